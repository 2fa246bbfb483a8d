"""What a call launches, planned once for each layout of its tensors: a repeated call only fills in their pointers.

What is wrong with a call, reasons against the kernels, the configuration and the launches' arguments follow from
shapes, strides, dtypes and the device, never from values. Planning takes tens of microseconds, hundreds where a
configuration is searched for, and a small UNet waits for the host. A plan is made once with aliases of a call's
tensors. Kept are its launches without tensors, which of its tensors go where, and each launch's compiled kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from . import _dependent, _launch
from ._checks import one_device
from ._dispatch import choose_backend
from ._launch import Launch, Operator
from ._triton import debugs

T = TypeVar("T")
# Layouts that an operator keeps. A step of the family has less than forty for each; the oldest go first.
MOST = 1024
# Triton compiles one kernel for pointers that are multiples of it, and another for those that are not.
ALIGNMENT = 16
_HOST = torch.device("cpu")
_PLAIN = frozenset((type(None), bool, int, float, str))


def layout(arguments: Sequence[Any]) -> Hashable:
    """What a plan may see of a call: shape, strides, dtype and device of a tensor, anything else as it is.

    Python takes 1, 1.0 and True for one key, and 0.0 and -0.0: harmless, as schemas fix each argument's type.
    """
    # What else a plan reads: the table of tuned configurations, which chip stands for none, and whether launches
    # are to be dependent.
    chip = _launch.chip_of(_HOST)
    key: list[Hashable] = [
        _launch.TUNED_FOLDER,
        None if chip is _launch.NO_GPU else chip,
        _dependent.dependent_launches_enabled(),
    ]
    for value in arguments:
        # Tensor's isinstance takes three times as long for what is none.
        if type(value) in _PLAIN:
            key.append(value)
        elif isinstance(value, Tensor):
            key += (value.shape, value.stride(), value.dtype, value.device)
        else:
            key.append(tuple(value) if isinstance(value, list) else value)
    return tuple(key)


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
        key = layout(arguments)
        try:
            return self._found[key]
        except KeyError:
            pass
        except TypeError:
            # Sizes are symbols while a tracer runs, and no keys.
            return self._function(*arguments)
        made = self._function(*arguments)
        if len(self._found) >= MOST:
            # Another thread may add to it meanwhile.
            with contextlib.suppress(RuntimeError, StopIteration):
                self._found.pop(next(iter(self._found)), None)
        self._found[key] = made
        return made

    @staticmethod
    def forget() -> None:
        """Clears the kept plans and the tuned tables. Call it after a change to what plans read."""
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
class _BoundLaunch:
    """A launch: `values` in the order of the kernel's parameters, and which of them are which tensors.

    compiled: by triton's debug setting, what launches the kernel that its binder found for aligned pointers. The
    binder would take longer to find that kernel again than all else of a call takes. Of triton's other
    settings those of the first launch hold.
    """

    kernel: Any
    programs: int
    values: tuple[Any, ...]
    tensors: tuple[tuple[int, int], ...]
    options: dict[str, int]
    compiled: dict[bool | None, Callable[..., None]] = field(default_factory=dict)

    def run(self, tensors: Sequence[Any]) -> None:
        """Launches with the tensors of these numbers, on the current device and stream."""
        values = list(self.values)
        pointers = 0
        for place, number in self.tensors:
            tensor = values[place] = tensors[number]
            pointers |= tensor.data_ptr()
        debug = debugs() if pointers % ALIGNMENT == 0 else None
        if (launch := self.compiled.get(debug)) is not None and not self.kernel.pre_run_hooks:
            launch(*values)
            return
        kernel = self.kernel[(self.programs,)](*values, **self.options)
        # The interpreter compiles nothing. On AMD a kernel depends on the size of its tensors' memory too.
        if debug is not None and kernel is not None and torch.version.hip is None:
            self.compiled[debug] = kernel[(self.programs, 1, 1)]


@dataclass(frozen=True)
class Recipe:
    """The launches of a call without its tensors. Tensors are numbered: first the arguments, then what is made."""

    device: torch.device
    made: tuple[_Memory, ...]
    launches: tuple[_BoundLaunch, ...]
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
        for launch in self.launches:
            launch.run(tensors)


Planned = tuple[Any, list[Launch]]
Decide = Callable[[Operator, Any, str], Planned | None]


def checked(operator: Operator, call: Any) -> Any:
    """The call. ValueError where it does not fit its operator, or its tensors are on several devices."""
    operator.check(call)
    one_device(operator.name, call)
    return call


def plan_or_none(operator: Operator, call: Any, backend: str, fastest: Any = None) -> Planned | None:
    """The plan of a call, None where torch serves it; `fastest` as `choose_backend` takes it."""
    reasons = [] if backend == "torch" else operator.unsupported_reasons(call)
    if choose_backend(operator.name, backend, reasons, fastest) == "torch":
        return None
    return operator.plan(call)


def aliases_of(arguments: Sequence[Any]) -> list[Any]:
    """The arguments, tensors as aliases: one tensor may be two arguments of a call, and two of the next."""
    return [value.detach() if isinstance(value, Tensor) else value for value in arguments]


def implementation_of(
    operator: Operator, bind: Callable[..., Any], reference: Callable[[Any], Any], decide: Decide = plan_or_none
) -> tuple[Callable[..., Any], Callable[..., bool]]:
    """(the implementation of an operator: what `decide` plans, or `reference` where that is None; whether it is).

    Both take the operator's arguments by position, the backend last, of which `bind` makes the call without it.
    What is wrong with a call and what is planned for it are asked once for each layout.
    """

    @ByLayout
    def recipe_of(*arguments: Any) -> Recipe | None:
        aliases = aliases_of(arguments)
        planned = decide(operator, checked(operator, bind(*aliases[:-1])), arguments[-1])
        return None if planned is None else recipe(aliases, *planned)

    def implementation(*arguments: Any) -> Any:
        found = recipe_of(*arguments)
        return reference(bind(*arguments[:-1])) if found is None else found.run(arguments)

    return implementation, lambda *arguments: recipe_of(*arguments) is None


def recipe(
    aliases: Sequence[Any], result: Any, launches: Sequence[Launch], *, outs: Sequence[Tensor] = ()
) -> Recipe:
    """What a plan for these arguments launches, without its tensors; no tensor may be two arguments.

    `outs`, the last of the arguments, are written in place of the plan's results.
    """
    given = [value for value in aliases if isinstance(value, Tensor)]
    known_memory = {value.untyped_storage()._cdata for value in given}
    numbers = {id(value): number for number, value in enumerate(aliases) if isinstance(value, Tensor)}
    made: list[Tensor] = []
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    for number, planned in enumerate(results[: len(outs)], start=len(aliases) - len(outs)):
        numbers[id(planned)] = number

    def number_of(tensor: Tensor) -> int:
        if id(tensor) not in numbers:
            if tensor.untyped_storage()._cdata in known_memory:
                raise AssertionError("a plan may launch on its arguments and on new memory, on no view of either")
            numbers[id(tensor)] = len(aliases) + len(made)
            known_memory.add(tensor.untyped_storage()._cdata)
            made.append(tensor)
        return numbers[id(tensor)]

    numbered: int | tuple[int, ...] | None = None
    if result is not None:
        numbered = number_of(result) if isinstance(result, Tensor) else tuple(map(number_of, result))
    bound = []
    for launch in launches:
        if not launch.programs:
            continue
        values = [launch.arguments[name] for name in launch.kernel.arg_names]
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        bound.append(
            _BoundLaunch(
                launch.kernel,
                launch.programs,
                tuple(None if isinstance(value, Tensor) else value for value in values),
                tuple((place, number_of(values[place])) for place in places),
                launch.options,
            )
        )
    return Recipe(
        given[0].device,
        tuple(_Memory(tuple(t.shape), t.stride(), t.dtype) for t in made),
        tuple(bound),
        numbered,
    )
