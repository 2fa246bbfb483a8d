"""`out=`: results written where the caller says.

Beside `name(...) -> Tensor` an operator has the overload `name.out(..., Tensor(a!) result0) -> ()`. It launches
what the operator launches, on the caller's memory in place of new memory. Where the reference serves, its result
is copied. As with torch's `out=` there are no derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autocast
from ._checks import has_tangent
from ._launch import Operator
from ._recipes import ByLayout, Decide, Recipe, aliases_of, checked, recipe


@dataclass(frozen=True)
class _Layout:
    """What a result is, less its values."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    def is_of(self, x: Tensor) -> bool:
        """Whether x has it; the stride of a dimension of size one, and those of an empty tensor, do not matter."""
        if tuple(x.shape) != self.shape or x.dtype != self.dtype or x.device != self.device:
            return False
        if x.numel() == 0:
            return True
        pairs = zip(self.shape, self.stride, x.stride(), strict=True)
        return all(size == 1 or wanted == given for size, wanted, given in pairs)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {list(self.shape)} of strides {list(self.stride)} on {self.device}"


def _layout(x: Tensor) -> _Layout:
    return _Layout(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)


def _each(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _require(name: str, wanted: Sequence[_Layout], outs: Sequence[Tensor]) -> None:
    """ValueError for memory that is not as the operator would make it: it is never resized, nor filled by strides
    that the kernels do not write."""
    under = " under autocast" if torch._C._is_any_autocast_enabled() else ""
    for i, (layout, out) in enumerate(zip(wanted, outs, strict=True)):
        if not layout.is_of(out):
            which = "out" if len(outs) == 1 else f"out[{i}]"
            raise ValueError(f"{name}: {which} must be {layout}{under}; got {_layout(out)}")


@dataclass(frozen=True)
class _Apart:
    """Two arguments whose memory must lie apart, by number, and the bytes that each spans.

    may_coincide: the same memory, element for element, is right too.
    """

    result: int
    other: int
    result_bytes: int
    other_bytes: int
    may_coincide: bool


def _spanned(x: Tensor) -> Any:
    """Bytes from the first element to the end of the last."""
    if x.numel() == 0:
        return 0
    return (sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def _begin_in_storage(x: Tensor) -> Any:
    return x.storage_offset() * x.element_size()


class Out:
    """What an operator does with `out`: see `define_operator`, whose arguments these are.

    count     of results
    names     of the overload's arguments
    in_place  arguments that a result may overwrite: every element is read by the program that writes it, before
    """

    def __init__(
        self,
        library: torch.library.Library,
        qualified: str,
        schema: str,
        operator: Operator,
        *,
        bind: Callable[..., Any],
        reference: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        decide: Decide,
        autocast: Callable[..., Any],
        in_place: Sequence[str],
    ) -> None:
        signature, _, returns = schema.partition(" -> ")
        name, _, parameters = signature.partition("(")
        self.count = returns.count("Tensor")
        self._operator, self._bind, self._reference, self._fake = operator, bind, reference, fake
        self._decide, self._autocast, self._in_place = decide, autocast, in_place
        results = [f"Tensor({'ab'[i]}!) result{i}" for i in range(self.count)]
        library.define(f"{name}.out({', '.join([parameters.removesuffix(')'), *results])}) -> ()")
        library.impl(f"{name}.out", self._implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{qualified}.out", self._of_fakes, lib=library)
        namespace, _, _ = qualified.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name)
        self._operator_itself, self._overload = packet.default, packet.out
        self.names = [argument.name for argument in self._overload._schema.arguments]
        _autocast.register(library, f"{name}.out", self._overload, self._under_autocast)
        self._planned, self._layouts = ByLayout(self._plan), ByLayout(self._wanted)

    def __call__(self, arguments: tuple[Any, ...], out: Any) -> Any:
        """`out`, which now holds the result of the operator for these arguments, the backend last."""
        outs = self._taken(arguments, out)
        if torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
            _require(self._operator.name, self._wanted(*arguments), outs)
        self._overload(*arguments, *outs)
        return outs if self.count > 1 else outs[0]

    def checked(self, arguments: tuple[Any, ...], out: Any) -> None:
        """For who computes the results by other operators: every refusal of a call."""
        outs = self._taken(arguments, out)
        if torch.compiler.is_compiling():
            _require(self._operator.name, self._wanted(*arguments), outs)
        else:
            self._refuse_shared((*arguments, *outs), self._planned(*arguments, *outs)[1])

    def _taken(self, arguments: tuple[Any, ...], out: Any) -> tuple[Tensor, ...]:
        """The tensors to write. Refuses what none are, and whatever would differentiate."""
        name = self._operator.name
        outs = _each(out)
        if len(outs) != self.count or not all(isinstance(one, Tensor) for one in outs):
            wanted = "a tensor" if self.count == 1 else "a pair of tensors, one for each result"
            raise ValueError(f"{name}: out must be {wanted}; got {type(out).__name__}")
        given = (*arguments, *outs)
        forward_mode = forward_ad._current_level >= 0 and has_tangent(given)
        if forward_mode or torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{name}: out= has no derivatives and no batching: under torch.func and in forward mode call it "
                "without out="
            )
        if torch.is_grad_enabled():
            for argument, value in zip(self.names, given, strict=True):
                if isinstance(value, Tensor) and value.requires_grad:
                    which = "out" if argument.startswith("result") else argument
                    raise ValueError(
                        f"{name}: out= has no gradients, and {which} requires grad; call it in torch.no_grad() or "
                        "without out="
                    )
        return outs

    def _call(self, arguments: Sequence[Any]) -> Any:
        """The call of the operator's own arguments without the backend, checked."""
        return checked(self._operator, self._bind(*arguments))

    def _wanted(self, *arguments: Any) -> tuple[_Layout, ...]:
        """The layouts of the results, for the operator's own arguments."""
        return tuple(map(_layout, _each(self._fake(self._call(arguments[:-1])))))

    def _apart(self, arguments: Sequence[Any]) -> tuple[_Apart, ...]:
        found = []
        first = len(arguments) - self.count
        for number in range(first, len(arguments)):
            out = arguments[number]
            for other, value in enumerate(arguments[:number]):
                if isinstance(value, Tensor):
                    overwritten = self.names[other] in self._in_place and _layout(out).is_of(value)
                    found.append(_Apart(number, other, _spanned(out), _spanned(value), overwritten))
        return tuple(found)

    def _refuse_shared(
        self, arguments: Sequence[Any], pairs: Sequence[_Apart], begin: Callable[[Tensor], Any] = Tensor.data_ptr
    ) -> None:
        """ValueError for a result in memory that the kernels read: they run in any order."""
        for pair in pairs:
            a, b = begin(arguments[pair.result]), begin(arguments[pair.other])
            if a < b + pair.other_bytes and b < a + pair.result_bytes and not (pair.may_coincide and a == b):
                raise ValueError(
                    f"{self._operator.name}: out must not share memory with {self.names[pair.other]}; give it "
                    "memory of its own"
                )

    def _plan(self, *arguments: Any) -> tuple[Recipe | None, tuple[_Apart, ...]]:
        """What to launch, None where the reference serves, and what must lie apart."""
        aliases = aliases_of(arguments)
        outs = aliases[-self.count :]
        *given, backend = aliases[: -self.count]
        call = self._call(given)
        _require(self._operator.name, tuple(map(_layout, _each(self._fake(call)))), outs)
        planned = self._decide(self._operator, call, backend)
        return None if planned is None else recipe(aliases, *planned, outs=outs), self._apart(arguments)

    def _implementation(self, *arguments: Any) -> None:
        found, apart = self._planned(*arguments)
        self._refuse_shared(arguments, apart)
        outs = arguments[-self.count :]
        if found is None:
            results = _each(self._reference(self._bind(*arguments[: -self.count - 1])))
            for out, result in zip(outs, results, strict=True):
                out.copy_(result)
        else:
            found.run(arguments)
            # As every torch operator that writes: who saved it for a backward is told.
            torch.autograd.graph.increment_version(outs)

    def _of_fakes(self, *arguments: Any) -> None:
        """The same refusals for tensors without memory; those of one storage may share it."""
        outs = arguments[-self.count :]
        _require(self._operator.name, self._wanted(*arguments[: -self.count]), outs)
        storages = [v.untyped_storage()._cdata if isinstance(v, Tensor) else None for v in arguments]
        pairs = [p for p in self._apart(arguments) if storages[p.result] == storages[p.other]]
        self._refuse_shared(arguments, pairs, _begin_in_storage)

    def _under_autocast(self, run: Callable[..., Any], *arguments: Any) -> None:
        """Autocast's rule for the operator, whose results are `out` where it computes in their dtypes."""
        given, outs = arguments[: -self.count], arguments[-self.count :]

        def written(*cast: Any) -> Any:
            if all(layout.is_of(out) for layout, out in zip(self._layouts(*cast), outs, strict=True)):
                run(*cast, *outs)
                return outs if self.count > 1 else outs[0]
            with _autocast.excluded():
                return self._operator_itself(*cast)

        for out, result in zip(outs, _each(self._autocast(written, *given)), strict=True):
            if result is not out:
                _require(self._operator.name, [_layout(result)], [out])
                out.copy_(result)
