"""What a forward of a UNet costs on paper: floating-point operations and parameters, counted without memory."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldmperf.model import UNet, UNetConfig

from .meta_inputs import added_on_meta


def flop_counter() -> FlopCounterMode:
    """torch's counter, and with it the matmuls that are added in place, which torch leaves out."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})


def _addmm(out: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


@lru_cache(maxsize=64)
def count_gflop(config: UNetConfig, height: int = 64, width: int = 64, context_tokens: int = 77) -> float:
    """GFLOP of one forward at batch 1, two per multiply-add: `height` x `width` latent, `context_tokens` of text.

    Counted by torch's FlopCounterMode on the meta device; on the CPU it would count attention as nothing.
    """
    with torch.device("meta"), flop_counter() as counter:
        unet = UNet(config, backend="torch")
        sample = torch.empty(1, config.in_channels, height, width)
        context = torch.empty(1, context_tokens, config.context_dim)
        unet(sample, torch.empty(1), context, **added_on_meta(config, 1))
    return float(counter.get_total_flops()) / 1e9


@lru_cache(maxsize=64)
def count_parameters(config: UNetConfig) -> int:
    """The exact number of parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())
