"""Registration with torch.library: one dispatcher entry per operator, with its fake, its gradient and its FLOPs.

`torch.library.custom_op` would do the same; the plain `Library` adds less host time to a call, and a small UNet
waits for the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# The folder may be copied into another package and be loaded beside ours: each copy takes its own namespace.
_PACKAGE = (__package__ or "kernels").replace(".", "_")
NAMESPACE = "ldmperf" if _PACKAGE == "ldmperf_kernels" else _PACKAGE
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
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
    reference: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Register `name(arguments) -> returns` and return the callable.

    `fake` gives the outputs' shapes, dtypes and strides. With `reference`, a function of the same arguments,
    gradients come from running it again under autograd; without, the operator has none. `flops` counts from the
    arguments' shapes (see `torch.utils.flop_counter.register_flop_formula`).
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    IMPLEMENTATIONS[name] = implementation
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if reference is not None:
        _register_gradient(qualified, reference)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    operator: Callable[..., Any] = packet.default
    return operator


def _register_gradient(qualified: str, reference: Callable[..., Any]) -> None:
    """Backward by recomputing: nothing but the inputs is kept between forward and backward."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if constant is None else constant[0] for constant in ctx.constants]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
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

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
