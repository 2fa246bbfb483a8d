"""The inputs of a call, its exact outputs in float64, and the error that passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS

from ..measure.error import relative_rms
from ..options import DType
from ..step.call import OperatorCall, plan_tensors, sampling_plan

# Relative RMS error that passes: several roundings of the dtype (torch's own operators round between their parts),
# and far less than a wrong formula gives.
_TOLERANCES: dict[DType, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Pipelines keep latents in the network's dtype, and guidance multiplies the rounding of its difference by 7.5.
_SAMPLER_FACTOR = 5.0
# Scores that a float64 reference of attention holds at once.
SCORES_BYTES = 2**30
_MASKS = ("key_lengths", "key_mask")


class CallInputs:
    """Sets of arguments; the first is the one that results are checked on, restored before each check."""

    def __init__(self, call: OperatorCall, sets: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.call, self._generator = call, generator
        self.sets = [call.arguments(device, generator) for _ in range(sets)]
        self._pristine = {
            spec.name: self.sets[0][spec.name].clone() for spec in call.tensors if spec.access == "update"
        }

    def restore(self) -> None:
        """Updated tensors as they were, written ones full of NaN, and NaN in the memory that results will take."""
        for spec in self.call.tensors:
            if spec.access == "update":
                self.sets[0][spec.name].copy_(self._pristine[spec.name])
            elif spec.access == "write":
                self.sets[0][spec.name].fill_(math.nan)
        device = self.sets[0][self.call.tensors[0].name].device
        # Freed at once: the next allocation of this size takes the same block.
        for result in self.call.results:
            torch.full((-(-result.nbytes // 4),), math.nan, device=device)

    @property
    def accumulates(self) -> bool:
        """Whether a call starts from what the call before has left."""
        return any(spec.access == "update" for spec in self.call.tensors)

    def renew(self) -> None:
        """Other random numbers in the memory of what the first set's calls read, but for a sampler's tables."""
        tables = {} if self.call.plan is None else plan_tensors(sampling_plan(self.call.plan))
        first, device = self.sets[0], self.sets[0][self.call.tensors[0].name].device
        fresh = self.call.arguments(device, self._generator)
        for spec in self.call.tensors:
            if spec.access == "read" and spec.below is None and spec.name not in tables:
                # Of an expanded dimension, what lies in memory.
                once = tuple(slice(None) if stride else slice(1) for stride in spec.stride)
                first[spec.name][once].copy_(fresh[spec.name][once])

    def reference(self) -> tuple[Tensor, ...]:
        """The outputs for the first set in float64, from the numbers that its dtype rounded to."""
        arguments = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.sets[0].items()
        }
        reference = OPERATORS[self.call.operator].reference
        if self.call.attention is None:
            return outputs(arguments, reference(**arguments))
        return (by_sample(reference, arguments),)

    def error(self, result: Any, reference: tuple[Tensor, ...]) -> float:
        """The largest relative RMS error of the outputs of a call on the first set; infinite for a NaN."""
        pairs = zip(outputs(self.sets[0], result), reference, strict=False)
        errors = [relative_rms(found, exact) for found, exact in pairs]
        # A NaN is no maximum.
        return max((error if math.isfinite(error) else math.inf for error in errors), default=math.inf)


def by_sample(
    reference: Callable[..., Tensor], arguments: Mapping[str, Any], most_bytes: int = SCORES_BYTES
) -> Tensor:
    """`reference`, attention of `arguments`, in slices whose scores take at most `most_bytes` each.

    In float64 torch keeps all scores, 17 GB of 16 samples of 4096 tokens. A slice is of some samples, or of some
    heads of a sample, or of some queries of a head: no score depends on another slice.
    """
    q, k = arguments["q"], arguments["k"]
    (batch, queries, heads), keys = q.shape[:3], k.shape[1]
    a_query = max(keys * q.element_size(), 1)
    # As many queries as fit; where all do, as many heads; where all do, as many samples.
    rows = max(min(queries, most_bytes // a_query), 1)
    at_once = max(min(heads, most_bytes // (rows * a_query)), 1)
    samples = max(min(batch, most_bytes // (at_once * rows * a_query)), 1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b, h, n in itertools.product(range(0, batch, samples), range(0, heads, at_once), range(0, queries, rows)):
        of_keys = (slice(b, b + samples), slice(None), slice(h, h + at_once))
        of_queries = (slice(b, b + samples), slice(n, n + rows), slice(h, h + at_once))
        part = {"q": q[of_queries], "k": k[of_keys], "v": arguments["v"][of_keys]}
        masks = {name: arguments[name][b : b + samples] for name in _MASKS if arguments.get(name) is not None}
        out[of_queries] = reference(**{**arguments, **part, **masks})
    return out


def tolerance_of(call: OperatorCall) -> float:
    """The relative RMS error of a call's result that passes."""
    return _TOLERANCES[call.dtype] * (_SAMPLER_FACTOR if call.operator == "sampler_update" else 1.0)


def outputs(arguments: Mapping[str, Any], result: Any) -> tuple[Tensor, ...]:
    """The outputs of a call: its result, or what it updated: latents, next model input, other registers."""
    if isinstance(result, Tensor):
        return (result,)
    if result is not None:
        return tuple(result)
    registers = arguments["registers"].unbind(0)
    return (registers[0], arguments["model_input"], *registers[1:])
