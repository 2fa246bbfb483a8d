"""Group normalization with an optional shift before it and an optional SiLU after it.

y = act(group_norm(x + shift)), x [B, C, H, W] channels-last or contiguous. The shift [B, C] is where a residual
block puts its time projection and the bias of the convolution before: both would cost a pass over x of their own.
Statistics are float32 (float64 for float64); the result has the memory format of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import choose_backend
from ._library import compute_dtype, define_operator

ACTIVATIONS = ("silu", None)


def group_norm_silu_ref(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """Reference of `group_norm_silu` in float32 (float64 for float64)."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=_memory_format(x))
    dtype = compute_dtype(x)
    x32 = x.to(dtype)
    if shift is not None:
        x32 = x32 + shift.to(dtype)[:, :, None, None]
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y = F.group_norm(x32, num_groups, weight, bias, eps)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=_memory_format(x))


def unsupported_reasons(x: Tensor) -> list[str]:
    """Every reason why the Triton kernel cannot serve these tensors; empty when it can."""
    return ["this version has no Triton kernel for group_norm_silu"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """act(group_norm(x + shift) * weight + bias), in x's dtype and memory format.

    x [B, C, H, W]; shift [B, C] or None, any strides (an expanded batch too); weight, bias [C] or None;
    activation "silu" or None. Raises ValueError for what does not fit, `KernelUnsupported` for
    `backend="triton"` where the kernel cannot serve. Source: Wu and He, arXiv 1803.08494.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"group_norm_silu: x must be a float [B, C, H, W]; got {x.dtype} {list(x.shape)}")
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm_silu: {channels} channels do not divide into {num_groups} groups")
    if activation not in ACTIVATIONS:
        raise ValueError(f'group_norm_silu: activation must be "silu" or None; got {activation!r}')
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (batch, channels)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"group_norm_silu: {name} must be {list(shape)}; got {list(value.shape)}")
    out: Tensor = _group_norm_silu(x, num_groups, weight, bias, eps, shift, activation, backend)
    return out


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _implementation(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    choose_backend("group_norm_silu", backend, unsupported_reasons(x))
    return group_norm_silu_ref(x, num_groups, weight, bias, eps, shift=shift, activation=activation)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x))


def _reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shift: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    return group_norm_silu_ref(x, num_groups, weight, bias, eps, shift=shift, activation=activation)


_group_norm_silu = define_operator(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? shift, "
    "str? activation, str backend) -> Tensor",
    _implementation,
    fake=_fake,
    reference=_reference,
)
