"""Clocks, streams and graphs of a real GPU. No hypothesis here: a GPU machine may have the light core only."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.kernel_bench.bench import KernelBench
from ldmperf.profiling.kernel_bench.device import (
    GraphCalls,
    Pace,
    l2_cache_bytes,
    timed_run,
)
from ldmperf.profiling.kernel_bench.peers import PEERS, usual_peers
from ldmperf.profiling.kernel_bench.selection import Job
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.rates import DELAY_CYCLES, copy_bandwidth, unit_rates
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule, timed
from ldmperf.profiling.step.calls import attention_calls, family_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_device_clock_sees_the_devices_work() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    result = timed(lambda: x @ x, device)
    assert result.gpu_ms is not None
    assert 0 < result.gpu_ms <= result.wall_ms


def test_the_host_has_handed_over_a_sample_before_the_devices_clock_starts() -> None:
    device = torch.device("cuda")
    x = torch.randn(1000, device=device)
    graph = GraphCalls([lambda: x * 2], device)
    timed_run(graph, 100, device)
    # What `timed` does, and where the device is when the host is done: still before its first event.
    before = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY_CYCLES)
    before.record()
    graph.run(10)
    assert not before.query()
    torch.cuda.synchronize()


def test_a_graph_gives_what_the_calls_give_and_results_of_their_own() -> None:
    device = torch.device("cuda")
    inputs = [torch.randn(1000, device=device) for _ in range(3)]
    workload = GraphCalls([lambda x=x: x * 2 for x in inputs], device)  # type: ignore[misc]
    for x in inputs:
        x.normal_()
    workload.run(2)
    torch.cuda.synchronize()
    for x, result in zip(inputs, workload.results, strict=True):
        assert torch.equal(result, x * 2)


def test_after_a_failed_capture_the_device_still_works() -> None:
    device = torch.device("cuda")
    before = torch.cuda.current_stream(device)
    x = torch.ones(10, device=device)
    with pytest.raises(RuntimeError):
        GraphCalls([lambda: x.sum().item()], device)
    assert torch.cuda.current_stream(device) == before
    assert float(x.sum()) == 10.0
    GraphCalls([lambda: x * 2], device).run(1)


def test_our_kernels_are_timed_in_both_modes() -> None:
    """Every case of the smallest step on small latents: right before and after, with a time."""
    bandwidth = copy_bandwidth(torch.device("cuda"), count=3)
    environment = Environment(os="Linux", python="3")
    pace = Pace(RepetitionRule(3, 0.0), 0.2)
    bench = KernelBench(
        "cuda", [PEERS["triton"], PEERS["eager"]], ("eager", "graph"), pace, environment, bandwidth
    )
    for case in family_calls("39M", 2, "bfloat16", latent=(16, 16)):
        for record in bench.measure(Job("39M", 2, case)):
            if record.peer == "triton":
                assert record.status == "ok", f"{record.case.label} {record.mode}: {record.message}"
                assert record.clock == "device"
                assert (record.delay_cycles != 0) == (record.mode == "graph")


@pytest.mark.parametrize("head_dim", [12, 40, 384])
def test_attentions_peers_are_timed_or_say_why_not(head_dim: int) -> None:
    rates = unit_rates(torch.bfloat16, torch.device("cuda"), count=3)
    assert rates is not None
    # Without NVML the clock is not known, and there is no bound.
    assert rates.message if rates.rates is None else rates.rates.matrix_tflops > 1.0
    pace = Pace(RepetitionRule(3, 0.0), 0.2)
    environment = Environment(os="Linux", python="3")
    peers = [PEERS[name] for name in usual_peers("cuda")]
    bench = KernelBench("cuda", peers, ("eager", "graph"), pace, environment, None, rates)
    for case in attention_calls(head_dim, 256, 2):
        for record in bench.measure(Job(f"head_dim {head_dim}", 2, case)):
            told = f"{record.peer} {record.mode} {record.case.label}: {record.status}: {record.message}"
            assert record.status in ("ok", "unsupported"), told
            if record.peer in ("triton", "auto", "eager", "reference"):
                assert record.status == "ok", told
                assert (record.percent_of_bound is None) == (rates.rates is None)


def test_the_tuner_times_torchs_attention_too() -> None:
    tune = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "tune.py"), run_name="tune")
    case = attention_calls(40, 256, 2)[0]
    candidates = OPERATORS["attention"].candidates(case.bound("meta"))[:2]
    with torch.inference_mode():
        timer = tune["GpuTimer"](case, torch.device("cuda"))
        found = tune["search"](candidates, timer, Deadline(None), with_torch=True)
    assert found.failures == ()
    assert found.torch is not None


def test_the_tuner_checks_and_times_candidates() -> None:
    tune = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "tune.py"), run_name="tune")
    case = next(case for case in family_calls("39M", 2, "bfloat16") if case.operator == "geglu")
    candidates = OPERATORS["geglu"].candidates(case.bound("meta"))[:3]
    with torch.inference_mode():
        found = tune["search"](candidates, tune["GpuTimer"](case, torch.device("cuda")), Deadline(None))
    assert (found.tried, found.failures) == (3, ())
    assert 0 < found.ms <= found.now


def test_the_size_of_the_cache_is_known() -> None:
    found = l2_cache_bytes(torch.device("cuda"))
    assert found is not None
    assert found > 2**20
