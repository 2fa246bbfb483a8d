"""The operators that a run calls, recorded without memory.

On the meta device shapes, strides and dtypes are computed as on a GPU, and nothing else is. Two things differ
there and are put right: a convolution forgets its channels-last layout, and a number cannot be read back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import OPERATORS, Launch, dependent_launches, dependent_launches_enabled

from .flops import flop_counter

# What a number that is read back is taken to be: any timestep or index but the last.
_READ_BACK = 500


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call that torch dispatched. Tensors are on the meta device, but for the host's own numbers, on the CPU.

    function    torch's operator, an overload
    arguments   by the names of its schema
    result      what it returned
    flops       two per multiply-add, by torch's formulas
    in_network  whether the network called it, and not the sampler
    dependent   whether its launches are asked to be dependent ones
    """

    function: Any
    arguments: Mapping[str, Any]
    result: Any
    flops: int
    in_network: bool
    dependent: bool = False

    @property
    def name(self) -> str:
        """namespace::name, without overload: aten::add_, ldmperf::geglu."""
        name: str = self.function._schema.name
        return name

    @property
    def operator(self) -> str | None:
        """Which of `OPERATORS` it is, or a part of: add_layer_norm is one of layer_norm. None of torch's own."""
        return operator_of(self.function)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of our operator's public function, in its order and without the backend."""
        assert self.operator is not None
        names = inspect.signature(OPERATORS[self.operator].call).parameters
        given = {name: self.arguments[name] for name in names if name in self.arguments and name != "backend"}
        return {**given, "float8": True} if "::float8_" in self.name else given

    @property
    def launches(self) -> list[Launch]:
        """What our operator plans for it."""
        assert self.operator is not None
        operator = OPERATORS[self.operator]
        with dependent_launches(self.dependent):
            launches: list[Launch] = operator.plan(operator.bind(**self.given))[1]
        return launches

    @property
    def results(self) -> tuple[Tensor, ...]:
        """The tensors that it returned."""
        return tuple(_tensors([self.result]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The distinct tensors among the arguments that are in device memory."""
        found = {id(tensor): tensor for tensor in _tensors(self.arguments.values()) if tensor.is_meta}
        return tuple(found.values())

    @property
    def is_view(self) -> bool:
        """Whether the results are arguments seen another way."""
        return returns_views(self.function)


@functools.cache
def returns_views(function: Any) -> bool:
    """Whether an overload returns its arguments seen another way, by its schema."""
    aliases = [value.alias_info for value in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


@functools.cache
def operator_of(function: Any) -> str | None:
    """Which of `OPERATORS` an overload is, or a part of.

    In any namespace but torch's, as a copy or a second load of our kernels has its own.
    """
    if function.namespace == "aten":
        return None
    name = function._schema.name.partition("::")[2]
    return next((known for known in OPERATORS if name == known or name.endswith(f"_{known}")), None)


class Recorder(TorchDispatchMode):
    """Notes in `calls` every call that reads or writes device memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[RecordedCall] = []
        self._in_network = False
        self._formulas = flop_counter().flop_registry

    @contextmanager
    def network(self) -> Iterator[None]:
        """What is called inside belongs to the network."""
        self._in_network = True
        try:
            yield
        finally:
            self._in_network = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._result(func, args, kwargs)
        names = (argument.name for argument in func._schema.arguments)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if any(tensor.is_meta for tensor in _tensors([*arguments.values(), result])):
            formula = self._formulas.get(func.overloadpacket)
            flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
            dependent = dependent_launches_enabled()
            self.calls.append(RecordedCall(func, arguments, result, flops, self._in_network, dependent))
        return result

    def _result(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a GPU would return."""
        aten = torch.ops.aten
        if func is aten.addmm_.default:
            # On meta it takes milliseconds, and changes nothing.
            return args[0]
        if func.overloadpacket is aten._local_scalar_dense and args[0].is_meta:
            return True if args[0].dtype == torch.bool else _READ_BACK
        result = func(*args, **kwargs)
        # In inference mode conv2d comes whole. cuDNN's layout is channels-last as soon as the input's or the
        # weight's is.
        if func.overloadpacket in (aten.convolution, aten.conv2d) and any(_channels_last(x) for x in args[:2]):
            result = result.contiguous(memory_format=torch.channels_last)
        return result


def calls_of_ours(run: Callable[[], Any]) -> list[RecordedCall]:
    """The calls of our operators that `run` makes on "meta" tensors."""
    with Recorder() as recorder:
        run()
    return [call for call in recorder.calls if call.operator is not None]


def _channels_last(x: Tensor) -> bool:
    """Whether cuDNN takes an image or weight for channels-last: by its strides, which alone tell it of 1x1."""
    return x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
