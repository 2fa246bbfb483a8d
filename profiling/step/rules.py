"""The GPU launches behind an operator call, by a table: a prediction, not read off a device.

torch's operators are those of its CUDA backend (aten/src/ATen/native), in bf16 or fp16 on a chip from sm_80 on;
each rule says where its number comes from. The launches of our own operators are those of their plans.
Bytes: every tensor read counts once, every one written too, and one that is updated in place twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ldmperf.kernels import Launch

from ..machines import SM_90
from .call import nbytes
from .launches import GpuLaunch, LaunchGroup
from .recording import RecordedCall

READ_BACK = "copy of a number to the host, which waits"


class UnknownOperator(LookupError):
    """An operator whose launches no rule tells; the text names it."""


def launches_of(calls: Iterable[RecordedCall]) -> list[GpuLaunch]:
    """The launches of recorded calls, in order. Raises `UnknownOperator` for a call that no rule covers."""
    found: list[GpuLaunch] = []
    for call in calls:
        launches = _launches(call)
        found += launches if call.in_network else [replace(launch, group="sampler") for launch in launches]
    return found


def _launches(call: RecordedCall) -> list[GpuLaunch]:
    if call.is_view or call.name in _FREE:
        return []
    if call.operator in _OUR_GROUPS:
        return _ours(call)
    if call.name in _RULES:
        return _RULES[call.name](call)
    raise UnknownOperator(
        f"no rule tells the launches of {call.name} ({_shapes(call.tensors)}): add one to profiling/step/rules.py"
    )


def _bytes(*tensors: Tensor) -> int:
    return sum(nbytes(tensor) for tensor in tensors)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "1"


def _shapes(tensors: Iterable[Tensor]) -> str:
    """Shapes, those of vectors (weights and biases of norms) left out where there are larger ones."""
    tensors = list(tensors)
    return ", ".join(_shape(t) for t in tensors if t.dim() > 1 or all(t.dim() <= 1 for t in tensors))


def _launch(call: RecordedCall, name: str, group: LaunchGroup) -> GpuLaunch:
    """One launch that reads all of a call's tensors and writes its first result."""
    results = call.results[:1]
    moved = _bytes(*call.tensors, *results)
    return GpuLaunch(name, group, _shapes(call.tensors), _shapes(results), moved, call.flops)


def _copy(name: str, tensor: Tensor) -> GpuLaunch:
    """The launch that writes a tensor once more in another layout."""
    return GpuLaunch(name, "copies", _shape(tensor), _shape(tensor), 2 * nbytes(tensor))


def _one(name: str, group: LaunchGroup) -> Callable[[RecordedCall], list[GpuLaunch]]:
    return lambda call: [_launch(call, name, group)]


def _convolution(call: RecordedCall) -> list[GpuLaunch]:
    """Convolution.cpp, ConvBackend::Cudnn: input.contiguous(layout), cudnn_convolution, output.add_(bias).

    The layout is channels-last, as the weights are. cuDNN's own kernels may be more than one; counted as one.
    """
    x, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
    (out,) = call.results
    shape, moved = _shape(out), _bytes(x, weight, out)
    launches = [GpuLaunch("convolution", "convolution", _shapes([x, weight]), shape, moved, call.flops)]
    if not x.is_contiguous(memory_format=torch.channels_last):
        launches.insert(0, _copy("copy to channels-last for a convolution", x))
    if bias is not None:
        moved = _bytes(out, out, bias)
        launches.append(GpuLaunch("bias of a convolution", "elementwise and residual", shape, shape, moved))
    return launches


def _native_group_norm(call: RecordedCall) -> list[GpuLaunch]:
    """group_norm_kernel.cu: moments of each group, then a x + b, its a and b [N, C] computed by a launch between.

    It serves contiguous memory only: group_norm.cpp copies what is channels-last, inside or before this operator.
    """
    x, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
    out, mean, rstd = call.results
    coefficients = 2 * 4 * x.shape[0] * x.shape[1]
    vectors, statistics = _bytes(*(v for v in (weight, bias) if v is not None)), _bytes(mean, rstd)
    shape, small = _shape(x), _shape(mean)
    copies = [] if x.is_contiguous() else [_copy("copy to contiguous", x)]
    parts = (
        ("moments", shape, small, nbytes(x) + statistics),
        ("coefficients", small, small, statistics + vectors + coefficients),
        ("apply", shape, shape, _bytes(x, out) + coefficients),
    )
    return [*copies, *(GpuLaunch(f"group norm: {name}", "group norm", *part) for name, *part in parts)]


def _native_layer_norm(call: RecordedCall) -> list[GpuLaunch]:
    """layer_norm_kernel.cu: one vectorized launch where rows are whole vectors of 4, else moments and apply."""
    channels = call.arguments["normalized_shape"][-1]
    launch = _launch(call, "layer norm", "layer norm")
    moments = [] if channels % 4 == 0 else [replace(launch, name="layer norm: moments")]
    return [*moments, launch]


def _attention(call: RecordedCall) -> list[GpuLaunch]:
    """One fused launch, and a second where flash attention divides the keys: too few tiles fill the chip."""
    q, k = call.arguments["query"].shape, call.arguments["key"].shape
    heads, queries, keys, dim = q[0] * q[1], q[2], k[2], q[3]
    name = "attention" if keys == queries else "cross-attention"
    launch = replace(_launch(call, name, "attention"), exponentials=heads * queries * keys)
    splits = flash_splits(heads, queries, keys, dim)
    if splits == 1:
        return [launch]
    # Each part of the keys has its own float32 result and the logarithm of its sum.
    rounded = -(-dim // 32) * 32 if dim <= 128 else -(-dim // 64) * 64
    parts, partial, result = (
        f"{splits} parts",
        4 * splits * heads * queries * (rounded + 1),
        nbytes(call.results[0]),
    )
    return [
        replace(launch, writes=parts, nbytes=launch.nbytes - result + partial),
        GpuLaunch(f"{name}: combine", "attention", parts, launch.writes, partial + result),
    ]


def flash_splits(heads: int, queries: int, keys: int, dim: int) -> int:
    """Into how many parts flash attention divides the keys on an H200: flash_api.cpp, set_params_splitkv.

    `heads` counts those of all samples.
    """
    block = 256 if dim <= 64 else 128 if dim <= 128 else 64
    blocks, tiles, slots = -(-keys // block), heads * -(-queries // 64), 2 * SM_90.multiprocessors
    if tiles >= 0.8 * slots:
        return 1
    efficiency = {}
    for parts in range(1, min(128, slots, blocks) + 1):
        if parts == 1 or -(-blocks // parts) != -(-blocks // (parts - 1)):
            waves = tiles * parts / slots
            efficiency[parts] = waves / math.ceil(waves)
    best = max(efficiency.values())
    return next(parts for parts, reached in efficiency.items() if reached >= 0.85 * best)


def _silu(call: RecordedCall) -> list[GpuLaunch]:
    # Of an image it follows a group norm; of a vector it is the time embedding's.
    image = call.results[0].dim() == 4
    return [_launch(call, "SiLU", "group norm" if image else "elementwise and residual")]


def _mul(call: RecordedCall) -> list[GpuLaunch]:
    # Two tensors of tokens: values and gates of a GEGLU.
    gate = len(call.tensors) == 2 and all(tensor.dim() == 3 for tensor in call.tensors)
    return [_launch(call, "mul", "GEGLU" if gate else "elementwise and residual")]


def _embedding(call: RecordedCall) -> list[GpuLaunch]:
    # Of the table, only the rows that it writes are read.
    launch, unread = _launch(call, "gather of a row", "copies"), nbytes(call.arguments["weight"])
    return [replace(launch, nbytes=launch.nbytes - unread + nbytes(call.results[0]))]


def _ours(call: RecordedCall) -> list[GpuLaunch]:
    """The launches that our operator plans; the last one writes the result."""
    launches = call.launches
    result = call.results[0] if call.results else call.arguments["model_input"]
    return [
        GpuLaunch(
            name=launch.role or launch.operator,
            group=_OUR_GROUPS[launch.operator],
            reads=_shapes(call.tensors) if launch is launches[-1] else _shape(call.tensors[0]),
            writes=_shape(result) if launch is launches[-1] else _between(launch),
            nbytes=launch.nbytes,
            flops=launch.flops,
            exponentials=launch.exponentials,
            is_ours=True,
        )
        for launch in launches
    ]


def _between(launch: Launch) -> str:
    """What a launch writes that is not the last of its operator."""
    out = launch.arguments.get("out_ptr")
    return "partial sums" if out is None else _shape(out)


_OUR_GROUPS: Mapping[str, LaunchGroup] = {
    "attention": "attention",
    "group_norm_silu": "group norm",
    "layer_norm": "layer norm",
    "linear": "linear",
    "conv3x3": "convolution",
    "geglu": "GEGLU",
    "residual_add": "elementwise and residual",
    "sampler_update": "sampler",
    **dict.fromkeys(("transformer_front", "transformer_tail"), "linear"),
}

# Memory without values, and a view that torch does not declare as one.
_FREE = frozenset(
    {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}
)

# TensorIterator: an elementwise operator is one launch, whatever its strides and broadcasts.
_ELEMENTWISE = ("add", "add_", "sub", "div", "exp", "sin", "cos", "arange", "ge")

_RULES: Mapping[str, Callable[[RecordedCall], list[GpuLaunch]]] = {
    **{f"aten::{name}": _one(name.rstrip("_"), "elementwise and residual") for name in _ELEMENTWISE},
    "aten::mul": _mul,
    "aten::silu": _silu,
    "aten::gelu": _one("GELU", "GEGLU"),
    "aten::convolution": _convolution,
    # Blas.cpp: one cuBLAS matmul. Its epilogue adds a bias vector; a matrix is updated in place.
    "aten::addmm": _one("linear", "linear"),
    "aten::addmm_": _one("linear", "linear"),
    "aten::mm": _one("linear", "linear"),
    # Linear.cpp: tokens that are not contiguous take a matmul per sample, and an addition for the bias.
    "aten::bmm": _one("linear, batched", "linear"),
    "aten::native_group_norm": _native_group_norm,
    "aten::native_layer_norm": _native_layer_norm,
    "aten::_scaled_dot_product_flash_attention": _attention,
    # UpSample.cuh, Shape.cu (up to 64 tensors in one launch), Copy.cu.
    "aten::upsample_nearest2d": _one("nearest upsampling", "copies"),
    "aten::cat": _one("concatenation", "copies"),
    "aten::embedding": _embedding,
    "aten::index_select": _one("gather of a row", "copies"),
    "aten::_to_copy": _one("cast", "copies"),
    "aten::clone": _one("copy to contiguous", "copies"),
    "aten::_local_scalar_dense": _one(READ_BACK, "copies"),
}
