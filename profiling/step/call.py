"""One call of an operator as a value: its arguments without their memory, what the call moves and computes."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ldmperf.kernels import OPERATORS, Launch, like_statistics
from ldmperf.samplers import NoiseSchedule, SamplingPlan, make_plan

from ..options import DType
from ..peer import SCHEDULER_CONFIG

PLAN_STEPS = 50
PLAN_ROW = 25
GUIDANCE_SCALE = 7.5
# How often a call moves a tensor: "row" for tables of which it reads a few numbers.
Access = Literal["read", "write", "update", "row"]
# Arguments that are the statistics of another one, by what that may be called.
_STATISTICS = {"statistics": ("x", "image"), "skip_statistics": ("skip",)}
_PASSES: dict[Access, int] = {"read": 1, "write": 1, "update": 2, "row": 0}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def nbytes(tensor: TensorSpec | Tensor) -> int:
    """Bytes of memory that a tensor has elements in: an expanded dimension (stride 0) counts once."""
    strides = tensor.stride if isinstance(tensor, TensorSpec) else tensor.stride()
    sizes = (size for size, stride in zip(tensor.shape, strides, strict=True) if stride or not size)
    return math.prod(sizes) * tensor.itemsize


class TensorSpec(_Value):
    """A tensor without its memory. Integers are drawn from 0 up to `below`, which is not among them.

    Tensors with the same `memory` are slices of one, each `offset` elements from its start.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    access: Access = "read"
    below: int | None = None
    memory: str | None = None
    offset: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def nbytes(self) -> int:
        return nbytes(self)

    @property
    def end(self) -> int:
        """Where the tensor ends, in elements from the start of its memory."""
        if 0 in self.shape:
            return self.offset
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.offset + last + 1


class Scalar(_Value):
    """An argument that is no tensor."""

    name: str
    value: bool | int | float | str | tuple[int, ...] | None


class AttentionSizes(NamedTuple):
    """The sizes of an attention call."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int


class OperatorCall(_Value):
    """A call of an operator: its arguments, its results, and how often a step makes it.

    `count` does not tell calls apart. `plan` names the sampler whose table of `PLAN_STEPS` steps a sampler_update
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
        """All that tells the call from others, as text."""
        tensors = [
            f"{t.name}={t.dtype}{list(t.shape)}@{list(t.stride)}"
            + (f"+{t.offset}in:{t.memory}" if t.memory else "")
            for t in self.tensors
        ]
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
        if self.attention is not None and self.attention.keys != self.attention.queries:
            parts.append(f"over {self.attention.keys}")
        if self.operator == "linear":
            parts.append(f"to {self.results[0].shape[-1]}" if self.results else "")
        if self.operator == "conv3x3" and self.results and self.results[0].shape[1] != first[1]:
            parts.append(f"to {self.results[0].shape[1]}")
        parameters = inspect.signature(OPERATORS[self.operator].call).parameters
        # The weight and bias of a norm are always there.
        usual = {"weight", "bias", "norm_bias"} if "weight" in parameters else set()
        options = {
            name: parameter.default
            for name, parameter in parameters.items()
            if name not in usual and (parameter.kind is parameter.KEYWORD_ONLY or parameter.default is None)
        }
        for tensor in self.tensors:
            if tensor.name in options:
                parts.append(
                    f"+{tensor.name}" + (f"({tensor.shape[1]})" if tensor.name in ("shortcut", "skip") else "")
                )
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

    @property
    def attention(self) -> AttentionSizes | None:
        """The sizes, if it is a call of attention."""
        if self.operator != "attention":
            return None
        q, k = (next(t.shape for t in self.tensors if t.name == name) for name in ("q", "k"))
        return AttentionSizes(batch=q[0], heads=q[2], queries=q[1], keys=k[1], head_dim=q[3])

    @property
    def launches(self) -> list[Launch]:
        """What the call launches, planned on "meta"."""
        launches: list[Launch] = OPERATORS[self.operator].plan(self.bound("meta"))[1]
        return launches

    @property
    def flops(self) -> int | None:
        """FLOPs of the matmuls, a multiply-add being two; None where there is none."""
        return sum(launch.flops for launch in self.launches) or None

    @property
    def exponentials(self) -> int | None:
        """Exponentials of the softmax; None where there is none."""
        return sum(launch.exponentials for launch in self.launches) or None

    def bound(self, device: torch.device | str) -> Any:
        """The call as its operator's value, with arguments as `arguments` makes them."""
        return OPERATORS[self.operator].bind(**self.arguments(device))

    def arguments(self, device: torch.device | str, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Arguments by name of the operator's public function: fresh random numbers, or empty on "meta"."""
        device = torch.device(device)
        shared: dict[str, list[TensorSpec]] = {}
        for tensor in self.tensors:
            shared.setdefault(tensor.memory or tensor.name, []).append(tensor)
        memories = {name: _memory(slices, device, generator) for name, slices in shared.items()}
        made: dict[str, Any] = {
            t.name: memories[t.memory or t.name].as_strided(t.shape, t.stride, t.offset) for t in self.tensors
        }
        if self.plan is not None and device.type != "meta":
            for name, value in plan_tensors(sampling_plan(self.plan)).items():
                if name in made:
                    made[name].copy_(value)
        if device.type != "meta":
            fill_statistics(made)
        return made | {scalar.name: scalar.value for scalar in self.scalars}


def fill_statistics(arguments: Mapping[str, Any]) -> None:
    """Writes the statistics among a call's arguments: those of the images that they stand beside."""
    for name, images in _STATISTICS.items():
        image = next((arguments[of] for of in images if isinstance(arguments.get(of), Tensor)), None)
        if image is not None and isinstance(arguments.get(name), Tensor):
            arguments[name].copy_(like_statistics(arguments[name], image))


def _memory(slices: Sequence[TensorSpec], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Memory that holds these tensors, filled as the first one says; on "meta" not filled."""
    first = slices[0]
    memory = torch.empty(max(spec.end for spec in slices), dtype=first.torch_dtype, device=device)
    if device.type != "meta" and memory.numel():
        if first.below is None:
            memory.normal_(generator=generator)
        else:
            memory.random_(0, first.below, generator=generator)
    return memory


@functools.cache
def sampling_plan(name: str) -> SamplingPlan:
    """The plan that a sampler_update is of."""
    return make_plan(name, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), PLAN_STEPS)


def plan_tensors(plan: SamplingPlan) -> dict[str, Tensor]:
    """What a plan says of `sampler_update`'s arguments, as float64 or int64 tensors of the CPU."""
    return {
        "table": torch.tensor(plan.table),
        "step": torch.tensor([PLAN_ROW]),
        "guidance_scale": torch.full((len(plan.steps),), GUIDANCE_SCALE, dtype=torch.float64),
        "input_scale": torch.tensor(plan.next_input_scales),
    }
