"""Tiny diffusers UNets in float64, and adapters for them as their loaders take them: dicts of random tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

# Every kind of layer that files for SD's UNets adapt.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj",
)  # fmt: skip
CONTEXT_DIM, IMAGE_DIM = 12, 10


def tiny_unet(**config: Any) -> Any:
    """A UNet2DConditionModel with attention at its first level; always the same weights."""
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_type": None,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": CONTEXT_DIM,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(options | config)).double().eval().requires_grad_(False)


def lora(
    unet: Any, seed: int, targets: Sequence[str] = TARGETS, rank: int = 2, dora: bool = False
) -> dict[str, Tensor]:
    """A LoRA for the layers of `unet` whose name ends with one of `targets`, wrapped by others or not."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {}
    for name, tensor in unet.state_dict().items():
        name = name.removesuffix(".weight").removesuffix(".base_layer")
        if tensor.dim() > 1 and name.endswith(tuple(targets)):
            weights[f"{name}.lora_A.weight"] = random(rank, *tensor.shape[1:])
            weights[f"{name}.lora_B.weight"] = random(tensor.shape[0], rank, *[1] * (tensor.dim() - 2))
            if dora:
                kept = [tensor.shape[0]] if tensor.dim() == 2 else [1, tensor.shape[0], 1, 1]
                weights[f"{name}.lora_magnitude_vector"] = 1 + random(*kept).abs()
    return weights


def ip_adapter(unet: Any, seed: int) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter with four image tokens."""
    torch.manual_seed(seed)
    tokens = 4 * CONTEXT_DIM
    image_proj = {
        "proj.weight": 0.3 * torch.randn(tokens, IMAGE_DIM),
        "proj.bias": torch.randn(tokens),
        "norm.weight": torch.ones(CONTEXT_DIM),
        "norm.bias": torch.zeros(CONTEXT_DIM),
    }
    weights = {}
    widths = [unet.get_submodule(name.removesuffix(".processor")).to_k.weight for name in unet.attn_processors]
    for number, width in enumerate(widths):
        # Numbers count all attention layers; those of text, every second one, are adapted.
        if number % 2:
            for which in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{which}.weight"] = torch.randn(width.shape[0], CONTEXT_DIM)
    return {"image_proj": image_proj, "ip_adapter": weights}
