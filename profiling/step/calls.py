"""The operator calls of one denoising step, as values: found by running the UNet of a size without memory.

The names of arguments come from the operators' schemas, so that a new operator or argument is in the calls as soon
as the UNet uses it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ldmperf.kernels import OPERATORS
from ldmperf.model import FAMILY, Choices, UNet

from ..options import DType
from .call import Access, OperatorCall, Scalar, TensorSpec, sampling_plan
from .recording import RecordedCall, calls_of_ours

# The plans whose updates are calls of a step: one register, two, four, and one with generated noise.
PLANS = ("ddim", "dpmpp_2m", "unipc", "euler_a")
# Of attention in the family: its widths over 8 heads.
FAMILY_HEAD_DIMS = tuple(
    sorted(
        {
            width // heads
            for config in FAMILY.values()
            for width, heads in zip(config.block_channels, config.num_heads, strict=True)
        }
    )
)
# The group norms of Stable Diffusion's VAE decoder at 512x512: (pixels a side, channels).
_VAE = ((512, 128), (512, 256), (256, 256), (256, 512), (128, 512), (64, 512))


@functools.lru_cache(maxsize=64)
def family_calls(
    size: str, batch: int, dtype: DType, latent: tuple[int, int] = (64, 64), context_tokens: int = 77
) -> tuple[OperatorCall, ...]:
    """The distinct calls of a step of `size`, first the UNet's in order, then the sampler's.

    `batch` is the UNet's: twice the images with guidance. Sampler updates are of batch // 2 guided images, or of
    one image without guidance at batch 1. `latent` is height and width.
    """
    config = FAMILY[size]
    torch_dtype: torch.dtype = getattr(torch, dtype)
    with torch.device("meta"), torch.no_grad():
        unet = UNet(config, backend="torch").to(torch_dtype)
        context = torch.empty(batch, context_tokens, config.context_dim, dtype=torch_dtype)
        conditioning = unet.condition([500.0], context)
        sample = torch.empty(batch, config.in_channels, *latent, dtype=torch_dtype)
        sample = sample.to(memory_format=torch.channels_last)
        found = _distinct(lambda: unet.denoise(sample, conditioning, 0), dtype)
        # What the same step calls besides, where all is merged that can be.
        merged = UNet(config, **Choices(*["triton"] * 5)._replace(backend="auto")._asdict()).to(torch_dtype)
        known = {call.key for call in found}
        found += [
            call
            for call in _distinct(lambda: merged.denoise(sample, conditioning, 0), dtype)
            if call.key not in known
        ]
    return (*found, *(sampler_call(plan, batch, dtype, latent) for plan in PLANS))


def vae_calls(dtype: DType = "bfloat16", batch: int = 1) -> tuple[OperatorCall, ...]:
    """The group norms of Stable Diffusion's VAE decoder at 512x512 pixels."""
    norm = OPERATORS["group_norm_silu"].call
    calls: list[OperatorCall] = []
    for side, channels in _VAE:
        x = torch.empty(batch, channels, side, side, dtype=getattr(torch, dtype), device="meta")
        x, weight = x.to(memory_format=torch.channels_last), x.new_empty(channels)
        calls += _distinct(functools.partial(norm, x, 32, weight, weight, 1e-6, backend="torch"), dtype)
    return tuple(calls)


def attention_calls(
    head_dim: int, queries: int, batch: int, dtype: DType = "bfloat16"
) -> tuple[OperatorCall, OperatorCall]:
    """Attention of 8 heads and so many tokens, to themselves and to 77 of text, in memory as in the UNet."""

    def packed(tokens: int, parts: int) -> tuple[Tensor, ...]:
        shape = (batch, tokens, parts, 8, head_dim)
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta").unbind(2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> OperatorCall:
        (found,) = _distinct(lambda: OPERATORS["attention"].call(q, k, v, backend="torch"), dtype)
        return found

    return call(*packed(queries, 3)), call(*packed(queries, 1), *packed(77, 2))


def sampler_call(plan: str, batch: int, dtype: DType, latent: tuple[int, int] = (64, 64)) -> OperatorCall:
    """One update of `plan`, with guidance where the UNet's batch is even; registers are float32."""
    made = sampling_plan(plan)
    images, guided = (batch // 2, True) if batch % 2 == 0 else (batch, False)
    registers, steps, (height, width) = made.num_registers, len(made.steps), latent

    def image(name: str, *leading: int, dtype: str, access: Access) -> TensorSpec:
        strides = [4 * height * width * math.prod(leading[i + 1 :]) for i in range(len(leading))]
        shape = (*leading, 4, height, width)
        stride = (*strides, 1, 4 * width, 4)
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


def _distinct(run: Callable[[], Any], dtype: DType) -> list[OperatorCall]:
    """The distinct calls that `run` makes, in order, with their counts."""
    counts = Counter(_as_value(call, dtype) for call in calls_of_ours(run))
    return [call.model_copy(update={"count": count}) for call, count in counts.items()]


def _as_value(call: RecordedCall, dtype: DType) -> OperatorCall:
    assert call.operator is not None
    given = call.given
    parameters = inspect.signature(OPERATORS[call.operator].call).parameters
    return OperatorCall(
        operator=call.operator,
        dtype=dtype,
        tensors=_specs({name: value for name, value in given.items() if isinstance(value, Tensor)}),
        scalars=tuple(
            Scalar(name=name, value=tuple(value) if isinstance(value, list) else value)
            for name, value in given.items()
            # None is said where it is not the default: activation=None is a call of its own.
            if not isinstance(value, Tensor) and not (value is None and parameters[name].default is None)
        ),
        results=tuple(_spec(f"result {i}", tensor) for i, tensor in enumerate(call.results)),
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
