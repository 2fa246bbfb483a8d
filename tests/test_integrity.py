"""Cheats that are known from public kernel contests: each is caught, and the message names it."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmperf.kernels import OPERATORS
from ldmperf.profiling import Case, Record, profile
from ldmperf.profiling.commands.shared import exit_by
from ldmperf.profiling.figures.text import statuses_in_words
from ldmperf.profiling.kernel_bench.bench import KernelBench
from ldmperf.profiling.kernel_bench.device import Pace
from ldmperf.profiling.kernel_bench.floor import least_call_ms
from ldmperf.profiling.kernel_bench.inputs import CallInputs
from ldmperf.profiling.kernel_bench.kernel_records import CopyBandwidth, KernelRecord, UnitRates
from ldmperf.profiling.kernel_bench.peers import Implementation, Peer
from ldmperf.profiling.kernel_bench.selection import Job
from ldmperf.profiling.measure import genuine
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.genuine import CallWatch, foreign_clocks, replaced_clocks
from ldmperf.profiling.measure.integrity import Returned, impossible, is_poisoned, poison
from ldmperf.profiling.measure.outcomes import Untrusted
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import RepetitionRule, Timed, timed
from ldmperf.profiling.step.call import OperatorCall, TensorSpec
from ldmperf.profiling.step.calls import family_calls, sampler_call
from ldmperf.profiling.trajectory.backend import Backend, Inputs, Problem, Trajectory
from ldmperf.profiling.trajectory.checkpoints import identified
from ldmperf.profiling.trajectory.floors import Floors
from ldmperf.profiling.trajectory.lane import GroupFacts, Lane
from ldmperf.profiling.trajectory.ours import OurBackend
from ldmperf.profiling.trajectory.records import Floor
from ldmperf.profiling.trajectory.theirs import DiffusersBackend

pytestmark = pytest.mark.usefixtures("_one_thread")

THRICE = RepetitionRule(3, 0.0)
BOTH: dict[str, Backend] = {"torch": OurBackend("torch"), "diffusers": DiffusersBackend()}
# A trajectory, the number of its call from 1 on, and the right one.
Cheat = Callable[[Inputs, int, Trajectory], Tensor]


@dataclass
class Cheating:
    """A backend under test: what it does with the right trajectory, and at its build."""

    cheat: Cheat
    at_build: Callable[[Problem, Trajectory], None] = lambda problem, right: None
    implementation: str = "torch"
    calls: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def build(self, problem: Problem) -> Trajectory:
        right = BOTH[self.implementation].build(problem)
        self.at_build(problem, right)
        return lambda inputs: self.cheat(inputs, next(self.calls), right)


def measured(
    checkpoint: Path, cheating: Backend, *beside: str, rule: RepetitionRule = THRICE, **changes: object
) -> dict[str, Record]:
    """The records of the cheat and of the honest backends beside it."""
    fields: dict[str, object] = {"unet": str(checkpoint), "steps": 2, "latent_height": 16, "latent_width": 16}
    names = ("cheat", *beside)
    cases = identified(Case(**(fields | changes | {"backend": name})) for name in names)
    records = profile(cases, rule=rule, backends=BOTH | {"cheat": cheating})
    return {record.case.backend: record for record in records}


def caught(records: dict[str, Record], status: str, *words: str) -> None:
    """The cheat has that status, no time, and a message with these words; the others are as they should be."""
    record = records.pop("cheat")
    assert record.status == status, record.message
    assert record.wall_ms is None
    for word in words:
        assert word in (record.message or ""), record.message
    assert {name: r.status for name, r in records.items()} == dict.fromkeys(records, "ok"), records
    with pytest.raises(BaseException, match="1"):
        exit_by({"ok", record.status})
    assert statuses_in_words(["ok", record.status]).startswith("1 failed")


ALONE_OR_NOT = pytest.mark.parametrize("beside", [(), ("diffusers",), ("torch", "diffusers")])


@ALONE_OR_NOT
def test_the_same_cached_tensor_is_caught(tiny_checkpoint: Path, beside: tuple[str, ...]) -> None:
    kept: list[Tensor] = []

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        if not kept:
            kept.append(right(inputs))
        return kept[0]

    caught(
        measured(tiny_checkpoint, Cheating(cheat), *beside), "incorrect", "cached output", "memory of an earlier"
    )


@ALONE_OR_NOT
def test_a_copy_of_a_cached_result_is_caught(tiny_checkpoint: Path, beside: tuple[str, ...]) -> None:
    kept: list[Tensor] = []

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        if not kept:
            kept.append(right(inputs).clone())
        return kept[0].clone()

    records = measured(tiny_checkpoint, Cheating(cheat), *beside)
    caught(records, "incorrect", "cached output", "round 1", "the result of its first call")


def test_a_result_cached_later_is_named_by_its_round(tiny_checkpoint: Path) -> None:
    kept: list[Tensor] = []

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        if call <= 2:
            kept.append(right(inputs).clone())
        return kept[-1].clone()

    caught(measured(tiny_checkpoint, Cheating(cheat)), "incorrect", "in round 2 it returned the result of round 1")


@ALONE_OR_NOT
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_memo_of_the_check_is_caught(tiny_checkpoint: Path, sampler: str, beside: tuple[str, ...]) -> None:
    """Right for inputs it has seen, which the last sample and the second check have; noise for all others."""
    kept: dict[bytes, Tensor] = {}

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        key = inputs.noise.numpy().tobytes()
        if call == 1:
            kept[key] = right(inputs).clone()
        return kept[key].clone() if key in kept else torch.randn_like(inputs.noise)

    records = measured(tiny_checkpoint, Cheating(cheat), *beside, sampler=sampler)
    caught(records, "incorrect", "remembered, or computed ahead", "on inputs that only that round had")


@ALONE_OR_NOT
def test_results_computed_at_build_time_are_caught(tiny_checkpoint: Path, beside: tuple[str, ...]) -> None:
    """The case has the seed: whatever follows from it can be computed before any clock runs."""
    ahead: dict[bytes, Tensor] = {}

    def at_build(problem: Problem, right: Trajectory) -> None:
        for number in range(-1, 5):
            inputs = problem.inputs(number)
            ahead[inputs.noise.numpy().tobytes()] = right(inputs).clone()

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        return ahead.get(inputs.noise.numpy().tobytes(), torch.ones_like(inputs.noise) * call).clone()

    records = measured(tiny_checkpoint, Cheating(cheat, at_build), *beside)
    caught(records, "incorrect", "remembered, or computed ahead")


def test_a_constant_computed_at_build_time_is_caught(tiny_checkpoint: Path) -> None:
    ahead: list[Tensor] = []

    def at_build(problem: Problem, right: Trajectory) -> None:
        ahead.append(right(problem.inputs(-1)).clone())

    records = measured(tiny_checkpoint, Cheating(lambda *_: ahead[0].clone(), at_build), "torch")
    caught(records, "incorrect", "cached output", "the result of its first call")


def test_what_is_right_only_while_it_is_checked_is_caught(tiny_checkpoint: Path) -> None:
    """Fewer steps in timed rounds: right in the first call and in the last sample, which it counts."""

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        return right(inputs) if call in (1, 4) else inputs.noise * 0.5

    for beside in ((), ("torch",)):
        records = measured(tiny_checkpoint, Cheating(cheat), *beside)
        caught(records, "incorrect", "on inputs that only that round had")


@pytest.mark.parametrize("name", ["perf_counter", "monotonic"])
def test_a_patched_timer_is_caught_and_put_back(tiny_checkpoint: Path, name: str) -> None:
    """Constant zero time; the backends that follow have the real clock."""
    real = getattr(time, name)

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        if call == 3:
            setattr(time, name, lambda: 0.0)
        return right(inputs)

    try:
        records = measured(tiny_checkpoint, Cheating(cheat), "torch")
        assert getattr(time, name) is real
    finally:
        setattr(time, name, real)
    caught(records, "impossible", "patched timers", f"time.{name} was replaced")


def test_a_timer_patched_at_build_time_is_caught(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_build(problem: Problem, right: Trajectory) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda one, other: 0.001)

    records = measured(tiny_checkpoint, Cheating(lambda inputs, call, right: right(inputs), at_build), "torch")
    caught(records, "impossible", "patched timers", "torch.cuda.synchronize, torch.cuda.Event.elapsed_time were")


def test_clocks_are_the_standard_librarys_and_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (replaced_clocks(), foreign_clocks()) == ((), ())
    monkeypatch.setattr(torch.cuda, "Event", type("Event", (), {}))
    assert replaced_clocks() == ("torch.cuda.Event",)
    # By something else, before the backend ran: it is not blamed.
    with pytest.warns(UserWarning, match="torch.cuda.Event was replaced by something else"), CallWatch().around():
        pass
    assert replaced_clocks() == ()


@pytest.mark.parametrize("has_ended", [True, False])
def test_work_in_a_thread_that_outlives_the_call_is_caught(
    tiny_checkpoint: Path, has_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is filled in after it was returned: before anyone looks for threads, or after that."""
    threads: list[threading.Thread] = []
    may_go = threading.Event()

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        if call != 2:
            return right(inputs)
        result = torch.empty_like(inputs.noise).fill_(call)

        def work() -> None:
            may_go.wait()
            result.copy_(right(inputs))

        threads.append(threading.Thread(target=work, name="hidden worker"))
        threads[-1].start()
        return result

    real = CallWatch.settle

    def settle(watch: CallWatch) -> None:
        if has_ended and threads:
            may_go.set()
            threads[-1].join()
        real(watch)
        if threads:
            may_go.set()
            threads[-1].join()

    monkeypatch.setattr(CallWatch, "settle", settle)
    records = measured(tiny_checkpoint, Cheating(cheat))
    named = "'hidden worker'" if has_ended else "the result of round 1 changed"
    caught(records, "impossible", "work after the call", named)


def test_a_result_that_changes_after_it_was_returned_is_named(tiny_checkpoint: Path) -> None:
    """The honest backend runs in between, and with it whatever the cheat left to be done."""
    late: list[Callable[[], object]] = []

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        result = right(inputs)
        if call == 2:
            late.append(lambda: result.add_(1e-6))
        return result

    class Following(OurBackend):
        def build(self, problem: Problem) -> Trajectory:
            right = super().build(problem)

            def trajectory(inputs: Inputs) -> Tensor:
                while late:
                    with torch.inference_mode():
                        late.pop()()
                return right(inputs)

            return trajectory

    case = Case(unet=str(tiny_checkpoint), steps=2, latent_height=16, latent_width=16)
    cases = identified(case.model_copy(update={"backend": name}) for name in ("cheat", "torch"))
    found = profile(cases, rule=THRICE, backends=BOTH | {"cheat": Cheating(cheat), "torch": Following("torch")})
    records = {record.case.backend: record for record in found}
    caught(records, "impossible", "work after the call", "the result of round 1 changed")


def test_a_thread_that_still_computes_is_named(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However busy the machine is.
    monkeypatch.setattr(genuine, "_WATCHED_S", 0.5)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            sum(range(1000))

    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        if call == 2:
            threading.Thread(target=busy, name="hidden worker", daemon=True).start()
        return right(inputs)

    try:
        records = measured(tiny_checkpoint, Cheating(cheat))
    finally:
        stop.set()
    caught(records, "impossible", "work after the call", "'hidden worker'")


def test_a_thread_that_waits_is_no_cheat(tiny_checkpoint: Path) -> None:
    stop = threading.Event()

    def honest(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        threading.Thread(target=stop.wait, daemon=True).start()
        return right(inputs)

    try:
        records = measured(tiny_checkpoint, Cheating(honest))
    finally:
        stop.set()
    assert records["cheat"].status == "ok", records["cheat"].message


class Lazy(Tensor):
    """Computes when it is read."""


def test_a_lazy_result_is_caught(tiny_checkpoint: Path) -> None:
    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        return right(inputs).clone().as_subclass(Lazy) if call > 1 else right(inputs)

    caught(measured(tiny_checkpoint, Cheating(cheat), "torch"), "impossible", "lazy result", "Lazy")


def test_a_result_that_is_not_finite_in_a_timed_round_is_caught(tiny_checkpoint: Path) -> None:
    def cheat(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        return right(inputs) * (math.nan if call == 2 else 1.0)

    caught(measured(tiny_checkpoint, Cheating(cheat), "torch"), "incorrect", "round 1", "not finite")


@contextmanager
def floor_of(least_step_ms: float) -> Iterator[None]:
    """All groups have this floor."""
    floor = Floor(
        step_ms=2 * least_step_ms, least_step_ms=least_step_ms, nbytes=1, flops=1, exponentials=1,
        bytes_per_s=1.0, flop_per_s=1.0, exponentials_per_s=1.0,
    )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Floors, "of", lambda floors, problem: floor)
        patch.setattr(Floors, "anew", lambda floors, problem: floor)
        yield


def test_a_time_below_the_floor_is_impossible(tiny_checkpoint: Path) -> None:
    # An hour a step.
    with floor_of(3.6e6):
        records = measured(tiny_checkpoint, BOTH["torch"])
    record = records["cheat"]
    caught(records, "impossible", "below the floor", "a trajectory of 2 evaluations", "at least 7.2e+06 ms")
    assert record.floor is not None
    assert record.gpu_ms is None
    with floor_of(1e-9):
        assert measured(tiny_checkpoint, BOTH["torch"])["cheat"].status == "ok"


def test_ceilings_are_measured_anew_before_the_devices_time_is_called_impossible(
    make_record: Callable[..., Record],
) -> None:
    """The host's clock was above the floor, the device's just below it; a busy machine had raised the floor."""

    def floor(ms: float) -> Floor:
        rates = {"bytes_per_s": 1.0, "flop_per_s": 1.0, "exponentials_per_s": 1.0}
        return Floor(step_ms=ms, least_step_ms=ms, nbytes=1, flops=1, exponentials=1, **rates)

    record = make_record()
    shared = GroupFacts("run", record.environment, THRICE, ("torch",), lambda *_: None, record.device_before)
    shared.evaluations, shared.floor, shared.floor_anew = 1, floor(5.0), lambda: floor(4.0)
    lane = Lane(record.case, BOTH["torch"], shared)
    sample = Timed(None, 5.05, 4.95)
    lane.watch.note(sample)
    lane.times.add(sample)
    lane._judge_times()
    assert shared.floor.least_step_ms == 4.0
    shared.floor_anew = lambda: floor(4.99)
    shared.floor = floor(5.0)
    with pytest.raises(Untrusted, match="below the floor"):
        lane._judge_times()


@pytest.mark.parametrize(("factor", "status"), [(1.00015, "ok"), (1.0003, "incorrect")])
def test_other_inputs_may_round_a_little_worse_than_the_checks(
    tiny_checkpoint: Path, factor: float, status: str
) -> None:
    """Off in all rounds but the check's, by more than the check's tolerance: up to twice that is rounding."""
    cheat = Cheating(lambda x, call, right: right(x) * (factor if call in (2, 3) else 1.0))
    record = measured(tiny_checkpoint, cheat)["cheat"]
    assert record.status == status, record.message
    if status != "ok":
        assert "a wrong result: in round" in (record.message or "")
        assert "at most 0.0002 passes" in (record.message or "")


@ALONE_OR_NOT
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_honest_backend_is_confirmed_by_another_or_by_a_reference(
    tiny_checkpoint: Path, sampler: str, dtype: str, beside: tuple[str, ...]
) -> None:
    records = measured(
        tiny_checkpoint, Cheating(lambda x, _, right: right(x)), *beside, sampler=sampler, dtype=dtype
    )
    assert {record.status for record in records.values()} == {"ok"}, [r.message for r in records.values()]
    seeds = {record.harness.round_seed for record in records.values()}
    assert len(seeds) == 1
    assert None not in seeds
    by = records["cheat"].harness.confirmed_by
    # Of a stochastic sampler each implementation draws its own noise.
    others = [name for name in beside if sampler == "ddim" or name == "torch"]
    assert by in (others or ["diffusers float32"])


def test_of_two_that_differ_a_reference_says_who_is_wrong(tiny_checkpoint: Path) -> None:
    """The honest one keeps its time, whatever the order."""
    for number in (2, 3):
        cheat = Cheating(lambda x, call, right, at=number: right(x) * (1.01 if call == at else 1.0))
        records = measured(tiny_checkpoint, cheat, "diffusers", rule=RepetitionRule(4, 0.0))
        assert records["diffusers"].harness.confirmed_by is not None
        caught(
            records, "incorrect", f"in round {number - 1}, on inputs that only that round had", "diffusers float32"
        )


def test_a_backend_may_return_the_same_static_memory(tiny_checkpoint: Path) -> None:
    """As a CUDA graph does: each run overwrites it. Or its input, or a view of a larger tensor."""
    static = torch.zeros(2, 1, 4, 16, 16)

    def graph_like(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        with torch.inference_mode():
            return static[1].copy_(right(inputs))

    def into_its_input(inputs: Inputs, call: int, right: Trajectory) -> Tensor:
        with torch.inference_mode():
            return inputs.noise.copy_(right(inputs))

    for honest in (graph_like, into_its_input):
        records = measured(tiny_checkpoint, Cheating(honest), "torch", "diffusers")
        assert {record.status for record in records.values()} == {"ok"}, [r.message for r in records.values()]
    assert is_poisoned(static[1])
    assert not static[0].any()


# Pure judgments, on figures.
WHAT = "a call"


def times(
    *wall: float, gpu: tuple[float, ...] | None = None, second: tuple[float, ...] | None = None
) -> list[Timed[None]]:
    return [
        Timed(None, ms, None if gpu is None else gpu[n], None if second is None else second[n])
        for n, ms in enumerate(wall)
    ]


def test_times_that_are_not_of_the_work_are_named() -> None:
    assert impossible([], 1.0, WHAT) is None
    assert "no time passed: a call" in str(impossible(times(3.0, 0.0), None, WHAT))
    below = str(impossible(times(30.0, 4.9, 30.0), 5.0, WHAT))
    assert "4.9 ms" in below
    assert "at least 5 ms" in below
    assert impossible(times(30.0, 5.0), 5.0, WHAT) is None
    # The device's clock counts for the floor too.
    assert "below the floor" in str(impossible(times(30.0, 31.0, gpu=(29.9, 4.0)), 5.0, WHAT))
    assert "side stream" in str(impossible(times(30.0, 31.0, gpu=(20.0, 25.0)), None, WHAT))
    assert "5.0" not in str(impossible(times(30.0, 31.0, gpu=(20.0, 29.5)), None, WHAT))
    assert "1.5 ms" in str(impossible(times(30.0, 31.0, gpu=(20.0, 29.5)), None, WHAT))
    assert "device's clock that is wrong" in str(impossible(times(1.0, 1.0, gpu=(2.0, 3.0)), None, WHAT))
    assert "second one says 999 ms" in str(impossible(times(1.0, 2.0, second=(1000.0, 3000.0)), None, WHAT))


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(0, 0.015), st.floats(0, 1e4)), min_size=1, max_size=9),
    st.integers(0, 8),
)
def test_interruptions_and_a_wake_up_are_no_cheat(drawn: list[tuple[float, float, float]], quiet: int) -> None:
    """The host may be interrupted between two clocks for any time, in all calls but one."""
    quiet %= len(drawn)
    seen = []
    for number, (gpu, share, interrupted) in enumerate(drawn):
        pause = 0.0 if number == quiet else interrupted
        wall = gpu * (1 + share) + 0.15 + pause
        seen.append(Timed(None, wall, gpu, wall + 1.0 + pause))
    assert impossible(seen, min(gpu for gpu, *_ in drawn), WHAT) is None


@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), st.integers(1, 9), st.data()
)
def test_poison_is_nan_and_is_known_again(dtype: torch.dtype, size: int, data: st.DataObject) -> None:
    tensor = torch.randn(size, 2).to(dtype)
    assert not is_poisoned(tensor)
    poison(tensor)
    assert tensor.isnan().all()
    assert is_poisoned(tensor)
    assert is_poisoned(tensor.clone())
    # No NaN of arithmetic is taken for it, nor a result of which a part was written.
    assert not is_poisoned(torch.zeros(size, dtype=dtype) / 0)
    assert not is_poisoned(torch.full((size,), math.nan, dtype=dtype))
    assert not is_poisoned((torch.full((size,), math.inf) - torch.inf).to(dtype))
    tensor.view(-1)[data.draw(st.integers(0, 2 * size - 1))] = 0.0
    assert not is_poisoned(tensor)


def test_what_cannot_be_poisoned_is_left_alone() -> None:
    for tensor in (torch.arange(3), torch.empty(0), torch.zeros(2, dtype=torch.complex64)):
        before = tensor.clone()
        poison(tensor)
        assert torch.equal(tensor, before)
        assert not is_poisoned(tensor)
    wide = torch.zeros(1).expand(4)
    poison(wide)
    assert is_poisoned(wide)
    leaf = torch.zeros(3, requires_grad=True)
    poison(leaf)
    assert is_poisoned(leaf)


def test_results_are_taken_as_they_were() -> None:
    returned, result = Returned(), torch.ones(2, 3, dtype=torch.float64)
    taken = returned.take(result, "its first call")
    returned.let_go()
    assert taken.eq(1).all()
    assert is_poisoned(result)
    # The same numbers in another shape are another result.
    returned.take(torch.ones(3, 2), "round 1")
    returned.take(torch.ones(2, 3), "its last sample", may_repeat="its first call")
    with pytest.raises(Untrusted, match="in round 2 it returned the result of round 1") as raised:
        returned.take(torch.ones(3, 2), "round 2")
    assert raised.value.status == "incorrect"


# The device, with a clock of its own.
class Device:
    """A CUDA device in fake seconds: two streams; the host waits for one of them or for both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.busy_until = {"main": 0.0, "side": 0.0}
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self, stream: str) -> None:
                self.at = max(device.now, device.busy_until[stream])

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def launch(self, seconds: float, stream: str = "main") -> None:
        self.now += 1e-5
        self.busy_until[stream] = max(self.now, self.busy_until[stream]) + seconds

    def synchronize(self, _: object) -> None:
        self.now = max(self.now, *self.busy_until.values()) + 2e-5

    def timed(self, call: Callable[[], object]) -> Timed[object]:
        result = timed(call, torch.device("cuda"), lambda: self.now)
        return Timed(None, result.wall_ms, result.gpu_ms)


def test_work_on_a_side_stream_is_seen_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    honest = device.timed(lambda: device.launch(0.010))
    assert honest.gpu_ms == pytest.approx(10.01)
    assert impossible([honest], 10.0, WHAT) is None
    # The host waits for the device: its clock has all of it.
    hidden = device.timed(lambda: device.launch(0.010, "side"))
    assert hidden.wall_ms > 10.0
    assert "work on a side stream: a call kept the device" in str(impossible([hidden], None, WHAT))

    # A stream that the timed one waits for is honest.
    def joined() -> None:
        device.launch(0.010, "side")
        device.busy_until["main"] = device.busy_until["side"]

    assert impossible([device.timed(joined)], 10.0, WHAT) is None


def test_what_a_call_puts_in_place_of_the_clock_does_not_end_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what puts itself back at its first use, so that nobody sees it afterwards."""
    device = Device(monkeypatch)

    def cheat() -> None:
        device.launch(0.010)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        monkeypatch.setattr(torch.cuda.Event, "record", lambda event, stream: setattr(event, "at", 0.0))
        monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda event, end: 1e-3)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "side")

    found = device.timed(cheat)
    assert found.gpu_ms == pytest.approx(10.01)
    assert found.wall_ms > 10.0


def test_a_function_that_sleeps_is_timed_as_long_as_it_sleeps() -> None:
    """On a clock that passes only in sleep, exactly; bench/timer_honesty.py does it on this machine's clocks."""
    now = 5.0

    def sleep() -> None:
        nonlocal now
        now += 0.010

    assert timed(sleep, torch.device("cpu"), lambda: now).wall_ms == pytest.approx(10.0, rel=1e-9)
    # On the real one: at least as long, by the promise of time.sleep, and within what the second clock saw.
    real = timed(lambda: time.sleep(0.010), torch.device("cpu"))
    assert real.second_ms is not None
    assert real.wall_ms >= 10.0
    assert impossible([Timed(None, real.wall_ms, None, real.second_ms)], 10.0, WHAT) is None


# `ldmperf kernels`, by the same clocks.
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


def test_a_kernel_with_a_lazy_result_is_caught() -> None:
    record = benched(lambda x: right_geglu(x).as_subclass(Lazy))
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
