"""What "auto" takes of an operator that merges what others compute one after the other.

It is asked outside the operator, so that what is chosen is seen by whoever traces: one operator, or several. Its
function `_auto` computes it from a call, and is kept by layout where nothing traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

from ._dispatch import choose_backend
from ._launch import Chip, chip_of, constant_to_a_compiler, fastest
from ._recipes import ByLayout

Chosen = Literal["torch", "triton"]
Shape = TypeVar("Shape")


def chooser(
    operator: str,
    shape_of: Callable[..., Shape],
    predicted_to_gain: Callable[[Shape, Chip], bool],
    key: Callable[[Shape, torch.dtype], str],
    *,
    tells: bool = False,
) -> Callable[..., Chosen]:
    """chosen(reasons, device, dtype, *numbers): what was measured for shape_of(*numbers), else what is predicted.

    A compiler that traces is told, from plain numbers, and does not look inside. Where there are `reasons` against
    the kernels it is torch. A log tells of that as a fall back only with `tells`: where others than the torch
    references serve every call, some of them faster, it is none.
    """

    @constant_to_a_compiler
    def chosen(reasons: tuple[str, ...], device: torch.device, dtype: torch.dtype, *numbers: Any) -> Chosen:
        if reasons and not tells:
            return "torch"
        chip, shape = chip_of(device), shape_of(*numbers)

        def measured() -> Chosen:
            unmeasured: Chosen = "triton" if predicted_to_gain(shape, chip) else "torch"
            return fastest(operator, chip, lambda: key(shape, dtype), unmeasured=unmeasured)

        return choose_backend(operator, "auto", reasons, measured)

    return chosen


def is_open(*sizes: int) -> bool:
    """Whether a compiler traces and does not know all of these sizes: one graph for all of them, so that no
    measurement of one decides."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(size) for size in sizes)


def asked(choice: Callable[..., Chosen], by_layout: ByLayout[Chosen], call: Any) -> Chosen:
    """choice(*call), kept in `by_layout` where nothing traces."""
    return (choice if torch.compiler.is_compiling() else by_layout)(*call)
