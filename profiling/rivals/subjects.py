"""What `ldmperf profile` can measure: the rivals as a subject, beside the family and pipelines."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..measure.outcomes import Unsupported
from ..pipelines.pipeline_subject import PipelineSubject
from ..trajectory.backend import Backend, Subject
from ..trajectory.case import Case, Task
from ..trajectory.network import FAMILY_SUBJECTS
from .rival_backends import rival_backends
from .rival_problem import RivalProblem, counted_gflop, kind_of, single


class RivalSubject:
    """Generators of other kinds, by the names of `RIVALS` and `DECODERS`; a `Subject`."""

    @property
    def backends(self) -> Mapping[str, Backend]:
        return rival_backends()

    def identity(self, case: Case) -> tuple[object, ...]:
        # A GAN has blocks for its image's size.
        return case.unet, case.dtype, case.device, case.seed, case.latent_height, case.latent_width

    def network(self, case: Case) -> nn.Module:
        kind, dtype = kind_of(case), getattr(torch, case.dtype)
        with torch.device("meta"):
            network = kind.network(case)
        network = network.to(dtype).to_empty(device=case.device)
        kind.initialize(network, case.seed)
        return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload,no-any-return]

    def problem(self, case: Case, network: nn.Module) -> RivalProblem:
        return RivalProblem(case, kind_of(case), network)

    def gflop(self, case: Case) -> float | None:
        try:
            return counted_gflop(kind_of(case), single(case))
        except Unsupported:
            return None


def all_subjects() -> Mapping[Task, Subject]:
    """What `ldmperf profile` can measure, by task: the family, its rivals, and whole pipelines."""
    return {**FAMILY_SUBJECTS, "rival": RivalSubject(), "pipeline": PipelineSubject()}
