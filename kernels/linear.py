"""A linear layer together with what stands beside it: a layer norm before it, a gated GELU after it.

y = x' W^T + b, x' = layer_norm(x + x_bias) or x; gated, with W and b of 2C rows, y[:C] * gelu(y[C:]).
As a prologue of the matmul, a norm is neither written nor read. As its epilogue, a gate spares values and gates:
twice as wide as the result, they are the widest tensors of the network.

Two kernels (_linear_kernels.py). Where a program can keep whole rows, up to 512 channels, it normalizes them once
and multiplies them with tile after tile of the weight. Wider rows are multiplied piece by piece; their norm is a
launch of layer_norm.

A matmul alone is left to cuBLAS. Fusing pays only where it saves more time than our matmul loses. The tuned table
tells where that was measured; elsewhere `predicted_to_gain` (_linear_config.py) decides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import lowered
from ._checks import choice, real, tensors
from ._choice import Choice, chooser
from ._dependent import launches_dependently
from ._dispatch import choose_backend
from ._launch import (
    Chip,
    Launch,
    Operator,
    ceil_div,
    chip_of,
    dtype_name,
    tuned,
)
from ._layout import collapse_rows, row_reasons
from ._library import OUTS, define_operator
from ._linear_config import (
    LinearConfig,
    LinearShape,
    candidate_configs,
    default_config,
    keeps_rows,
    merged_and_separate_ns,
    predicted_to_gain,
)
from ._linear_kernels import linear_kernel, norm_linear_kernel
from ._parts import parts
from ._recipes import checked
from ._triton import contiguity_reasons, device_reasons, dtype_reasons, is_interpreted
from .geglu import geglu
from .layer_norm import OPERATOR as LAYER_NORM
from .layer_norm import LayerNormCall, layer_norm

ACTIVATIONS = ("geglu", None)
# Tiles of rows that run beside each other on the same columns.
GROUP_M = 8


class LinearCall(NamedTuple):
    """The arguments of `linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5
    x_bias: Tensor | None = None
    activation: str | None = None

    @property
    def norm(self) -> LayerNormCall | None:
        """The layer norm before the matmul."""
        if self.norm_weight is None or self.norm_bias is None:
            return None
        return LayerNormCall(self.x, self.norm_weight, self.norm_bias, self.eps, self.x_bias)

    @property
    def shape(self) -> LinearShape:
        """What a configuration depends on."""
        gated = self.activation is not None
        return LinearShape(
            rows=math.prod(self.x.shape[:-1]),
            channels=self.x.shape[-1],
            columns=self.weight.shape[0] // (2 if gated else 1),
            gated=gated,
            normed=self.norm_weight is not None,
            itemsize=self.x.element_size(),
        )


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Reference of `linear`: torch's matmul, whose sums are float32 for half dtypes, between the references of
    layer_norm and geglu."""
    call = LinearCall(x, weight, bias, norm_weight, norm_bias, eps, x_bias, activation)
    return _separate(call, "torch")


def linear_separate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """The same by torch's own matmul, with norm and gate in launches of their own, on `backend`.

    Arguments and errors as of `linear`, whose backend "auto" takes this where a fused kernel is not expected to
    be faster.
    """
    choose_backend("linear", backend, ())
    tensors(linear, (x, weight), (bias, norm_weight, norm_bias, x_bias))
    choice("linear", "activation", activation, ACTIVATIONS)
    call = LinearCall(x, weight, bias, norm_weight, norm_bias, real("linear", "eps", eps), x_bias, activation)
    return _separate(checked(OPERATOR, _lowered(call, backend)), backend)


def _separate(call: LinearCall, backend: str, out: Tensor | None = None) -> Tensor:
    norm, bias = call.norm, call.bias
    x = call.x if norm is None else _normalized(norm, backend)
    bias = None if bias is None else bias.to(x.dtype)
    if call.activation is None and out is not None:
        return _matmul_into(out, x, call.weight, bias)
    y = F.linear(x, call.weight, bias)
    return y if call.activation is None else geglu(y, backend=backend, out=out)


def _matmul_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, which has no `out`, by the matmul that it consists of."""
    if torch.compiler.is_compiling():
        # A compiler makes its own choice of what to write where.
        return out.copy_(F.linear(x, weight, bias))
    count = math.prod(x.shape[:-1])
    rows, result = x.reshape(count, x.shape[-1]), out.view(count, out.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        torch.addmm(bias, rows, weight.t(), out=result)
    return out


def _normalized(norm: LayerNormCall, backend: str) -> Tensor:
    out = layer_norm(norm.x, norm.weight, norm.bias, norm.eps, x_bias=norm.x_bias, backend=backend)
    assert isinstance(out, Tensor)
    return out


def candidates(call: LinearCall) -> list[LinearConfig]:
    """The configurations that bench/tune.py tries for this call."""
    return candidate_configs(call.shape, chip_of(call.x.device))


def tuning_key(call: LinearCall) -> str:
    """What a tuned configuration is looked up by."""
    return _key(call.shape, call.x.dtype)


def _key(shape: LinearShape, dtype: torch.dtype) -> str:
    sizes = f"rows={shape.rows} channels={shape.channels} columns={shape.columns}"
    beside = f"{' norm' if shape.normed else ''}{' geglu' if shape.gated else ''}"
    return f"{sizes} {str(dtype).removeprefix('torch.')}{beside}"


def plan(
    call: LinearCall, *, config: LinearConfig | None = None, chip: Chip | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result, not yet computed, and the launches that compute it: one, or two where rows are too wide to keep
    for their norm."""
    x, weight, norm, shape = call.x, call.weight, call.norm, call.shape
    out = _empty_result(call)
    if not out.numel():
        return out, []
    chip = chip or chip_of(x.device)
    config = config or tuned("linear", tuning_key(call), chip, LinearConfig) or default_config(shape, chip)
    if not config.block_k and not shape.normed:
        raise ValueError(f"linear: {config} keeps rows for their norm, and there is none")
    launches: list[Launch] = []
    if norm is not None and config.block_k:
        x, launches = LAYER_NORM.plan(norm)
    rows = collapse_rows([x])
    assert rows is not None
    pdl = launches_dependently(chip)
    ((stride_outer, stride_inner),) = rows.strides
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": call.bias,
        "out_ptr": out,
        "rows": rows.count,
        "columns": shape.columns,
        "inner": rows.inner,
        "stride_outer": stride_outer,
        "stride_inner": stride_inner,
        "stride_w": weight.stride(0),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GATED": shape.gated,
        "EVEN_N": shape.columns % (config.block_n * config.tiles_n) == 0,
        "FLAT": rows.flat,
        "PRECISION": "ieee",
        # Largest power of two up to 8 that divides all strides. The compiler cannot infer it for a stride of 40.
        "ALIGN": math.gcd(8, stride_outer, stride_inner, weight.stride(0)),
        "PDL": pdl,
    }
    programs = ceil_div(rows.count, config.block_m) * ceil_div(shape.columns, config.block_n * config.tiles_n)
    if config.block_k:
        kernel = linear_kernel
        arguments |= {
            "channels": shape.channels,
            "BLOCK_K": config.block_k,
            "GROUP_M": GROUP_M,
            "EVEN_K": shape.channels % config.block_k == 0,
        }
    else:
        kernel = norm_linear_kernel
        part_1, part_2 = parts(shape.channels)
        arguments |= {
            "x_bias_ptr": call.x_bias,
            "norm_weight_ptr": call.norm_weight,
            "norm_bias_ptr": call.norm_bias,
            "eps": call.eps,
            "tiles_n": config.tiles_n,
            "CHANNELS": shape.channels,
            "PART_1": part_1,
            "PART_2": part_2,
        }
    fused = (None if config.block_k else "layer_norm", "linear", call.activation)
    launch = Launch(
        kernel,
        programs,
        arguments,
        config.num_warps,
        config.num_stages,
        operator="linear",
        role=" + ".join(name for name in fused if name),
        flops=_flops(x.shape, weight.shape),
        pdl=pdl,
    )
    return out, [*launches, launch]


def unsupported_reasons(call: LinearCall) -> list[str]:
    """Every reason why the Triton kernels cannot serve this call; empty when they can."""
    x, weight, bias, norm_weight, norm_bias, _, x_bias, _ = call
    reasons = [
        *device_reasons(linear_kernel, x),
        *dtype_reasons(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, x_bias=x_bias),
        *row_reasons(collapse_rows([x]), x=x, weight=weight),
        *contiguity_reasons(bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, x_bias=x_bias),
    ]
    if x.shape[-1] == 0:
        reasons.append("there are no channels")
    if x.dtype == torch.bfloat16 and is_interpreted(linear_kernel):
        reasons.append("triton's interpreter multiplies bfloat16 as if it were integers")
    if call.norm is not None and not keeps_rows(x.shape[-1], x.element_size(), chip_of(x.device).arch):
        reasons += [text for text in LAYER_NORM.unsupported_reasons(call.norm) if text not in reasons]
    return reasons


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N] -> contiguous [..., N] in x's dtype.

    norm_weight, norm_bias  [K] each, or neither: x is first normalized over its channels, with `eps`
    x_bias      [K], with a norm: added to x before it
    activation  "geglu": the result is [..., N / 2], the first half of the columns times gelu_erf of the second
    backend     "triton": the kernels; a norm of rows too wide to keep is a launch of its own
                "torch": torch's matmul between the references of layer_norm and geglu
                "auto": the kernels where that was measured, or is predicted, to be faster on this GPU, else
                torch's matmul between the kernels of layer_norm and geglu
    out         is written and returned: contiguous, of the result's shape, memory of its own, no gradients

    x and weight share a dtype; vectors are of any float dtype. Under autocast as F.linear after F.layer_norm: the
    norm is of x before autocast rounds it, the matmul in autocast's dtype. Raises ValueError for what does not
    fit, `KernelUnsupported` for `backend="triton"` where the kernels cannot serve.
    Sources: Ba et al., arXiv 1607.06450 (layer norm); Shazeer, arXiv 2002.05202 (GEGLU).
    """
    tensors(linear, (x, weight), (bias, norm_weight, norm_bias, x_bias))
    choice("linear", "activation", activation, ACTIVATIONS)
    call = LinearCall(x, weight, bias, norm_weight, norm_bias, real("linear", "eps", eps), x_bias, activation)
    if backend == "auto":
        # Outside the operator, so that what is chosen is seen by whoever traces: one operator, or three.
        call = _lowered(call, backend)
        backend = _CHOICE.auto(call)
        if backend == "torch":
            if out is not None:
                OUTS["linear"].checked((*call, "auto"), out)
            return _separate(call, "auto", out)
    result: Tensor = _linear(*call, backend, out=out)
    return result


def _lowered(call: LinearCall, backend: str) -> LinearCall:
    """The call as autocast makes it, which rounds the result of a norm, not the norm's input."""
    if not torch._C._is_any_autocast_enabled():
        return call
    x, weight, bias = lowered(call.x, call.weight, call.bias)
    low = call._replace(x=x, weight=weight, bias=bias)
    if x.dtype != call.x.dtype and call.norm is not None:
        checked(OPERATOR, low)
        (x,) = lowered(_normalized(call.norm, backend))
        low = low._replace(x=x, norm_weight=None, norm_bias=None, x_bias=None)
    return low


def _check(call: LinearCall) -> None:
    x, weight, bias, norm_weight, norm_bias, _, x_bias, activation = call
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"linear: x must be a float [..., K]; got {x.dtype} {list(x.shape)}")
    channels = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != channels or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"linear: weight must be {dtype_name(x)} [N, {channels}] on {x.device}; "
            f"got {dtype_name(weight)} {list(weight.shape)} on {weight.device}"
        )
    choice("linear", "activation", activation, ACTIVATIONS)
    if activation is not None and weight.shape[0] % 2:
        raise ValueError(f"linear: with geglu the weight's rows must be even; got {weight.shape[0]}")
    if (norm_weight is None) != (norm_bias is None) or (x_bias is not None and norm_weight is None):
        raise ValueError("linear: norm_weight and norm_bias come together, and x_bias only with them")
    vectors = (
        ("bias", bias, weight.shape[0]),
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
        ("x_bias", x_bias, channels),
    )
    for name, vector, length in vectors:
        if vector is not None and (vector.shape != (length,) or not vector.is_floating_point()):
            raise ValueError(
                f"linear: {name} must be a float [{length}]; got {dtype_name(vector)} {list(vector.shape)}"
            )


def _empty_result(call: LinearCall) -> Tensor:
    return call.x.new_empty((*call.x.shape[:-1], call.shape.columns))


def _flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """A multiply-add is two; norms and gates are left out, as torch leaves out its own."""
    return 2 * math.prod(x) * weight[0]


OPERATOR = Operator(
    "linear",
    linear,
    linear_ref,
    LinearCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
    torchs_own=linear_separate,
    predicted_ns=lambda call, chip: merged_and_separate_ns(call.shape, chip),
)
_CHOICE = Choice(
    OPERATOR,
    linear_kernel,
    chooser("linear", LinearShape, predicted_to_gain, _key, tells=True),
    lambda call: dataclasses.astuple(call.shape),
    lambda call: (call.shape.rows, call.shape.channels),
)
_linear = define_operator(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor? x_bias, str? activation, str backend) -> Tensor",
    OPERATOR,
    reference=lambda call: _separate(call, "torch").contiguous(),
    fake=_empty_result,
    autocast=lambda run, *arguments: run(*_lowered(LinearCall(*arguments[:-1]), arguments[-1]), arguments[-1]),
    flops=_flops,
)
