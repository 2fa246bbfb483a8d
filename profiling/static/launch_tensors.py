"""The tensors of a launch and their bytes, and how often a product goes through its loop."""

from __future__ import annotations

import torch

from ldmperf.kernels import Launch


def tensor_bytes(launch: Launch) -> int:
    """The bytes of a launch's tensors, each counted once: the least that it can move."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(launch).values())


def tensors(launch: Launch) -> dict[str, torch.Tensor]:
    """The tensors among a launch's arguments."""
    return {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}


def product_passes(launch: Launch) -> int | None:
    """Passes of a program's loop in a matrix product, over tiles of columns or of channels; None for others."""
    arguments = launch.arguments
    if "GATED" not in arguments:
        return None
    tiles: int = arguments.get("tiles_n") or -(-arguments["channels"] // arguments["BLOCK_K"])
    return tiles
