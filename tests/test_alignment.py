"""Pointers that operators get are divisible by 16 at every step.

Triton compiles a kernel for pointers that are divisible by 16 and another for those that are not: views of one
tensor at other offsets, or a step's row of a table, would compile in the middle of a trajectory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmperf.model import FAMILY, UNet
from ldmperf.samplers import NoiseSchedule, initial_noise, make_plan, sample


class Pointers(TorchDispatchMode):
    """Notes the tensors that do not begin at a multiple of 16 bytes in their memory, for all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.unaligned: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    self.calls += 1
                    offset = tensor.storage_offset() * tensor.element_size()
                    if offset % 16:
                        self.unaligned.append((func._schema.name, offset))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", FAMILY)
@torch.no_grad()
def test_a_step_of_the_family(size: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        unet = UNet(FAMILY[size], backend="torch").to(dtype).eval()
        x, context = torch.empty(2, 4, 8, 8, dtype=dtype), torch.empty(2, 77, 1024, dtype=dtype)
    conditioning = unet.condition([3.0, 2.0, 1.0], context)
    with Pointers() as pointers:
        for step in (0, 1, 2, torch.zeros(1, dtype=torch.int64, device="meta")):
            unet.denoise(x, conditioning, step)
    assert pointers.calls > 1000
    assert pointers.unaligned == []


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("name", ["ddpm", "unipc"])
def test_a_samplers_update(name: str, guidance_scale: float) -> None:
    plan = make_plan(name, NoiseSchedule.from_diffusers({}), 5)
    noise = initial_noise([1, 2], (4, 8, 8))
    steps: list[int] = []

    class Steps(Pointers):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "ldmperf::sampler_update":
                steps.append(args[3].item())
                return super().__torch_dispatch__(func, types, args, kwargs)
            return func(*args, **(kwargs or {}))

    with Steps() as pointers:
        sample(lambda x, step: x * 0.9, plan, noise, guidance_scale=guidance_scale, seeds=[1, 2], backend="torch")
    assert pointers.unaligned == []
    assert steps == [step.index for step in plan.steps]
