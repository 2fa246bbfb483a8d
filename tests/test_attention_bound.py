"""The bound of attention, against figures computed by hand."""

from __future__ import annotations

import pytest

from ldmperf.profiling.machines import (
    MACHINES,
    Rates,
    attention_bound,
    bound_cycles,
    exponential_cycles,
    matrix_cycles,
    padded_head_dim,
)
from ldmperf.profiling.step.calls import attention_calls

# 1000 TFLOP/s, and 16 * 125 * 2 = 4000 exponentials a nanosecond: 4e9 a millisecond.
RATES = Rates(matrix_tflops=1000.0, multiprocessors=125, clock_ghz=2.0)


@pytest.mark.parametrize(
    ("head_dim", "padded"), [(4, 16), (8, 16), (16, 16), (20, 32), (40, 48), (80, 80), (112, 112), (384, 384)]
)
def test_the_head_dimension_is_padded_to_sixteen(head_dim: int, padded: int) -> None:
    assert padded_head_dim(head_dim) == padded


def test_cycles_of_a_tile() -> None:
    # 128 x 64 scores: 2 * 8192 * 48 multiply-adds at 2048 a clock, 8192 exponentials at 16.
    assert matrix_cycles(128, 64, 48) == 384
    assert exponential_cycles(128, 64) == 512
    assert exponential_cycles(128, 64, polynomial=2) == 384
    assert exponential_cycles(128, 64, polynomial=8) == 0
    # An A100's matrix unit is half as fast, its exponential unit as fast.
    assert matrix_cycles(128, 64, 48, MACHINES["sm_80"]) == 768
    assert exponential_cycles(128, 64, machine=MACHINES["sm_80"]) == 512


@pytest.mark.parametrize(
    ("head_dim", "polynomial", "expected"),
    [
        (8, 0, (512, "exponential")),
        (40, 0, (512, "exponential")),
        (40, 2, (384, "matrix")),
        (40, 1, (448, "exponential")),
        # The two meet at 64: exponentials over products is 64 / d.
        (64, 0, (512, "matrix")),
        (160, 4, (1280, "matrix")),
    ],
)
def test_the_bound_is_the_longer_of_both(head_dim: int, polynomial: int, expected: tuple[float, str]) -> None:
    assert bound_cycles(128, 64, head_dim, polynomial) == expected


def test_the_bound_of_a_call_in_milliseconds() -> None:
    # Batch 2, 8 heads, 4096 tokens, D = 40: 16 * 4096 * 4096 = 2**28 scores.
    assert attention_calls(40, 4096, 2)[0].flops == 4 * 2**28 * 40
    bound = attention_bound(16, 4096, 4096, 40, RATES)
    assert bound.matrix_ms == pytest.approx(4 * 2**28 * 48 / 1e12)
    assert bound.exponential_ms == pytest.approx(2**28 / 4e9)
    assert (bound.ms, bound.unit) == (bound.exponential_ms, "exponential")
    moved = attention_bound(16, 4096, 4096, 40, RATES, polynomial=2)
    assert moved.exponential_ms == pytest.approx(0.75 * 2**28 / 4e9)
    assert (moved.ms, moved.unit) == (moved.matrix_ms, "matrix")


@pytest.mark.parametrize("polynomial", [-1, 9])
def test_more_than_all_exponentials_cannot_be_moved(polynomial: int) -> None:
    with pytest.raises(ValueError, match="0 to 8"):
        exponential_cycles(1, 1, polynomial)
