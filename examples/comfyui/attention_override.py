"""ComfyUI's attention contract, served by the kernel: an override of `optimized_attention`.

ComfyUI calls override(func, q, k, v, heads, ...), where `func` is the attention that it would have called. q, k
and v are [B, N, H * D], or with skip_reshape [B, H, N, D]; both are read in place. The result is [B, N, H * D], or
with skip_output_reshape [B, H, N, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .serving import bind, log_once, refusals, run

KEY = "optimized_attention_override"
Attention = Callable[..., Tensor]
# Arguments beside the named ones that the kernel follows, or that say nothing about the result. Low precision may
# be refused: the kernel's sums and softmax are float32.
_KNOWN = ("scale", "enable_gqa", "low_precision_attention", "transformer_options", "_inside_attn_wrapper")


def attention_override(backend: str, previous: Attention | None = None) -> Attention:
    """The override. `previous`, one that is set already, is called as before and gets the kernel for `func`.

    So what `previous` does to the attention stays done: a region, a mask, a backend of its own.
    """

    def kernel(
        func: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **others: Any,
    ) -> Tensor:
        call, reasons = _call(q, k, v, heads, mask, attn_precision, skip_reshape, others)
        reasons = reasons or refusals("attention", call, backend)
        if reasons:
            log_once("attention", reasons)
            return func(
                *(q, k, v, heads),
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **others,
            )
        out = run("attention", call, backend)
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    override: Any = kernel
    if previous is not None:

        def override(func: Attention, *arguments: Any, **named: Any) -> Tensor:
            inner = functools.update_wrapper(functools.partial(kernel, func), func)
            return previous(inner, *arguments, **named)

    override.ldmperf_previous = previous
    return override


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None,
    attn_precision: torch.dtype | None,
    skip_reshape: bool,
    others: dict[str, Any],
) -> tuple[Any, tuple[str, ...]]:
    """(the operator's call, ()), or (None, why there is none)."""
    unknown = [name for name, value in others.items() if name not in _KNOWN and value is not None]
    if unknown:
        return None, (f"the arguments {', '.join(unknown)} are unknown here",)
    if attn_precision not in (None, torch.float32):
        return None, (f"attn_precision is {attn_precision}, not float32",)
    rank = 4 if skip_reshape else 3
    if not q.ndim == k.ndim == v.ndim == rank:
        return None, (f"q, k and v have {q.ndim}, {k.ndim} and {v.ndim} dimensions, not {rank}",)
    if skip_reshape:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    elif q.shape[-1] % heads or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return None, (f"q, k and v of width {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]} for {heads} heads",)
    else:
        q, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in (q, k, v))
    key_mask = None
    if mask is not None:
        key_mask = _key_mask(mask, q, k)
        if key_mask is None:
            return None, (f"a mask of {mask.dtype} {list(mask.shape)} is not one of keys alone",)
    return bind("attention", q, k, v, others.get("scale"), key_mask=key_mask), ()


def _key_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
    """[B, Nk] of a bool mask that is the same for all heads and queries by its shape, or None: no value is read.

    As ComfyUI reads masks: [Nq, Nk], [B, Nq, Nk] or [B, H, Nq, Nk], and what broadcasts to it.
    """
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4:
        return None
    if mask.ndim == 3:
        mask = mask.unsqueeze(1)
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    one_for_all = all(mask.shape[i] == 1 or mask.stride(i) == 0 for i in (1, 2))
    if not one_for_all or mask.shape[0] not in (1, q.shape[0]) or mask.shape[3] not in (1, k.shape[1]):
        return None
    return mask[:, 0, 0].expand(q.shape[0], k.shape[1])
