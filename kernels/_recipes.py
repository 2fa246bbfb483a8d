"""What a call launches, planned once for each layout of its tensors: a repeated call only fills in their pointers.

Reasons, the configuration and the launches' arguments follow from shapes, strides, dtypes and the device, never
from values. Planning takes tens of microseconds, hundreds where a configuration is searched for, and a small UNet
waits for the host. A plan is taken once with aliases of a call's tensors; of its launches the places of those
aliases, and of the memory that the plan made, are kept, and no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from . import _launch
from ._checks import one_device
from ._launch import Launch

T = TypeVar("T")
# Layouts that an operator keeps. A step of the family has less than forty for each; the oldest go first.
MOST = 1024
_HOST = torch.device("cpu")


def layout(value: Any) -> Hashable:
    """What a plan may see of an argument: shape, strides, dtype and device of a tensor, anything else as it is.

    Python takes 1, 1.0 and True for one key, and 0.0 and -0.0: harmless, as schemas fix each argument's type.
    """
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(value) if isinstance(value, list) else value


class ByLayout(Generic[T]):
    """`function`, which may look at the layouts of its arguments only, computed once for each.

    Arguments are positional. What `function` raises is raised, and not kept.
    """

    _all: ClassVar[list[ByLayout[Any]]] = []

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._found: dict[Hashable, T] = {}
        ByLayout._all.append(self)

    def __call__(self, *arguments: Any) -> T:
        # What else a plan reads: the table of tuned configurations, and which chip stands for none.
        key = (_launch.TUNED_FOLDER, _launch.chip_of(_HOST), *map(layout, arguments))
        try:
            return self._found[key]
        except KeyError:
            pass
        except TypeError:
            # Sizes are symbols while a tracer runs, and no keys.
            return self._function(*arguments)
        made = self._function(*arguments)
        if len(self._found) >= MOST:
            self._found.pop(next(iter(self._found)), None)
        self._found[key] = made
        return made

    @staticmethod
    def forget() -> None:
        """Forgets all, of every operator, and the tuned tables: for who changes what plans depend on."""
        _launch._table.cache_clear()
        for one in ByLayout._all:
            one._found.clear()


@dataclass(frozen=True)
class _Memory:
    """An uninitialized tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Step:
    """A launch: `values` in the order of the kernel's parameters, and which of them are which tensors."""

    launch: Callable[..., None]
    values: tuple[Any, ...]
    tensors: tuple[tuple[int, int], ...]
    options: dict[str, int]


@dataclass(frozen=True)
class Recipe:
    """The launches of a call without its tensors. Tensors are numbered: first the arguments, then what is made."""

    device: torch.device
    made: tuple[_Memory, ...]
    steps: tuple[_Step, ...]
    result: int | tuple[int, ...] | None

    def run(self, arguments: Sequence[Any]) -> Any:
        """The result of launching with these arguments, on the current stream of their device."""
        device = self.device
        tensors = self.tensors(arguments)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(tensors)
        else:
            self.launch(tensors)
        if isinstance(self.result, tuple):
            return tuple([tensors[number] for number in self.result])
        return None if self.result is None else tensors[self.result]

    def tensors(self, arguments: Sequence[Any]) -> list[Any]:
        """By number: the arguments, and new memory."""
        made = [torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device=self.device) for m in self.made]
        return [*arguments, *made]

    def launch(self, tensors: Sequence[Any]) -> None:
        """Launches with the tensors of these numbers, on the current device and stream."""
        for step in self.steps:
            values = list(step.values)
            for place, number in step.tensors:
                values[place] = tensors[number]
            step.launch(*values, **step.options)


Planned = tuple[Any, list[Launch]]


def served(name: str, decided: Callable[..., Planned | None], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of operator `name`: what `decided` plans, or `reference` where that is None.

    Both take the operator's arguments by position; `decided` is asked once for each layout of them.
    """

    @ByLayout
    def recipe_of(*arguments: Any) -> Recipe | None:
        one_device(name, arguments)
        # One tensor may be two arguments of a call, and two of the next: aliases tell which is which.
        aliases = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
        planned = decided(*aliases)
        return None if planned is None else recipe(aliases, *planned)

    def implementation(*arguments: Any) -> Any:
        found = recipe_of(*arguments)
        return reference(*arguments) if found is None else found.run(arguments)

    return implementation


def recipe(aliases: Sequence[Any], result: Any, launches: Sequence[Launch]) -> Recipe:
    """What a plan for these arguments launches, without its tensors; no tensor may be two arguments."""
    given = [value for value in aliases if isinstance(value, Tensor)]
    memory_of_arguments = {value.untyped_storage()._cdata for value in given}
    numbers = {id(value): number for number, value in enumerate(aliases) if isinstance(value, Tensor)}
    made: list[Tensor] = []

    def number_of(tensor: Tensor) -> int:
        if id(tensor) not in numbers:
            if tensor.untyped_storage()._cdata in memory_of_arguments:
                raise AssertionError("a plan may launch on its arguments and on new memory, on no view of either")
            numbers[id(tensor)] = len(aliases) + len(made)
            memory_of_arguments.add(tensor.untyped_storage()._cdata)
            made.append(tensor)
        return numbers[id(tensor)]

    numbered: int | tuple[int, ...] | None = None
    if result is not None:
        numbered = number_of(result) if isinstance(result, Tensor) else tuple(map(number_of, result))
    steps = []
    for launch in launches:
        if not launch.programs:
            continue
        values = [launch.arguments[name] for name in launch.kernel.arg_names]
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        steps.append(
            _Step(
                launch.kernel[(launch.programs,)],
                tuple(None if isinstance(value, Tensor) else value for value in values),
                tuple((place, number_of(values[place])) for place in places),
                {"num_warps": launch.num_warps, "num_stages": launch.num_stages},
            )
        )
    return Recipe(
        given[0].device,
        tuple(_Memory(tuple(t.shape), t.stride(), t.dtype) for t in made),
        tuple(steps),
        numbered,
    )
