"""Pipelines as a subject of `ldmperf profile`."""

from __future__ import annotations

from collections.abc import Mapping

from ldmperf.samplers import NoiseSchedule, make_plan

from ..measure.outcomes import Unsupported
from ..peer import SCHEDULER_CONFIG
from ..trajectory.backend import Backend
from ..trajectory.case import Case
from .components import Components
from .pipeline_backends import pipeline_backends
from .pipeline_problem import PipelineProblem, unet_gflop

FEWEST_TOKENS = 3


class PipelineSubject:
    """Pipelines with random weights in the shapes of `PIPELINES`; a `Subject`."""

    @property
    def backends(self) -> Mapping[str, Backend]:
        return pipeline_backends()

    def identity(self, case: Case) -> tuple[object, ...]:
        # A text encoder has a position for each token.
        return case.task, case.unet, case.dtype, case.device, case.seed, case.context_tokens

    def network(self, case: Case) -> Components:
        return Components(case)

    def problem(self, case: Case, network: Components) -> PipelineProblem:
        if case.context_tokens < FEWEST_TOKENS:
            # With fewer every prompt is the empty one, and a call that ignored it would pass the check.
            raise Unsupported(f"a prompt needs a start, a word and an end: give --tokens {FEWEST_TOKENS} at least")
        try:
            plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
        except ValueError as refusal:
            raise Unsupported(str(refusal)) from None
        if plan.stochastic:
            raise Unsupported(f"pipelines are measured without noise at their steps; {case.sampler} draws some")
        return PipelineProblem(case, network, plan)

    def gflop(self, case: Case) -> float | None:
        try:
            return unet_gflop(case)
        except Unsupported:
            return None
