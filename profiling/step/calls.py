"""The operator calls of one denoising step, as values: found by running the UNet of a size without memory.

The names of arguments come from the operators' schemas, so that a new operator or argument is in the cases as soon
as the UNet uses it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import OPERATORS
from ldmperf.model import FAMILY, UNet

from ..options import DType
from .call import Access, OperatorCall, Scalar, TensorSpec, sampling_plan

# The plans whose updates are cases: one register, two, four, and one with generated noise.
PLANS = ("ddim", "dpmpp_2m", "unipc", "euler_a")
# The group norms of Stable Diffusion's VAE decoder at 512x512: (pixels a side, channels).
_VAE = ((512, 128), (512, 256), (256, 256), (256, 512), (128, 512), (64, 512))


@functools.lru_cache(maxsize=64)
def family_calls(size: str, batch: int, dtype: DType, latents: int = 64) -> tuple[OperatorCall, ...]:
    """The distinct calls of a step of `size`, first the UNet's in order, then the sampler's.

    `batch` is the UNet's: twice the images with guidance. Sampler updates are of batch // 2 guided images, or of
    one image without guidance at batch 1.
    """
    config = FAMILY[size]
    torch_dtype: torch.dtype = getattr(torch, dtype)
    with torch.device("meta"), torch.no_grad():
        unet = UNet(config, backend="torch").to(torch_dtype)
        conditioning = unet.condition([500.0], torch.empty(batch, 77, config.context_dim, dtype=torch_dtype))
        sample = torch.empty(batch, config.in_channels, latents, latents, dtype=torch_dtype)
        sample = sample.to(memory_format=torch.channels_last)
        found = _record(lambda: unet.denoise(sample, conditioning, 0), dtype)
        # What the same step calls where products are merged with what stands beside them.
        merged = UNet(config, products="triton").to(torch_dtype)
        found += [
            case
            for case in _record(lambda: merged.denoise(sample, conditioning, 0), dtype)
            if case.operator == "linear"
        ]
    return (*found, *(sampler_call(plan, batch, dtype, latents) for plan in PLANS))


def vae_calls(dtype: DType = "bfloat16", batch: int = 1) -> tuple[OperatorCall, ...]:
    """The group norms of Stable Diffusion's VAE decoder at 512x512 pixels."""
    norm = OPERATORS["group_norm_silu"].call
    cases: list[OperatorCall] = []
    for side, channels in _VAE:
        x = torch.empty(batch, channels, side, side, dtype=getattr(torch, dtype), device="meta")
        x, weight = x.to(memory_format=torch.channels_last), x.new_empty(channels)
        cases += _record(functools.partial(norm, x, 32, weight, weight, 1e-6, backend="torch"), dtype)
    return tuple(cases)


def attention_calls(
    head_dim: int, queries: int, batch: int, dtype: DType = "bfloat16", *, heads: int = 8, context: int = 77
) -> tuple[OperatorCall, OperatorCall]:
    """Self-attention of so many tokens and their attention over a context, in memory as the UNet has them."""

    def packed(tokens: int, parts: int) -> tuple[Tensor, ...]:
        shape = (batch, tokens, parts, heads, head_dim)
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta").unbind(2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> OperatorCall:
        (case,) = _record(lambda: OPERATORS["attention"].call(q, k, v, backend="torch"), dtype)
        return case

    return call(*packed(queries, 3)), call(*packed(queries, 1), *packed(context, 2))


def sampler_call(plan: str, batch: int, dtype: DType, latents: int = 64) -> OperatorCall:
    """One update of `plan`, with guidance where the UNet's batch is even; registers are float32."""
    made = sampling_plan(plan)
    images, guided = (batch // 2, True) if batch % 2 == 0 else (batch, False)
    registers, steps = made.num_registers, len(made.steps)

    def image(name: str, *leading: int, dtype: str, access: Access) -> TensorSpec:
        strides = [4 * latents * latents * math.prod(leading[i + 1 :]) for i in range(len(leading))]
        shape = (*leading, 4, latents, latents)
        stride = (*strides, 1, 4 * latents, 4)
        return TensorSpec(name=name, shape=shape, stride=stride, dtype=dtype, access=access)

    def row(name: str, *shape: int) -> TensorSpec:
        stride = torch.empty(shape, device="meta").stride()
        return TensorSpec(name=name, shape=shape, stride=stride, dtype="float32", access="row")

    tensors = [
        image("registers", registers, images, dtype="float32", access="update"),
        image("model_output", batch, dtype=dtype, access="read"),
        row("table", steps, registers, registers + 2),
        TensorSpec(name="step", shape=(1,), stride=(1,), dtype="int64", access="row", below=steps),
    ]
    if guided:
        tensors.append(row("guidance_scale", steps))
    if made.stochastic:
        tensors.append(TensorSpec(name="seeds", shape=(images,), stride=(1,), dtype="int64", below=2**62))
    tensors += [image("model_input", batch, dtype=dtype, access="write"), row("input_scale", steps)]
    return OperatorCall(operator="sampler_update", dtype=dtype, tensors=tuple(tensors), plan=plan)


class Calls(TorchDispatchMode):
    """Notes the calls of operators that have kernels: (operator, arguments, result). For "meta" tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.addmm_.default:
            # On meta it takes milliseconds, and changes nothing.
            return args[0]
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.conv2d):
            # A convolution on the meta device forgets the layout that it has on every other. (In inference mode
            # conv2d comes whole.)
            return result.to(memory_format=torch.channels_last)
        name = _public_name(schema.name.partition("::")[2])
        if func.namespace != "aten" and name is not None:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
            taken = inspect.signature(OPERATORS[name].call).parameters
            arguments = {key: value for key, value in (given | (kwargs or {})).items() if key in taken}
            arguments.pop("backend", None)
            self.calls.append((name, arguments, result))
        return result


def _public_name(name: str) -> str | None:
    """The operator that a dispatcher entry belongs to: add_layer_norm is a part of layer_norm."""
    if name in OPERATORS:
        return name
    return next((operator for operator in OPERATORS if name.endswith(f"_{operator}")), None)


def _record(run: Callable[[], Any], dtype: DType) -> list[OperatorCall]:
    """The distinct calls that `run` makes, in order, with their counts."""
    with Calls() as noted:
        run()
    cases = Counter(_case(dtype, *call) for call in noted.calls)
    return [case.model_copy(update={"count": count}) for case, count in cases.items()]


def _case(dtype: DType, operator: str, arguments: dict[str, Any], result: Any) -> OperatorCall:
    # In the order of the public function, whose first tensor is the one a label tells.
    parameters = inspect.signature(OPERATORS[operator].call).parameters
    ordered = {name: arguments[name] for name in parameters if name in arguments}
    results = result if isinstance(result, tuple | list) else () if result is None else (result,)
    return OperatorCall(
        operator=operator,
        dtype=dtype,
        tensors=_specs({name: value for name, value in ordered.items() if isinstance(value, Tensor)}),
        scalars=tuple(
            Scalar(name=name, value=tuple(value) if isinstance(value, list) else value)
            for name, value in ordered.items()
            # None is said where it is not the default: activation=None is a call of its own.
            if not isinstance(value, Tensor) and not (value is None and parameters[name].default is None)
        ),
        results=tuple(_spec(f"result {i}", tensor) for i, tensor in enumerate(results)),
    )


def _specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Those of a call's arguments; of which several are slices of one memory, they stay so."""
    names: dict[StorageWeakRef, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(StorageWeakRef(tensor.untyped_storage()), []).append(name)
    found = {name: _spec(name, tensor) for name, tensor in tensors.items()}
    for sharing in names.values():
        offsets = {name: tensors[name].storage_offset() for name in sharing}
        if len(set(offsets.values())) > 1:
            start = min(offsets.values())
            for name, offset in offsets.items():
                changes = {"memory": "+".join(sharing), "offset": offset - start}
                found[name] = found[name].model_copy(update=changes)
    return tuple(found.values())


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(
        name=name,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=str(tensor.dtype).removeprefix("torch."),
        below=None if tensor.is_floating_point() else 2,
    )
