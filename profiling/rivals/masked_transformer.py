"""A masked transformer as aMUSEd runs it: diffusers' UVit2DModel and AmusedScheduler, from masks to tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..peer import import_diffusers
from ..trajectory.backend import Trajectory
from ..trajectory.case import Case
from .decoders import token_grid
from .kind import LATENT_PIXELS, RivalInputs, RivalKind
from .rival import TransformerShape

# The middle of the scale that AmusedPipeline tells the network: its default aesthetic score.
_AESTHETIC_SCORE = 6.0
# Of the check: logits are compared along so many random directions of the vocabulary, at each evaluation.
_DIRECTIONS = 64


class TokenTransformer(nn.Module):
    """diffusers' UVit2DModel inside a plain module, whose `to` has nothing to warn of."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **arguments: Tensor) -> Tensor:
        """input_ids [B, h, w] and the conditions, by UVit2DModel's names, to logits [B, codebook, h, w]."""
        logits: Tensor = self.network(**arguments)
        return logits


@dataclass(frozen=True)
class MaskedTransformer(RivalKind):
    """MaskGIT's sampling (Chang et al., arXiv 2202.04200) on aMUSEd's network (Patil et al., arXiv 2401.01808).

    A trajectory goes from masks alone to tokens [B, h, w], as the loop of diffusers' AmusedPipeline: at each step
    the network tells the tokens, guided; the scheduler draws them and masks again those it is least sure of.

    Rounding flips a draw, and from there on two right trajectories part. So the check gives the tokens that each
    evaluation reads, and compares the guided logits that the scheduler would draw from.
    """

    shape: TransformerShape
    is_stochastic = True

    def network(self, case: Case) -> nn.Module:
        shape = self.shape
        self._grid(case)
        network = import_diffusers().UVit2DModel(
            hidden_size=shape.hidden,
            cond_embed_dim=shape.text_dim,
            encoder_hidden_size=shape.text_dim,
            vocab_size=shape.vocabulary,
            codebook_size=shape.codebook,
            in_channels=shape.channels,
            block_out_channels=shape.channels,
            num_res_blocks=shape.res_blocks,
            downsample=True,
            upsample=True,
            block_num_heads=shape.channel_heads,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.feed_forward,
        )
        return TokenTransformer(network)

    def arguments(self, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
        shape, inputs = self.shape, case.model_batch
        height, width = case.latent_height * LATENT_PIXELS, case.latent_width * LATENT_PIXELS
        conditions = torch.tensor([[width, height, 0.0, 0.0, _AESTHETIC_SCORE]])
        return {
            "input_ids": torch.full((case.batch, *self._grid(case)), self.mask_token),
            "encoder_hidden_states": torch.randn(inputs, case.context_tokens, shape.text_dim, generator=generator),
            "pooled_text_emb": torch.randn(inputs, shape.text_dim, generator=generator),
            "micro_conds": conditions.repeat(inputs, 1),
        }

    @property
    def mask_token(self) -> int:
        return self.shape.vocabulary - 1

    def _grid(self, case: Case) -> tuple[int, int]:
        # The transformer runs at half the resolution of the tokens.
        return token_grid(case, self.shape.pixels, multiple=2)

    def tokens(self, case: Case) -> Callable[[int], Tensor]:
        """Random tokens, as many of them masked as the scheduler's cosine leaves masked at that evaluation."""
        size = (case.batch, *self._grid(case))

        def tokens(index: int) -> Tensor:
            generator = torch.Generator().manual_seed((case.seed + index) % 2**64)
            drawn = torch.randint(self.shape.codebook, size, generator=generator)
            is_masked = torch.rand(size, generator=generator) < math.cos(0.5 * math.pi * index / case.steps)
            return drawn.masked_fill(is_masked, self.mask_token).to(case.device)

        return tokens

    def trajectory(self, network: Callable[..., Any], case: Case) -> Trajectory:
        """To tokens [B, h, w]; with given ones to logits [B, evaluations, directions, h, w]."""
        scheduler = import_diffusers().AmusedScheduler(mask_token_id=self.mask_token)

        def guided_logits(tokens: Tensor, inputs: RivalInputs) -> Tensor:
            # The output of the evaluation before is used up: its graph, if any, may overwrite it.
            torch.compiler.cudagraph_mark_step_begin()
            both = torch.cat([tokens] * 2) if case.guided else tokens
            logits: Tensor = network(**{**inputs.arguments, "input_ids": both})
            if not case.guided:
                return logits
            uncond, cond = logits.chunk(2)
            return uncond + case.guidance_scale * (cond - uncond)

        def trajectory(inputs: RivalInputs) -> Tensor:
            tokens = inputs.arguments["input_ids"]
            scheduler.set_timesteps(case.steps, device=tokens.device)
            if inputs.tokens is not None:
                given = map(inputs.tokens, range(case.steps))
                return torch.stack([along_directions(guided_logits(tokens, inputs)) for tokens in given], dim=1)
            generator = torch.Generator(tokens.device).manual_seed(inputs.seeds[0])
            for timestep in scheduler.timesteps:
                logits = guided_logits(tokens, inputs)
                tokens = scheduler.step(logits, timestep, tokens, generator=generator).prev_sample
            return tokens

        return trajectory


def along_directions(logits: Tensor) -> Tensor:
    """Logits [B, V, h, w] along random directions, [B, directions, h, w]: each has the error of every entry."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_DIRECTIONS, logits.shape[1], generator=generator) / math.sqrt(logits.shape[1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.einsum("dv,bvhw->bdhw", directions.to(wide), wide)
