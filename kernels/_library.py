"""Registration with torch.library: one dispatcher entry per operator, with its fake, its gradient and its FLOPs.

`torch.library.custom_op` would do the same; the plain `Library` adds less host time to a call, and a small UNet
waits for the host.

Derivatives are those of the reference. In plain reverse mode the operator runs, and in its backward a formula
(`Formula`), or the reference again under autograd where there is none. Where forward mode or torch.func
differentiates, the reference runs instead of the operator.
"""

import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import _autocast
from ._checks import has_tangent
from ._dispatch import choose_backend
from ._launch import Operator
from ._namespace import NAMESPACE
from ._out import Out
from ._recipes import Decide, checked, implementation_of, plan_or_none

_KEPT = -1
# Where nothing traces and no subclass of Tensor wants to see what is called.
_PLAIN_KEYS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
# The dtypes that references compute in.
_COMPUTED = (torch.float32, torch.float64)
# By operator: for who measures what the dispatcher adds to them.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
# By operator with results: what it does with `out`.
OUTS: dict[str, Out] = {}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics, sums and transcendental functions of `x` are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor in this dtype, None for None. `to` alone would pass through the dispatcher for nothing."""
    return value if value is None or value.dtype == dtype else value.to(dtype)


class Formula(NamedTuple):
    """First derivatives of a reference for less than recomputing it under autograd costs.

    gradients  (call, kept, grads, needed) -> the gradients by argument, those that are `needed` at least; None for
               a call that it has no formula of. `grads` are the results'. In the call an argument that is `spared`
               has a shape, a dtype and a device, and no values. It calls torch's operators alone, which a compiler
               may trace.
    keeping    call -> (the reference's result, what `gradients` then finds as `kept`), or None: in place of the
               reference where torch serves and nothing traces. `kept` is () otherwise, as of a kernel.

    Without `keeping`, where torch serves float32 or float64 and nothing traces, the reference runs under ordinary
    autograd: no Python in the backward, and what torch's own operators keep is kept. In half dtypes that would be
    float32 copies.
    """

    gradients: Callable[
        [Any, Sequence[Tensor], Sequence[Tensor], Container[str]], Mapping[str, Tensor | None] | None
    ]
    keeping: Callable[[Any], tuple[Any, tuple[Tensor, ...]] | None] | None = None


def define_operator(
    schema: str,
    operator: Operator,
    *,
    reference: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    bind: Callable[..., Any] | None = None,
    decide: Decide = plan_or_none,
    autocast: Callable[..., Any] = _autocast.unchanged,
    differentiable: bool = True,
    formula: Formula | None = None,
    composite: Callable[[Any], Any] | None = None,
    flops: Callable[..., int] | None = None,
    in_place: Sequence[str] = (),
    spared: Mapping[str, int | None] | None = None,
) -> Callable[..., Any]:
    """Register `name(arguments) -> returns`, whose last argument is the backend, and return the callable.

    `bind` makes a call of the arguments without the backend: the operator's own unless given. `reference` computes
    a call, and its derivatives are the operator's if it is `differentiable`; `formula` has its first ones, and
    `composite` stands for a reference that has no forward mode or no second derivative. `fake` gives the outputs'
    shapes, dtypes and strides; `decide` is as in `implementation_of`, `autocast` the rule there (see
    `_autocast.register`). `flops` counts from the arguments' shapes (see
    `torch.utils.flop_counter.register_flop_formula`). The callable of an operator with results takes `out` (see
    `_out.Out`), which may be one of the arguments named `in_place`. Arguments that are `spared` are not kept for
    the backward: {argument: the result whose value has the same derivatives in its place, None for zeros}.

    A call travels: public function -> overload -> Autograd (`_differentiable`) -> implementation
    (`_recipes.implementation_of`) -> `Recipe.run` or the reference.
    """
    name = schema.partition("(")[0]
    bind = bind or operator.bind
    implementation, is_torchs = implementation_of(operator, bind, reference, decide)
    IMPLEMENTATIONS[name] = implementation
    # A module may be loaded again. What the first load made may be held by callers, so that it stays.
    numbered = (NAMESPACE if n == 1 else f"{NAMESPACE}_{n}" for n in itertools.count(1))
    namespace = next(space for space in numbered if not hasattr(getattr(torch.ops, space), name))
    qualified = f"{namespace}::{name}"

    def reference_of(*arguments: Any) -> Any:
        return reference(bind(*arguments[:-1]))

    def composite_of(*arguments: Any) -> Any:
        return (composite or reference)(checked(operator, bind(*arguments[:-1])))

    def fake_of(*arguments: Any) -> Any:
        return fake(checked(operator, bind(*arguments[:-1])))

    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    into: Any = None
    # Here, as another overload changes the packet's hash, by which formulas of FLOPs are kept.
    if not schema.endswith("-> ()"):
        into = OUTS[name] = Out(
            library,
            qualified,
            schema,
            operator,
            bind=bind,
            reference=reference,
            fake=fake,
            decide=decide,
            autocast=autocast,
            in_place=in_place,
        )
    torch.library.register_fake(qualified, fake_of, lib=library)
    packet = getattr(getattr(torch.ops, namespace), name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    if differentiable:
        kernel = _differentiable(
            name, packet.default, bind, is_torchs, reference_of, composite_of, formula, spared or {}
        )
        library.impl(name, kernel, "Autograd", with_keyset=True)
    _autocast.register(library, name, packet.default, autocast)
    # The library takes its registrations with it when nobody holds it.
    packet.library = library
    overload = packet.default

    def run(*arguments: Any, out: Any = None) -> Any:
        if out is not None:
            return into(arguments, out)
        # A ValueError of the fake would be one of the compiler's. What autocast casts is checked afterwards.
        if torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
            checked(operator, bind(*arguments[:-1]))
        return overload(*arguments)

    return run


def refuse_forward_mode(name: str, arguments: Sequence[Any]) -> None:
    """NotImplementedError where forward mode differentiates by one of these."""
    if forward_ad._current_level >= 0 and has_tangent(arguments):
        raise NotImplementedError(f"{name}: it has no derivatives; in forward mode call {name}_ref")


@dataclass(frozen=True)
class _Zeros:
    """What the backward knows of an argument whose values do not matter there."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def made(self, grad: Tensor) -> Tensor:
        """Zeros in no memory, of the class that `grad` has."""
        # Not grad.new_zeros: of a batch of gradients (is_grads_batched=True) it would be batched too.
        zeros: Callable[..., Tensor] = torch.zeros if type(grad) is Tensor else grad.new_zeros
        return zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


def _differentiable(
    name: str,
    operator: Any,
    bind: Callable[..., Any],
    is_torchs: Callable[..., bool],
    reference: Callable[..., Any],
    composite: Callable[..., Any],
    formula: Formula | None,
    spared: Mapping[str, int | None],
) -> Callable[..., Any]:
    """The kernel of the Autograd keys."""
    names = [argument.name for argument in operator._schema.arguments]
    kept_as = [spared.get(argument, _KEPT) for argument in names]

    def below_autograd(keys: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    keeping = None if formula is None else formula.keeping

    def is_eager_torchs(keys: Any, arguments: Sequence[Any]) -> bool:
        below = keys & torch._C._after_ADInplaceOrView_keyset
        return below.highestPriorityTypeId() in _PLAIN_KEYS and is_torchs(*arguments)

    class Recomputed(torch.autograd.Function):
        """Kept between forward and backward are inputs, and the little that a `Formula` keeps. The backward
        computes the rest again: by the formula, or by the reference, or what stands for it, under autograd."""

        @staticmethod
        def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
            found = None
            if keeping is not None and is_eager_torchs(keys, arguments):
                with torch._C._AutoDispatchBelowAutograd():
                    found = keeping(bind(*arguments[:-1]))
            outputs, kept = (below_autograd(keys, *arguments), ()) if found is None else found
            saved: list[Tensor] = []
            constants: list[Any] = []
            for value, place in zip(arguments, kept_as, strict=True):
                if not isinstance(value, Tensor):
                    constants.append((value,))
                elif place is None:
                    constants.append((_Zeros(value.shape, value.dtype, value.device),))
                else:
                    saved.append(value if place == _KEPT else outputs[place])
                    constants.append(None)
            ctx.save_for_backward(*saved, *kept)
            ctx.constants = constants
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            arguments = [next(saved) if constant is None else constant[0] for constant in ctx.constants]
            _, *needed = ctx.needs_input_grad
            # With create_graph=True the gradients are differentiated too.
            again = torch.is_grad_enabled()
            # Of a batch of gradients (is_grads_batched=True) autograd computes each.
            if formula is not None and not again and not torch._C._are_functorch_transforms_active():
                wanted = {argument for argument, need in zip(names, needed, strict=True) if need}
                with _autocast.excluded():
                    found = formula.gradients(bind(*arguments[:-1]), tuple(saved), grads, wanted)
                if found is not None:
                    return None, *(found[n] if n in wanted else None for n in names)
            arguments = [value.made(grads[0]) if isinstance(value, _Zeros) else value for value in arguments]
            return None, *_gradients(composite if again else reference, arguments, needed, grads, again)

    def kernel(keys: Any, *arguments: Any) -> Any:
        followed = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        transformed = torch._C._are_functorch_transforms_active()
        # AOTAutograd, in a mode of its own, enters a level of forward mode that Python is not told of.
        traced = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
        unusual = transformed or forward_ad._current_level >= 0 or traced is not None
        # torch.func takes no such Function, whose derivatives are of reverse mode alone.
        if unusual and ((transformed and followed) or has_tangent(arguments)):
            choose_backend(name, arguments[-1], ())
            return composite(*arguments)
        if not followed:
            return below_autograd(keys, *arguments)
        exact = formula is not None and keeping is None and arguments[0].dtype in _COMPUTED
        if exact and is_eager_torchs(keys, arguments):
            return reference(*arguments)
        return Recomputed.apply(keys, *arguments)  # type: ignore[no-untyped-call]

    return kernel


def _gradients(
    function: Callable[..., Any],
    arguments: list[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
    again: bool,
) -> list[Tensor | None]:
    """The gradients of the arguments that need one, by those of the outputs; `again` with a graph of their own."""
    wanted = [i for i, need in enumerate(needed) if need]
    with torch.enable_grad(), _autocast.excluded():
        for i, value in enumerate(arguments):
            if isinstance(value, Tensor) and (i in wanted or not again):
                # A tensor of its own for each argument: one tensor may be two arguments. Zeros have no graph.
                is_followed = again and value.requires_grad
                arguments[i] = value.view_as(value) if is_followed else value.detach().requires_grad_(i in wanted)
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # A sum beside a norm does not depend on the norm's weight, which may be all that is trained.
        pairs = [(o, grad) for o, grad in zip(outputs, grads, strict=True) if o.requires_grad]
        result: list[Tensor | None] = [None] * len(arguments)
        if pairs and wanted:
            outs, out_grads = zip(*pairs, strict=True)
            inputs = [arguments[i] for i in wanted]
            found = torch.autograd.grad(outs, inputs, out_grads, allow_unused=True, create_graph=again)
            for i, gradient in zip(wanted, found, strict=True):
                result[i] = gradient
    return result
