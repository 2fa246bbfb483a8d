"""The operator calls of one denoising step, as values: found by running the UNet of a size without memory.

The names of arguments come from the operators' schemas, so that a new operator or argument is in the cases as soon
as the UNet uses it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import OPERATORS
from ldmperf.model import FAMILY, UNet
from ldmperf.samplers import NoiseSchedule, SamplingPlan, make_plan

from .cases import DType
from .group import SCHEDULER_CONFIG

# The plans whose updates are cases: one register, two, four, and one with generated noise.
PLANS = ("ddim", "dpmpp_2m", "unipc", "euler_a")
PLAN_STEPS = 50
PLAN_ROW = 25
GUIDANCE_SCALE = 7.5
# The group norms of Stable Diffusion's VAE decoder at 512x512: (pixels a side, channels).
_VAE = ((512, 128), (512, 256), (256, 256), (256, 512), (128, 512), (64, 512))

# How often a call moves a tensor: "row" for tables of which it reads a few numbers.
Access = Literal["read", "write", "update", "row"]
_PASSES: dict[Access, int] = {"read": 1, "write": 1, "update": 2, "row": 0}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSpec(_Value):
    """A tensor without its memory. `below`: integers are drawn from 0 up to it, without it."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    access: Access = "read"
    below: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it has elements in: an expanded dimension (stride 0) counts once."""
        sizes = (size for size, stride in zip(self.shape, self.stride, strict=True) if stride or not size)
        return math.prod(sizes) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def make(self, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """The tensor, with these strides: standard normal, or integers below `below`; empty on "meta"."""
        if 0 in self.shape:
            return torch.empty_strided(self.shape, self.stride, dtype=self.torch_dtype, device=device)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        memory = torch.empty(extent, dtype=self.torch_dtype, device=device)
        if device.type != "meta":
            if self.below is None:
                memory.normal_(generator=generator)
            else:
                memory.random_(0, self.below, generator=generator)
        return memory.as_strided(self.shape, self.stride)


class Scalar(_Value):
    """An argument that is no tensor."""

    name: str
    value: bool | int | float | str | tuple[int, ...] | None


class KernelCase(_Value):
    """One call of an operator: what it is called with, what it returns, and how often a step makes it.

    `count` does not tell cases apart. `plan` names the sampler whose table of `PLAN_STEPS` steps a sampler_update
    applies, row `PLAN_ROW` of it.
    """

    operator: str
    dtype: DType
    tensors: tuple[TensorSpec, ...]
    scalars: tuple[Scalar, ...] = ()
    results: tuple[TensorSpec, ...] = ()
    plan: str | None = None
    count: int = 1

    @property
    def key(self) -> str:
        """All that tells it from other cases, as text."""
        tensors = [f"{t.name}={t.dtype}{list(t.shape)}@{list(t.stride)}" for t in self.tensors]
        scalars = [f"{s.name}={s.value}" for s in self.scalars]
        plan = [f"plan={self.plan}"] if self.plan else []
        return " ".join([self.operator, *plan, *tensors, *scalars]).replace(", ", ",")

    @property
    def label(self) -> str:
        """A short name: the shape of the first tensor, and the options that are not their default."""
        first = self.tensors[0].shape
        if self.plan is not None:
            return f"{self.plan} {'x'.join(map(str, first[1:]))}, {first[0]} register" + (
                "s" if first[0] > 1 else ""
            )
        parts = ["x".join(map(str, first))]
        parameters = inspect.signature(OPERATORS[self.operator].call).parameters
        # The weight and bias of a norm are always there.
        usual = {"weight", "bias"} if "weight" in parameters else set()
        options = {
            name: parameter.default
            for name, parameter in parameters.items()
            if name not in usual and (parameter.kind is parameter.KEYWORD_ONLY or parameter.default is None)
        }
        for tensor in self.tensors:
            if tensor.name in options:
                parts.append(f"+{tensor.name}" + (f"({tensor.shape[1]})" if tensor.name == "skip" else ""))
        for scalar in self.scalars:
            if scalar.name in options and scalar.value != options[scalar.name]:
                value = scalar.value
                parts.append(f"{scalar.name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join(parts)

    @property
    def bytes_moved(self) -> int:
        """Bytes of every argument read once and every result written once.

        Registers are both; of a sampler's tables a call reads a row, which is left out.
        """
        moved = (_PASSES[tensor.access] * tensor.nbytes for tensor in self.tensors)
        return sum(moved) + sum(result.nbytes for result in self.results)

    def arguments(self, device: torch.device | str, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Arguments by name of the operator's public function: fresh random numbers, or empty on "meta"."""
        device = torch.device(device)
        made: dict[str, Any] = {tensor.name: tensor.make(device, generator) for tensor in self.tensors}
        if self.plan is not None and device.type != "meta":
            for name, value in plan_tensors(sampling_plan(self.plan)).items():
                if name in made:
                    made[name].copy_(value)
        return made | {scalar.name: scalar.value for scalar in self.scalars}


@functools.lru_cache(maxsize=64)
def family_kernel_cases(size: str, batch: int, dtype: DType, latents: int = 64) -> tuple[KernelCase, ...]:
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
    return (*found, *(sampler_case(plan, batch, dtype, latents) for plan in PLANS))


def vae_kernel_cases(dtype: DType = "bfloat16", batch: int = 1) -> tuple[KernelCase, ...]:
    """The group norms of Stable Diffusion's VAE decoder at 512x512 pixels."""
    norm = OPERATORS["group_norm_silu"].call
    cases: list[KernelCase] = []
    for side, channels in _VAE:
        x = torch.empty(batch, channels, side, side, dtype=getattr(torch, dtype), device="meta")
        x, weight = x.to(memory_format=torch.channels_last), x.new_empty(channels)
        cases += _record(functools.partial(norm, x, 32, weight, weight, 1e-6, backend="torch"), dtype)
    return tuple(cases)


def sampler_case(plan: str, batch: int, dtype: DType, latents: int = 64) -> KernelCase:
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
    return KernelCase(operator="sampler_update", dtype=dtype, tensors=tuple(tensors), plan=plan)


@functools.cache
def sampling_plan(name: str) -> SamplingPlan:
    """The plan of a sampler case."""
    return make_plan(name, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), PLAN_STEPS)


def plan_tensors(plan: SamplingPlan) -> dict[str, Tensor]:
    """What a plan says of `sampler_update`'s arguments, as float64 or int64 tensors of the CPU."""
    scales = torch.tensor(plan.input_scales)
    return {
        "table": torch.tensor(plan.table),
        "step": torch.tensor([PLAN_ROW]),
        "guidance_scale": torch.full((len(plan.steps),), GUIDANCE_SCALE, dtype=torch.float64),
        # The input of the evaluation after each step, as `sample` has it.
        "input_scale": torch.cat([scales[1:], torch.ones(1, dtype=torch.float64)]),
    }


class _Calls(TorchDispatchMode):
    """Notes the calls of operators that have kernels: (operator, arguments, result)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if func.overloadpacket is torch.ops.aten.convolution:
            # A convolution on the meta device forgets the layout that it has on every other.
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


def _record(run: Callable[[], Any], dtype: DType) -> list[KernelCase]:
    """The distinct calls that `run` makes, in order, with their counts."""
    with _Calls() as noted:
        run()
    cases = Counter(_case(dtype, *call) for call in noted.calls)
    return [case.model_copy(update={"count": count}) for case, count in cases.items()]


def _case(dtype: DType, operator: str, arguments: dict[str, Any], result: Any) -> KernelCase:
    # In the order of the public function, whose first tensor is the one a label tells.
    parameters = inspect.signature(OPERATORS[operator].call).parameters
    ordered = {name: arguments[name] for name in parameters if name in arguments}
    results = result if isinstance(result, tuple | list) else () if result is None else (result,)
    return KernelCase(
        operator=operator,
        dtype=dtype,
        tensors=tuple(_spec(name, value) for name, value in ordered.items() if isinstance(value, Tensor)),
        scalars=tuple(
            Scalar(name=name, value=tuple(value) if isinstance(value, list) else value)
            for name, value in ordered.items()
            # None is said where it is not the default: activation=None is a call of its own.
            if not isinstance(value, Tensor) and not (value is None and parameters[name].default is None)
        ),
        results=tuple(_spec(f"result {i}", tensor) for i, tensor in enumerate(results)),
    )


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(
        name=name,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=str(tensor.dtype).removeprefix("torch."),
        below=None if tensor.is_floating_point() else 2,
    )
