"""Attention as diffusers' processors compute it, with the kernel in place of theirs.

`attend` follows the processor that an `Attention` holds, of which it knows these:

    AttnProcessor2_0, FusedAttnProcessor2_0   scale 1 / sqrt(head dimension), norms of q and k
    AttnProcessor, XFormersAttnProcessor      the module's scale, no such norms

Softmax and sums are float32 in any case, as `upcast_attention` and `upcast_softmax` ask for.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from ldmperf.kernels import KernelUnsupported, attention, layers

logger = logging.getLogger(__name__)

_OF_TORCH_2 = (AttnProcessor2_0, FusedAttnProcessor2_0)
KNOWN_PROCESSORS = (*_OF_TORCH_2, AttnProcessor, XFormersAttnProcessor)


def attend(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    backend: str,
) -> Tensor:
    """What `attn.processor` returns for these arguments, one of KNOWN_PROCESSORS, computed on `backend`.

    hidden_states [B, N, C] or [B, C, H, W], and the result as it; encoder_hidden_states [B, Nk, Ck] or None for
    self-attention; attention_mask a bias [B, 1 or N, Nk] or as diffusers' prepare_attention_mask takes it.
    """
    residual, x = hidden_states, hidden_states
    if attn.spatial_norm is not None:
        x = attn.spatial_norm(x, temb)
    is_image, size = x.ndim == 4, x.shape
    tokens = x.flatten(2).transpose(1, 2) if is_image else x
    context = encoder_hidden_states
    batch, keys = (tokens if context is None else context).shape[:2]
    mask = attn.prepare_attention_mask(attention_mask, keys, batch)
    if mask is not None:
        mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
    if attn.group_norm is not None:
        tokens = _normed(attn.group_norm, x, tokens, backend)
    q, k, v = (t.view(batch, -1, attn.heads, t.shape[-1] // attn.heads) for t in _projected(attn, tokens, context))
    scale = attn.scale
    if type(attn.processor) in _OF_TORCH_2:
        scale = None
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
    h: Tensor = _attended(q, k, v, mask, scale, backend).flatten(2)
    h = attn.to_out[1](attn.to_out[0](h))
    if is_image:
        h = h.transpose(1, 2).reshape(size)
    if attn.residual_connection:
        return layers.residual_sum(residual, h, None, attn.rescale_output_factor, backend)
    return h if attn.rescale_output_factor == 1 else h / attn.rescale_output_factor


def _normed(norm: Any, x: Tensor, tokens: Tensor, backend: str) -> Tensor:
    """The group norm of x [B, N, C] or [B, C, H, W], also given as tokens [B, N, C]; the result as tokens."""
    if not layers.is_plain(norm, nn.GroupNorm):
        return cast(Tensor, norm(tokens.transpose(1, 2)).transpose(1, 2))
    image = x if x.ndim == 4 else tokens.transpose(1, 2).unsqueeze(-1)
    return layers.group_norm(norm, image, backend=backend).flatten(2).transpose(1, 2)


def _projected(attn: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """Queries of x, keys and values of the context, or of x without one; each [B, N, heads * head dimension]."""
    fused = type(attn.processor) is FusedAttnProcessor2_0
    if context is None and fused:
        return tuple(attn.to_qkv(x).chunk(3, dim=-1))
    if context is not None and attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)
    source = x if context is None else context
    if fused:
        return attn.to_q(x), *attn.to_kv(source).chunk(2, dim=-1)
    return attn.to_q(x), attn.to_k(source), attn.to_v(source)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, backend: str) -> Tensor:
    """softmax(scale q k^T + mask) v of [B, N, heads, D], mask [B, heads, 1 or Nq, Nk]."""
    if mask is None:
        if q.shape == k.shape and k.shape[1] < k.shape[2]:
            # Fewer tokens than heads look transposed: `attention` warns, but not of slices of a packed tensor.
            k, v = torch.stack((k, v), dim=2).unbind(2)
        return attention(q, k, v, scale=scale, backend=backend)
    if backend == "triton":
        raise KernelUnsupported("attention", [_MASKED])
    if backend == "auto" and not torch.compiler.is_compiling():
        _log_mask()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


_MASKED = "an additive mask: the kernel takes lengths of contexts and masks of keys, which are no sums with scores"


@functools.cache
def _log_mask() -> None:
    """Once in a process."""
    logger.warning("attention: torch's scaled_dot_product_attention serves %s", _MASKED)
