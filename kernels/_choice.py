"""What "auto" takes of an operator that merges what others compute one after the other.

It is asked outside the operator, so that what is chosen is seen by whoever traces: one operator, or several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from ._dispatch import choose_backend
from ._launch import Chip, Operator, chip_of, constant_to_a_compiler, fastest
from ._recipes import ByLayout, checked
from ._triton import of_layout

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


class Choice:
    """Who serves calls of an operator: its kernels ("triton"), or what it merges, one after the other ("torch").

    operator  a call's first argument has its device and its dtype
    kernel    what it launches
    chosen    what `chooser` made of it
    numbers   of a call, those that `chosen` takes
    sizes     of a call, those that may vary: where a compiler leaves one open, "auto" is torch
    """

    def __init__(
        self,
        operator: Operator,
        kernel: Any,
        chosen: Callable[..., Chosen],
        numbers: Callable[[Any], Sequence[Any]],
        sizes: Callable[[Any], Sequence[int]],
    ) -> None:
        self._operator, self._kernel = operator, kernel
        self._chosen, self._numbers, self._sizes = chosen, numbers, sizes
        # Kept by layout where nothing traces.
        self._auto_by_layout, self._able_by_layout = ByLayout(self._auto), ByLayout(self._able)

    def auto(self, call: Any) -> Chosen:
        """What "auto" takes."""
        return self._auto(*call) if torch.compiler.is_compiling() else self._auto_by_layout(*call)

    def of(self, call: Any, backend: str, *, able: bool = True) -> Chosen:
        """Who serves on `backend`: "auto" as of `auto`, "triton" the kernels where they can serve.

        Without `able` they cannot, for a reason that the call does not show. ValueError for an unknown backend.
        """
        choose_backend(self._operator.name, backend, ())
        if backend == "torch" or not able:
            return "torch"
        if backend == "auto":
            return self.auto(call)
        return self._able(*call) if torch.compiler.is_compiling() else self._able_by_layout(*call)

    def _reasons(self, call: Any) -> list[str]:
        return of_layout(self._operator.unsupported_reasons(call), self._kernel, call[0])

    def _able(self, *arguments: Any) -> Chosen:
        return "torch" if self._reasons(checked(self._operator, self._operator.bind(*arguments))) else "triton"

    def _auto(self, *arguments: Any) -> Chosen:
        call = checked(self._operator, self._operator.bind(*arguments))
        if is_open(*self._sizes(call)):
            return "torch"
        return self._chosen(tuple(self._reasons(call)), call[0].device, call[0].dtype, *self._numbers(call))
