"""Attention: softmax(scale q k^T) v, without mask, over tokens that carry their heads beside each other.

Layout: q [B, Nq, H, D], k and v [B, Nk, H, D], any strides with a contiguous last dimension, so that slices of
a packed projection are read in place. The result is contiguous: [B, Nq, H, D] is [B, Nq, H * D] for the
projection that follows. Softmax and accumulators are float32 (float64 for float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import choose_backend
from ._library import define_operator


def attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Reference of `attention`: torch's own operator, whose softmax and sums are float32 for half dtypes."""
    if q.shape[0] == 0 or q.shape[1] == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    if k.shape[1] == 0:
        # A softmax over nothing: torch's backends disagree (zeros, NaN, an error); a sum over nothing is zero.
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2).contiguous()


def unsupported_reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Every reason why the Triton kernel cannot serve these tensors; empty when it can."""
    return ["this version has no Triton kernel for attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Attention of q [B, Nq, H, D] over k, v [B, Nk, H, D] -> contiguous [B, Nq, H, D] in q's dtype.

    `scale` is D ** -0.5 unless given. float64, float32, bfloat16 and float16. No keys give zeros; NaN and Inf
    propagate. Raises ValueError for shapes, dtypes or devices that do not fit, `KernelUnsupported` for
    `backend="triton"` where the kernel cannot serve. Source: Vaswani et al., arXiv 1706.03762, eq. 1.
    """
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise ValueError(
            "attention: q must be [B, Nq, H, D] and k, v [B, Nk, H, D]; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"attention: q {list(q.shape)} and k {list(k.shape)} differ in B, H or D")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"attention: q, k, v must share one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"attention: q, k, v must share a device; got {q.device}, {k.device}, {v.device}")
    out: Tensor = _attention(q, k, v, scale, backend)
    return out


def _implementation(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> Tensor:
    choose_backend("attention", backend, unsupported_reasons(q, k, v))
    return attention_ref(q, k, v, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> Tensor:
    return attention_ref(q, k, v, scale)


def _flops(q: torch.Size, k: torch.Size, v: torch.Size, scale: float | None, backend: str, **_: object) -> int:
    """Two matrix products of Nq x Nk x D per head, 2 FLOP per multiply-add, as torch counts its own operator."""
    batch, queries, heads, dim = q
    return 4 * batch * heads * queries * k[1] * dim


_attention = define_operator(
    "attention(Tensor q, Tensor k, Tensor v, float? scale, str backend) -> Tensor",
    _implementation,
    fake=_fake,
    reference=_reference,
    flops=_flops,
)
