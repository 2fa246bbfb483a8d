"""Every test here needs a CUDA device, and is skipped, visibly, without one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldmperf.model import FAMILY, UNet, UNetConfig
from ldmperf.profiling.kernel_bench.inputs import by_sample
from ldmperf.profiling.trajectory.network import randomize
from ldmperf.samplers import GraphedSampler, NoiseSchedule, sample

DEVICE, OPERATORS, GRAPHS = "cuda", "triton", None
SCHEDULE = NoiseSchedule.from_diffusers(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
)
# Relative RMS error that is rounding alone.
FLOOR = {torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    # float32 means float32, in references above all.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield
    torch.cuda.empty_cache()


def relative_rms(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def judge(actual: Any, exact: Any, own: Any, factor: float = 2.0) -> None:
    """Fails unless each error is rounding, or at most `factor` times that of torch's own in the same dtype."""
    tuples = [value if isinstance(value, tuple) else (value,) for value in (actual, exact, own)]
    for got, want, torchs in zip(*tuples, strict=True):
        assert got.shape == want.shape
        error = relative_rms(got, want)
        assert error <= max(FLOOR[got.dtype], factor * relative_rms(torchs, want)), error


def launch(operator: Any, config: Any = None, **arguments: Any) -> Any:
    """The operator's result by its kernels; every result and workspace was NaN before."""
    from ldmperf.kernels._launch import run

    result, launches = operator.plan(operator.bind(**arguments), config=config)
    given = {id(value) for value in arguments.values()}
    for one in launches:
        for tensor in one.tensors.values():
            if id(tensor) not in given and tensor.is_floating_point():
                tensor.fill_(torch.nan)
    run(launches, torch.device("cuda", torch.cuda.current_device()))
    return result


def exact_of(operator: Any, arguments: dict[str, Any]) -> Any:
    """The reference in float64, on the same values; attention's sample by sample, as it keeps all scores."""
    exact = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return by_sample(operator.reference, exact) if operator.name == "attention" else operator.reference(**exact)


def needs_memory(gib: float) -> None:
    """Skips where the GPU has less free; beside other test processes once they have kept it for a minute."""
    patience = 60 if "PYTEST_XDIST_WORKER" in os.environ else 0
    while (free := torch.cuda.mem_get_info()[0]) < gib * 2**30:
        if patience == 0:
            pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")
        patience -= 1
        time.sleep(1)


def network(config: UNetConfig, dtype: torch.dtype, operators: str | None = None) -> UNet:
    """A network with random weights on the device."""
    with torch.device(DEVICE):
        unet = UNet(config, backend=operators or OPERATORS).to(dtype)
    randomize(unet, 0)
    return unet.eval().requires_grad_(False)


def given(config: UNetConfig, batch: int, latents: int, tokens: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    """(sample, context) in float32 on the device."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(batch, config.in_channels, latents, latents, device=DEVICE, generator=generator)
    return x, torch.randn(batch, tokens, config.context_dim, device=DEVICE, generator=generator)


@torch.no_grad()
def check_a_forward(size: str, dtype: torch.dtype, latents: int = 64) -> None:
    """Fails unless the network on the kernels errs at most 1.5 times what it errs on torch's operators."""
    parameters = float(size[:-1]) * {"M": 1e-3, "B": 1.0}[size[-1]]
    if DEVICE == "cuda":
        needs_memory(8 * parameters + 3)
    ours = network(FAMILY[size], dtype)
    x, context = (value.to(dtype) for value in given(FAMILY[size], 2, latents))
    results = [unet(x, 500.0, context).float() for unet in (ours, ours.with_backend("torch"))]
    exact = ours.with_backend("torch").float()
    expected = exact(x.float(), 500.0, context.float())
    error, own = (relative_rms(result, expected) for result in results)
    assert error <= 1.5 * own, (error, own)


def eager(unet: UNet, conditioning: Any, plan: Any, noise: torch.Tensor, **options: Any) -> torch.Tensor:
    """What a captured step's replays must equal bit by bit: the same loop, launch by launch."""
    return sample(
        lambda x, step: unet.denoise(x, conditioning, step.index),
        plan,
        noise,
        input_dtype=unet.dtype,
        backend=OPERATORS,
        **options,
    )


def graphed(unet: UNet, **options: Any) -> GraphedSampler[Any]:
    """The sampler that captures the network's steps."""
    return GraphedSampler(unet.denoise, input_dtype=unet.dtype, backend=OPERATORS, graphs=GRAPHS, **options)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The functions above, and where they run."""
    functions: tuple[Callable[..., Any], ...] = (
        relative_rms,
        judge,
        launch,
        exact_of,
        needs_memory,
        network,
        given,
        check_a_forward,
        eager,
        graphed,
    )
    place = {"device": DEVICE, "operators": OPERATORS, "graphs": GRAPHS, "schedule": SCHEDULE}
    return SimpleNamespace(**{function.__name__: function for function in functions}, **place)
