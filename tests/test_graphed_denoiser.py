"""`GraphedDenoiser` on tapes: the bits of the eager call, whatever is asked between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import GraphedDenoiser

from .tapes import Tapes

TINY = UNetConfig((8, 16), (2, 4), (True, False), layers_per_block=1, context_dim=12, norm_groups=4)


def graphed(denoise: Any, **options: Any) -> tuple[GraphedDenoiser[Any], Tapes]:
    graphs = Tapes()
    return GraphedDenoiser(denoise, graphs=graphs, **options), graphs


@pytest.mark.usefixtures("_one_thread")
@torch.no_grad()
def test_a_unet_of_ours() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY, backend="torch").eval().requires_grad_(False)
    denoiser, graphs = graphed(unet.denoise)
    results: list[tuple[Tensor, Tensor]] = []
    for steps in (3, 5):
        conditioning = unet.condition(range(1, 1 + steps), torch.randn(2, 5, TINY.context_dim))
        for step in (0, torch.tensor(1), torch.tensor([2])):
            for batch in (2, 1):
                one = unet.condition(range(1, 1 + steps), torch.randn(batch, 5, TINY.context_dim))
                given = one if batch == 1 else conditioning
                x = torch.randn(batch, 4, 8, 8)
                if step == 0:
                    x = x.contiguous(memory_format=torch.channels_last)
                results.append((denoiser(x, given, step), unet.denoise(x, given, int(step))))
    assert all(torch.equal(*pair) for pair in results)
    assert graphs.captured == 2
