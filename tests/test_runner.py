"""The runner: no wrong result has a time, no failure stops the others, and the real backends agree."""

from __future__ import annotations

import copy
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmperf.kernels import KernelUnsupported
from ldmperf.profiling import Case, Record, load_records, profile
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.measure.error import relative_rms
from ldmperf.profiling.measure.outcomes import Unsupported, failure
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule, Timed
from ldmperf.profiling.options import DTYPES
from ldmperf.profiling.trajectory import group, runner, short_traces
from ldmperf.profiling.trajectory.backend import Backend, Inputs, Trajectory
from ldmperf.profiling.trajectory.check import TOLERANCES, Reference, References, code_identity, tolerances
from ldmperf.profiling.trajectory.checkpoints import identified
from ldmperf.profiling.trajectory.lane import Lane
from ldmperf.profiling.trajectory.network import Networks, make_network, make_problem
from ldmperf.profiling.trajectory.ours import OurBackend
from ldmperf.profiling.trajectory.records import Phases, RecordStore, Trace
from ldmperf.profiling.trajectory.runner import groups
from ldmperf.profiling.trajectory.short_traces import Tracer, timing_deadline, wants_trace
from ldmperf.profiling.trajectory.theirs import DiffusersBackend
from ldmperf.profiling.trajectory.unet_problem import UNetProblem
from ldmperf.samplers import SAMPLERS

pytestmark = pytest.mark.usefixtures("_one_thread")


TWICE = RepetitionRule(2, 0.0)
BOTH: dict[str, Backend] = {"torch": OurBackend("torch"), "diffusers": DiffusersBackend()}


def tiny_case(checkpoint: Path, **changes: object) -> Case:
    fields: dict[str, object] = {"unet": str(checkpoint), "steps": 2, "latent_height": 16, "latent_width": 16}
    return identified([Case(**(fields | changes))])[0]


@dataclass
class Changed:
    """The torch backend, with what it returns changed by a function of the latents and the number of the call."""

    change: Callable[[Tensor, int], Tensor]
    implementation: str = "torch"
    calls: list[Inputs] = field(default_factory=list)

    def build(self, problem: UNetProblem) -> Trajectory:
        right = OurBackend("torch").build(problem)

        def trajectory(inputs: Inputs) -> Tensor:
            self.calls.append(inputs)
            return self.change(right(inputs), len(self.calls))

        return trajectory


def raising(error: Exception, at_call: int = 1) -> Changed:
    def change(latents: Tensor, call: int) -> Tensor:
        if call == at_call:
            raise error
        return latents

    return Changed(change)


def measure(case: Case, backends: dict[str, Backend], rule: RepetitionRule = TWICE) -> dict[str, Record]:
    """The records of the case on each of the backends, with the real ones for references."""
    cases = [case.model_copy(update={"backend": name}) for name in backends]
    records = profile(cases, rule=rule, backends=BOTH | backends)
    assert {record.case for record in records} == {case.as_recorded() for case in cases}
    assert len(records) == len(cases)
    return {record.case.backend: record for record in records}


def test_the_real_pair_agrees_and_each_is_the_others_reference(tiny_checkpoint: Path) -> None:
    records = measure(tiny_case(tiny_checkpoint), BOTH)
    for name, other in (("torch", "diffusers"), ("diffusers", "torch")):
        record = records[name]
        assert record.status == "ok", record.message
        assert record.correctness is not None
        assert record.correctness.reference == f"{other} float32"
        # Rounding differs between two implementations: a thing compared with itself would give exactly zero.
        assert 0 < (record.correctness.error_before or 0) < 1e-5
        assert record.correctness.error_after == record.correctness.error_before
        assert record.wall_ms is not None
        assert record.wall_ms.n == 2
        assert record.gpu_ms is None
        assert record.peak_memory_bytes is None
        assert record.evaluations == 2
        assert record.harness.interleaved == ("torch", "diffusers")
        assert record.harness.order == (("torch", "diffusers"), ("diffusers", "torch"))
        assert record.harness.stopped_by is None
        assert record.phases.first_call_ms is not None
        assert record.phases.build_ms is not None
        assert record.phases.weights_ms is not None
        assert record.phases.reference_ms is None
        assert record.parameters == sum(p.numel() for p in DiffusersBackendUNet(tiny_checkpoint).parameters())


def DiffusersBackendUNet(checkpoint: Path) -> torch.nn.Module:  # noqa: N802
    import diffusers

    unet: torch.nn.Module = diffusers.UNet2DConditionModel.from_pretrained(checkpoint)
    return unet


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_agrees_with_diffusers_own(tiny_checkpoint: Path, sampler: str) -> None:
    case = tiny_case(tiny_checkpoint, sampler=sampler, steps=4, batch=2)
    records = measure(case, BOTH, RepetitionRule(1, 0.0))
    assert {record.status for record in records.values()} == {"ok"}, [r.message for r in records.values()]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_super_resolution_sees_the_low_resolution_latents(guidance_scale: float) -> None:
    case = Case(
        unet="39M", task="sr", steps=1, guidance_scale=guidance_scale, latent_height=8, latent_width=8, batch=2
    )
    records = measure(case, BOTH, RepetitionRule(1, 0.0))
    assert {record.status for record in records.values()} == {"ok"}, [r.message for r in records.values()]
    blind = Blind()
    assert measure(case, {"blind": blind}, RepetitionRule(1, 0.0))["blind"].status == "incorrect"


class Blind:
    """Takes zeros for the low-resolution latents."""

    implementation = "torch"

    def build(self, problem: UNetProblem) -> Trajectory:
        right = OurBackend("torch").build(problem)

        def trajectory(inputs: Inputs) -> Tensor:
            assert inputs.low_resolution is not None
            zeros = torch.zeros_like(inputs.low_resolution)
            return right(Inputs(inputs.noise, inputs.context, zeros, inputs.seeds, inputs.step_noise))

        return trajectory


def test_a_task_that_does_not_fit_the_checkpoint_is_unsupported(tiny_checkpoint: Path) -> None:
    record = measure(tiny_case(tiny_checkpoint, task="sr"), {"torch": OurBackend("torch")})["torch"]
    assert record.status == "unsupported"
    assert record.message is not None
    assert "8 to 4 channels" in record.message


def not_a_number(latents: Tensor, call: int) -> Tensor:
    return torch.full_like(latents, math.nan)


@pytest.mark.parametrize(
    "change",
    [
        lambda latents, call: latents * (1 + 2e-4),
        lambda latents, call: latents.roll(1, dims=-1),
        lambda latents, call: torch.zeros_like(latents),
        lambda latents, call: latents[:, :, :8],
        not_a_number,
    ],
    ids=["slightly off", "shifted", "zeros", "another shape", "nan"],
)
def test_a_wrong_result_is_incorrect_and_has_no_time(
    tiny_checkpoint: Path, change: Callable[[Tensor, int], Tensor]
) -> None:
    records = measure(
        tiny_case(tiny_checkpoint),
        {"wrong": Changed(change), "diffusers": DiffusersBackend(), "torch": OurBackend("torch")},
    )
    wrong = records["wrong"]
    assert wrong.status == "incorrect"
    assert wrong.wall_ms is None
    assert wrong.message is not None
    assert "before timing" in wrong.message
    assert wrong.correctness is not None
    assert wrong.correctness.error_after is None
    assert (records["diffusers"].status, records["torch"].status) == ("ok", "ok")


def test_a_result_that_goes_wrong_only_while_timed_is_incorrect(tiny_checkpoint: Path) -> None:
    late = Changed(lambda latents, call: latents if call == 1 else latents * 1.01)
    record = measure(tiny_case(tiny_checkpoint), {"late": late})["late"]
    assert record.status == "incorrect"
    assert record.wall_ms is None
    assert record.message is not None
    assert "after timing" in record.message
    assert record.correctness is not None
    assert record.correctness.error_before is not None
    assert record.correctness.error_before < 1e-4
    assert record.correctness.error_after == pytest.approx(0.01, rel=0.01)


def test_two_that_disagree_both_lose_their_time(tiny_checkpoint: Path) -> None:
    # Which of the pair is wrong, their disagreement cannot say.
    wrong = Changed(lambda latents, call: latents * 1.01)
    records = measure(tiny_case(tiny_checkpoint), {"torch": wrong, "diffusers": DiffusersBackend()})
    assert {record.status for record in records.values()} == {"incorrect"}


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("error", OUT_OF_MEMORY[:2], ids=["torch", "python"])
def test_out_of_memory_is_data_and_the_others_go_on(tiny_checkpoint: Path, error: Exception, at_call: int) -> None:
    # The first call, a timed one, the last one.
    records = measure(
        tiny_case(tiny_checkpoint), {"greedy": raising(error, at_call), "torch": OurBackend("torch")}
    )
    greedy = records["greedy"]
    assert (greedy.status, greedy.wall_ms) == ("oom", None)
    assert greedy.message is not None
    assert "\n" not in greedy.message
    assert records["torch"].status == "ok"


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_every_wording_of_out_of_memory_is_known(error: Exception) -> None:
    assert failure(error)[0] == "oom"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("first\nsecond"), ("error", "ValueError: first")),
        (RuntimeError(""), ("error", "RuntimeError: no message")),
        (Unsupported("not here"), ("unsupported", "not here")),
        (KernelUnsupported("attention", ["head_dim 7"]), ("unsupported", None)),
    ],
)
def test_failures_become_a_status_and_one_line(error: Exception, expected: tuple[str, str | None]) -> None:
    status, message = failure(error)
    assert status == expected[0]
    assert expected[1] in (None, message)
    assert "\n" not in message


def test_a_long_message_keeps_its_cause_and_what_to_do() -> None:
    cause, advice = "no network fits", "give --task sr"
    _, message = failure(Unsupported(f"{cause}: {'/long/path' * 100}: {advice}"))
    assert message.startswith(cause)
    assert message.endswith(advice)
    assert len(message) <= 400


def test_a_real_allocation_that_fails_is_oom(tiny_checkpoint: Path) -> None:
    def change(latents: Tensor, call: int) -> Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)

    assert measure(tiny_case(tiny_checkpoint), {"greedy": Changed(change)})["greedy"].status == "oom"


@pytest.mark.parametrize("name", ["plain", "a\xa0b\x1b", "\u3000"])
def test_no_record_says_where_a_checkpoint_lies_whatever_its_path(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name / "mine"
    shutil.copytree(tiny_checkpoint, folder)
    case = tiny_case(folder)
    (folder / "config.json").write_text("{")
    message = measure(case, {"torch": OurBackend("torch")})["torch"].message
    assert message is not None
    assert message.startswith("CheckpointError: mine/config.json: not readable as JSON")


def test_an_error_names_its_type_and_stops_nobody_else(tiny_checkpoint: Path) -> None:
    records = measure(
        tiny_case(tiny_checkpoint),
        {"broken": raising(ZeroDivisionError("of all things\nand more")), "torch": OurBackend("torch")},
    )
    assert records["broken"].message == "ZeroDivisionError: of all things"
    assert (records["broken"].status, records["torch"].status) == ("error", "ok")


class Missing:
    """A backend that is not installed."""

    implementation = "diffusers"

    def build(self, problem: UNetProblem) -> Trajectory:
        raise Unsupported("not installed")


def test_without_the_peer_ours_is_checked_in_a_wider_dtype(tiny_checkpoint: Path) -> None:
    for dtype, reference in (("float32", "torch float64"), ("bfloat16", "torch float32")):
        case = tiny_case(tiny_checkpoint, dtype=dtype)
        records = measure(case, {"torch": OurBackend("torch"), "diffusers": Missing()})
        assert (records["diffusers"].status, records["diffusers"].message) == ("unsupported", "not installed")
        ours = records["torch"]
        assert ours.status == "ok", ours.message
        assert ours.correctness is not None
        assert ours.correctness.reference == reference
        assert (ours.correctness.error_before or 0) > 0
        assert ours.phases.reference_ms is not None


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_checked_against_float32(tiny_checkpoint: Path, dtype: str) -> None:
    case = tiny_case(tiny_checkpoint, dtype=dtype)
    records = measure(case, BOTH)
    for name, reference in (("torch", "diffusers float32"), ("diffusers", "torch float32")):
        assert records[name].status == "ok", records[name].message
        correctness = records[name].correctness
        assert correctness is not None
        assert correctness.reference == reference
        assert correctness.tolerance == TOLERANCES[case.dtype]
        assert (correctness.error_before or 0) > 1e-5


@dataclass
class Rounding:
    """A backend whose half dtypes are off by a fraction, and whose float32 is by another."""

    backend: Backend
    half: float
    single: float = 0.0

    @property
    def implementation(self) -> str:
        return self.backend.implementation

    def build(self, problem: UNetProblem) -> Trajectory:
        right = self.backend.build(problem)
        off = self.single if problem.unet.dtype == torch.float32 else self.half
        return lambda inputs: right(inputs).double() * (1.0 + off)


# By backend the error of its half dtype, the tolerance that this gives and whether it passes.
ROUNDED: list[tuple[str, dict[str, float], dict[str, float], set[str]]] = [
    # Each explains the other: ours by 1.5 times, the peer, which keeps its latents in half, by four times.
    ("both round", {"graph": 0.16, "diffusers": 0.12}, {"graph": 0.18, "diffusers": 0.5}, {"graph", "diffusers"}),
    ("peer rounds", {"torch": 0.06, "diffusers": 0.2}, {"torch": 0.3, "diffusers": 0.24}, {"torch", "diffusers"}),
    ("within", {"graph": 0.02, "diffusers": 0.02}, {"graph": 0.1, "diffusers": 0.1}, {"graph", "diffusers"}),
    ("ours is off", {"graph": 0.12, "diffusers": 0.05}, {"graph": 0.1, "diffusers": 0.1}, {"diffusers"}),
    # What fails is no yardstick either.
    ("ours is far off", {"graph": 0.2, "diffusers": 0.12}, {"graph": 0.1, "diffusers": 0.1}, set()),
    ("alone", {"diffusers": 0.12}, {"diffusers": 0.1}, set()),
    ("our plain one judges", {"graph": 0.14, "torch": 0.03, "diffusers": 0.13},
     {"graph": 0.1, "torch": 0.1, "diffusers": 0.12}, {"torch"}),
    ("beyond the cap", {"graph": 0.45, "diffusers": 0.55}, {"graph": 0.1, "diffusers": 0.1}, set()),
    ("capped", {"graph": 0.45, "torch": 0.3, "diffusers": 0.4},
     {"graph": 0.5, "torch": 0.5, "diffusers": 0.5}, {"graph", "torch", "diffusers"}),
    ("not a number", {"graph": 0.12, "diffusers": math.nan}, {"graph": 0.1, "diffusers": 0.1}, set()),
    ("the plain one before one that is compiled", {"graph": 0.14, "diffusers": 0.12, "diffusers-compile": 0.06},
     {"graph": 0.18, "diffusers": 0.5, "diffusers-compile": 0.5}, {"graph", "diffusers", "diffusers-compile"}),
    ("which judges where there is no other", {"graph": 0.14, "diffusers-compile": 0.12},
     {"graph": 0.18, "diffusers-compile": 0.5}, {"graph", "diffusers-compile"}),
]  # fmt: skip


@pytest.mark.parametrize("told", ROUNDED, ids=lambda told: told[0])
def test_in_a_half_dtype_the_rounding_of_the_other_implementation_is_a_yardstick(
    told: tuple[str, dict[str, float], dict[str, float], set[str]],
) -> None:
    _, errors, expected, passing = told
    implementations = {name: "diffusers" if "diffusers" in name else "torch" for name in errors}
    latents = {"torch": torch.ones(64).double(), "diffusers": torch.full((64,), 1.0 + 5e-5).double()}
    references = {
        name: Reference("float32", latents["torch" if of == "diffusers" else "diffusers"], None)
        for name, of in implementations.items()
    }
    found = tolerances("bfloat16", implementations, errors, references, {})
    assert found == pytest.approx(expected)
    assert {name for name, error in errors.items() if error <= found[name]} == passing
    # In float32 there is no excuse, nor where the two are not the same function in float32.
    assert set(tolerances("float32", implementations, errors, references, {}).values()) == {1e-4}
    latents["diffusers"] *= 1.0 + 2e-4
    assert set(tolerances("bfloat16", implementations, errors, references, {}).values()) == {0.1}


def test_a_time_of_a_network_that_rounds_much_is_kept_with_the_tolerance_that_held(tiny_checkpoint: Path) -> None:
    case = tiny_case(tiny_checkpoint, dtype="bfloat16")
    ours, theirs = OurBackend("torch"), DiffusersBackend()
    records = measure(case, {"torch": Rounding(ours, 0.13), "diffusers": Rounding(theirs, 0.12)})
    for name, factor, other in (("torch", 1.5, "diffusers"), ("diffusers", 4.0, "torch")):
        found, yardstick = records[name].correctness, records[other].correctness
        assert records[name].status == "ok", records[name].message
        assert found is not None
        assert yardstick is not None
        assert (found.error_before or 0) > 0.1
        assert (found.error_after or 0) > 0.1
        assert found.tolerance == pytest.approx(min(factor * (yardstick.error_before or 0), 0.5))
    # What differs in float32 too is no rounding: neither excuses the other.
    wrong = {"torch": Rounding(ours, 0.13, 0.13), "diffusers": Rounding(theirs, 0.0)}
    records = measure(case, wrong)
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(wrong, "incorrect")
    assert "at most 0.1 passes" in (records["torch"].message or "")


def test_a_reference_that_fails_leaves_no_time(tiny_checkpoint: Path) -> None:
    case = tiny_case(tiny_checkpoint, backend="torch")
    everything: dict[str, Backend] = {
        "torch": OurBackend("torch"), "diffusers": raising(MemoryError(), at_call=1)
    }  # fmt: skip
    (record,) = profile([case], rule=TWICE, backends=everything)
    assert (record.status, record.wall_ms) == ("oom", None)


def test_timed_inputs_are_fresh_random_and_the_same_for_all(tiny_checkpoint: Path) -> None:
    first, second = Changed(lambda x, n: x), Changed(lambda x, n: x)
    measure(tiny_case(tiny_checkpoint, batch=2), {"first": first, "second": second}, RepetitionRule(4, 0.0))
    # First call, three timed rounds, and the last on the check's inputs again.
    assert len(first.calls) == len(second.calls) == 5
    for mine, theirs in zip(first.calls, second.calls, strict=True):
        assert torch.equal(mine.noise, theirs.noise)
        assert torch.equal(mine.context, theirs.context)
        assert mine.noise.data_ptr() != theirs.noise.data_ptr()
        assert mine.noise.std() > 0.9
        assert mine.context.shape[0] == 4
    noises = [inputs.noise for inputs in first.calls]
    assert torch.equal(noises[0], noises[-1])
    # All images of all other rounds differ.
    images = torch.cat(noises[:-1]).flatten(1)
    assert len({tuple(image.tolist()) for image in images}) == len(images) == 8


def test_the_same_weights_whatever_the_backend_and_the_order() -> None:
    case = Case(unet="39M")
    once, again = make_network(case), make_network(case.model_copy(update={"backend": "diffusers"}))
    for (name, a), b in zip(once.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = make_network(case.model_copy(update={"seed": 1}))
    assert not torch.equal(once.conv_in.weight, other.conv_in.weight)
    # Unit gain: the output is of order one, and depends on the input.
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = torch.randn(2, 77, 1024, generator=torch.Generator().manual_seed(0))
    output = once(sample, 500.0, context)
    assert 0.3 < output.std() < 3
    assert relative_rms(output[:1], output[1:]) > 0.3


def test_relative_rms_is_as_defined() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_rms(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_rms(reference, reference) == 0.0
    assert math.isnan(relative_rms(torch.tensor([math.nan, 4.0]), reference))
    assert relative_rms(torch.zeros(3), reference) == math.inf


def test_groups_are_what_differs_in_the_backend_alone() -> None:
    a, b = Case(unet="39M", steps=1), Case(unet="39M", steps=2)
    peers = [case.model_copy(update={"backend": "diffusers"}) for case in (a, b)]
    assert groups([a, b, *peers, a]) == [[a, peers[0]], [b, peers[1]]]


class Heard(runner.Listener):
    """A listener that interrupts at the n-th group, and counts what else it hears."""

    def __init__(self, interrupt_at: int = 0) -> None:
        self.interrupt_at = interrupt_at
        self.began = self.ended = 0
        self.records: list[Record] = []
        self.log: list[tuple[str, str]] = []

    def begin(self, cases: Sequence[Case]) -> None:
        self.began += 1

    def ran(self, case: Case, phase: str) -> None:
        self.log.append((case.backend, phase))
        if self.began == self.interrupt_at:
            raise KeyboardInterrupt

    def recorded(self, record: Record) -> None:
        self.records.append(record)

    def end(self) -> None:
        self.ended += 1


def test_an_interrupt_keeps_what_is_done_and_skip_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cases = [tiny_case(tiny_checkpoint, steps=n) for n in (1, 2, 3)]
    backends: dict[str, Backend] = BOTH
    store = RecordStore(tmp_path / "records.jsonl")
    with pytest.raises(KeyboardInterrupt):
        profile(cases, rule=TWICE, store=store, listener=Heard(2), backends=backends)
    assert [record.case for record in store.load()] == [case.as_recorded() for case in cases[:1]]
    done = {record.case_key for record in store.load()}
    profile(cases, rule=TWICE, store=store, skip=done, backends=backends)
    records, rejected = load_records(tmp_path)
    assert ([record.case_key for record in records], rejected) == ([case.key for case in cases], 0)


@contextmanager
def told_times(**ms: float) -> Iterator[None]:
    """Timed trajectories take so long by their own account, a thousandth of a millisecond where none is given."""
    real = Lane.run_measured

    def run_measured(lane: Lane, inputs: Inputs) -> Timed[Tensor]:
        return replace(real(lane, inputs), wall_ms=ms.get(lane.case.backend, 1e-3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lane, "run_measured", run_measured)
        yield


def test_each_record_is_on_disk_when_its_backend_is_done(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A failed build, a wrong result, a failure while timed, one that has its samples, one that is interrupted."""
    store = RecordStore(tmp_path / "records.jsonl")
    on_disk: list[list[str]] = []

    def change(latents: Tensor, call: int) -> Tensor:
        on_disk.append([record.case.backend for record in store.load()])
        if call == 4:
            raise KeyboardInterrupt
        return latents

    backends = BOTH | {
        "missing": Missing(),
        "wrong": Changed(lambda latents, call: latents * 2),
        "broken": raising(ZeroDivisionError("in the second round"), at_call=3),
        "done": OurBackend("torch"),
        "last": Changed(change),
    }
    cases = [tiny_case(tiny_checkpoint, backend=name) for name in ("missing", "wrong", "broken", "done", "last")]
    with pytest.raises(KeyboardInterrupt), told_times(done=5e3):
        profile(cases, rule=RepetitionRule(2, 1.0), store=store, backends=backends)
    # The first call; the first round; the second, before `broken` failed in it or after; the third.
    assert on_disk[:2] == [["missing"], ["missing", "wrong"]]
    assert on_disk[3] == ["missing", "wrong", "broken", "done"]
    kept = {record.case.backend: record for record in store.load()}
    assert {name: record.status for name, record in kept.items()} == {
        "missing": "unsupported", "wrong": "incorrect", "broken": "error", "done": "ok"
    }  # fmt: skip
    assert kept["done"].harness.interleaved == ("broken", "done", "last")
    assert kept["done"].harness.order[0] == ("broken", "last", "done")
    # Resuming measures what is missing, and that alone: it says beside whom.
    done = {record.case_key for record in store.load()}
    (rest,) = profile(cases, rule=TWICE, store=store, skip=done, backends=BOTH | {"last": OurBackend("torch")})
    assert (rest.case.backend, rest.status, rest.harness.interleaved) == ("last", "ok", ("last",))


KILLED = """
import sys, time
from dataclasses import replace
from pathlib import Path
from ldmperf.profiling import Case, profile
from ldmperf.profiling.trajectory.ours import OurBackend
from ldmperf.profiling.trajectory.lane import Lane
from ldmperf.profiling.trajectory.theirs import DiffusersBackend
from ldmperf.profiling.trajectory.unet_problem import UNetProblem
from ldmperf.profiling.trajectory.records import RecordStore
from ldmperf.profiling.measure.timing import RepetitionRule

class Hangs:
    implementation = "torch"
    def build(self, problem):
        right, calls = OurBackend("torch").build(problem), []
        def trajectory(inputs):
            calls.append(None)
            # First call, two rounds beside the others, and then it is alone.
            time.sleep(600 if len(calls) == 4 else 0)
            return right(inputs)
        return trajectory

backends = {"torch": OurBackend("torch"), "diffusers": DiffusersBackend(), "hangs": Hangs()}
size = {"steps": 1, "latent_height": 16, "latent_width": 16}
cases = [Case(unet=sys.argv[1], backend=name, **size) for name in backends]
real = Lane.run_measured
Lane.run_measured = lambda lane, inputs: replace(
    real(lane, inputs), wall_ms=0.001 if lane.case.backend == "hangs" else 1000.0
)
profile(cases, rule=RepetitionRule(2, 1.0), store=RecordStore(Path(sys.argv[2])), backends=backends)
"""


def test_a_killed_process_leaves_the_records_of_the_backends_that_were_done(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(path)],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") == 2):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    records, rejected = load_records(path)
    assert rejected == 0
    assert [(record.case.backend, record.status) for record in records] == [("torch", "ok"), ("diffusers", "ok")]


class Clock(runner.Listener):
    """Seconds that pass by one for each trajectory that a listener hears of."""

    def __init__(self) -> None:
        self.now = 0.0
        self.began = 0
        self.heard: list[tuple[str, str]] = []

    def __call__(self) -> float:
        return self.now

    def begin(self, cases: Sequence[Case]) -> None:
        self.began += 1

    def ran(self, case: Case, phase: str) -> None:
        self.now += 1.0
        self.heard.append((case.backend, phase))

    def recorded(self, record: Record) -> None: ...

    def end(self) -> None: ...


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_what_has_a_sample_at_the_deadline_is_checked_and_recorded_as_cut_short(
    tiny_checkpoint: Path, tmp_path: Path, sampler: str
) -> None:
    first = [tiny_case(tiny_checkpoint, sampler=sampler, backend=name) for name in BOTH]
    second = [case.model_copy(update={"steps": 3}) for case in first]
    clock = Clock()
    # Two first calls, and three samples are begun before seven seconds have passed: two and two.
    records = profile(
        [*first, *second],
        rule=RepetitionRule(5, 0.0),
        backends=BOTH,
        listener=clock,
        deadline=Deadline(5.5, clock),
    )
    assert [record.case for record in records] == [case.as_recorded() for case in first]
    # Of the next group not even the network is made.
    assert clock.began == 1
    for record in records:
        assert (record.status, record.harness.stopped_by, record.harness.min_count) == ("ok", "seconds", 5)
        assert record.correctness is not None
        assert record.correctness.error_after is not None
    samples = [record.wall_ms.n for record in records if record.wall_ms is not None]
    # Of a deterministic plan the check is one more sample, of a stochastic one it is none.
    closing = 1 if sampler == "ddim" else 0
    assert samples == [2 + closing, 2 + closing]
    assert clock.heard == [
        ("torch", "first call"), ("diffusers", "first call"),
        ("torch", "timing"), ("diffusers", "timing"), ("diffusers", "timing"), ("torch", "timing"),
        ("torch", "check"), ("diffusers", "check"),
    ]  # fmt: skip
    if closing:
        assert [record.harness.order[-1] for record in records] == [("torch",), ("diffusers",)]


def test_what_has_no_sample_at_the_deadline_has_no_record(tiny_checkpoint: Path) -> None:
    cases = [tiny_case(tiny_checkpoint, backend=name) for name in BOTH]
    for seconds, heard in ((0.5, 1), (1.5, 2)):
        clock = Clock()
        deadline = Deadline(seconds, clock)
        assert profile(cases, rule=TWICE, backends=BOTH, listener=clock, deadline=deadline) == []
        assert clock.heard == [("torch", "first call"), ("diffusers", "first call")][:heard]
    # Nor is a reference computed that no sample would be compared with.
    clock = Clock()
    wide: list[torch.dtype] = []

    class Noted:
        implementation = "diffusers"

        def build(self, problem: UNetProblem) -> Trajectory:
            wide.append(problem.unet.dtype)
            return DiffusersBackend().build(problem)

    case = tiny_case(tiny_checkpoint, dtype="bfloat16")
    backends = BOTH | {"diffusers": Noted()}
    assert profile([case], rule=TWICE, backends=backends, listener=clock, deadline=Deadline(0.5, clock)) == []
    assert wide == []
    # One sample of the two: the other backend has none.
    clock = Clock()
    deadline = Deadline(2.5, clock)
    (record,) = profile(cases, rule=TWICE, backends=BOTH, listener=clock, deadline=deadline)
    assert record.case.backend == "torch"


def test_what_failed_before_the_deadline_is_recorded(tiny_checkpoint: Path) -> None:
    cases = [tiny_case(tiny_checkpoint, backend=name) for name in ("missing", "torch")]
    clock = Clock()
    backends = BOTH | {"missing": Missing()}
    deadline = Deadline(0.5, clock)
    (record,) = profile(cases, backends=backends, listener=clock, deadline=deadline)
    assert (record.case.backend, record.status) == ("missing", "unsupported")


def settling(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """As on a GPU: memory is given back, and what runs next has to allocate it. What ran, and when that was."""
    log: list[tuple[str, str]] = []
    real_run, real_measured, real_release = Lane.run, Lane.run_measured, group.release_memory

    def run(lane: Lane, inputs: Inputs) -> Timed[Tensor]:
        log.append((lane.case.backend, "untimed"))
        return real_run(lane, inputs)

    def run_measured(lane: Lane, inputs: Inputs) -> Timed[Tensor]:
        result = real_measured(lane, inputs)
        log[-1] = (lane.case.backend, "timed")
        return result

    def release() -> None:
        log.append(("", "released"))
        real_release()

    monkeypatch.setattr(Lane, "run", run)
    monkeypatch.setattr(Lane, "run_measured", run_measured)
    monkeypatch.setattr(group, "release_memory", release)
    monkeypatch.setattr("ldmperf.profiling.measure.outcomes.release_memory", release)
    monkeypatch.setattr(group, "warmup_rounds", lambda case: 1)
    return log


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_no_sample_pays_for_memory_that_was_given_back(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Neither after the checks, nor after another backend has failed, nor after a stochastic check's capture."""
    log = settling(monkeypatch)
    cases = [tiny_case(tiny_checkpoint, sampler=sampler, backend=n) for n in ("torch", "broken", "diffusers")]
    # Fails at its second sample: its first call, its warm-ups and a sample went well.
    backends = BOTH | {"broken": raising(MemoryError(), at_call=4 if sampler == "ddim" else 5)}
    with told_times(torch=600.0, diffusers=250.0):
        records = {r.case.backend: r for r in profile(cases, rule=RepetitionRule(2, 1.0), backends=backends)}
    assert {name: record.status for name, record in records.items()} == {
        "torch": "ok", "broken": "oom", "diffusers": "ok"
    }  # fmt: skip
    # Of a deterministic plan the time is reached before the closing sample.
    taken = {"torch": 3, "diffusers": 5} if sampler == "ddim" else {"torch": 2, "diffusers": 4}
    # After the checks, and after the failure; of a stochastic plan after the captures of the warm-up too, and once
    # more for the one that is still timed when the check of the other was captured.
    warm_ups = {"torch": 2, "diffusers": 2} if sampler == "ddim" else {"torch": 3, "diffusers": 4}
    for name in ("torch", "diffusers"):
        mine = [what for who, what in log if who in ("", name)]
        assert mine.count("timed") == taken[name]
        for before, what in pairwise(mine):
            assert (before, what) != ("released", "timed"), log
        assert records[name].harness.warmup_count == warm_ups[name]
        assert records[name].phases.warmup_ms is not None


def test_references_are_computed_once_and_found_by_the_next_profile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    computed: list[str] = []

    @dataclass
    class Counted:
        of: Backend
        implementation: str

        def build(self, problem: UNetProblem) -> Trajectory:
            if problem.unet.dtype == torch.float32:
                computed.append(self.implementation)
            return self.of.build(problem)

    counted = {name: Counted(backend, name) for name, backend in BOTH.items()}
    case = tiny_case(tiny_checkpoint, dtype="bfloat16")
    given = make_problem(case, make_network(case))
    kept = References()
    once = kept.get(given, "torch", counted)
    assert once.ms is not None
    assert (once.name, computed) == ("diffusers float32", ["diffusers"])
    again = kept.get(given, "torch", counted)
    assert torch.equal(again.latents, once.latents)
    assert (again.ms, computed) == (None, ["diffusers"])
    # What the result depends on is another reference: the implementation beside it, the steps, the batch.
    kept.get(given, "diffusers", counted)
    other = case.model_copy(update={"steps": 3})
    kept.get(make_problem(other, given.unet), "torch", counted)
    assert computed == ["diffusers", "torch", "diffusers"]
    assert relative_rms(kept.get(make_problem(other, given.unet), "torch", counted).latents, once.latents) > 0.1

    family = Case(unet="39M", steps=1, dtype="bfloat16", latent_height=8, latent_width=8)
    small = make_problem(family, make_network(family))
    computed.clear()
    written = References(tmp_path / "kept", "commit").get(small, "torch", counted)
    found = References(tmp_path / "kept", "commit").get(small, "torch", counted)
    assert (computed, found.ms, found.name) == (["diffusers"], None, "diffusers float32")
    assert torch.equal(found.latents, written.latents)
    # Of another commit, of changed files, or torn, it is computed anew; a checkpoint's is never kept on disk.
    (path,) = (tmp_path / "kept").iterdir()
    References(tmp_path / "kept", "another").get(small, "torch", counted)
    References(tmp_path / "kept", None).get(small, "torch", counted)
    path.write_bytes(path.read_bytes()[:-100])
    References(tmp_path / "kept", "commit").get(small, "torch", counted)
    References(tmp_path / "kept", "commit").get(given, "torch", counted)
    assert len(computed) == 5
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_references_are_kept_for_code_that_is_known_alone() -> None:
    here = collect_environment("cpu").model_copy(update={"git_commit": "a", "git_dirty": False})
    assert code_identity(here) is not None
    assert code_identity(here.model_copy(update={"git_dirty": True})) is None
    assert code_identity(here.model_copy(update={"git_commit": None, "git_dirty": None})) is None
    # The commit given from outside, of a checkout without its history.
    assert code_identity(here.model_copy(update={"git_dirty": None})) is not None
    for change in ({"git_commit": "b"}, {"torch": "9"}, {"diffusers": "9"}, {"cudnn": 9}, {"cpu": "another"}):
        assert code_identity(here.model_copy(update=change)) != code_identity(here)


def test_the_float32_network_is_made_once_a_group_and_given_up(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[weakref.ref[torch.nn.Module]] = []
    real = copy.deepcopy

    def deepcopy(module: torch.nn.Module) -> torch.nn.Module:
        found = real(module)
        copies.append(weakref.ref(found))
        return found

    monkeypatch.setattr("ldmperf.profiling.trajectory.check.copy.deepcopy", deepcopy)
    alive: list[int] = []

    class Listening(Heard):
        def ran(self, case: Case, phase: str) -> None:
            if phase == "timing":
                gc.collect()
                alive.append(sum(copy() is not None for copy in copies))

    cases = [tiny_case(tiny_checkpoint, dtype="bfloat16", backend=name) for name in BOTH]
    records = profile(cases, rule=TWICE, backends=BOTH, listener=Listening())
    assert {record.status for record in records} == {"ok"}
    assert (len(copies), set(alive)) == (1, {0})


def traced_as(trace: Trace, log: list[tuple[str, int]]) -> Tracer:
    def tracer(call: Callable[[], object], device: torch.device, evaluations: int) -> Trace:
        call()
        log.append(("traced", evaluations))
        return trace.model_copy(update={"evaluations": evaluations})

    return tracer


def test_traces_are_of_short_trajectories_after_all_timing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one the profiler stays attached: nothing is timed then. The record is written again with it."""
    monkeypatch.setattr(runner, "wants_trace", lambda record: record.status == "ok" and record.trace is None)
    cases = [
        tiny_case(tiny_checkpoint, steps=steps, backend=name) for steps in (2, 20) for name in ("torch", "wrong")
    ]
    backends = BOTH | {"wrong": Changed(lambda latents, call: latents * 2)}
    log: list[tuple[str, int]] = []

    class Listening(Heard):
        def ran(self, case: Case, phase: str) -> None:
            log.append((phase, case.steps))

    trace = Trace(launches=10, launches_per_step=3, busy_ms=1.0, step_busy_ms=0.25)
    store = RecordStore(tmp_path / "records.jsonl")
    records = profile(
        cases,
        rule=TWICE,
        store=store,
        backends=backends,
        listener=Listening(),
        tracer=traced_as(trace, log),
    )
    phases = [phase for phase, _ in log]
    assert phases.count("traced") == 2
    assert set(phases[phases.index("traced") :]) == {"traced", "trace"}
    assert [steps for phase, steps in log if phase == "traced"] == [2, 8]
    assert {(r.case.steps, r.case.backend): r.trace is not None for r in records} == {
        (2, "torch"): True, (2, "wrong"): False, (20, "torch"): True, (20, "wrong"): False
    }  # fmt: skip
    # On disk the record without its trace was there first; read, it is one.
    assert store.path.read_bytes().count(b"\n") == 6
    assert sorted(store.load(), key=lambda r: r.case_key) == sorted(records, key=lambda r: r.case_key)
    # Twelve evaluations more than were traced, each a quarter of a millisecond.
    long = next(r for r in records if r.case.steps == 20 and r.trace is not None)
    assert long.trace is not None
    assert long.trace.busy_in(20) == pytest.approx(1.0 + 12 * 0.25)
    assert long.wall_ms is not None
    assert long.host_gap == pytest.approx(1.0 - 4.0 / long.wall_ms.p50)


def test_a_trace_that_fails_leaves_the_record_and_resuming_makes_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "wants_trace", lambda record: record.status == "ok" and record.trace is None)
    case = tiny_case(tiny_checkpoint)
    store = RecordStore(tmp_path / "records.jsonl")

    def broken(call: Callable[[], object], device: torch.device, evaluations: int) -> Trace | None:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    with pytest.warns(UserWarning, match="no trace .*CUPTI_ERROR_NOT_INITIALIZED"):
        (record,) = profile([case], rule=TWICE, store=store, backends=BOTH, tracer=broken)
    with pytest.warns(UserWarning, match="the profiler saw nothing"):
        profile([case], store=store, skip={case.key}, backends=BOTH, tracer=lambda *_: None)
    assert store.load() == [record]
    assert record.trace is None
    trace = Trace(launches=10, busy_ms=1.0)
    late = Deadline(0.0)
    profile([case], store=store, skip={case.key}, backends=BOTH, tracer=traced_as(trace, []), deadline=late)
    assert store.load() == [record]
    again = profile([case], store=store, skip={case.key}, backends=BOTH, tracer=traced_as(trace, []))
    (completed,) = store.load()
    assert again == []
    assert completed.trace is not None
    assert completed.model_copy(update={"trace": None}) == record


def test_the_end_of_the_time_is_for_traces_the_most_important_first(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_traces, "is_traceable", lambda case: True)
    names = ("torch", "graph+separate", "diffusers", "graph")
    cases = [tiny_case(tiny_checkpoint, steps=s, backend=name) for s in (1, 2, 3) for name in names]
    backends: dict[str, Backend] = dict.fromkeys(names, OurBackend("torch")) | {"diffusers": DiffusersBackend()}
    log: list[str] = []

    def run(seconds: float, count: int) -> list[Record]:
        """The records; who was traced, in order, is in the log."""
        clock = Clock()
        records = profile(
            cases,
            rule=RepetitionRule(count, 0.0),
            store=RecordStore(tmp_path / f"{seconds}.jsonl"),
            backends=backends,
            listener=clock,
            deadline=Deadline(seconds, clock),
            tracer=traced_as(Trace(launches=1, busy_ms=1.0), []),
        )
        log[:] = [name for name, phase in clock.heard if phase == "trace"]
        return records

    # A group takes eight seconds: two are done when the 16 of 20 are over that timing has.
    records = run(20.0, 1)
    assert {record.case.steps for record in records} == {1, 2}
    assert log == ["graph", "graph", "diffusers", "diffusers"]
    assert {(r.case.steps, r.case.backend) for r in records if r.trace is not None} == {
        (1, "graph"), (2, "graph"), (1, "diffusers"), (2, "diffusers")
    }  # fmt: skip
    # A group that is cut short has a trace all the same: four seconds of closing checks, and one are left.
    records = run(25.0, 9)
    assert {(r.case.steps, r.harness.stopped_by) for r in records} == {(1, "seconds")}
    assert log == ["graph"]


def test_a_compiled_peer_is_traced_last_and_only_where_it_can_be_built_again(
    tiny_checkpoint: Path, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_traces, "is_traceable", lambda case: True)
    built = {"diffusers-compile-max": 120.0, "diffusers-compile": 30.0, "torch": 900.0, "graph": 900.0}
    records = []
    for steps in (1, 2):
        for name, seconds in built.items():
            case = tiny_case(tiny_checkpoint, steps=steps, backend=name)
            phases = Phases(build_ms=400.0, first_call_ms=1e3 * seconds)
            records.append(make_record(case, phases=phases))
    backends: dict[str, Backend] = dict.fromkeys(built, OurBackend("torch"))
    clock = Clock()

    def tracer(call: Callable[[], object], device: torch.device, evaluations: int) -> Trace:
        clock.now += 1.0
        return Trace(launches=1, busy_ms=1.0)

    def traced_within(seconds: float | None) -> list[tuple[str, int]]:
        clock.now = 0.0
        deadline = Deadline(seconds, clock)
        found = short_traces.short_traces(records, Networks(), backends, deadline, tracer, {})
        return [(record.case.backend, record.case.steps) for record in found]

    eager = [("graph", 1), ("graph", 2), ("torch", 1), ("torch", 2)]
    # Four seconds later there are 30.3 left, and it takes 30.4.
    assert traced_within(34.3) == eager
    assert traced_within(34.5) == [*eager, ("diffusers-compile", 1)]
    compiled = [("diffusers-compile-max", 1), ("diffusers-compile", 1)]
    assert traced_within(124.5) == [*eager, *compiled, ("diffusers-compile", 2)]
    assert traced_within(None) == [*eager, *compiled, ("diffusers-compile-max", 2), ("diffusers-compile", 2)]


def test_only_what_has_a_time_on_a_gpu_is_traced(make_record: Callable[..., Record]) -> None:
    on_gpu, on_cpu = Case(unet="39M", device="cuda"), Case(unet="39M", device="cpu")
    assert wants_trace(make_record(on_gpu))
    assert not wants_trace(make_record(on_gpu, trace=Trace(launches=1, busy_ms=1.0)))
    assert not wants_trace(make_record(on_gpu, status="oom"))
    assert not wants_trace(make_record(on_cpu))
    deadline = Deadline(10.0, Clock())
    assert timing_deadline([on_cpu, on_gpu], deadline).left == 8.0
    # Nothing of the time is kept for what cannot be traced.
    assert timing_deadline([on_cpu], deadline) is deadline


def test_process_wide_settings_are_put_back(tiny_checkpoint: Path) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        record = measure(tiny_case(tiny_checkpoint), {"torch": OurBackend("torch")})["torch"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert record.environment.float32_matmul_precision == "highest"
    assert record.environment.cudnn_tf32 is False
    assert torch.backends.cudnn.allow_tf32 == before[1]
