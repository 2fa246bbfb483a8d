"""Modules with the operators inside, in place of torch's and diffusers': the same state dict, loaded strictly.

GroupNormSiLU  torch's nn.GroupNorm and the SiLU behind it
GEGLU          diffusers' GEGLU, the gated layer of a feed-forward
Attention      diffusers' Attention, without the norms and extra projections that some models put in it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import layers
from ._checks import choice
from ._dispatch import choose_backend
from .attention import attention
from .group_norm import ACTIVATIONS, group_norm_silu

Device = torch.device | str | int | None


class GroupNormSiLU(nn.GroupNorm):
    """act(group_norm(x + x_bias) * weight + bias); an nn.GroupNorm by its constructor, parameters and state dict.

    num_channels counts those of a `skip` too; activation "silu" or None; backend as of `group_norm_silu`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = "silu",
        backend: str = "auto",
    ) -> None:
        choice("GroupNormSiLU", "activation", activation, ACTIVATIONS)
        choose_backend("GroupNormSiLU", backend, ())
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        x_bias: Tensor | None = None,
        skip: Tensor | None = None,
        statistics: Tensor | None = None,
        skip_statistics: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, ...] -> [B, C + C2, ...], in x's dtype and memory format.

        x is an image [B, C, H, W], or of any other rank from [B, C] on; x_bias [B, C + C2] or [C + C2] is added
        before the norm; the channels of skip [B, C2, ...] follow those of x, without a concatenation. statistics
        and skip_statistics as of `group_norm_silu`. Raises ValueError for what does not fit, `KernelUnsupported`
        for backend "triton" where the kernel cannot serve.
        """
        if isinstance(x, Tensor):
            if x.ndim != 4:
                return self._of_another_rank(x, x_bias, skip, statistics, skip_statistics)
            if isinstance(x_bias, Tensor) and x_bias.ndim == 1:
                x_bias = x_bias.expand(x.shape[0], -1)
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            x_bias=x_bias,
            skip=skip,
            activation=self.activation,
            statistics=statistics,
            skip_statistics=skip_statistics,
            backend=self.backend,
        )

    def _of_another_rank(
        self, x: Tensor, x_bias: Tensor | None, skip: Tensor | None, *statistics: Tensor | None
    ) -> Tensor:
        """`forward` of x and skip read as images: views, unless strides of the dimensions between do not merge."""
        if x.ndim < 2:
            raise ValueError(f"GroupNormSiLU: x must be [B, C, ...]; got {list(x.shape)}")
        if isinstance(skip, Tensor):
            if skip.ndim != x.ndim or skip.shape[2:] != x.shape[2:]:
                wanted = ", ".join(map(str, (x.shape[0], "C2", *x.shape[2:])))
                raise ValueError(f"GroupNormSiLU: skip must be [{wanted}]; got {list(skip.shape)}")
            skip = _as_image(skip)
        out: Tensor = self.forward(_as_image(x), x_bias, skip, *statistics)
        return out.view(*out.shape[:2], *x.shape[2:])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, backend={self.backend!r}"


def _as_image(x: Tensor) -> Tensor:
    """[B, C, ...] of another rank -> [B, C, H, W] of the same elements in the same order."""
    while x.ndim < 4:
        x = x.unsqueeze(-1)
    return x.flatten(2, -2)


class GEGLU(layers.GEGLU):
    """[..., dim_in] -> [..., dim_out]: value * gelu(gate), both of one linear layer, as diffusers' GEGLU.

    backend as of `linear`, or of `geglu` where `proj` is no longer a plain nn.Linear.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        choose_backend("GEGLU", backend, ())
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out, bias, device, dtype)
        self.backend = backend

    @property
    def ldmperf_backend(self) -> str:
        """The backend under the name that `layers` asks for."""
        return self.backend

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class Attention(nn.Module):
    """to_out(softmax(q k^T / sqrt(dim_head)) v) over `heads` heads, as diffusers' Attention.

    q is to_q of the hidden states [B, N, query_dim]; k and v are to_k and to_v of the encoder's hidden states
    [B, Nk, cross_attention_dim], or of the hidden states too where there are none. bias is that of to_q, to_k and
    to_v; dropout acts behind to_out; backend as of `attention`.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        *,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        out_bias: bool = True,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        choose_backend("Attention", backend, ())
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_dim = query_dim
        self.cross_attention_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.heads = heads
        self.backend = backend
        inner_dim = heads * dim_head
        self.to_q = nn.Linear(query_dim, inner_dim, bias, **placed)
        self.to_k = nn.Linear(self.cross_attention_dim, inner_dim, bias, **placed)
        self.to_v = nn.Linear(self.cross_attention_dim, inner_dim, bias, **placed)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim, out_bias, **placed), nn.Dropout(dropout)])

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """[B, N, query_dim] -> [B, N, query_dim], contiguous.

        key_mask [B, Nk] bool: True for keys to attend to. Raises ValueError for what does not fit, and
        `KernelUnsupported` for backend "triton" where the kernel cannot serve.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        _expect("hidden_states", "N", self.query_dim, hidden_states)
        _expect("encoder_hidden_states", "Nk", self.cross_attention_dim, context)
        # [B, N, H, D]: the operator reads heads where the projection wrote them.
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1))
            for layer, tokens in ((self.to_q, hidden_states), (self.to_k, context), (self.to_v, context))
        )
        if hidden_states.shape[1] < self.heads:
            # Slices of one tensor have their tokens first beyond doubt: the operator does not warn of the layout.
            k, v = torch.stack((k, v), dim=2).unbind(2)
        out: Tensor = attention(q, k, v, key_mask=key_mask, backend=self.backend).flatten(2)
        for layer in self.to_out:
            out = layer(out)
        return out

    def extra_repr(self) -> str:
        return f"heads={self.heads}, backend={self.backend!r}"


def _expect(name: str, tokens: str, channels: int, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != channels:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"Attention: {name} must be [B, {tokens}, {channels}]; got {got}; "
            "an image [B, C, H, W] goes in as x.flatten(2).transpose(1, 2)"
        )
