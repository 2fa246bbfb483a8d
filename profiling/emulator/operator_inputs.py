"""Arguments of an operator's call on the CPU: random, extreme or given numbers, and what is exact for them.

Every kind is of the shapes and layouts of `static/shapes.py`. Memory that a tensor has no elements in is NaN.
Extremes are of what is added and multiplied; weights, tables and scales stay of order one, so that results do not
cancel to nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS, channel_statistics

from ..options import CaseError
from ..static.shapes import SHAPES, Shape

# What each kind is, in the order that they are shown.
KINDS_OF_INPUTS: Mapping[str, str] = {
    "random": "normal numbers",
    "huge": "random numbers times 2^40, or the largest power of two less than that which keeps results finite",
    "tiny": "random numbers times 2^-40, of float16 2^-10",
    "largest": "random signs times the largest power of two that keeps results finite",
    "subnormal": "small multiples of the dtype's smallest subnormal number",
    "zeros": "random numbers, but zeros in the first half of the tokens or channels",
    "one-hot": "zeros, but a single one in each row",
}
EXTREMES = tuple(kind for kind in KINDS_OF_INPUTS if kind != "random")
_TINY = {torch.float16: 2.0**-10}
# Results stay finite where float32 does not overflow in torch's own operators, and the dtype holds what is exact.
_HUGE, _LARGEST = 40, 127
# Of these names extremes make no difference: their numbers are random.
_OF_ORDER_ONE = (
    *("weight", "norm_weight", "group_weight", "norm2_weight", "norm3_weight"),
    *("table", "guidance_scale", "input_scale"),
)
# Operators whose weights are of matmuls, but for those of norms.
_MATMULS = ("linear", "conv3x3", "transformer_front", "transformer_tail")
# Arguments that a call only writes.
_WRITTEN = ("model_input",)
_GUIDANCE = 5.0


@dataclass(frozen=True)
class EmulatedInputs:
    """The arguments of a call; `kind`: of KINDS_OF_INPUTS, or the name of the file that they are from."""

    operator: str
    kind: str
    arguments: Mapping[str, Any]

    @property
    def written(self) -> list[Tensor]:
        """Tensors that the call only writes."""
        return [self.arguments[name] for name in _WRITTEN if isinstance(self.arguments.get(name), Tensor)]

    def results(self, returned: Any) -> dict[str, Tensor]:
        """By name: what the call returned or, of one that returns nothing, updated."""
        if isinstance(returned, Tensor):
            return {"result": returned}
        if returned is not None:
            return {f"result[{n}]": tensor for n, tensor in enumerate(returned)}
        registers = enumerate(self.arguments["registers"].unbind(0))
        written = {name: self.arguments[name] for name in _WRITTEN if self.arguments.get(name) is not None}
        return {f"registers[{n}]": tensor for n, tensor in registers} | written

    def exact(self) -> dict[str, Tensor]:
        """The results in float64, of the numbers that the arguments hold. Before the call: it may update them."""
        return _reference(self, torch.float64)


def _reference(inputs: EmulatedInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    arguments = {
        name: value.to(dtype, copy=True) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.arguments.items()
    }
    converted = EmulatedInputs(inputs.operator, inputs.kind, arguments)
    return converted.results(OPERATORS[inputs.operator].reference(**arguments))


# ---------------------------------------------------------------- made here


def made_inputs(
    operator: str, shape: Shape, kind: str, *, seed: int = 0, mean: float = 0.0, scale: float = 1.0
) -> EmulatedInputs:
    """Arguments of a kind of KINDS_OF_INPUTS.

    seed, mean, scale: of the normal numbers. Weights of matmuls are divided by the square root of what is summed.
    """
    make: Callable[[int], EmulatedInputs] = _Maker(operator, shape, kind, seed, mean, scale).make
    if kind not in ("huge", "largest"):
        return make(0)
    low, high = 0, _HUGE if kind == "huge" else _LARGEST
    # The largest exponent with finite results, by bisection; 2^0 has them.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _stays_finite(make(middle), shape.dtype) else (low, middle - 1)
    return make(low)


def _stays_finite(inputs: EmulatedInputs, dtype: torch.dtype) -> bool:
    tensors = [value for value in inputs.arguments.values() if isinstance(value, Tensor)]
    if not all(t.isfinite().all() for t in tensors if all(t is not written for written in inputs.written)):
        return False
    exact, single = inputs.exact(), _reference(inputs, torch.float32)
    return all(t.to(dtype).isfinite().all() for t in exact.values()) and all(
        t.isfinite().all() for t in single.values()
    )


@dataclass(frozen=True)
class _Maker:
    operator: str
    shape: Shape
    kind: str
    seed: int
    mean: float
    scale: float

    def make(self, exponent: int) -> EmulatedInputs:
        """exponent: of the power of two that huge and largest numbers are scaled by."""
        generator = torch.Generator().manual_seed(self.seed)
        described = SHAPES[self.operator][0](self.shape)
        memories: dict[int, Tensor] = {}
        arguments = dict(described)
        for name, value in described.items():
            if isinstance(value, Tensor):
                made = _like(value, memories)
                made.copy_(self._values(name, value, described, exponent, generator))
                arguments[name] = made
        if self.operator == "transformer_front":
            # Not any numbers: those of the image.
            image, tiles = arguments["image"], described["statistics"].shape[1]
            pixels = -(-image[0, 0].numel() // tiles)
            arguments["statistics"] = channel_statistics(image, 1 << (pixels - 1).bit_length())
        return EmulatedInputs(self.operator, self.kind, arguments)

    def _values(
        self, name: str, like: Tensor, described: Mapping[str, Any], exponent: int, generator: torch.Generator
    ) -> Tensor:
        size = like.shape
        if name == "step":
            return torch.randint(described["table"].shape[0], size, generator=generator)
        if like.dtype == torch.bool:
            return torch.rand(size, generator=generator) < 0.5
        if not like.is_floating_point():
            return torch.randint(2**40, size, generator=generator)
        # In float64, so that a power of two rounds nothing away.
        values = self.mean + self.scale * torch.randn(size, generator=generator, dtype=torch.float64)
        if self.operator in _MATMULS and name.endswith("weight") and len(size) > 1:
            return values / math.sqrt(math.prod(size[1:]))
        if name == "guidance_scale":
            return _GUIDANCE * values
        return values if name in _OF_ORDER_ONE else self._extreme(values, like.dtype, exponent, generator)

    def _extreme(self, values: Tensor, dtype: torch.dtype, exponent: int, generator: torch.Generator) -> Tensor:
        match self.kind:
            case "huge":
                return values * 2.0**exponent
            case "tiny":
                return values * _TINY.get(dtype, 2.0**-40)
            case "largest":
                return torch.where(values < 0, -1.0, 1.0).double() * 2.0**exponent
            case "subnormal":
                smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
                return torch.randint(-7, 8, values.shape, generator=generator).double() * smallest
            case "zeros" if values.dim() > 2:
                half = values.clone()
                half[:, : values.shape[1] // 2] = 0
                return half
            case "one-hot" if values.dim() > 2:
                place = torch.randint(values.shape[-1], (*values.shape[:-1], 1), generator=generator)
                return torch.zeros_like(values).scatter_(-1, place, 1.0)
        return values


def _like(described: Tensor, memories: dict[int, Tensor]) -> Tensor:
    """A tensor of this layout. Slices of one are slices of one; what none covers is NaN."""
    base = described if described._base is None else described._base
    # Arguments that are no slices may be one tensor on "meta", and are several here.
    key = id(base) if described._base is not None else -len(memories) - 1
    if key not in memories:
        count = base.untyped_storage().nbytes() // base.element_size()
        memories[key] = torch.full((count,), math.nan if base.is_floating_point() else 0, dtype=base.dtype)
    return memories[key].as_strided(described.shape, described.stride(), described.storage_offset())


# ---------------------------------------------------------------- given


def given_inputs(operator: str, path: Path, others: Mapping[str, Any]) -> EmulatedInputs:
    """Tensors named as the operator's arguments, from a .safetensors file.

    others: arguments that are no tensors. Those in the file's metadata, as JSON, go before. Raises CaseError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as failure:
        raise CaseError(f"--inputs: {path} is no .safetensors file that can be read ({failure})") from None
    told = {name: _from_json(path, name, text) for name, text in metadata.items() if name != "format"}
    return EmulatedInputs(operator, path.name, {**others, **told, **tensors})


def _from_json(path: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise CaseError(f"--inputs: {path}: {name} in its metadata is no JSON: {text}") from None
