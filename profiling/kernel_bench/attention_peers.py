"""Peers of attention: torch's kernels by name, FlexAttention and xformers, each called as its users call it.

A peer gets views of q, k, v [B, N, H, D] in its own order of dimensions, so nothing is copied before its call. Its
result may have any strides; it is compared as [B, N, H, D].
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..measure.outcomes import Unsupported
from ..step.call import OperatorCall
from .implementation import Arguments, Implementation

# By peer: torch's name of the backend, and what tells whether it serves a call on a GPU.
SDPA: Mapping[str, tuple[SDPBackend, str]] = {
    "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, "can_use_cudnn_attention"),
    "sdpa-flash": (SDPBackend.FLASH_ATTENTION, "can_use_flash_attention"),
    "sdpa-efficient": (SDPBackend.EFFICIENT_ATTENTION, "can_use_efficient_attention"),
}
_MASKS = ("key_lengths", "key_mask")
# Words of FlexAttention and xformers for a call that they cannot serve.
_REFUSALS = ("NYI", "not implemented", "NotImplementedError", "not supported", "unsupported", "No operator found")


def sdpa(name: str, call: OperatorCall, device: torch.device) -> Implementation:
    """scaled_dot_product_attention with one backend allowed, chosen once for all calls."""
    backend, serves = SDPA[name]
    made = _prepared(call, call.arguments(device))
    if device.type == "cuda" and (refusal := _refusal(getattr(torch.backends.cuda, serves), made)) is not None:
        raise Unsupported(refusal)
    return Implementation(
        _heads_first(F.scaled_dot_product_attention),
        functools.partial(_prepared, call),
        functools.partial(sdpa_kernel, backend),
    )


def flex(call: OperatorCall, device: torch.device) -> Implementation:
    """FlexAttention as its page says to call it: compiled; for these sizes, its tiles chosen by trying them."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    return Implementation(_heads_first(_or_refused(compiled)), functools.partial(_prepared, call))


def xformers(call: OperatorCall, device: torch.device) -> Implementation:
    """memory_efficient_attention by xformers' own choice among its kernels."""
    if importlib.util.find_spec("xformers") is None:
        raise Unsupported("xformers is not installed: pip install 'ldmperf[peers]'")
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Any:
        return memory_efficient_attention(q, k, v, scale=scale)

    return Implementation(_or_refused(attend), functools.partial(_prepared, call))


def _prepared(call: OperatorCall, arguments: Arguments) -> Arguments:
    """What peers take: q, k, v and the scale. Unsupported for a call with a mask."""
    masks = [tensor.name for tensor in call.tensors if tensor.name in _MASKS]
    if masks:
        raise Unsupported(f"no peer of attention is set up for {', '.join(masks)}")
    return {name: arguments[name] for name in ("q", "k", "v", "scale") if name in arguments}


def _heads_first(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`attention` of [B, H, N, D], called with [B, N, H, D]: views both ways."""

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Any:
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale).transpose(1, 2)

    return call


def _refusal(serves: Callable[..., bool], arguments: Arguments) -> str | None:
    """Why a backend of torch cannot serve a call, in its own words; None when it can."""
    q, k, v = (arguments[name].transpose(1, 2) for name in ("q", "k", "v"))
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if serves(parameters, debug=True):
            return None
    reasons = [str(warning.message).partition(" (Triggered internally")[0].strip() for warning in said]
    return "; ".join(dict.fromkeys(reasons)) or "torch says that it cannot serve this call, and not why"


def _or_refused(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with Unsupported in place of its refusal to serve."""

    def called(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if any(word in line for word in _REFUSALS)]
            if not lines and not isinstance(error, NotImplementedError):
                raise
            raise Unsupported((lines or [str(error)])[0]) from None

    return called
