"""Noise on a real GPU; no hypothesis here, as a GPU machine may have the light core only."""

import pytest
import torch

from ldmperf.kernels import STEP_NOISE, philox_normal


@pytest.mark.gpu
def test_same_numbers_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    seeds = torch.tensor([0, -1, 2**62 + 3])
    cpu = philox_normal(seeds, [4, 64, 64], 5, STEP_NOISE)
    gpu = philox_normal(seeds.cuda(), [4, 64, 64], torch.tensor([5], device="cuda"), STEP_NOISE)
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=2e-6, atol=2e-6)
