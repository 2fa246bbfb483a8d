"""The kept heap, by the page faults of a tensor that is made again and again."""

from __future__ import annotations

import resource

import pytest
import torch

from ldmperf.profiling.measure import heap
from ldmperf.profiling.measure.heap import can_be_kept, kept_heap, trim_heap

MIB = 1 << 20
TIMES = 20
needs_glibc = pytest.mark.skipif(not can_be_kept(), reason="this C library cannot be told to keep its heap")


def fault_share() -> float:
    """Page faults of tensors of 64 MiB, one after the other, as a share of the pages that they write."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.empty(64 * MIB, dtype=torch.uint8).fill_(1)
    pages = TIMES * 64 * MIB / resource.getpagesize()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@needs_glibc
def test_inside_a_freed_block_is_taken_again_without_faults() -> None:
    # The first few may split what the one before has left.
    with kept_heap():
        assert fault_share() < 0.5
        with kept_heap():
            assert fault_share() < 0.1
        # Leaving the inner one changes nothing.
        assert fault_share() < 0.1
        before = resident()
        trim_heap()
        assert resident() < before - 60 * MIB


@needs_glibc
def test_it_ends_with_what_it_is_around_and_gives_all_back() -> None:
    before = resident()

    def work() -> None:
        with kept_heap():
            fault_share()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert heap._inside == 0
    assert resident() < before + 60 * MIB


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_function", lambda name: None)
    assert not can_be_kept()
    with kept_heap():
        assert heap._inside == 0
    trim_heap()
