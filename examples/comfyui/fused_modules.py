"""Modules of ComfyUI's UNets with an operator inside, put in and taken out by the class of the instance.

A residual block's `in_layers` and `out_layers` and the UNet's `out` are nn.Sequential(GroupNorm, SiLU, ..., conv).
The instance stays, with its children, weights, hooks and state dict; only its class changes, and back. LoRA
patches and offloading meet the same modules as ever. What is not plain when it is called, is called as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .serving import bind, log_once, refusals, run

OPS = "comfy.ops"
ATTENTION = "comfy.ldm.modules.attention"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedSequential(nn.Sequential):
    """nn.Sequential(GroupNorm, SiLU, ...), the first two in one pass over the image."""

    ldmperf_backend: str
    ldmperf_class: type

    def __getitem__(self, index: Any) -> Any:
        """A slice, which ComfyUI takes of blocks that resample, is an nn.Sequential."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        norm, act, *rest = self
        y = _norm_silu(norm, act, x, self.ldmperf_backend)
        if y is None:
            y = act(norm(x))
        for layer in rest:
            y = layer(y)
        return y


class FusedGate(nn.Module):
    """proj(x) = (value, gate) -> value * gelu(gate); mixed into the GEGLU whose instances it takes over."""

    ldmperf_backend: str
    ldmperf_class: type

    def forward(self, x: Tensor) -> Tensor:
        original = self.ldmperf_class
        if not _own_methods(original, nn.Module):
            log_once("GEGLU", [f"someone replaced the forward of {original.__name__}"])
            y: Tensor = original.forward(self, x)
            return y
        # The projection is called as a module: LoRA patches, casts and offloading are its own.
        projected = self.proj(x)
        call = bind("geglu", projected)
        reasons = refusals("geglu", call, self.ldmperf_backend)
        if not reasons:
            return run("geglu", call, self.ldmperf_backend)
        log_once("GEGLU", reasons)
        value, gate = projected.chunk(2, dim=-1)
        return value * nn.functional.gelu(gate)


def inject(model: nn.Module, norms: bool, geglu: bool, backend: str) -> None:
    """Puts the operators into the modules of `model` that this file knows, and takes out what is in."""
    eject(model)
    pairs, gates = pairs_and_gates(model)
    for module in [*(pairs if norms else ()), *(gates if geglu else ())]:
        original = type(module)
        module.ldmperf_backend, module.ldmperf_class = backend, original
        module.__class__ = FusedSequential if original is nn.Sequential else _fused_gate(original)


def eject(model: nn.Module) -> None:
    """Takes all of them out again. Harmless where none is in."""
    for module in model.modules():
        if isinstance(module, FusedSequential | FusedGate):
            module.__class__ = module.ldmperf_class
            del module.ldmperf_backend, module.ldmperf_class


def pairs_and_gates(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The nn.Sequential that begin with GroupNorm and SiLU, and ComfyUI's GEGLU, fused or not."""
    classes = [(vars(module).get("ldmperf_class", type(module)), module) for module in model.modules()]
    pairs = [
        module
        for cls, module in classes
        if cls is nn.Sequential
        and len(module) > 1
        and isinstance(module[0], nn.GroupNorm)
        and isinstance(module[1], nn.SiLU)
    ]
    return pairs, [module for cls, module in classes if (cls.__module__, cls.__qualname__) == (ATTENTION, "GEGLU")]


@functools.cache
def _fused_gate(original: type) -> type:
    return type(original.__name__, (FusedGate, original), {})


def _norm_silu(norm: nn.Module, act: nn.Module, x: Tensor, backend: str) -> Tensor | None:
    """silu(norm(x)) by the operator, None where ComfyUI's modules have to be called."""
    reasons: tuple[str, ...] = ()
    if not _is_group_norm(norm) or not _is_untouched(norm, nn.GroupNorm):
        reasons = (
            f"the norm is a {_full_name(norm)} that is not ComfyUI's or torch's own, or is hooked or patched",
        )
    elif type(act) is not nn.SiLU or not _is_untouched(act, nn.SiLU):
        reasons = (f"the activation is a {_full_name(act)} that is not torch's own, or is hooked or patched",)
    if reasons:
        log_once("GroupNorm + SiLU", reasons)
        return None
    with _weights(norm, x) as (weight, bias):
        if not all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in (weight, bias)):
            reasons = (f"the norm's weight is a {type(weight).__name__}",)
        else:
            call = bind("group_norm_silu", x, norm.num_groups, weight, bias, norm.eps)
            reasons = refusals("group_norm_silu", call, backend)
            if not reasons:
                return run("group_norm_silu", call, backend)
    log_once("GroupNorm + SiLU", reasons)
    return None


@contextlib.contextmanager
def _weights(norm: Any, x: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The norm's weight and bias as ComfyUI uses them for x: cast, fetched from offloaded memory, LoRA added."""
    casts = getattr(norm, "comfy_cast_weights", False)
    if norm.weight is None or not (
        casts or getattr(norm, "weight_function", ()) or getattr(norm, "bias_function", ())
    ):
        yield norm.weight, norm.bias
        return
    from comfy import ops

    weight, bias, stream = ops.cast_bias_weight(norm, x, offloadable=True)
    try:
        yield weight, bias
    finally:
        ops.uncast_bias_weight(norm, weight, bias, stream)


def _is_group_norm(module: nn.Module) -> bool:
    # Others' subclasses, of quantized formats for example, have casts of their own.
    return type(module) is nn.GroupNorm or (isinstance(module, nn.GroupNorm) and type(module).__module__ == OPS)


def _is_untouched(module: nn.Module, base: type) -> bool:
    """Whether a call of the module runs its class's forward as its author wrote it, and nothing else."""
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
        return False
    return _own_methods(type(module), base)


def _own_methods(cls: type, base: type) -> bool:
    """Whether the forwards of `cls` and of `base`, which it may call, are still of the files of these classes.

    AnimateDiff puts its own forward into torch's and ComfyUI's GroupNorm while it samples.
    """
    return all(
        getattr(vars(owner)[name], "__module__", None) == owner.__module__
        for name in ("forward", "forward_comfy_cast_weights")
        for owner in (*cls.__mro__, base)
        if name in vars(owner) and issubclass(owner, base)
    )


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
