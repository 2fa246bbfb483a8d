"""The launches of one denoising step of a family size that differ in the code they are compiled to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ldmperf.kernels import OPERATORS, Chip, Launch

from ..machines import MACHINES, Machine
from ..options import DType
from ..step.call import OperatorCall
from ..step.calls import family_calls
from .compile import Specialization, specialization_of

SM_90 = MACHINES["sm_90"]
_OF_ARCH = ("attention", "linear")


def planned(operator: str, arguments: Mapping[str, Any], machine: Machine, config: Any = None) -> list[Launch]:
    """The launches of a call as they are planned for a chip that need not be there."""
    made = OPERATORS[operator]
    chip = Chip(machine.chip, machine.multiprocessors, machine.arch)
    # The others' configurations do not depend on the architecture: they are those of 132 multiprocessors.
    return made.plan(made.bind(**arguments), config=config, chip=chip if operator in _OF_ARCH else None)[1]


def family_launches(
    size: str, batch: int, dtype: DType, operator: str | None = None, machine: Machine = SM_90
) -> dict[Specialization, Launch]:
    """Those of a step of `size`, `batch` images in the model; of one operator or of all."""
    cases = family_calls(size, batch, dtype)
    return distinct_launches((case for case in cases if operator in (None, case.operator)), machine)


def distinct_launches(cases: Iterable[OperatorCall], machine: Machine = SM_90) -> dict[Specialization, Launch]:
    """The launches of calls, one of each specialization."""
    launches: dict[Specialization, Launch] = {}
    for case in cases:
        for launch in planned(case.operator, case.arguments("meta"), machine):
            launches.setdefault(specialization_of(launch, machine), launch)
    return launches


def tensor_bytes(launch: Launch) -> int:
    """The bytes of a launch's tensors, each counted once: the least that it can move."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(launch).values())


def tensors(launch: Launch) -> dict[str, torch.Tensor]:
    """The tensors among a launch's arguments."""
    return {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}


def product_passes(launch: Launch) -> int | None:
    """Passes of a program's loop in a matrix product, over tiles of columns or of channels; None for others."""
    arguments = launch.arguments
    if "GATED" not in arguments:
        return None
    tiles: int = arguments.get("tiles_n") or -(-arguments["channels"] // arguments["BLOCK_K"])
    return tiles
