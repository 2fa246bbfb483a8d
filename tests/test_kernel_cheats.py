"""Cheats of kernels in `ldmperf kernels`: each is caught, and the message names it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.kernel_bench.bench import KernelBench
from ldmperf.profiling.kernel_bench.device import Pace
from ldmperf.profiling.kernel_bench.floor import least_call_ms
from ldmperf.profiling.kernel_bench.inputs import CallInputs
from ldmperf.profiling.kernel_bench.kernel_records import CopyBandwidth, KernelRecord, UnitRates
from ldmperf.profiling.kernel_bench.peers import Implementation, Peer
from ldmperf.profiling.kernel_bench.selection import Job
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.step.call import OperatorCall, TensorSpec
from ldmperf.profiling.step.calls import family_calls, sampler_call

pytestmark = pytest.mark.usefixtures("_one_thread")

THRICE = RepetitionRule(3, 0.0)
GEGLU = OperatorCall(
    operator="geglu",
    dtype="float32",
    tensors=(TensorSpec(name="x", shape=(6, 16), stride=(16, 1), dtype="float32"),),
    results=(TensorSpec(name="result 0", shape=(6, 8), stride=(8, 1), dtype="float32"),),
)
LINEAR = next(call for call in family_calls("39M", 2, "float32", latent=(8, 8)) if call.operator == "linear")


def benched(call: Callable[..., Tensor], of: OperatorCall = GEGLU, **given: object) -> KernelRecord:
    """The record of a peer beside an honest one, which is ok."""
    peers = [
        Peer("cheat", lambda case, device: Implementation(call)),
        Peer("triton", lambda case, device: Implementation(OPERATORS[of.operator].reference)),
    ]
    fields: dict[str, Any] = {"copy": None, "rates": None} | given
    bench = KernelBench("cpu", peers, ("eager",), Pace(THRICE, 0.0), Environment(os="Linux", python="3"), **fields)
    cheat, honest = bench.measure(Job("39M", 2, of))
    assert honest.status == "ok" or "rates" in given, honest.message
    assert (cheat.ms is None) == (cheat.status != "ok")
    return cheat


def right_geglu(x: Tensor) -> Tensor:
    return OPERATORS["geglu"].reference(x)  # type: ignore[no-any-return]


def test_a_kernel_that_remembers_its_inputs_by_their_place_is_caught() -> None:
    kept: dict[int, Tensor] = {}

    def cheat(x: Tensor) -> Tensor:
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = right_geglu(x)
        return kept[x.data_ptr()].clone()

    record = benched(cheat)
    assert record.status == "incorrect"
    assert "cached output: with other numbers in the same memory" in (record.message or "")

    def same_memory(x: Tensor) -> Tensor:
        return kept.setdefault(-x.data_ptr(), right_geglu(x))

    record = benched(same_memory)
    assert record.status == "incorrect"
    assert "cached output: it returned the memory of an earlier result" in (record.message or "")


def test_a_kernel_that_is_right_only_while_it_is_checked_is_caught() -> None:
    """By the number of its call: the first, and the last."""
    counting = itertools.count(1)
    benched(lambda x: (next(counting), right_geglu(x))[1])
    last, calls = next(counting) - 1, itertools.count(1)
    record = benched(lambda x: right_geglu(x) * (1.0 if next(calls) in (1, last) else 0.5))
    assert record.status == "incorrect"
    assert "in timing the result was off" in (record.message or "")


def test_a_kernel_that_patches_timers_is_caught_and_the_next_one_timed() -> None:
    calls, real = itertools.count(1), time.perf_counter

    def cheat(x: Tensor) -> Tensor:
        if next(calls) == 8:
            time.perf_counter = lambda: 0.0
        return right_geglu(x)

    record = benched(cheat)
    assert time.perf_counter is real
    assert record.status == "impossible"
    assert "patched timers: time.perf_counter was replaced" in (record.message or "")


class LazyResult(Tensor):
    """Computes when it is read."""


def test_a_kernel_with_a_lazy_result_is_caught() -> None:
    record = benched(lambda x: right_geglu(x).as_subclass(LazyResult))
    assert record.status == "impossible"
    assert "lazy result" in (record.message or "")


def test_a_kernel_faster_than_its_flops_allow_is_impossible() -> None:
    """By the matmuls of the run; slow ones, here."""
    rates = UnitRates(
        matrix_size=10, matrix_ms=Samples.of([2e9, 3e9]), multiprocessors=1, clock_ghz=None, message="-"
    )
    flops = LINEAR.flops
    assert flops is not None
    # 2000 FLOP in 2e9 ms, and a quarter more.
    least = least_call_ms(LINEAR, rates, None, True)
    assert least == pytest.approx(flops / (1.25 * 1e-6))
    record = benched(OPERATORS["linear"].reference, LINEAR, rates=rates)
    assert record.status == "impossible"
    assert "below the floor: a sample of 1 call took" in (record.message or "")
    quick = rates.model_copy(update={"matrix_ms": Samples.of([1e-9])})
    assert benched(OPERATORS["linear"].reference, LINEAR, rates=quick).status == "ok"


def test_bytes_are_a_floor_where_no_cache_can_hold_them() -> None:
    copy = CopyBandwidth(bytes_each=10**6, ms=Samples.of([2.0]))
    moved = 4 * (6 * 16 + 6 * 8)
    assert least_call_ms(GEGLU, None, copy, True) == pytest.approx(moved / (4 * 1e6))
    assert least_call_ms(GEGLU, None, copy, False) is None
    masked = GEGLU.model_copy(
        update={"tensors": (*GEGLU.tensors, TensorSpec(name="key_mask", shape=(1,), stride=(1,), dtype="bool"))}
    )
    assert least_call_ms(masked, None, copy, True) is None


def test_other_numbers_come_into_the_same_memory() -> None:
    """Of all that a call reads, but for a sampler's tables; strides and expanded dimensions stay."""
    expanded = GEGLU.model_copy(
        update={"tensors": (TensorSpec(name="x", shape=(6, 16), stride=(0, 1), dtype="float32"),)}
    )
    for call in (expanded, GEGLU, sampler_call("dpmpp_2m", 2, "float32", (8, 8))):
        inputs = CallInputs(call, 1, torch.device("cpu"), seed=0)
        before = {name: v.clone() for name, v in inputs.sets[0].items() if isinstance(v, Tensor)}
        places = {name: v.data_ptr() for name, v in inputs.sets[0].items() if isinstance(v, Tensor)}
        inputs.renew()
        changed = {name for name in before if not torch.equal(before[name], inputs.sets[0][name])}
        assert {name: inputs.sets[0][name].data_ptr() for name in places} == places
        if call.plan is None:
            assert changed == {"x"}
        else:
            assert "model_output" in changed
            assert changed.isdisjoint({"table", "step", "guidance_scale", "input_scale", "registers"})
