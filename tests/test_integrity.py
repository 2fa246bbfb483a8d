"""Cheats that are known from public kernel contests: each is caught, and the message names it."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmperf.profiling import Case, Record, profile
from ldmperf.profiling.commands.shared import exit_by
from ldmperf.profiling.figures.text import statuses_in_words
from ldmperf.profiling.measure import genuine
from ldmperf.profiling.measure.genuine import CallWatch, foreign_clocks, replaced_clocks
from ldmperf.profiling.measure.integrity import is_poisoned
from ldmperf.profiling.measure.outcomes import Untrusted
from ldmperf.profiling.measure.timing import RepetitionRule, Timed
from ldmperf.profiling.trajectory.backend import Backend, Inputs, Problem, Trajectory
from ldmperf.profiling.trajectory.checkpoints import identified
from ldmperf.profiling.trajectory.floors import Floors
from ldmperf.profiling.trajectory.group_facts import GroupFacts
from ldmperf.profiling.trajectory.lane import Lane
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
