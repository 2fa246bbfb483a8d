"""The UNet: `condition` computes once what a trajectory keeps, `denoise` is a step, `forward` is both in a row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig
from .layers import Downsample, GroupNorm, ResBlock, TimestepEmbedding, Transformer, Upsample


@dataclass(frozen=True)
class Conditioning:
    """What does not change in a trajectory, from `UNet.condition`.

    `shifts` [K, B or 1, S]: for each of K steps the sum of time projection and first convolution's bias of every
    ResBlock, side by side in the order in which they run. `context`: keys and values [B, T, heads, D] of every
    transformer, in that order.
    """

    shifts: Tensor
    context: tuple[tuple[Tensor, Tensor], ...]


class Level(nn.Module):
    """What runs at one resolution: ResBlocks, followed by transformers for as long as there are any."""

    def __init__(self, resblocks: Sequence[ResBlock], transformers: Sequence[Transformer]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(resblocks)
        self.transformers = nn.ModuleList(transformers)
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def blocks(self) -> list[tuple[ResBlock, Transformer | None]]:
        """The pairs in the order in which they run."""
        pairs = zip_longest(self.resblocks, self.transformers)
        return [(cast(ResBlock, block), cast(Transformer | None, transformer)) for block, transformer in pairs]


class UNet(nn.Module):
    """A text-conditioned latent-diffusion UNet (Rombach et al., arXiv 2112.10752).

    `backend` goes to every operator: "auto", "torch" or "triton" (see `ldmperf.kernels`). Convolution weights are
    kept channels-last, as the activations are.
    """

    def __init__(self, config: UNetConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        groups, eps, channels = config.norm_groups, config.norm_eps, config.block_channels
        last = len(channels) - 1

        def resblock(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, groups, eps, backend)

        def transformer(level: int) -> Transformer:
            return Transformer(channels[level], config.num_heads[level], config.context_dim, groups, backend)

        self.time_embedding = TimestepEmbedding(channels[0], config.time_dim)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        skips = [channels[0]]
        width = channels[0]
        self.down = nn.ModuleList()
        for i, out_channels in enumerate(channels):
            resblocks = []
            for _ in range(config.layers_per_block):
                resblocks.append(resblock(width, out_channels))
                width = out_channels
                skips.append(width)
            level = Level(resblocks, [transformer(i) for _ in resblocks if config.attention[i]])
            if i < last:
                level.downsample = Downsample(width)
                skips.append(width)
            self.down.append(level)
        self.middle = None
        if config.has_middle:
            self.middle = Level([resblock(width, width), resblock(width, width)], [transformer(last)])
        self.up = nn.ModuleList()
        for i in reversed(range(len(channels))):
            resblocks = []
            for _ in range(config.layers_per_block + 1):
                resblocks.append(resblock(width + skips.pop(), channels[i]))
                width = channels[i]
            level = Level(resblocks, [transformer(i) for _ in resblocks if config.attention[i]])
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = GroupNorm(groups, width, eps, "silu", backend)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        # The time projections of all ResBlocks as one linear layer: one matrix product for a whole trajectory.
        self.shift_channels = [block.conv1.out_channels for block in self._resblocks()]
        self.time_projection = nn.Linear(config.time_dim, sum(self.shift_channels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def _levels(self) -> list[Level]:
        middle = [] if self.middle is None else [self.middle]
        return [cast(Level, level) for level in (*self.down, *middle, *self.up)]

    def _resblocks(self) -> list[ResBlock]:
        return [resblock for level in self._levels() for resblock, _ in level.blocks()]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.conv_in.weight.dtype

    def condition(self, timesteps: float | Sequence[float] | Tensor, context: Tensor) -> Conditioning:
        """Compute once what a trajectory keeps.

        timesteps: K numbers for K steps, or a tensor [K, B] where the samples of a batch differ. context
        [B, T, Dctx], any float dtype; with guidance the batch holds both halves. Raises ValueError for shapes that
        do not fit.
        """
        if context.ndim != 3 or context.shape[-1] != self.config.context_dim:
            raise ValueError(f"context must be [B, T, {self.config.context_dim}]; got {list(context.shape)}")
        weight = self.time_projection.weight
        t = torch.as_tensor(timesteps, dtype=torch.float32).to(weight.device)
        if t.ndim < 2:
            t = t.reshape(-1, 1)
        if t.ndim != 2 or t.shape[1] not in (1, context.shape[0]):
            raise ValueError(
                f"timesteps must be [K] or [K, {context.shape[0]}] as the context's batch; got {list(t.shape)}"
            )
        embedding = F.silu(self.time_embedding(t.reshape(-1)))
        conv_bias = torch.cat([block.conv1.bias for block in self._resblocks() if block.conv1.bias is not None])
        shifts = F.linear(embedding, weight, self.time_projection.bias + conv_bias)
        context = context.to(weight)
        return Conditioning(
            shifts=shifts.unflatten(0, tuple(t.shape)),
            context=tuple(
                transformer.block.project_context(context)
                for level in self._levels()
                for _, transformer in level.blocks()
                if transformer is not None
            ),
        )

    def denoise(self, sample: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """One evaluation: sample [B, Cin, H, W] at the step's timestep -> [B, Cout, H, W].

        The result is channels-last and in the network's dtype. A sample in that dtype and channels-last is read in
        place. Raises ValueError for shapes that do not fit the network or the conditioning.
        """
        batch = sample.shape[0]
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample must be [B, {self.config.in_channels}, H, W]; got {list(sample.shape)}")
        if conditioning.shifts.shape[1] not in (1, batch) or any(
            k.shape[0] != batch for k, _ in conditioning.context
        ):
            raise ValueError(
                f"the conditioning's batch is not the sample's {batch}: pass one context per sample, "
                "with guidance both halves"
            )
        shifts = iter(conditioning.shifts[step].expand(batch, -1).split(self.shift_channels, dim=1))
        context = iter(conditioning.context)

        def run(
            block: tuple[ResBlock, Transformer | None],
            x: Tensor,
            skip: Tensor | None = None,
            size: torch.Size | None = None,
        ) -> Tensor:
            resblock, transformer = block
            if transformer is None:
                out: Tensor = resblock(x, next(shifts), skip, size)
                return out
            return transformer(resblock(x, next(shifts), skip), next(context), size)  # type: ignore[no-any-return]

        x = self.conv_in(sample.to(self.dtype, memory_format=torch.channels_last))
        skips = [x]
        for level in cast(Iterable[Level], self.down):
            for block in level.blocks():
                x = run(block, x)
                skips.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
                skips.append(x)
        if self.middle is not None:
            for block in self.middle.blocks():
                x = run(block, x)
        for level in cast(Iterable[Level], self.up):
            blocks = level.blocks()
            for i, block in enumerate(blocks):
                skip = skips.pop()
                # The size of the skip to come, not twice ours: an odd size was rounded up on the way down.
                enlarge = level.upsample is not None and i == len(blocks) - 1
                x = run(block, x, skip, skips[-1].shape[2:] if enlarge else None)
            if level.upsample is not None:
                x = level.upsample(x)
        out: Tensor = self.conv_out(self.norm_out(x))
        return out

    def forward(self, sample: Tensor, timestep: float | Tensor, context: Tensor) -> Tensor:
        """sample [B, Cin, H, W], timestep a number or [B], context [B, T, Dctx] -> [B, Cout, H, W]."""
        timesteps = torch.as_tensor(timestep, dtype=torch.float32).reshape(1, -1)
        if timesteps.shape[1] not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep must be one number or one per sample ({sample.shape[0]}); got {timesteps.shape[1]}"
            )
        return self.denoise(sample, self.condition(timesteps, context), 0)
