"""Trained networks on disk: a folder each, in diffusers' layout, in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ldmperf.model import UNet, UNetConfig, diffusers_config, load_unet, save_unet
from ldmperf.profiling.step.flops import flop_counter

from .captions import CONTEXT_DIM, TOKENS

COMMITTED = Path(__file__).with_name("weights")


def label(width: int) -> str:
    """What records call a network: "w8"."""
    return f"w{width}"


def network_folder(weights: Path, width: int, seed: int) -> Path:
    """Where the network of a width and a training seed lies; its last part is its label."""
    return weights / f"seed-{seed}" / label(width)


def save_network(network: UNet, folder: Path) -> None:
    """Writes the folder; `ldmperf profile --unet` and diffusers read it. One that is there is whole."""
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "UNet2DConditionModel", **diffusers_config(network.config)}
    (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_unet(network, part / "diffusion_pytorch_model.safetensors", dtype=torch.float16)
    part.rename(folder)


def load_network(folder: Path, device: str = "cpu") -> UNet:
    """The network of a folder, in float32."""
    backend = "torch" if device == "cpu" else "auto"
    return load_unet(folder, dtype=torch.float32, device=device, backend=backend)


def parameters(network: torch.nn.Module) -> int:
    """How many it has."""
    return sum(parameter.numel() for parameter in network.parameters())


def step_cost(width: int) -> float:
    """What a step of a network costs beside that of the narrowest, roughly."""
    return 0.6 + width / 20


def forward_gflop(config: UNetConfig, latent: int) -> float:
    """GFLOP of one step at batch 1, without what is computed once for all steps."""
    with torch.device("meta"), torch.no_grad():
        network = UNet(config, backend="torch").eval()
        conditions = network.condition(torch.zeros(1), torch.empty(1, TOKENS, CONTEXT_DIM))
        with flop_counter() as counter:
            network.denoise(torch.empty(1, config.in_channels, latent, latent), conditions, 0)
    return float(counter.get_total_flops()) / 1e9
