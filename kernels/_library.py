"""Registration with torch.library: one dispatcher entry per operator, with its fake, its gradient and its FLOPs.

`torch.library.custom_op` would do the same; the plain `Library` adds less host time to a call, and a small UNet
waits for the host.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _autocast
from ._checks import one_device

# The folder may be copied into another package and be loaded beside ours: each copy takes its own namespace. A
# folder's name may hold what a schema may not.
_COPY = "ldmperf_" + re.sub(r"\W", "_", __package__ or "kernels", flags=re.ASCII)
NAMESPACE = "ldmperf" if __package__ == "ldmperf.kernels" else _COPY
# By operator: for who measures what the dispatcher adds to them.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that statistics, sums and transcendental functions of `x` are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def define_operator(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    autocast: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Register `name(arguments) -> returns` and return the callable.

    `fake` gives the outputs' shapes, dtypes and strides; `autocast` is the rule there (see `_autocast.register`).
    With `reference`, a function of the same arguments, gradients come from running it again under autograd;
    without, the operator has none. `flops` counts from the arguments' shapes (see
    `torch.utils.flop_counter.register_flop_formula`).
    """
    name = schema.partition("(")[0]
    IMPLEMENTATIONS[name] = implementation
    # A module may be loaded again. What the first load made may be held by callers, so that it stays.
    numbered = (NAMESPACE if n == 1 else f"{NAMESPACE}_{n}" for n in itertools.count(1))
    namespace = next(space for space in numbered if not hasattr(getattr(torch.ops, space), name))
    qualified = f"{namespace}::{name}"

    def fake_of_one_device(*arguments: Any) -> Any:
        one_device(name, arguments)
        return fake(*arguments)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake_of_one_device, lib=library)
    if reference is not None:
        _register_gradient(library, qualified, reference)
    packet = getattr(getattr(torch.ops, namespace), name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    operator: Callable[..., Any] = packet.default
    _autocast.register(library, name, operator, autocast)
    # The library takes its registrations with it when nobody holds it.
    packet.library = library
    return operator


def _register_gradient(library: torch.library.Library, qualified: str, reference: Callable[..., Any]) -> None:
    """Backward by recomputing: nothing but the inputs is kept between forward and backward."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if constant is None else constant[0] for constant in ctx.constants]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad(), _autocast.excluded():
            for i in wanted:
                arguments[i] = arguments[i].detach().requires_grad_()
            outputs = reference(*arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
            found = _gradients(pairs, [arguments[i] for i in wanted])
        result: list[Tensor | None] = [None] * len(arguments)
        for i, gradient in zip(wanted, found, strict=True):
            result[i] = gradient
        return tuple(result)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
