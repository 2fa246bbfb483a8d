"""Attention: softmax(scale q k^T) v, with the heads of a token beside each other.

Layout: q [B, Nq, H, D], k and v [B, Nk, H, D], any strides with a contiguous last dimension: slices of a packed
projection are read in place. The result is contiguous: [B, Nq, H, D] is [B, Nq, H * D] for the projection that
follows. Softmax and accumulators are float32 (float64 for float64).

Two kernels (_attention_kernels.py). Long contexts: a program takes a tile of queries over tiles of keys, with an
online softmax. Short ones (text): all keys are one tile, which a program holds for several tiles of queries.
What limits them, and what each idea gave: docs/attention.md.
"""

from __future__ import annotations

import functools
import inspect
import math
import os.path
import warnings
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import _formulas
from ._attention_config import MAX_SHORT_KEYS, AttentionConfig, candidate_configs, default_config
from ._attention_kernels import attention_kernel, short_attention_kernel
from ._autocast import lowered
from ._checks import real, tensors
from ._dependent import launches_dependently
from ._launch import Chip, Launch, Operator, ceil_div, chip_of, dtype_name, fastest, next_power_of_two, tuned
from ._layout import MAX_INDEX
from ._library import Formula, define_operator
from ._parts import parts
from ._recipes import Planned, plan_or_none
from ._triton import device_reasons, dtype_reasons, is_interpreted

MAX_HEAD_DIM = 384
# With operands of unit variance, scores times this scale stay under the 1e8 up to which the softmax is exact.
MAX_SCALE = 2.0**16


class AttentionCall(NamedTuple):
    """The arguments of `attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    key_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    tf32: bool = False


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    """Reference of `attention`: torch's own operator, whose softmax and sums are float32 for half dtypes.

    `tf32` is the kernels'; torch's own follows torch.backends.
    """
    if q.shape[0] == 0 or q.shape[1] == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    if k.shape[1] == 0:
        # A softmax over nothing: torch's backends disagree (zeros, NaN, an error); a sum over nothing is zero.
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    mask = key_mask
    if key_lengths is not None:
        mask = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
    if mask is None:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return out.transpose(1, 2).contiguous()
    # Masked keys and values become zeros: a NaN there must not count. Samples without any key attend to all of
    # these zeros, and their result is replaced: so no gradient is NaN.
    kept = mask[:, :, None, None]
    k, v = torch.where(kept, k, 0), torch.where(kept, v, 0)
    attends = mask.any(dim=1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=(mask | ~attends[:, None])[:, None, None, :],
        scale=scale,
    )
    return torch.where(attends[:, None, None, None], out.transpose(1, 2), 0).contiguous()


def candidates(call: AttentionCall) -> list[AttentionConfig]:
    """The configurations that bench/tune.py tries for this call."""
    q, k = call.q, call.k
    return candidate_configs(q.shape[1], k.shape[1], q.shape[3], q.element_size())


def tuning_key(call: AttentionCall) -> str:
    """What a tuned configuration is looked up by: a class of shapes, sizes rounded up to powers of two."""
    batch, queries, heads, dim = call.q.shape
    keys = call.k.shape[1] if call.k.shape[1] <= MAX_SHORT_KEYS else next_power_of_two(call.k.shape[1])
    masked = " masked" if call.key_mask is not None else " lengths" if call.key_lengths is not None else ""
    sizes = f"queries={next_power_of_two(queries)} keys={keys} heads={next_power_of_two(batch * heads)}"
    return f"head_dim={dim} {sizes} {dtype_name(call.q)}{' tf32' if call.tf32 else ''}{masked}"


def plan(
    call: AttentionCall, *, config: AttentionConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result, not yet computed, and the launch that computes it."""
    q, k, v, scale, key_lengths, key_mask, tf32 = call
    out = _empty_result(call)
    if not out.numel():
        return out, []
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    chip = chip or chip_of(q.device)
    config = config or tuned("attention", tuning_key(call), chip, AttentionConfig)
    config = config or default_config(
        queries, keys, dim, batch * heads, q.element_size(), chip, tf32=tf32, has_mask=key_mask is not None
    )
    pdl = launches_dependently(chip)
    part_1, part_2 = parts(dim)
    strides = {
        f"stride_{name}{axis}": tensor.stride(i)
        for name, tensor in (("q", q), ("k", k), ("v", v))
        for i, axis in enumerate("bnh")
    }
    strided = [tensor.stride(i) for tensor in (q, k, v) for i in range(3) if tensor.shape[i] > 1]
    block_m = config.block_m
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "lengths_ptr": key_lengths,
        "mask_ptr": key_mask,
        "out_ptr": out,
        "scale_log2": (dim**-0.5 if scale is None else scale) * math.log2(math.e),
        "heads": heads,
        "queries": queries,
        "keys": keys,
        **strides,
        "stride_lb": 0 if key_lengths is None else key_lengths.stride(0),
        "stride_mb": 0 if key_mask is None else key_mask.stride(0),
        "stride_mn": 0 if key_mask is None else key_mask.stride(1),
        "HEAD_DIM": dim,
        "PART_1": part_1,
        "PART_2": part_2,
        "BLOCK_M": block_m,
        "POLYNOMIAL": config.polynomial,
        "MATRIX_SUMS": config.matrix_sums,
        "PRECISION": "tf32" if tf32 else "ieee",
        # Largest power of two up to 8 that divides head_dim and all strides. The compiler cannot infer it for a
        # stride of 40.
        "ALIGN": math.gcd(8, dim, *strided),
        "PDL": pdl,
    }
    tiles: dict[str, Any]
    if config.block_n == 0:
        keys_1, keys_2 = parts(keys)
        full = 0 if keys < keys_1 else 2 if keys == keys_1 + keys_2 else 1
        tiles = {
            "KEYS_1": keys_1,
            "KEYS_2": keys_2,
            "QUERY_TILES": config.query_tiles,
            "WHOLE_PARTS": full if key_lengths is None and key_mask is None else 0,
        }
        kernel, block_m = short_attention_kernel, block_m * config.query_tiles
    else:
        whole = key_lengths is None and key_mask is None and keys % config.block_n == 0 and keys > 0
        # A second copy of the tile's code, without comparisons in the first, where there are registers for it.
        last = key_mask is None and q.element_size() == 2 and part_1 + part_2 <= 96
        masks = "none" if whole else "last" if last else "every"
        ahead = config.ahead and whole
        # By the machine code: a mask needs it too, but at 64, where it takes too many registers.
        # The interpreter runs no PTX.
        serialized = chip.arch == "sm_90" and (ahead or (key_mask is not None and part_1 + part_2 != 64))
        tiles = {
            "BLOCK_N": config.block_n,
            "MASKS": masks,
            "AHEAD": ahead,
            "PTX_COPY": serialized and not is_interpreted(attention_kernel),
        }
        kernel = attention_kernel
    launch = Launch(
        kernel,
        batch * heads * ceil_div(queries, block_m),
        arguments | tiles,
        config.num_warps,
        config.num_stages,
        operator="attention",
        role="" if keys == queries else "cross-attention",
        flops=_flops(q.shape, k.shape),
        exponentials=batch * heads * queries * keys,
        pdl=pdl,
    )
    return out, [launch]


def unsupported_reasons(call: AttentionCall) -> list[str]:
    """Every reason why the Triton kernels cannot serve this call; empty when they can."""
    q, k, v, scale, *_ = call
    dim = q.shape[3]
    reasons = [*device_reasons(attention_kernel, q), *dtype_reasons(q=q, k=k, v=v)]
    if q.dtype == torch.bfloat16 and is_interpreted(attention_kernel):
        reasons.append("triton's interpreter multiplies bfloat16 as if it were integers")
    if dim % 4 or dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {dim} is not a multiple of 4 up to {MAX_HEAD_DIM}")
    reasons += [
        f"{name}'s last dimension has stride {tensor.stride(-1)}, not 1"
        for name, tensor in (("q", q), ("k", k), ("v", v))
        if dim > 1 and tensor.stride(-1) != 1
    ]
    if max(q.shape[1], k.shape[1]) > MAX_INDEX:
        reasons.append(f"{max(q.shape[1], k.shape[1])} tokens are more than {MAX_INDEX}")
    if q.shape[0] * q.shape[2] * ceil_div(q.shape[1], 16) >= 2**31:
        reasons.append(f"{q.shape[0] * q.shape[2]} heads of {q.shape[1]} queries are more than 2^31 tiles")
    if scale is not None and not 2.0**-126 <= scale <= MAX_SCALE:
        reasons.append(f"scale {scale} is not within 2^-126 and {MAX_SCALE:.0f}")
    return reasons


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    tf32: bool = False,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Attention of q [B, Nq, H, D] over k, v [B, Nk, H, D] -> contiguous [B, Nq, H, D] in q's dtype.

    scale        D ** -0.5 unless given; the kernels take 2^-126 to 65536
    key_lengths  [B] int32 or int64: sample b attends to its first key_lengths[b] keys; taken as within 0 to Nk
    key_mask     [B, Nk] bool: True for keys to attend to; instead of key_lengths
    tf32         whether the kernels may multiply float32 in TF32, which truncates operands to 10 bits of mantissa;
                 torch's own follows torch.backends
    backend      "triton": the kernels, for D a multiple of 4 up to 384, float32, bfloat16 and float16
                 "torch": scaled_dot_product_attention
                 "auto": the kernels where they were measured to be faster on this GPU (kernels/tuned), else torch
    out          is written and returned: contiguous [B, Nq, H, D], memory of its own, no gradients

    float64, float32, bfloat16 and float16. What is masked off is not read: a NaN there does not matter; a row
    that attends to no key is zeros. Elsewhere NaN and Inf propagate. The kernels' softmax is exact to rounding for
    logits (scale q k^T) up to +-1e8; from about 2e8 (float16) or 1e9 on rows may become NaN. Raises ValueError for
    shapes, dtypes or devices that do not fit, `KernelUnsupported` for `backend="triton"` where the kernels cannot
    serve. Under autocast as scaled_dot_product_attention, in autocast's dtype. Tensors in its layout [B, H, N, D]
    go in as q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2); fewer tokens than heads are warned of, once.
    Sources: Vaswani et al., arXiv 1706.03762, eq. 1; Milakov and Gimelshein, arXiv 1805.02867 (online softmax).
    """
    tensors(attention, (q, k, v), (key_lengths, key_mask))
    if scale is not None:
        scale = real("attention", "scale", scale)
    result: Tensor = _attention(q, k, v, scale, key_lengths, key_mask, tf32, backend, out=out)
    return result


def _check(call: AttentionCall) -> None:
    q, k, v, _, key_lengths, key_mask, _ = call
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise ValueError(
            "attention: q must be [B, Nq, H, D] and k, v [B, Nk, H, D]; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: k must be [{q.shape[0]}, Nk, {q.shape[2]}, {q.shape[3]}] for q {list(q.shape)}; "
            f"got {list(k.shape)}; of the layout [B, H, N, D] give q.transpose(1, 2), k and v too"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"attention: q, k, v must share one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"attention: q, k, v must share a device; got {q.device}, {k.device}, {v.device}")
    if key_lengths is not None and key_mask is not None:
        raise ValueError("attention: give key_lengths or key_mask, not both")
    _expect("key_lengths", key_lengths, [k.shape[0]], (torch.int32, torch.int64), k)
    _expect("key_mask", key_mask, list(k.shape[:2]), (torch.bool,), k)


def _expect(
    name: str, tensor: Tensor | None, shape: list[int], dtypes: tuple[torch.dtype, ...], k: Tensor
) -> None:
    if tensor is None:
        return
    if list(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != k.device:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"attention: {name} must be {wanted} {shape} on {k.device}; "
            f"got {dtype_name(tensor)} {list(tensor.shape)} on {tensor.device}"
        )


def _decided(operator: Operator, call: AttentionCall, backend: str) -> Planned | None:
    """The plan of a call, None where torch serves it."""
    # Here, as this runs once for each layout, and of a compiled graph when it runs.
    if call.key_lengths is None and call.key_mask is None and _looks_transposed(call.q, call.k):
        _warn_of_layout()

    def measured() -> Literal["torch", "triton"]:
        # Torch's own is fast at the head dimensions that it was made for: ours has to have been measured to win.
        return fastest("attention", chip_of(call.q.device), lambda: tuning_key(call), unmeasured="torch")

    return plan_or_none(operator, call, backend, measured)


def _looks_transposed(q: Tensor, k: Tensor) -> bool:
    """Whether q and k may be [B, H, N, D]: self-attention of fewer tokens than heads.

    Not if k is a slice of a packed projection [B, N, ..., H, D], as the UNet's is: that has its tokens first.
    """
    sliced = k.stride(1) > k.shape[2] * k.stride(2)
    return q.shape == k.shape and 0 < q.shape[1] < q.shape[2] and not sliced


@functools.cache
def _warn_of_layout() -> None:
    """Warns once in a process, of the line that called the operator: between it and here is torch's dispatcher."""
    folders = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(folders):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        "attention: q, k and v have fewer tokens than heads, read as [B, N, H, D]. If they are [B, H, N, D], as "
        "for scaled_dot_product_attention, pass q.transpose(1, 2), k.transpose(1, 2) and v.transpose(1, 2), and "
        "transpose the result",
        stacklevel=level + 1,
    )


def _empty_result(call: AttentionCall) -> Tensor:
    return torch.empty_like(call.q, memory_format=torch.contiguous_format)


def _reference(call: AttentionCall) -> Tensor:
    return attention_ref(**call._asdict())


def _composite(call: AttentionCall) -> Tensor:
    """Torch's fused attention has no forward mode, and its gradient no gradient."""
    with sdpa_kernel(SDPBackend.MATH):
        return _reference(call)


def _flops(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    """Two matmuls of Nq x Nk x D per head, 2 FLOP per multiply-add, as torch counts its own operator."""
    batch, queries, heads, dim = q
    return 4 * batch * heads * queries * k[1] * dim


OPERATOR = Operator(
    "attention",
    attention,
    attention_ref,
    AttentionCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
    torchs_own=attention_ref,
)
_attention = define_operator(
    "attention(Tensor q, Tensor k, Tensor v, float? scale, Tensor? key_lengths, Tensor? key_mask, bool tf32, "
    "str backend) -> Tensor",
    OPERATOR,
    reference=_reference,
    fake=_empty_result,
    decide=_decided,
    autocast=lambda run, q, k, v, *others: run(*lowered(q, k, v), *others),
    formula=Formula(_formulas.attention, _formulas.attention_and_sums),
    composite=_composite,
    flops=_flops,
)
