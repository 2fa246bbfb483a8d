"""Layer normalization over the last dimension, optionally with the residual add before it.

y = layer_norm(x + residual), s = x + residual: a transformer block needs both, and s is in registers anyway.
The norm is of the unrounded sum. Statistics are float32 (float64 for float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import choose_backend
from ._library import compute_dtype, define_operator


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of `layer_norm` in float32 (float64 for float64)."""
    dtype = compute_dtype(x)
    x32 = x.to(dtype)
    if residual is not None:
        x32 = x32 + residual.to(dtype)
    y = F.layer_norm(x32, (x.shape[-1],), weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
    return y if residual is None else (y, x32.to(x.dtype))


def unsupported_reasons(x: Tensor) -> list[str]:
    """Every reason why the Triton kernel cannot serve these tensors; empty when it can."""
    return ["this version has no Triton kernel for layer_norm"]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of x [..., C] with weight and bias [C]; contiguous, in x's dtype.

    With `residual` (shape and dtype of x) returns (norm(x + residual), x + residual). Raises ValueError for what
    does not fit, `KernelUnsupported` for `backend="triton"` where the kernel cannot serve.
    Source: Ba et al., arXiv 1607.06450.
    """
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"layer_norm: x must be a float [..., C]; got {x.dtype} {list(x.shape)}")
    channels = x.shape[-1]
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"layer_norm: weight and bias must be [{channels}]; got {list(weight.shape)} and {list(bias.shape)}"
        )
    if residual is None:
        out: Tensor = _layer_norm(x, weight, bias, eps, backend)
        return out
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"layer_norm: residual must be {x.dtype} {list(x.shape)}; got {residual.dtype} {list(residual.shape)}"
        )
    both: tuple[Tensor, Tensor] = _add_layer_norm(x, residual, weight, bias, eps, backend)
    return both


def _implementation(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    choose_backend("layer_norm", backend, unsupported_reasons(x))
    return _reference(x, weight, bias, eps, backend)


def _reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    out = layer_norm_ref(x, weight, bias, eps)
    assert isinstance(out, Tensor)
    return out.contiguous()


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_implementation(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    choose_backend("layer_norm", backend, unsupported_reasons(x))
    return _add_reference(x, residual, weight, bias, eps, backend)


def _add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    y, total = layer_norm_ref(x, weight, bias, eps, residual=residual)
    return y.contiguous(), total.contiguous()


def _add_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake(x), _fake(x)


_layer_norm = define_operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    _implementation,
    fake=_fake,
    reference=_reference,
)
_add_layer_norm = define_operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, str backend) "
    "-> (Tensor, Tensor)",
    _add_implementation,
    fake=_add_fake,
    reference=_add_reference,
)
