"""Kernel benches: right before timed, failures as records, the order within a time bound, rotation, the table."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.commands.kernels_command import progress_line
from ldmperf.profiling.kernel_bench import bench as bench_module
from ldmperf.profiling.kernel_bench import peer_lane
from ldmperf.profiling.kernel_bench.bench import KernelBench
from ldmperf.profiling.kernel_bench.device import (
    MOST_INPUT_SETS,
    EagerCalls,
    GraphCalls,
    Pace,
    calibrated,
    input_sets,
    runs_per_sample,
    timed_run,
)
from ldmperf.profiling.kernel_bench.inputs import CallInputs, by_sample, tolerance_of
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord, KernelStore
from ldmperf.profiling.kernel_bench.peers import PEERS, Implementation, Peer
from ldmperf.profiling.kernel_bench.run import earlier_records, run_jobs
from ldmperf.profiling.kernel_bench.selection import Job, by_importance, jobs, steps_in_order
from ldmperf.profiling.kernel_bench.table import markdown, notes, print_records, ratios, summary_lines
from ldmperf.profiling.measure import turn
from ldmperf.profiling.measure.environment import Environment, max_sm_clock_mhz
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.nvml import Sensor
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.measure.rates import DELAY_CYCLES, CopyBandwidth, copy_bandwidth, unit_rates
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.store import load_lines, rejected_path
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule, Timed, Times, timed
from ldmperf.profiling.step.call import OperatorCall, TensorSpec
from ldmperf.profiling.step.calls import family_calls, sampler_call

pytestmark = pytest.mark.usefixtures("_one_thread")

ENVIRONMENT = Environment(os="Linux", python="3.11", torch="2.13.0", git_commit="a" * 40, git_dirty=False)
COPY = CopyBandwidth(bytes_each=10**6, ms=Samples.of([1.0, 2.0, 3.0]))
QUICK = Pace(RepetitionRule(3, 0.0), 0.0)


def geglu_case(rows: int = 6, dtype: Any = "float32") -> OperatorCall:
    x = TensorSpec(name="x", shape=(rows, 16), stride=(16, 1), dtype=dtype)
    out = TensorSpec(name="result 0", shape=(rows, 8), stride=(8, 1), dtype=dtype)
    return OperatorCall(operator="geglu", dtype=dtype, tensors=(x,), results=(out,))


def peer(name: str, call: Callable[..., Any]) -> Peer:
    return Peer(name, lambda case, device: Implementation(call))


def bench(*peers: Peer, modes: tuple[Any, ...] = ("eager",)) -> KernelBench:
    return KernelBench("cpu", peers, modes, QUICK, ENVIRONMENT, COPY)


def right(**arguments: Any) -> Any:
    return OPERATORS["geglu"].reference(**arguments)


def after_calls(count: int) -> Callable[..., Any]:
    """Right for so many calls, then one percent off."""
    calls = itertools.count()
    return lambda **arguments: right(**arguments) * (1.0 if next(calls) < count else 1.01)


def fails(error: Exception, **_: Any) -> Any:
    raise error


def test_only_a_right_result_gets_a_time() -> None:
    oom = torch.OutOfMemoryError("CUDA out of memory")
    peers = [
        peer("triton", right),
        peer("off", lambda x: right(x=x) * 1.001),
        peer("nan", lambda x: right(x=x) * float("nan")),
        peer("part", lambda x: right(x=x)[:-1]),
        peer("later", after_calls(7)),
        peer("oom", functools.partial(fails, oom)),
        peer("broken", functools.partial(fails, TypeError("no\nwell"))),
        peer("missing", functools.partial(fails, Unsupported("not installed"))),
    ]
    records = {record.peer: record for record in bench(*peers).measure(Job("39M", 2, geglu_case()))}
    assert {name: record.status for name, record in records.items()} == {
        "triton": "ok",
        "off": "incorrect",
        "nan": "incorrect",
        "part": "incorrect",
        "later": "incorrect",
        "oom": "oom",
        "broken": "error",
        "missing": "unsupported",
    }
    assert [name for name, record in records.items() if record.ms is not None] == ["triton"]
    ok = records["triton"]
    assert ok.ms is not None
    assert ok.ms.n == 3
    assert ok.gb_per_s == pytest.approx((6 * 16 + 6 * 8) * 4 / ok.ms.p50 / 1e6)
    assert ok.percent_of_copy == pytest.approx(100 * ok.gb_per_s)
    later = records["later"].correctness
    assert later is not None
    assert later.error_before is not None
    assert later.error_before < 1e-6 < later.error_after  # type: ignore[operator]
    assert records["broken"].message == "TypeError: no"


def oom_from(monkeypatch: pytest.MonkeyPatch, name: str, failing: Callable[[int], bool]) -> None:
    """Lets the calls of a method of CallInputs for which `failing(number)` holds find no memory."""
    method, numbers = getattr(CallInputs, name), itertools.count()

    def called(inputs: CallInputs) -> Any:
        if failing(next(numbers)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method(inputs)

    monkeypatch.setattr(CallInputs, name, called)


PEERS_OF_THREE = ("triton", "eager", "compile")


@pytest.mark.parametrize("modes", [("eager",), ("eager", "graph")])
@pytest.mark.parametrize("failures", [0, 1, 2, 3, 9])
def test_a_last_check_without_memory_fails_no_more_lanes_than_it_has_to(
    monkeypatch: pytest.MonkeyPatch, failures: int, modes: tuple[Any, ...]
) -> None:
    """The reference of the last check finds no memory until so many lanes have given theirs back."""
    # The first is the reference of the check before timing.
    oom_from(monkeypatch, "reference", lambda number: 1 <= number <= failures)
    peers = [peer(name, right) for name in PEERS_OF_THREE]
    found = bench(*peers, modes=modes).measure(Job("39M", 2, geglu_case()))
    expected = {0: ("ok", "ok", "ok"), 1: ("ok", "ok", "oom"), 2: ("ok", "oom", "oom")}
    eager = [record for record in found if record.mode == "eager"]
    assert [record.peer for record in eager] == list(PEERS_OF_THREE)
    assert tuple(record.status for record in eager) == expected.get(failures, ("oom", "oom", "oom"))
    # Of lanes that are left none is judged by an older reference.
    assert {record.status for record in found if record.mode == "graph"} <= {"unsupported", "oom"}


@pytest.mark.parametrize("lane", range(3))
def test_a_lane_that_finds_no_memory_for_its_last_check_fails_alone(
    monkeypatch: pytest.MonkeyPatch, lane: int
) -> None:
    # Before timing: one for each peer. Then one of the renewed check, then one for each lane.
    oom_from(monkeypatch, "restore", lambda number: number == 3 + 1 + lane)
    found = bench(*(peer(name, right) for name in PEERS_OF_THREE)).measure(Job("39M", 2, geglu_case()))
    assert [record.status for record in found] == ["oom" if place == lane else "ok" for place in range(3)]


def test_a_record_says_whether_other_sides_had_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> bool:
        (record,) = bench(peer("eager", right)).measure(Job("39M", 2, geglu_case()))
        return record.in_turns

    assert not measured()

    def end() -> None:
        turn.TURNS.waited += 0.5

    monkeypatch.setattr(turn.TURNS, "end", end)
    assert measured()
    monkeypatch.undo()
    # What was waited for in an earlier call is that call's.
    assert not measured()


def test_the_check_sees_what_a_call_does_not_write() -> None:
    """model_input is full of NaN before the check, so that a call that leaves it alone is wrong."""
    case = sampler_call("ddim", 2, "float32", (8, 8))

    def forgets(**arguments: Any) -> None:
        OPERATORS["sampler_update"].reference(**arguments | {"model_input": None, "input_scale": None})

    whole = functools.partial(OPERATORS["sampler_update"].call, backend="torch")
    found = bench(peer("triton", whole), peer("forgets", forgets)).measure(Job("39M", 2, case))
    assert [record.status for record in found] == ["ok", "incorrect"]


def test_before_a_check_inputs_are_as_they_were_and_outputs_are_poisoned() -> None:
    inputs = CallInputs(sampler_call("ddim", 2, "float32", (8, 8)), 2, torch.device("cpu"), seed=0)
    first = inputs.sets[0]
    registers = first["registers"].clone()
    assert not torch.equal(registers, inputs.sets[1]["registers"])
    OPERATORS["sampler_update"].reference(**first)
    assert not torch.equal(first["registers"], registers)
    inputs.restore()
    assert torch.equal(first["registers"], registers)
    assert first["model_input"].isnan().all()


def test_every_case_of_a_step_is_right_in_plain_torch() -> None:
    """Wrong formulas of the peers would make our kernels look wrong, or slow."""
    peers = [PEERS[name] for name in ("eager", "reference")]
    for case in family_calls("39M", 2, "float32", latent=(8, 8)):
        for record in bench(*peers).measure(Job("39M", 2, case)):
            expected = "unsupported" if case.plan in ("unipc", "euler_a") and record.peer == "eager" else "ok"
            assert record.status == expected, record.message


@pytest.mark.parametrize("plan", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_of_diffusers_is_ours(plan: str, batch: int) -> None:
    pytest.importorskip("diffusers")
    (record,) = bench(PEERS["diffusers"]).measure(Job("39M", batch, sampler_call(plan, batch, "float32", (8, 8))))
    assert record.status == "ok", record.message


def test_without_a_gpu_our_kernels_have_no_time() -> None:
    found = bench(PEERS["triton"], PEERS["xformers"], modes=("eager", "graph")).measure(
        Job("39M", 2, geglu_case())
    )
    assert {(record.peer, record.mode, record.status) for record in found} == {
        (name, mode, "unsupported") for name in ("triton", "xformers") for mode in ("eager", "graph")
    }
    assert "needs a GPU" in (found[0].message or "")


def test_a_call_that_cannot_be_set_up_is_a_record_for_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(OperatorCall, "arguments", no_room)
    found = bench(peer("triton", right), peer("eager", right)).measure(Job("39M", 2, geglu_case()))
    assert [(record.peer, record.status) for record in found] == [("triton", "oom"), ("eager", "oom")]


def test_what_one_record_says_is_said_once() -> None:
    measured = bench(PEERS["xformers"], peer("triton", right))
    first, second = (measured.measure(Job("39M", 2, geglu_case(rows))) for rows in (4, 5))
    assert [record.peer for record in first] == ["xformers", "triton"]
    assert [record.peer for record in second] == ["triton"]


def test_a_record_is_whole() -> None:
    (record,) = bench(peer("triton", right)).measure(Job("39M", 2, geglu_case()))
    assert KernelRecord.model_validate_json(record.model_dump_json()) == record
    for changes in (
        {"ms": None},
        {"correctness": None},
        {"status": "oom", "message": "no room"},
        {"peer": "other"},
        {"l2": None},
    ):
        with pytest.raises(ValidationError):
            KernelRecord(**(record.model_dump(exclude={"bytes_moved", "gb_per_s", "percent_of_copy"}) | changes))


def test_records_are_on_disk_as_they_are_made_and_the_bound_holds(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels.jsonl")
    now = 0.0
    lines: list[int] = []

    def told(_: object) -> None:
        nonlocal now
        now += 4.0
        lines.append(len(store.path.read_bytes().splitlines()))

    given = [Job("39M", 2, geglu_case(rows)) for rows in (3, 4, 5, 6)]
    deadline = Deadline(10.0, clock=lambda: now)
    records, complete = run_jobs(bench(peer("triton", right)), given, store, deadline, told)
    assert (len(records), complete, lines) == (3, False, [1, 2, 3])
    assert store.load() == records
    # Torn by a kill: set aside, never fatal.
    store.path.write_bytes(store.path.read_bytes()[:-20])
    assert KernelStore(store.path).load() == records[:2]
    assert rejected_path(store.path).exists()
    assert load_lines(store.path, KernelRecord)[1] == 1


def test_what_is_recorded_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Takes most of the time here.
    monkeypatch.setattr(bench_module, "release_memory", lambda: None)
    path = tmp_path / "kernels.jsonl"
    KernelStore(path)
    measured: list[int] = []

    def noted(**arguments: Any) -> Any:
        measured.append(arguments["x"].shape[0])
        return right(**arguments)

    def run(rows: tuple[int, ...], peers: Sequence[str] = ("triton", "eager")) -> list[KernelRecord]:
        """A new process: what it measured is in `measured`."""
        measured.clear()
        earlier = earlier_records(tmp_path, ENVIRONMENT, "float32", "cpu")
        given = [Job("39M", 2, geglu_case(n)) for n in rows]
        new = bench(PEERS["xformers"], *(peer(name, noted) for name in peers))
        return run_jobs(new, given, KernelStore(path), Deadline(None), lambda _: None, earlier)[0]

    first = run((3, 4))
    assert set(measured) == {3, 4}
    again = run((3, 4, 5))
    assert set(measured) == {5}
    assert again[: len(first)] == first
    # Of xformers one record an operator says all there is.
    assert [record.peer for record in again].count("xformers") == 1
    assert load_lines(path, KernelRecord) == (again, 0)
    # Of one folder, and resuming does not change it.
    (run_id,) = {record.run_id for record in again}
    assert run_id is not None
    assert len({record.case_id for record in again}) == len(again)
    # A torn record, or a new peer: the call is measured again as a whole, and its last records count.
    path.write_bytes(path.read_bytes()[:-20])
    whole = run((3, 4, 5))
    assert set(measured) == {5}
    assert len(load_lines(path, KernelRecord)[0]) == 8
    assert len({record.case_key for record in whole}) == len(whole) == 7
    with pytest.raises(RunError, match="is of float32, and this call of bfloat16: give --dtype float32"):
        earlier_records(tmp_path, ENVIRONMENT, "bfloat16", "cpu")
    with pytest.raises(RunError, match="is of cpu, and this call of cuda: give --device cpu"):
        earlier_records(tmp_path, ENVIRONMENT, "float32", "cuda")
    with pytest.raises(RunError, match="is of 0, and this call of 3: give --seed 0"):
        earlier_records(tmp_path, ENVIRONMENT, "float32", "cpu", 3)
    assert sorted(r.model_dump_json() for r in earlier_records(tmp_path, ENVIRONMENT, "float32", "cpu")) == sorted(
        r.model_dump_json() for r in whole
    )
    run((3,), peers=("triton", "eager", "other"))
    assert set(measured) == {3}
    assert run((3, 4), peers=("triton",))
    assert measured == []


def test_an_interrupt_passes_through(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels.jsonl")
    calls = itertools.count()

    def interrupted(**arguments: Any) -> Any:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return right(**arguments)

    given = [Job("39M", 2, geglu_case(rows)) for rows in (3, 4, 5, 6)]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(bench(peer("triton", interrupted)), given, store, Deadline(None), lambda _: None)
    assert 1 <= len(store.load()) <= 3


def test_important_steps_and_calls_come_first() -> None:
    order = steps_in_order(("39M", "866M", "83M", "vae"), (2, 16))
    assert order[:4] == [("866M", 2), ("39M", 2), ("866M", 16), ("vae", 1)]
    assert len(order) == len(set(order)) == 7
    cases = by_importance(family_calls("39M", 2, "bfloat16"))
    assert {case.operator for case in cases[: len(OPERATORS)]} == set(OPERATORS)
    for operator in OPERATORS:
        moved = [case.count * case.bytes_moved for case in cases if case.operator == operator]
        assert moved == sorted(moved, reverse=True)
    assert sorted(cases, key=lambda c: c.key) == sorted(family_calls("39M", 2, "bfloat16"), key=lambda c: c.key)


def test_a_call_that_several_sizes_make_is_measured_once() -> None:
    found = list(jobs(("sampler_update",), ("39M", "83M"), (2,), "bfloat16"))
    assert {job.size for job in found} == {"39M"}
    assert len(found) == 4


def test_calls_at_another_latent_and_context() -> None:
    """Both sides of a latent are halved at each level; the context's length is that of k and v alone."""
    usual, tall, long = (
        list(jobs(OPERATORS, ("39M", "vae"), (2,), "float32", latents, contexts))
        for latents, contexts in ((((16, 16),), (77,)), (((24, 8),), (77,)), (((16, 16),), (5, 77)))
    )
    of_vae = [job for job in usual if job.size == "vae"]
    assert of_vae == [job for job in tall if job.size == "vae"]
    pixels = {job.call.tensors[0].shape[2:] for job in tall if job.call.operator == "group_norm_silu"}
    assert pixels >= {(24, 8), (12, 4), (6, 2), (3, 1)}
    registers = {job.call.tensors[0].shape[3:] for job in tall if job.call.operator == "sampler_update"}
    assert registers == {(24, 8)}
    added = [job.call for job in long if job not in usual]
    assert {case.operator for case in added} >= {"attention"}
    assert {case.attention.keys for case in added if case.attention is not None} == {5}
    assert len({job.call.key for job in long}) == len(long)


def test_the_command_takes_latents_context_lengths_and_a_seed(run: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--device", "cpu", "--dtype", "float32", "--size", "39M", "--batch", "1", "--peer", "eager"]
    options += ["--kernel", "attention", "--latent", "8x16,8", "--tokens", "5", "--seed", "7"]
    found = run("kernels", *options, "--out", tmp_path)
    assert found.code == 0, found.err
    (folder,) = tmp_path.iterdir()
    records, _ = load_lines(folder / "kernels.jsonl", KernelRecord)
    sizes = {(r.case.attention.queries, r.case.attention.keys) for r in records if r.case.attention is not None}
    assert sizes == {(n, keys) for n in (128, 64, 32, 16, 8, 4, 2, 1) for keys in (n, 5)}
    assert {(r.seed, r.case_key.endswith("mode=eager seed=7"), r.status) for r in records} == {(7, True, "ok")}
    other = records[0].model_copy(update={"seed": 0})
    assert other.case_id != records[0].case_id
    refused = run("kernels", *options, "--seed", "8", "--resume", folder)
    assert (refused.code, "give --seed 7" in refused.err) == (2, True)


def test_a_seed_chooses_the_inputs() -> None:
    errors = []
    for seed in (0, 0, 2**64 - 1):
        seeded = KernelBench("cpu", [PEERS["eager"]], ("eager",), QUICK, ENVIRONMENT, COPY, seed=seed)
        (record,) = seeded.measure(Job("39M", 2, geglu_case()))
        assert (record.status, record.seed) == ("ok", seed)
        assert record.correctness is not None
        errors.append(record.correctness.error_before)
    assert errors[0] == errors[1] != errors[2]


@pytest.mark.parametrize(
    ("bytes_a_set", "l2", "expected"),
    [
        (10, None, (1, False)),
        (50, 50, (2, True)),
        (51, 50, (2, True)),
        (100, 50, (1, True)),
        (30, 50, (4, True)),
        (1, 50 << 20, (MOST_INPUT_SETS, False)),
    ],
)
def test_inputs_rotate_past_twice_the_cache(bytes_a_set: int, l2: int | None, expected: tuple[int, bool]) -> None:
    assert input_sets(bytes_a_set, l2) == expected


def test_calls_rotate_and_results_stay_apart() -> None:
    seen: list[int] = []

    def call(i: int) -> torch.Tensor:
        seen.append(i)
        return torch.empty(1000)

    workload = EagerCalls([functools.partial(call, i) for i in range(3)])
    workload.run(4)
    workload.run(3)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert len({result.data_ptr() for result in workload.results}) == 3


def test_a_sample_is_as_many_runs_as_fill_it() -> None:
    assert runs_per_sample(0.3, 1.0) == 4
    assert runs_per_sample(5.0, 1.0) == 1
    assert runs_per_sample(0.0, 1.0) == 10_000
    assert calibrated(EagerCalls([lambda: None]), QUICK, torch.device("cpu")) == 1


def test_the_copy_bandwidth_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmperf.profiling.measure.rates._COPY_BYTES", {"cpu": 4096})
    found = copy_bandwidth(torch.device("cpu"), count=5)
    assert (found.bytes_each, found.ms.n) == (4096, 5)
    assert COPY.gb_per_s == pytest.approx(1.0)


class _FakeCuda:
    """torch.cuda's streams and graphs, as far as capturing needs them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capture_fails: bool) -> None:
        self.current = "main"
        self.replays = 0
        fake = self

        class Stream:
            def __init__(self, *_: object) -> None: ...
            def wait_stream(self, other: object) -> None: ...

        class Graph:
            def replay(self) -> None:
                fake.replays += 1

        @contextlib.contextmanager
        def stream(_: object) -> Any:
            yield

        @contextlib.contextmanager
        def graph(_: object, capture_error_mode: str) -> Any:
            fake.current = "capturing"
            yield
            if capture_fails:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            fake.current = "main"

        self.main = Stream()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.main)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "set_stream", self.set_stream)

    def set_stream(self, stream: object) -> None:
        assert stream is self.main
        self.current = "main"


def test_a_graph_holds_every_call_and_replays_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _FakeCuda(monkeypatch, capture_fails=False)
    workload = GraphCalls([lambda: "a", lambda: "b", lambda: "c"], torch.device("cuda"))
    workload.run(5)
    assert (workload.calls_per_run, workload.results, cuda.replays) == (3, ["a", "b", "c"], 5)


def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _FakeCuda(monkeypatch, capture_fails=True)
    with pytest.raises(RuntimeError, match="capturing"):
        GraphCalls([lambda: None], torch.device("cuda"))
    assert cuda.current == "main"


@pytest.fixture
def device_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a device that stands for a CUDA one, in order."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self, stream: str) -> None:
            log.append("record" if stream == torch.cuda.current_stream("cuda") else "record on another stream")

        def elapsed_time(self, _: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "current")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"wait {cycles}"))
    return log


def test_a_graph_is_launched_before_its_clock_starts_and_eager_calls_are_not(
    device_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    _FakeCuda(monkeypatch, capture_fails=False)
    graph = GraphCalls([lambda: device_log.append("captured")], cuda)
    monkeypatch.setattr(graph, "run", lambda runs: device_log.append(f"{runs} replays"))
    device_log.clear()
    assert timed_run(graph, 7, cuda).gpu_ms == 2.0
    assert device_log == ["synchronize", f"wait {DELAY_CYCLES}", "record", "7 replays", "record", "synchronize"]
    assert DELAY_CYCLES >= 100_000
    device_log.clear()
    timed_run(EagerCalls([lambda: device_log.append("call")]), 2, cuda)
    assert device_log == ["synchronize", "record", "call", "call", "record", "synchronize"]
    # A whole trajectory's host time is the point.
    device_log.clear()
    timed(lambda: device_log.append("call"), cuda)
    assert device_log == ["synchronize", "record", "call", "record", "synchronize"]


def test_no_sample_pays_for_memory_that_was_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever memory was given back, each peer runs untimed before its next sample."""
    warm: set[str] = set()
    sampled: list[str] = []
    cold: list[str] = []
    is_timed = False
    counts = {name: itertools.count(1) for name in "abc"}

    def released() -> None:
        warm.clear()

    def sample(*arguments: Any) -> Any:
        nonlocal is_timed
        is_timed = True
        try:
            return timed_run(*arguments)
        finally:
            is_timed = False

    def call(name: str, fails_at: int, **arguments: Any) -> Any:
        if next(counts[name]) == fails_at:
            raise RuntimeError("broken")
        if is_timed:
            sampled.append(name)
            cold.extend({name} - warm)
        warm.add(name)
        return right(**arguments)

    monkeypatch.setattr("ldmperf.profiling.measure.outcomes.release_memory", released)
    monkeypatch.setattr(bench_module, "release_memory", released)
    monkeypatch.setattr(peer_lane, "timed_run", sample)
    # One call is checked, six calibrate, one is untimed: the tenth is the second sample, the third calibrates.
    peers = [peer(name, functools.partial(call, name, fails)) for name, fails in (("a", 0), ("b", 10), ("c", 3))]
    statuses = [record.status for record in bench(*peers).measure(Job("39M", 2, geglu_case()))]
    assert statuses == ["ok", "error", "error"]
    assert sampled.count("a") >= 3
    assert sampled.count("b") == 1
    assert cold == []


@pytest.mark.parametrize("replays", [True, False])
def test_a_graph_is_checked_again_by_a_replay(replays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are poisoned before, so that a replay that computes nothing is wrong."""
    inputs = CallInputs(geglu_case(), 1, torch.device("cpu"), seed=0)
    check = peer_lane.Check(inputs, inputs.reference())
    built = peer_lane.BuiltPeer(peer("triton", right), torch.device("cpu"))
    built.begin(check)
    _FakeCuda(monkeypatch, capture_fails=False)
    graph = GraphCalls(built.calls, torch.device("cuda"))
    monkeypatch.setattr(graph, "run", lambda _: replays and graph.results[0].copy_(built.calls[0]()))
    lane = peer_lane.PeerLane(built, "graph", workload=graph, calls_per_sample=4)
    lane.check_timed(check)
    assert lane.status == "ok"
    lane.finish(Times(wall_ms=[8.0], gpu_ms=[2.0]), check.renewed())
    assert (lane.ms, lane.status) == ([0.5], "ok" if replays else "incorrect")


def test_the_clock_of_the_units_is_nvmls_or_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's properties have no clock since CUDA 13."""
    properties = SimpleNamespace(uuid="1234", multi_processor_count=132)
    randn = torch.randn
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(*shape))
    monkeypatch.setattr("ldmperf.profiling.measure.rates._MATRIX_SIZE", 8)
    monkeypatch.setattr("ldmperf.profiling.measure.rates.timed", lambda *_, **__: Timed(None, 9.0, 2.0))
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1234": "handle"}[uuid],
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: {("handle", 1): 1980}[handle, kind],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert max_sm_clock_mhz("cuda") == 1980
    found = unit_rates(torch.float32, torch.device("cuda"), count=2)
    assert found is not None
    assert (found.clock_ghz, found.multiprocessors, found.matrix_ms.samples) == (1.98, 132, (2.0, 2.0))
    assert found.rates is not None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert max_sm_clock_mhz("cuda") is None
    found = unit_rates(torch.float32, torch.device("cuda"), count=2)
    assert found is not None
    assert (found.clock_ghz, found.rates) == (None, None)
    assert "nvidia-ml-py" in (found.message or "")


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    budget=st.integers(1, 2000),
    masked=st.sampled_from([None, "key_lengths", "key_mask"]),
)
def test_a_reference_in_slices_is_the_whole(
    batch: int, heads: int, queries: int, keys: int, budget: int, masked: str | None
) -> None:
    generator = torch.Generator().manual_seed(batch + 7 * queries + 31 * keys)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    arguments: dict[str, Any] = {"q": random(batch, queries, heads, 4), "scale": 0.3}
    arguments["k"], arguments["v"] = random(2, batch, keys, heads, 4)
    if masked == "key_lengths":
        arguments[masked] = torch.randint(0, keys + 1, (batch,), generator=generator)
    elif masked == "key_mask":
        arguments[masked] = random(batch, keys) > 0
    reference = OPERATORS["attention"].reference
    slices: list[int] = []

    def noting(q: torch.Tensor, k: torch.Tensor, **rest: Any) -> torch.Tensor:
        slices.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] * 8)
        return reference(q, k, **rest)

    found = by_sample(noting, arguments, budget)
    torch.testing.assert_close(found, reference(**arguments))
    # The scores of one query are the least there is; and no slice is smaller than it need be.
    assert max(slices) <= max(budget, 8 * keys)
    assert sum(slices) == batch * heads * queries * keys * 8
    if budget >= sum(slices):
        assert len(slices) == 1


def test_the_scores_of_large_batches_stay_under_a_gibibyte() -> None:
    for batch, tokens in ((16, 4096), (2, 16384)):
        q = torch.empty(batch, tokens, 8, 40, dtype=torch.float64, device="meta")
        slices: list[int] = []

        def noting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slices: list[int] = slices) -> torch.Tensor:
            slices.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] * 8)
            return torch.empty_like(q)

        by_sample(noting, {"q": q, "k": q, "v": q})
        assert sum(slices) == batch * 8 * tokens**2 * 8 >= 17e9
        assert max(slices) == 2**30


def _timed(peer_name: str, ms: float, rows: int = 6) -> KernelRecord:
    (record,) = bench(peer(peer_name, right)).measure(Job("39M", 2, geglu_case(rows)))
    return record.model_copy(update={"ms": Samples.of([ms])})


def test_ratios_are_geometric_means_over_calls_that_both_have() -> None:
    records = [
        *(_timed("triton", 1.0, 6), _timed("eager", 2.0, 6)),
        *(_timed("triton", 1.0, 7), _timed("eager", 8.0, 7)),
        _timed("eager", 100.0, 8),
    ]
    (found,) = ratios(records)
    assert (found.operator, found.peer, found.calls, found.worst) == ("geglu", "eager", 2, 2.0)
    assert found.mean == pytest.approx(4.0)
    assert "6x16" in found.worst_call
    bandwidth, ratio = summary_lines(records)
    assert "triton has" in bandwidth
    assert "7x16" in bandwidth
    assert "4.000 times" in ratio


def test_the_table_shows_times_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    failed = bench(PEERS["triton"]).measure(Job("39M", 2, geglu_case()))
    records = [*failed, _timed("eager", 0.012345)]
    print_records(records, Console())
    shown = capsys.readouterr().out
    for part in ("0.01235", "needs a GPU", "geglu 6x16", "1 a step", "GB/s"):
        assert part in shown
        assert part.replace("_", "\\_") in markdown(records)
    assert markdown([]).startswith("No kernel")


def test_a_sampler_may_round_more_than_others() -> None:
    assert tolerance_of(sampler_call("ddim", 2, "bfloat16", (8, 8))) > tolerance_of(geglu_case(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kernel", "gelu"], "group_norm_silu"),
        (["--size", "40M"], "39M"),
        (["--batch", "0"], "from 1"),
        (["--peer", "jax"], "xformers"),
        (["--dtype", "int8"], "bfloat16"),
        (["--device", "cuda:99"], "not here"),
        # What is refused without an option is refused beside it; no option is taken for another, or for none.
        (["--size", ","], "--size: no value given"),
        (["--head-dim", ",", "--size", "39M"], "--head-dim: no value given"),
        (["--head-dim", "8", "--tokens", " , "], "--tokens: no value given"),
        (["--head-dim", "8", "--kernel", "attention,geglu"], "leave --size out; leave --kernel out too"),
        (["--head-dim", "0"], "from 1"),
        (["--head-dim", "8", "--kernel", "geglu"], "attention"),
        (["--head-dim", "8", "--size", "39M"], "--size"),
        (["--head-dim", "8", "--latent", "64"], "leave --latent out"),
        (["--head-dim", "8", "--dtype", "int8"], "bfloat16"),
        (["--head-dim", "8", "--batch", "0"], "from 1"),
        (["--head-dim", "8", "--peer", "jax"], "xformers"),
        (["--size", "vae", "--batch", "3"], "leave --batch out"),
        (["--resume", "/no/where", "--out", "/tmp"], "leave --out out"),
        (["--resume", "/no/where", "--tokens", "8", "--size", "vae"], "leave --tokens out"),
        (["--size", "vae", "--latent", "8"], "leave --latent out"),
        (["--latent", "8x8x8"], "height x width"),
        (["--tokens", "0"], "from 1 to 1048576"),
        (["--seed", "-1"], "from 0 to 18446744073709551615"),
        (["--resume", "/no/where"], "start one without --resume"),
        (["--seconds", "nan"], "--help"),
    ],
)
def test_a_wrong_call_is_one_line(run: Callable[..., Any], arguments: list[str], told: str) -> None:
    found = run("kernels", *arguments)
    assert found.code == 2
    assert told in found.err
    assert len(found.err.strip().splitlines()) == 1


def test_the_command_measures_records_and_shows(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [Job("39M", 2, case) for case in family_calls("39M", 2, "float32", latent=(8, 8))[:4]]
    monkeypatch.setattr("ldmperf.profiling.kernel_bench.run.jobs", lambda *_: small)
    found = run("kernels", "--device", "cpu", "--dtype", "float32", "--seconds", "60", "--out", tmp_path)
    assert found.code == 0, found.err
    (folder,) = tmp_path.iterdir()
    records, rejected = load_lines(folder / "kernels.jsonl", KernelRecord)
    assert rejected == 0
    assert {record.peer for record in records} == {"eager", "reference"}
    assert "unsupported" not in found.out + found.err
    assert (folder / "kernels.md").read_text().count("\n") > 5
    assert "compile" not in found.err


def test_help_lists_every_peer(run: Callable[..., Any]) -> None:
    options = run("kernels", "--help").out.partition("Options:")[2]
    listed = "".join(options.partition("--peer")[2].partition("; those that")[0].split())
    assert set(listed.removeprefix("LIST").split(",")) == set(PEERS)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.gpu_only])
def test_a_peer_that_needs_a_gpu_says_so_when_named(name: str) -> None:
    operator = next(iter(PEERS[name].operators or ["geglu"]))
    with pytest.raises(Unsupported, match="GPU"):
        PEERS[name].build(OperatorCall.model_construct(operator=operator), torch.device("cpu"))
    assert not PEERS[name].is_usual(torch.device("cpu"))


def test_no_word_stands_twice_and_both_ways_to_call_are_told() -> None:
    eager = _timed("eager", 2.0)
    graph = eager.model_copy(update={"mode": "graph", "case_key": "other"})
    assert progress_line([eager]).endswith("(39M batch 2): eager 2 ms")
    assert progress_line([eager, graph]).endswith("one by one eager 2 ms; as a graph eager 2 ms")
    assert "eager eager" not in printed([eager, graph], 200)
    assert "one by one" in printed([eager, graph], 200)
    # One way only: nothing to tell apart.
    assert "one by one" not in printed([eager], 200).partition("calls")[0]


def printed(records: Sequence[KernelRecord], width: int) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("COLUMNS", str(width))
        print_records(records, Console(file=out, width=width))
    return out.getvalue()


def test_the_table_fits_a_narrow_terminal() -> None:
    records = [_timed("eager", 0.012345), *bench(PEERS["triton"]).measure(Job("39M", 2, geglu_case()))]
    for width in (40, 60, 80):
        shown = printed(records, width)
        assert max(map(len, shown.splitlines())) <= width
        for part in ("0.01235", "unsupported: the Triton kernel needs a GPU"):
            assert part in " ".join(shown.split())
    assert "p50 ms 0.01235" in printed(records, 60)


def test_a_busy_machine_is_noted() -> None:
    quiet = _timed("eager", 1.0)
    environment = quiet.environment.model_copy(update={"usable_cores": 2})
    loads = [quiet.device_before.model_copy(update={"load_average_1min": load}) for load in (0.5, 7.25)]
    records = [
        quiet.model_copy(update={"environment": environment, "device_before": loads[0], "device_after": after})
        for after in loads
    ]
    assert notes(records[:1]) == []
    (note,) = notes(records[1:])
    assert note.startswith("Note: The machine was probably busy")
    assert "1 of 1 call saw" in note
    assert "up to 7.25" in note
    for shown in (printed(records[1:], 300), markdown(records[1:])):
        assert "probably busy" in shown


def test_throttling_is_read_after_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the peer that is sampled when it is seen, and of no other; what holds before and after does not count."""
    running = SimpleNamespace(hot=False)
    nvml = SimpleNamespace(
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 4 if running.hot else 0,
    )
    monkeypatch.setattr(bench_module.Sensor, "of", lambda device: Sensor(nvml, "handle"))

    def while_hot(x: torch.Tensor, hot: bool) -> Any:
        running.hot = hot
        return right(x=x)

    hot, cool = (peer(str(state), functools.partial(while_hot, hot=state)) for state in (True, False))
    records = bench(hot, cool).measure(Job("39M", 2, geglu_case()))
    seen = {record.peer: record.device_during.throttle_reasons for record in records}
    assert seen == {"True": ("SwPowerCap",), "False": ()}


def test_a_bench_that_measured_nothing_fails(run: Callable[..., Any], tmp_path: Path) -> None:
    found = run("kernels", "--device", "cpu", "--seconds", "0", "--size", "39M", "--out", tmp_path)
    assert found.code == 1
    assert "No kernel" in found.out
    assert "--seconds" in found.err


def test_a_bench_is_taken_up_in_its_folder(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [Job("39M", 2, geglu_case(rows)) for rows in (3, 4)]
    options = ["--device", "cpu", "--dtype", "float32", "--peer", "eager,reference"]

    def bench_of(jobs: Sequence[Job], *more: str | Path) -> Any:
        monkeypatch.setattr("ldmperf.profiling.kernel_bench.run.jobs", lambda *_: jobs)
        return run("kernels", *options, *more)

    begun = bench_of(small[:1], "--out", tmp_path / "runs")
    assert begun.code == 0, begun.err
    (folder,) = (tmp_path / "runs").iterdir()
    resumed = bench_of(small, "--resume", folder)
    assert resumed.code == 0, resumed.err
    records, rejected = load_lines(folder / "kernels.jsonl", KernelRecord)
    assert ([record.case.tensors[0].shape[0] for record in records], rejected) == ([3, 3, 4, 4], 0)
    assert list((tmp_path / "runs").iterdir()) == [folder]
    assert "3x16" in resumed.out
    assert "geglu 3x16" not in resumed.err
    # Begun elsewhere, or no folder of a bench: one line, and nothing is measured.
    text = (folder / "kernels.jsonl").read_text()
    (folder / "kernels.jsonl").write_text(text.replace(f'"python":"{sys.version.split()[0]}"', '"python":"2.7"'))
    for wrong, told in ((folder, "another environment (python"), (tmp_path, "no folder of a bench")):
        refused = bench_of(small, "--resume", wrong)
        assert refused.code == 2
        assert told in refused.err
        assert len(refused.err.strip().splitlines()) == 1
