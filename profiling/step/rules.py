"""The GPU launches behind an operator call, by a table: a prediction, not read off a device.

torch's operators are those of its CUDA backend (aten/src/ATen/native), in bf16 or fp16 on a chip from sm_80 on;
each rule says where its number comes from. The launches of our own operators are those of their plans.
Bytes: every tensor read counts once, every one written too, and one that is updated in place twice.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS, Launch

from .launches import GpuLaunch, Group
from .recording import Op

# Of an H100 or H200; flash attention divides its keys by it.
MULTIPROCESSORS = 132
READ_BACK = "copy of a number to the host, which waits"


class UnknownOperator(LookupError):
    """An operator whose launches no rule tells; the text names it."""


def launches_of(ops: Iterable[Op]) -> list[GpuLaunch]:
    """The launches of operator calls, in order. Raises `UnknownOperator` for one that no rule covers."""
    found: list[GpuLaunch] = []
    for op in ops:
        launches = _launches(op)
        found += launches if op.in_network else [replace(launch, group="sampler") for launch in launches]
    return found


def _launches(op: Op) -> list[GpuLaunch]:
    if op.is_view or op.name in _FREE:
        return []
    namespace, _, name = op.name.partition("::")
    # add_layer_norm is a part of layer_norm.
    operator = next((known for known in OPERATORS if name == known or name.endswith(f"_{known}")), None)
    if namespace == "ldmperf" and operator is not None and operator in _OUR_GROUPS:
        return _ours(op, operator)
    if op.name in _RULES:
        return _RULES[op.name](op)
    raise UnknownOperator(
        f"no rule tells the launches of {op.name} ({_shapes(op.tensors)}): add one to profiling/step/rules.py"
    )


def nbytes(tensor: Tensor) -> int:
    """Bytes of memory that it has elements in: an expanded dimension (stride 0) counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.itemsize


def _bytes(*tensors: Tensor) -> int:
    return sum(nbytes(tensor) for tensor in tensors)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "1"


def _shapes(tensors: Iterable[Tensor]) -> str:
    """Shapes, those of vectors (weights and biases of norms) left out where there are larger ones."""
    tensors = list(tensors)
    return ", ".join(_shape(t) for t in tensors if t.dim() > 1 or all(t.dim() <= 1 for t in tensors))


def _launch(op: Op, name: str, group: Group, exponentials: int = 0) -> GpuLaunch:
    """One launch that reads all of an operator's tensors and writes its first result."""
    results = op.results[:1]
    return GpuLaunch(
        name=name,
        group=group,
        reads=_shapes(op.tensors),
        writes=_shapes(results),
        nbytes=_bytes(*op.tensors, *results),
        flops=op.flops,
        exponentials=exponentials,
        first_result=_bytes(*results),
    )


def _copy(name: str, tensor: Tensor) -> GpuLaunch:
    """The launch that writes a tensor once more in another layout."""
    size = nbytes(tensor)
    return GpuLaunch(name, "copies", _shape(tensor), _shape(tensor), 2 * size, first_result=size)


def _one(name: str, group: Group) -> Callable[[Op], list[GpuLaunch]]:
    return lambda op: [_launch(op, name, group)]


def _convolution(op: Op) -> list[GpuLaunch]:
    """Convolution.cpp, ConvBackend::Cudnn: input.contiguous(layout), cudnn_convolution, output.add_(bias).

    The layout is channels-last, as the weights are. cuDNN's own kernels may be more than one; counted as one.
    """
    x, weight, bias = (op.arguments[name] for name in ("input", "weight", "bias"))
    (out,) = op.results
    launches = []
    if not x.is_contiguous(memory_format=torch.channels_last):
        launches.append(_copy("copy to channels-last for a convolution", x))
    size = nbytes(out)
    launches.append(
        GpuLaunch(
            "convolution",
            "convolution",
            _shapes([x, weight]),
            _shape(out),
            _bytes(x, weight, out),
            flops=op.flops,
            first_result=size,
        )
    )
    if bias is not None:
        moved = 2 * size + nbytes(bias)
        name = "bias of a convolution"
        launches.append(
            GpuLaunch(name, "elementwise and residual", _shape(out), _shape(out), moved, first_result=size)
        )
    return launches


def _native_group_norm(op: Op) -> list[GpuLaunch]:
    """group_norm_kernel.cu: moments of each group, then a x + b, its a and b [N, C] computed by a launch between.

    It serves contiguous memory only: group_norm.cpp copies what is channels-last, inside or before this operator.
    """
    x = op.arguments["input"]
    out, mean, rstd = op.results
    launches = [] if x.is_contiguous() else [_copy("copy to contiguous", x)]
    coefficients = 2 * 4 * x.shape[0] * x.shape[1]
    vectors = _bytes(*(op.arguments[name] for name in ("weight", "bias") if op.arguments[name] is not None))
    statistics = _bytes(mean, rstd)
    shape, small = _shape(x), _shape(mean)
    return [
        *launches,
        GpuLaunch("group norm: moments", "group norm", shape, small, nbytes(x) + statistics),
        GpuLaunch("group norm: coefficients", "group norm", small, small, statistics + vectors + coefficients),
        GpuLaunch(
            "group norm: apply",
            "group norm",
            shape,
            shape,
            _bytes(x, out) + coefficients,
            first_result=nbytes(out),
        ),
    ]


def _native_layer_norm(op: Op) -> list[GpuLaunch]:
    """layer_norm_kernel.cu: one vectorized launch where rows are whole vectors of 4, else moments and apply."""
    channels = op.arguments["normalized_shape"][-1]
    launch = _launch(op, "layer norm", "layer norm")
    moments = [] if channels % 4 == 0 else [replace(launch, name="layer norm: moments")]
    return [*moments, launch]


def _attention(op: Op) -> list[GpuLaunch]:
    """One fused launch, and a second where flash attention divides the keys: too few tiles fill the chip."""
    heads, queries, keys, dim = _attention_sizes(op)
    name = _attention_name(op)
    launch = _launch(op, name, "attention", exponentials=heads * queries * keys)
    splits = flash_splits(heads, queries, keys, dim)
    if splits == 1:
        return [launch]
    # Each part of the keys has its own float32 result and the logarithm of its sum.
    rounded = -(-dim // 32) * 32 if dim <= 128 else -(-dim // 64) * 64
    partial = 4 * splits * heads * queries * (rounded + 1)
    combined = GpuLaunch(
        f"{name}: combine",
        "attention",
        f"{splits} parts",
        launch.writes,
        partial + launch.first_result,
        first_result=launch.first_result,
    )
    divided = replace(
        launch,
        writes=f"{splits} parts",
        nbytes=launch.nbytes - launch.first_result + partial,
        first_result=partial,
    )
    return [divided, combined]


def _attention_sizes(op: Op) -> tuple[int, int, int, int]:
    """Heads of all samples, queries, keys, head dimension; aten's are [B, H, N, D], ours [B, N, H, D]."""
    q, k = (op.arguments[name].shape for name in (("query", "key") if op.name.startswith("aten") else ("q", "k")))
    heads, tokens = (1, 2) if op.name.startswith("aten") else (2, 1)
    return q[0] * q[heads], q[tokens], k[tokens], q[3]


def _attention_name(op: Op) -> str:
    _, queries, keys, _ = _attention_sizes(op)
    return "attention" if keys == queries else "cross-attention"


def flash_splits(heads: int, queries: int, keys: int, dim: int) -> int:
    """Into how many parts flash attention divides the keys: flash_api.cpp, set_params_splitkv.

    `heads` counts those of all samples.
    """
    block = 256 if dim <= 64 else 128 if dim <= 128 else 64
    blocks, tiles, slots = -(-keys // block), heads * -(-queries // 64), 2 * MULTIPROCESSORS
    if tiles >= 0.8 * slots:
        return 1
    efficiency = {}
    for parts in range(1, min(128, slots, blocks) + 1):
        if parts == 1 or -(-blocks // parts) != -(-blocks // (parts - 1)):
            waves = tiles * parts / slots
            efficiency[parts] = waves / math.ceil(waves)
    best = max(efficiency.values())
    return next(parts for parts, reached in efficiency.items() if reached >= 0.85 * best)


def _silu(op: Op) -> list[GpuLaunch]:
    # Of an image it follows a group norm; of a vector it is the time embedding's.
    image = op.results[0].dim() == 4
    return [_launch(op, "SiLU", "group norm" if image else "elementwise and residual")]


def _mul(op: Op) -> list[GpuLaunch]:
    # The product of two tensors of tokens is the gate of a GEGLU.
    gate = len(op.tensors) == 2 and all(tensor.dim() == 3 for tensor in op.tensors)
    return [_launch(op, "mul", "GEGLU" if gate else "elementwise and residual")]


def _ours(op: Op, operator: str) -> list[GpuLaunch]:
    """The launches of an operator's plan, whose tensors each count once; a sampler's registers are updated."""
    taken = inspect.signature(OPERATORS[operator].call).parameters
    arguments = {name: value for name, value in op.arguments.items() if name in taken and name != "backend"}
    softmax = math.prod(_attention_sizes(op)[:3]) if operator == "attention" else 0
    launches: list[GpuLaunch] = []
    planned = OPERATORS[operator].plan(OPERATORS[operator].bind(**arguments))[1]
    for launch in planned:
        tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, Tensor)}
        moved = _bytes(*tensors.values(), *([op.arguments["registers"]] if operator == "sampler_update" else []))
        last = launch is planned[-1]
        written = op.results[0] if op.results else op.arguments["model_input"]
        launches.append(
            GpuLaunch(
                name=_our_name(op, operator, launch.name),
                group=_OUR_GROUPS["layer_norm" if launch.name == "layer_norm_kernel" else operator],
                reads=_shapes(op.tensors) if last else _shape(op.tensors[0]),
                writes=_shape(written) if last else _between(launch),
                nbytes=moved,
                flops=op.flops if last else 0,
                exponentials=softmax if last else 0,
                first_result=nbytes(written) if last else 0,
            )
        )
    return launches


def _our_name(op: Op, operator: str, kernel: str) -> str:
    """The kernel's name; that of attention tells of what, that of a product what is merged with it."""
    if operator == "attention":
        return _attention_name(op)
    if operator == "linear" and kernel != "layer_norm_kernel":
        norm = "layer_norm + " if kernel == "norm_linear_kernel" else ""
        return f"{norm}linear{' + geglu' if op.arguments['activation'] else ''}"
    return kernel.removesuffix("_kernel")


def _between(launch: Launch) -> str:
    """What a launch that is not the last of its operator writes."""
    out = launch.arguments.get("out_ptr")
    return "partial sums" if out is None else _shape(out)


_OUR_GROUPS: Mapping[str, Group] = {
    "attention": "attention",
    "group_norm_silu": "group norm",
    "layer_norm": "layer norm",
    "linear": "linear",
    "geglu": "GEGLU",
    "residual_add": "elementwise and residual",
    "sampler_update": "sampler",
}

# Memory without values, and a view that torch does not declare as one.
_FREE = frozenset(
    {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}
)

# TensorIterator: an elementwise operator is one launch, whatever its strides and broadcasts.
_ELEMENTWISE = ("add", "add_", "sub", "div", "exp", "sin", "cos", "arange", "ge")

_RULES: Mapping[str, Callable[[Op], list[GpuLaunch]]] = {
    **{f"aten::{name}": _one(name.rstrip("_"), "elementwise and residual") for name in _ELEMENTWISE},
    "aten::mul": _mul,
    "aten::silu": _silu,
    "aten::gelu": _one("GELU", "GEGLU"),
    "aten::convolution": _convolution,
    # Blas.cpp: one cuBLAS product; a bias vector is added by its epilogue, a matrix is updated in place.
    "aten::addmm": _one("linear", "linear"),
    "aten::addmm_": _one("linear", "linear"),
    "aten::mm": _one("linear", "linear"),
    # Linear.cpp: tokens that are not contiguous take a product per sample, and an addition for the bias.
    "aten::bmm": _one("linear, batched", "linear"),
    "aten::native_group_norm": _native_group_norm,
    "aten::native_layer_norm": _native_layer_norm,
    "aten::_scaled_dot_product_flash_attention": _attention,
    # UpSample.cuh, Shape.cu (up to 64 tensors in one launch), Copy.cu.
    "aten::upsample_nearest2d": _one("nearest upsampling", "copies"),
    "aten::cat": _one("concatenation", "copies"),
    "aten::index_select": _one("gather of a row", "copies"),
    "aten::_to_copy": _one("cast", "copies"),
    "aten::clone": _one("copy to contiguous", "copies"),
    "aten::_local_scalar_dense": _one(READ_BACK, "copies"),
}
