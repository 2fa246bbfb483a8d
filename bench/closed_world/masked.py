"""A masked transformer on tokens of the latents: diffusers' UVit2DModel in miniature and its AmusedScheduler.

MaskGIT (Chang et al., arXiv 2202.04200) and Muse (Chang et al., arXiv 2301.00704) as aMUSEd has them (Patil et
al., arXiv 2401.01808), which is the masked transformer that `ldmperf profile --rival` measures, too.

    masked      = round(64 cos(pi u / 2)) of the 64 tokens, u uniform in 0..1; at least one
    loss        = -log p(token | tokens that are not masked, caption), the mean over masked tokens
    sampling      from masks alone; each evaluation draws all masked tokens, and masks the least sure of them again
                  until cos(pi k / 2n) of all are masked after k of n evaluations

The sizes have about as many parameters as networks of the family. Scenes, their order, batches and steps are the
family's, and the averaged weights are judged.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.profiling.peer import import_diffusers
from ldmperf.profiling.step.flops import flop_counter

from .captions import CONTEXT_DIM, TOKENS, embedded, none_embedded
from .family import World
from .sampling import Prompts
from .tokens import CODES, codebook
from .training import Recipe, Training

MASK = CODES
# UVit2DModel wants a number such as an image's width, in two dimensions at least; all images are alike here.
_TOLD = 2


@dataclass(frozen=True)
class TokenShape:
    """Of UVit2DModel, by its own names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    block_out_channels: int
    block_num_heads: int
    num_res_blocks: int


# By latent and name: m12 has about the parameters of w12, m32 those of w32. Only the smaller world has tokens.
# Most weights are in blocks of convolution and attention. Two of these before the layer of the transformer and two
# after it learned more in 1000 steps than one before and one after two layers.
SHAPES = {
    8: {"m12": TokenShape(24, 1, 2, 64, 32, 2, 2), "m32": TokenShape(96, 1, 4, 192, 80, 4, 2)},
}


def token_network(shape: TokenShape) -> nn.Module:
    """A UVit2DModel on the device and with the draws of its surroundings."""
    network: nn.Module = import_diffusers().UVit2DModel(
        **asdict(shape),
        in_channels=shape.block_out_channels,
        vocab_size=CODES + 1,
        codebook_size=CODES,
        encoder_hidden_size=CONTEXT_DIM,
        cond_embed_dim=TOKENS * CONTEXT_DIM,
        micro_cond_encode_dim=_TOLD,
        micro_cond_embed_dim=_TOLD,
    )
    return network


def drawn_token_network(shape: TokenShape, seed: int, device: str = "cpu") -> nn.Module:
    """One whose weights a training seed draws."""
    torch.manual_seed(seed)
    return token_network(shape).to(device)


def logits_of(network: nn.Module, tokens: Tensor, context: Tensor) -> Tensor:
    """Logits [n, codes, h, w] of tokens [n, h, w], some masked, under contexts [n, 6, 32]."""
    told = context.new_zeros(len(context), 1)
    logits: Tensor = network(tokens, context, context.flatten(1), told)
    return logits


def masked_places(count: int, side: int, draws: torch.Generator) -> Tensor:
    """Which tokens are masked, [count, side, side]: of each image a share by the cosine, at least one."""
    places = side * side
    shares = torch.cos(0.5 * math.pi * torch.rand(count, generator=draws))
    masked = (places * shares).round().clamp(min=1)
    ranks = torch.rand(count, places, generator=draws).argsort(1).argsort(1)
    return (ranks < masked[:, None]).reshape(count, side, side)


def token_loss(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """Mean cross entropy of the masked tokens."""
    return F.cross_entropy(logits, tokens.masked_fill(~masked, -100))


class TrainingTokens(Training[nn.Module]):
    """A masked transformer in training."""

    def __init__(self, world: World, network: nn.Module, seed: int, recipe: Recipe) -> None:
        super().__init__(world, network, seed, recipe)
        self._codebook = codebook(world)

    def _loss(self, number: int) -> Tensor:
        recipe, batch, draws = self.recipe, self._read(self._source, number), self._draws(number)
        masked = masked_places(recipe.batch, self.world.latent, draws)
        told = torch.rand(recipe.batch, generator=draws) >= recipe.untold
        tokens, masked, context = (
            tensor.to(self._device)
            for tensor in (self._codebook.tokens(batch.latents), masked, embedded(batch.factors, told))
        )
        return token_loss(logits_of(self.network, tokens.masked_fill(masked, MASK), context), tokens, masked)


def save_token_network(network: nn.Module, folder: Path) -> None:
    """Writes the folder in diffusers' layout, in 16 bits. One that is there is whole."""
    part = folder.with_name(f"{folder.name}.part")
    short: Any = copy.deepcopy(network).half()
    short.save_pretrained(part)
    part.rename(folder)


def load_token_network(folder: Path, device: str = "cpu") -> nn.Module:
    """The network of a folder, in float32."""
    model = import_diffusers().UVit2DModel
    network: nn.Module = model.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    return network.to(device).eval()


def evaluation_gflop(network: nn.Module, side: int) -> float:
    """GFLOP of one evaluation at batch 1, all of it: nothing is computed once for all evaluations."""
    tokens = torch.full((1, side, side), MASK, device="meta")
    context = torch.empty(1, TOKENS, CONTEXT_DIM, device="meta")
    with torch.no_grad(), flop_counter() as counter:
        logits_of(copy.deepcopy(network).to("meta"), tokens, context)
    return float(counter.get_total_flops()) / 1e9


def sampled_tokens(
    network: nn.Module, side: int, evaluations: int, prompts: Prompts, guidance: float, batch: int = 125
) -> Tensor:
    """Tokens [n, side, side]. Each image draws from a generator of its own seed, whatever network makes it."""
    device = next(network.parameters()).device
    scheduler = import_diffusers().AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(evaluations)
    timesteps = scheduler.timesteps.tolist()
    found = []
    with torch.inference_mode():
        for start in range(0, len(prompts.seeds), batch):
            place = slice(start, start + batch)
            draws = [torch.Generator().manual_seed(seed) for seed in prompts.seeds[place]]
            told = embedded(prompts.factors[place]).to(device)
            untold = none_embedded(len(told)).to(device)
            tokens = torch.full((len(told), side, side), MASK)
            for timestep in timesteps:
                logits = guided_logits(network, tokens.to(device), told, untold, guidance).cpu()
                # A scheduler takes one generator, so an image at a time.
                steps = (
                    scheduler.step(logits[i : i + 1], timestep, tokens[i : i + 1], generator=one)
                    for i, one in enumerate(draws)
                )
                tokens = torch.cat([step.prev_sample for step in steps])
            found.append(tokens)
    return torch.cat(found)


def guided_logits(network: nn.Module, tokens: Tensor, told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """Logits [n, codes, h, w] with guidance, as AmusedPipeline has them."""
    if guidance == 1:
        return logits_of(network, tokens, told)
    without, within = logits_of(network, tokens.repeat(2, 1, 1), torch.cat([untold, told])).chunk(2)
    return without + guidance * (within - without)
