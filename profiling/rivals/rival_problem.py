"""The problem of a rival: its network, and what its trajectories start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from ..measure.outcomes import Unsupported
from ..step.flops import flop_counter
from ..step.launches import GpuLaunch
from ..step.roofline import WINOGRAD, StepPart
from ..trajectory.backend import wider
from ..trajectory.case import Case
from ..trajectory.unet_problem import CHECK_ROUND, round_seeds
from .decoders import VaeDecoder, VqDecoder
from .gan import Gan
from .kind import RivalInputs, RivalKind, cast
from .masked_transformer import MaskedTransformer
from .rival import DECODERS, RIVALS, GanShape, TransformerShape, VaeDecoderShape


@dataclass(frozen=True)
class RivalProblem:
    """A rival's trajectory on its network; a `Problem`."""

    case: Case
    kind: RivalKind
    network: nn.Module

    @property
    def evaluations(self) -> int:
        return self.case.steps

    @property
    def is_stochastic(self) -> bool:
        return self.kind.is_stochastic

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def gflop(self) -> float:
        return counted_gflop(self.kind, single(self.case))

    def step_parts(self) -> tuple[StepPart, ...]:
        """All convolutions of an evaluation, then all else: their FLOPs, and their weights read once.

        Its launches are not counted one by one, nor are activations, so the floor is further below the time than
        that of a UNet. Of an embedding few rows are read.
        """
        flops = counted_flops(self.kind, single(self.case))
        embeddings = {id(m.weight) for m in self.network.modules() if isinstance(m, nn.Embedding)}
        weights = [p for p in self.network.parameters() if id(p) not in embeddings]
        kernels = sum(weight.nbytes for weight in weights if weight.dim() == 4)
        matrices = sum(weight.nbytes for weight in weights if weight.dim() != 4)
        convolutions, others = (self.case.model_batch * count for count in (flops.convolutions, flops.others))
        convolving = GpuLaunch("convolutions", "convolution", "", "", kernels, convolutions)
        multiplying = GpuLaunch("all else", "linear", "", "", matrices, others)
        least = WINOGRAD * convolutions
        return StepPart("convolution", convolving, least), StepPart("linear", multiplying, others)

    def inputs(self, number: int, seed: int | None = None) -> RivalInputs:
        """Fresh random inputs of round `number`; `seed`: the case's unless given."""
        case, seeds = self.case, round_seeds(self.case, number, seed)
        dtype: torch.dtype = getattr(torch, case.dtype)
        arguments = self.kind.arguments(case, torch.Generator().manual_seed(seeds[0]))
        return RivalInputs({n: cast(value, dtype).to(case.device) for n, value in arguments.items()}, seeds)

    def check_inputs(self) -> RivalInputs:
        """The inputs of the check: with what a timed trajectory draws given."""
        return replace(self.inputs(CHECK_ROUND), tokens=self.kind.tokens(self.case))

    def references(self, implementation: str, *, of_round: bool = False) -> tuple[tuple[str, torch.dtype], ...]:
        """The same network in a wider dtype: nobody else has these weights.

        None of a timed round whose tokens are drawn: rounding alone may change one, and all that follow.
        """
        if of_round and self.is_stochastic:
            return ()
        return (("eager", wider(getattr(torch, self.case.dtype))),)

    def as_drawn(self, inputs: RivalInputs) -> RivalInputs:
        """The same inputs: rounds whose tokens are drawn have no reference."""
        return inputs

    def with_network(self, network: nn.Module) -> RivalProblem:
        return replace(self, network=network)


def kind_of(case: Case) -> RivalKind:
    """The kind and size that the case names; `Unsupported` for a name that is none."""
    rival = RIVALS.get(case.unet) or DECODERS.get(case.unet)
    if rival is None:
        raise Unsupported(f"no rival {case.unet!r}; choose from {', '.join(RIVALS)}")
    shape = rival.shape
    if isinstance(shape, VaeDecoderShape):
        return VaeDecoder(shape)
    if isinstance(shape, TransformerShape):
        return MaskedTransformer(shape)
    return Gan(shape) if isinstance(shape, GanShape) else VqDecoder(shape)


def single(case: Case) -> Case:
    """The same image alone, without guidance, whatever runs it: what FLOPs are counted for."""
    alike = {"batch": 1, "guidance_scale": 1.0, "dtype": "float32", "device": "cpu", "backend": "", "seed": 0}
    return case.model_copy(update=alike)


def counted_gflop(kind: RivalKind, case: Case) -> float:
    """GFLOP of one evaluation, two per multiply-add."""
    flops = counted_flops(kind, case)
    return (flops.convolutions + flops.others) / 1e9


@dataclass(frozen=True)
class CountedFlops:
    """FLOPs of an evaluation, two per multiply-add."""

    convolutions: int
    others: int


@lru_cache(maxsize=64)
def counted_flops(kind: RivalKind, case: Case) -> CountedFlops:
    """FLOPs of one evaluation, counted on the meta device; `kind` and `case` are values."""
    arguments = kind.arguments(case, torch.Generator())
    with torch.device("meta"), flop_counter() as counter:
        network = kind.network(case).requires_grad_(False)
        network(**{name: value.to("meta") for name, value in arguments.items()})
    convolutions = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    return CountedFlops(convolutions, counter.get_total_flops() - convolutions)
