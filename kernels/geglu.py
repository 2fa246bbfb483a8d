"""Gated GELU: value * gelu(gate), the two halves of the last dimension, with the exact (erf) GELU."""

import torch.nn.functional as F
from torch import Tensor

from ._dispatch import choose_backend
from ._library import compute_dtype, define_operator


def geglu_ref(x: Tensor) -> Tensor:
    """Reference of `geglu` in float32 (float64 for float64)."""
    value, gate = x.to(compute_dtype(x)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def unsupported_reasons(x: Tensor) -> list[str]:
    """Every reason why the Triton kernel cannot serve this tensor; empty when it can."""
    return ["this version has no Triton kernel for geglu"]


def geglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x [..., 2C] -> value * gelu_erf(gate) [..., C], contiguous, in x's dtype; value is the first half.

    Raises ValueError for an odd last dimension or an integer dtype, `KernelUnsupported` for `backend="triton"`
    where the kernel cannot serve. Source: Shazeer, arXiv 2002.05202.
    """
    if x.ndim < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"geglu: x must be a float [..., 2C]; got {x.dtype} {list(x.shape)}")
    out: Tensor = _geglu(x, backend)
    return out


def _implementation(x: Tensor, backend: str) -> Tensor:
    choose_backend("geglu", backend, unsupported_reasons(x))
    return _reference(x, backend)


def _reference(x: Tensor, backend: str) -> Tensor:
    return geglu_ref(x).contiguous()


def _fake(x: Tensor, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_geglu = define_operator(
    "geglu(Tensor x, str backend) -> Tensor",
    _implementation,
    fake=_fake,
    reference=_reference,
)
