"""Kernels in triton's interpreter: TRITON_INTERPRET=1 is read when they are decorated, so a process of its own.

tests/test_interpreter.py starts it; `TRITON_INTERPRET=1 pytest tests/interpreter` does by hand.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]

# The same examples in every run of the suite: a failure is of the code that changed. To search further, by hand:
# TRITON_INTERPRET=1 pytest tests/interpreter --hypothesis-profile=default
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Relative error that is rounding alone. The interpreter cuts bfloat16 off, by up to 2^-7; a GPU rounds to nearest.
FLOOR = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
LAYOUTS = ("plain", "channels_last", "sliced", "channel_slice", "expanded", "transposed")


def image(shape, layout, dtype, generator, mean=0.0, scale=1.0):
    """[B, C, H, W] of the layout; the storage around it is NaN."""
    batch, channels, height, width = shape

    def random(*size):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)

    if layout == "channels_last":
        return random(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        around = torch.full((batch + 1, channels + 2, height + 1, 2 * width + 1), torch.nan, dtype=dtype)
        return around[1:, 1:-1, 1:, 1::2].copy_(random(*shape))
    if layout == "channel_slice":
        around = torch.full((batch, channels + 5, height, width), torch.nan, dtype=dtype)
        return around.to(memory_format=torch.channels_last)[:, 2:-3].copy_(random(*shape))
    if layout == "expanded":
        return random(1, *shape[1:]).expand(*shape)
    if layout == "transposed":
        return random(batch, channels, width, height).transpose(2, 3)
    return random(*shape)


def tokens(shape, layout, dtype, generator, mean=0.0, scale=1.0):
    """[B, N, C] of the layout, its last dimension contiguous; the storage around it is NaN."""
    batch, count, channels = shape

    def random(*size):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)

    if layout in ("sliced", "channel_slice"):
        around = torch.full((batch + 1, count + 2, 3 * channels), torch.nan, dtype=dtype)
        return around[1:, 1:-1, channels : 2 * channels].copy_(random(*shape))
    if layout == "expanded":
        return random(1, count, channels).expand(*shape)
    if layout == "transposed":
        return random(count, batch, channels).transpose(0, 1)
    return random(*shape)


def launch(operator, *args, config=None, **kwargs):
    """The operator's result by its kernels, under a configuration; every result and workspace was NaN before."""
    from ldmperf.kernels._launch import run

    result, launches = operator.plan(*args, config=config, **kwargs)
    for tensor in result if isinstance(result, tuple) else (result,):
        tensor.fill_(torch.nan)
    for one in launches:
        if "statistics_ptr" in one.arguments:
            one.arguments["statistics_ptr"].fill_(torch.nan)
    run(launches, torch.device("cpu"))
    return result


def relative_rms(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def judge(actual, exact, own, dtype):
    """Fails unless the error is rounding, or at most twice that of torch's own operator in the same dtype."""
    assert actual.shape == exact.shape
    assert actual.dtype == dtype
    if exact.numel():
        error = relative_rms(actual, exact)
        assert error <= max(FLOOR[dtype], 2 * relative_rms(own, exact)), error


def pick_configs(operator, choose, *args, **kwargs):
    """The default configuration and some that a tuner may choose."""
    found = operator.candidates(*args, **kwargs)
    return [None, *(found[choose.randrange(len(found))] for _ in range(2))]


@pytest.fixture(scope="session")
def kit():
    """The functions above."""
    return SimpleNamespace(
        image=image,
        tokens=tokens,
        launch=launch,
        judge=judge,
        relative_rms=relative_rms,
        pick_configs=pick_configs,
    )
