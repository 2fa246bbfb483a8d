"""Every test here needs a CUDA device, and is skipped, visibly, without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Relative RMS error that is rounding alone.
FLOOR = {torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
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

    result, launches = operator.plan(**arguments, config=config)
    for tensor in result if isinstance(result, tuple) else (result,):
        tensor.fill_(torch.nan)
    for one in launches:
        if "statistics_ptr" in one.arguments:
            one.arguments["statistics_ptr"].fill_(torch.nan)
    run(launches, torch.device("cuda", torch.cuda.current_device()))
    return result


def exact_of(operator: Any, arguments: dict[str, Any]) -> Any:
    """The reference in float64, on the same values."""
    return operator.reference(
        **{
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
    )


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The functions above."""
    functions: tuple[Callable[..., Any], ...] = (relative_rms, judge, launch, exact_of, needs_memory)
    return SimpleNamespace(**{function.__name__: function for function in functions})
