"""Is a trajectory's result right? The reference, the error and its tolerance."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..measure.environment import Environment
from ..measure.error import relative_rms
from ..measure.outcomes import Unsupported
from ..measure.store import write_whole
from ..measure.timing import timed
from ..options import DType
from .backend import Backend, Coarse, Problem

# Relative RMS error of the final latents that passes. Right implementations differ by rounding alone: over guided
# DDIM trajectories of the 39M network by 5e-6 in float32, 4e-3 in float16, 4e-2 in bfloat16. Guidance that is 1 %
# off gives 7e-3, another prompt 1. bfloat16 thus catches only what is plainly wrong; finer faults show in float32.
TOLERANCES: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# Rounding grows with the network, and is not measured beyond 39M. So in a half dtype an error also passes that is
# at most this many times the other implementation's. diffusers rounds its latents to the dtype after each step,
# ours stay float32: on a small network its error is 1.1 to 3.5 times ours, more with more steps.
ROUNDING_FACTOR = 1.5
DIFFUSERS_ROUNDING_FACTOR = 4.0
# Of float8 matmuls, whose operands have 3 bits of mantissa where bfloat16 has 7. Guided trajectories of the 39M
# network on a CPU (20 steps of dpmpp_2m, 20 and 50 of ddim) end 0.05 to 0.06 off float32 where all levels but the
# first are quantized, 0.07 to 0.11 where all are; in bfloat16 0.014 to 0.025. This is twice the largest of them.
# Guidance that is 10 % off would pass, another prompt would not. Larger networks are not measured.
FLOAT8_TOLERANCE = 0.2
# No error above this passes, whatever the yardstick (another prompt gives 1).
LARGEST_TOLERANCE = 0.5
# Another input rounds otherwise than the check's, so in a timed round this many times the tolerance passes.
ROUND_FACTOR = 2.0


@dataclass(frozen=True)
class Reference:
    """Final latents to compare with, the name of what made them, its time in ms (None where no run was needed)."""

    name: str
    latents: Tensor
    ms: float | None


def tolerances(
    dtype: DType,
    implementations: Mapping[str, str],
    errors: Mapping[str, float],
    references: Mapping[str, Reference],
    own: Mapping[str, float],
) -> dict[str, float]:
    """The relative RMS error that passes, for each backend of a group: the dtype's own, or what rounding explains.

    own: of backends that round more than the dtype does (`own_tolerance`), which are yardsticks for no other.

    By backend: `implementations`, whose code it is; `errors` of the first calls; `references` of these errors. In
    a half dtype an error also passes that is at most a factor times the other implementation's: that of its plain
    eager backend, else its least. This yardstick has to pass itself, and the float32 references of the two have to
    agree as float32 results must: then both compute the same thing, and a half dtype adds rounding alone. Two
    implementations that disagree do not excuse each other.
    """
    fixed = TOLERANCES[dtype]
    if dtype == "float32":
        return {name: own.get(name, fixed) for name in errors}

    def tolerance(name: str, yardsticks: Collection[str]) -> float:
        if name in own:
            return own[name]
        others = [other for other in yardsticks if implementations[other] != implementations[name]]
        others = [other for other in others if other == implementations[other]] or others
        if not others:
            return fixed
        other = min(others, key=lambda other: errors[other])
        # Each one's reference is the other implementation's float32 result.
        if not relative_rms(references[name].latents, references[other].latents) <= TOLERANCES["float32"]:
            return fixed
        is_peer = implementations[name] in ("diffusers", "pipe")
        factor = DIFFUSERS_ROUNDING_FACTOR if is_peer else ROUNDING_FACTOR
        return max(fixed, min(factor * errors[other], LARGEST_TOLERANCE))

    # Neither a NaN nor more than any tolerance passes, nor says how much is rounding.
    passing = {name for name, error in errors.items() if error <= LARGEST_TOLERANCE and name not in own}
    while True:
        found = {name: tolerance(name, passing) for name in errors}
        still = {name for name in passing if errors[name] <= found[name]}
        if still == passing:
            return found
        passing = still


def own_tolerance(backend: Backend) -> float | None:
    """The tolerance of a backend that rounds more than its case's dtype does; None for the dtype's."""
    return backend.tolerance if isinstance(backend, Coarse) else None


def round_tolerance(*tolerances: float) -> float:
    """What passes in a timed round, for a result with one tolerance against a reference, or two with theirs."""
    return min(ROUND_FACTOR * sum(tolerances) / len(tolerances), LARGEST_TOLERANCE)


class References:
    """Float32 references, each computed once a profile, or once for all profiles that share a folder.

    folder: where references of the family are kept, or None. code: what the result depends on beside the case, as
    text (commit, versions, device). With None (changed files) nothing is kept on disk.
    """

    def __init__(self, folder: Path | None = None, code: str | None = None) -> None:
        self._folder = folder if code is not None else None
        self._code = code
        self._known: dict[str, Reference] = {}
        self._wide: tuple[torch.nn.Module, torch.nn.Module] | None = None

    def get(self, problem: Problem, implementation: str, backends: Mapping[str, Backend]) -> Reference:
        """The result of the check's inputs by the first of the problem's `references` that can be run here.

        Weights and inputs are the case's, rounded to its dtype and then widened: the error is the arithmetic's. A
        reference that was kept has no time.
        """
        key = f"{problem.case.group_key} beside={implementation}"
        if key not in self._known:
            # A checkpoint's file may have changed.
            path = None if self._folder is None or problem.case.is_checkpoint else self._path(key)
            found = None if path is None else self._read(path, key)
            if found is None:
                found = self._compute(
                    problem, problem.references(implementation), backends, problem.check_inputs()
                )
                if path is not None:
                    self._write(path, key, found)
            self._known[key] = found
            return found
        return replace(self._known[key], ms=None)

    def of_round(
        self, problem: Problem, implementation: str, backends: Mapping[str, Backend], inputs: Any
    ) -> Reference | None:
        """The reference of a timed round, whose inputs are random: computed anew, and not kept.

        None where nobody else can know what a stochastic trajectory draws.
        """
        wanted = problem.references(implementation, of_round=True)
        return self._compute(problem, wanted, backends, problem.as_drawn(inputs)) if wanted else None

    def release(self) -> None:
        """Frees the float32 network, which serves the references of one group.

        It may be twice as large as the measured network, and would count in its peak memory.
        """
        self._wide = None

    def _compute(
        self,
        problem: Problem,
        wanted: Sequence[tuple[str, torch.dtype]],
        backends: Mapping[str, Backend],
        inputs: Any,
    ) -> Reference:
        """By the first of the wanted backends that is there."""
        *others, last = wanted
        for name, dtype in others:
            try:
                return self._run(problem, name, dtype, backends, inputs)
            except Unsupported:
                continue
        return self._run(problem, *last, backends, inputs)

    def _run(
        self, problem: Problem, name: str, dtype: torch.dtype, backends: Mapping[str, Backend], inputs: Any
    ) -> Reference:
        trajectory = backends[name].build(problem.with_network(self._widened(problem.network, dtype)))
        wide = inputs.to(dtype)
        result = timed(lambda: trajectory(wide), torch.device(problem.case.device))
        return Reference(
            f"{name} {str(dtype).removeprefix('torch.')}", result.value.double().cpu(), result.wall_ms
        )

    def _widened(self, network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        if next(network.parameters()).dtype == dtype:
            return network
        if self._wide is None or self._wide[0] is not network or next(self._wide[1].parameters()).dtype != dtype:
            self._wide = None
            self._wide = (network, copy.deepcopy(network).to(dtype))
        return self._wide[1]

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(f"{key} {self._code}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"

    def _read(self, path: Path, key: str) -> Reference | None:
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                if (told.get("key"), told.get("code")) != (key, self._code):
                    return None
                return Reference(told["name"], file.get_tensor("latents"), None)
        except (OSError, SafetensorError):
            # None yet, or torn: it is computed anew.
            return None

    def _write(self, path: Path, key: str, reference: Reference) -> None:
        told = {"key": key, "code": str(self._code), "name": reference.name}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, save({"latents": reference.latents.contiguous()}, metadata=told))
        except OSError as failure:
            # A folder that others share may be theirs to write.
            warnings.warn(f"{path.parent}: no reference can be kept ({failure.strerror})", stacklevel=2)


def code_identity(environment: Environment) -> str | None:
    """What a reference depends on beside its case, as text; None where files of the checkout have changed."""
    if environment.git_commit is None or environment.git_dirty:
        return None
    gpu = None if environment.gpu is None else environment.gpu.name
    versions = (environment.torch, environment.diffusers, environment.cudnn)
    return json.dumps((environment.git_commit, *versions, gpu, environment.cpu))
