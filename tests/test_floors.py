"""Floors of cases: made from given ceilings, in records and tables; a floor never ends a measurement."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ldmperf.model import FAMILY, UNet
from ldmperf.profiling import Case, Record, profile
from ldmperf.profiling.figures.derived import overview
from ldmperf.profiling.measure.ceilings import MARGIN, Ceiling, CeilingDevice, Ceilings
from ldmperf.profiling.measure.environment import DeviceState, Environment
from ldmperf.profiling.measure.timing import RepetitionRule, Times
from ldmperf.profiling.report.columns import table_of
from ldmperf.profiling.rivals.subjects import all_subjects
from ldmperf.profiling.step.roofline import Roof, StepShape, least_ms, step_parts, sums_of
from ldmperf.profiling.trajectory import floors as module
from ldmperf.profiling.trajectory import unet_problem
from ldmperf.profiling.trajectory.backend import Problem
from ldmperf.profiling.trajectory.checkpoints import identified
from ldmperf.profiling.trajectory.floors import Floors, floor_of
from ldmperf.profiling.trajectory.group_facts import GroupFacts
from ldmperf.profiling.trajectory.lane import Lane
from ldmperf.profiling.trajectory.network import family_config
from ldmperf.profiling.trajectory.record_parts import Floor
from ldmperf.profiling.trajectory.rungs import all_backends
from ldmperf.profiling.trajectory.unet_problem import UNetProblem, step_shape
from ldmperf.samplers import SamplingPlan

pytestmark = pytest.mark.usefixtures("_one_thread")

CASE = Case(unet="39M", latent_height=16, latent_width=16, guidance_scale=1.0)
DEVICE = CeilingDevice(machine_id="ab", device="EPYC", torch="2.13", threads=1, cores=1)


class Given:
    """A source of ceilings that are told; `anew` they are larger."""

    def __init__(self, ceilings: Ceilings, better: Ceilings | None = None) -> None:
        self.ceilings, self.better = ceilings, better or ceilings
        self.asked: list[str] = []

    def of(self, device: str) -> Ceilings:
        self.asked.append(device)
        return self.ceilings

    def anew(self, device: str) -> Ceilings:
        return self.better


def at(*flop: float | None, moved: float | None = 1e11, exponentials: float | None = 1e10) -> Ceilings:
    """Rates of float32, bfloat16 and float16 matmuls, one for all where one is given."""
    now = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)

    def ceiling(per_s: float | None) -> Ceiling:
        return Ceiling(per_s=per_s, at=now, message=None if per_s else "why not")

    rates = flop * 3 if len(flop) == 1 else flop
    of_each = dict(zip(("float32", "bfloat16", "float16"), map(ceiling, rates), strict=True))
    return Ceilings(
        device=DEVICE, bytes=ceiling(moved), flop=of_each, exponentials=ceiling(exponentials), last=now
    )


def problem_of(case: Case) -> Problem:
    """What a floor needs of a problem: the case and a network, here one without memory."""
    with torch.device("meta"):
        return UNetProblem(case, UNet(family_config(case)), cast(SamplingPlan, None), {})


def test_a_floor_is_the_roofline_of_the_cases_step() -> None:
    ceilings = at(2e11, 5e11, 3e11)
    found = Floors(Given(ceilings)).of(problem_of(CASE))
    parts = step_parts(FAMILY["39M"], StepShape(1, False, "float32", 16, 16, 77))
    sums = sums_of(parts, Roof(1e11, 2e11, 1e10))
    assert found == floor_of(parts, ceilings, "float32")
    assert found is not None
    assert (found.step_ms, found.nbytes, found.flops) == (sums.floor_ms, sums.nbytes, sums.flops)
    assert (found.flop_per_s, found.least_flop_per_s) == (2e11, MARGIN * 2e11)
    assert found.least_step_ms == pytest.approx(least_ms(parts, MARGIN * 2e11))
    # By far: no bytes, no exponentials, convolutions at a quarter, a faster machine.
    assert found.least_step_ms < found.step_ms / MARGIN


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, StepShape(1, True, "float32", 64, 64, 77)),
        ({"guidance_scale": 1.0, "batch": 3}, StepShape(3, False, "float32", 64, 64, 77)),
        ({"latent_height": 32, "context_tokens": 154}, StepShape(1, True, "float32", 32, 64, 154)),
        ({"dtype": "bfloat16", "steps": 7, "sampler": "euler"}, StepShape(1, True, "bfloat16", 64, 64, 77)),
    ],
)
def test_what_a_step_depends_on_is_the_cases(changes: dict[str, Any], shape: StepShape) -> None:
    assert step_shape(Case(unet="39M", **changes)) == shape


def test_super_resolution_reads_eight_channels() -> None:
    case = CASE.model_copy(update={"task": "sr"})
    small, large = (Floors(Given(at(1e12))).of(problem_of(one)) for one in (CASE, case))
    assert small is not None
    assert large is not None
    assert large.flops - small.flops == 2 * 9 * 4 * 64 * 16 * 16


@pytest.mark.parametrize("missing", [at(None), at(1e12, moved=None), at(1e12, exponentials=None)])
def test_without_a_ceiling_there_is_no_floor_and_a_reason(missing: Ceilings) -> None:
    with pytest.warns(UserWarning, match=r"39M in float32 on cpu: no floor \(no ceiling of .*why not"):
        assert Floors(Given(missing)).of(problem_of(CASE)) is None


def test_a_step_that_cannot_be_counted_has_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    # More than a record's counts hold: a batch of a million at 4096 x 4096.
    huge = CASE.model_copy(update={"batch": 10**6, "latent_height": 4096, "latent_width": 4096})
    with pytest.warns(UserWarning, match="no floor"):
        assert Floors(Given(at(1e12))).of(problem_of(huge)) is None

    def unknown(*_: object) -> None:
        raise LookupError("no rule tells the launches of aten::tan")

    monkeypatch.setattr(unet_problem, "step_parts", unknown)
    with pytest.warns(UserWarning, match=r"LookupError: no rule tells the launches of aten::tan"):
        assert Floors(Given(at(1e12))).of(problem_of(CASE)) is None


def test_ceilings_measured_anew_only_lower_a_floor() -> None:
    floors = Floors(Given(at(1e10), better=at(4e10)))
    problem = problem_of(CASE)
    before, after = floors.of(problem), floors.anew(problem)
    assert before is not None
    assert after is not None
    assert after.least_step_ms == pytest.approx(before.least_step_ms / 4)
    assert after.step_ms < before.step_ms
    assert Floors().of(problem) is Floors().anew(problem) is None


def test_records_of_a_profile_have_floors_and_their_group_can_ask_anew(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[Any] = []
    make = module.Floors.of

    def noted(self: Floors, problem: Problem) -> Floor | None:
        facts.append(problem.case)
        return make(self, problem)

    monkeypatch.setattr(module.Floors, "of", noted)
    (case,) = identified([CASE.model_copy(update={"unet": str(tiny_checkpoint), "steps": 1})])
    source = Given(at(1e18, moved=1e18, exponentials=1e18))
    (record,) = profile([case], rule=RepetitionRule(1, 0.0), ceilings=source)
    assert record.status == "ok"
    assert record.floor is not None
    assert record.floor.step_ms > record.floor.least_step_ms > 0
    assert record.percent_of_floor == pytest.approx(100 * record.floor.step_ms / (record.ms_per_step or 0))
    # Known before a network takes its memory.
    assert source.asked[0] == "cpu"
    assert len(facts) == 1
    (without,) = profile([case], rule=RepetitionRule(1, 0.0))
    assert (without.status, without.floor, without.percent_of_floor) == ("ok", None, None)


def test_a_rival_that_is_faster_than_its_floor_is_impossible() -> None:
    """One pass of a GAN to 64x64 pixels, on a machine that is called slower than it is, and on a faster one."""
    case = Case(
        unet="gan-30M",
        task="rival",
        sampler="none",
        steps=1,
        guidance_scale=1.0,
        context_tokens=0,
        latent_height=8,
        latent_width=8,
        backend="eager",
    )
    for rate, status in ((1e6, "impossible"), (1e18, "ok")):
        source = Given(at(rate))
        (record,) = profile([case], rule=RepetitionRule(1, 0.0), ceilings=source, subjects=all_subjects())
        assert record.status == status
        assert record.floor is not None
        assert record.floor.flops == pytest.approx(1e9 * (record.gflop_per_forward or 0))
        assert 0.25 < record.floor.least_step_ms * MARGIN * rate / (1e3 * record.floor.flops) < 0.5
        assert status == "ok" or "below the floor" in (record.message or "")


def test_before_a_time_is_called_impossible_the_ceilings_are_measured_once_more() -> None:
    asked: list[None] = []

    def anew() -> Floor:
        asked.append(None)
        return FLOOR.model_copy(update={"least_step_ms": 0.1})

    def facts(floor: Floor | None) -> GroupFacts:
        nobody = ("run", Environment(os="Linux", python="3"), RepetitionRule(), (), lambda *_: None, DeviceState())
        return GroupFacts(*nobody, evaluations=4, floor=floor, floor_anew=anew)

    # Of four evaluations at 0.5 ms each.
    honest = facts(FLOOR)
    assert (honest.least_ms(2.0), honest.floor, asked) == (2.0, FLOOR, [])
    suspect = facts(FLOOR)
    assert suspect.least_ms(1.9) == pytest.approx(0.4)
    assert len(asked) == 1
    assert facts(None).least_ms(0.0) is None
    suspect.floor_anew = lambda: None
    assert suspect.least_ms(0.3) == pytest.approx(0.4)
    # The device's clock is the shorter one, and is judged by the same floor.
    lane = Lane(CASE, all_backends()["torch"], facts(FLOOR))
    lane.times = Times([2.1, 2.2], [1.9, 2.0])
    lane._judge_times()
    assert len(asked) == 2


def test_a_floor_that_cannot_be_made_loses_no_measurement(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(unet_problem, "step_parts", broken)
    (case,) = identified([CASE.model_copy(update={"unet": str(tiny_checkpoint), "steps": 1})])
    with pytest.warns(UserWarning, match="no floor"):
        (record,) = profile([case], rule=RepetitionRule(1, 0.0), ceilings=Given(at(1e12)))
    assert (record.status, record.floor) == ("ok", None)
    assert torch.is_inference_mode_enabled() is False


FLOOR = Floor(
    step_ms=2.5,
    least_step_ms=0.5,
    nbytes=10,
    flops=10,
    exponentials=1,
    bytes_per_s=1.0,
    flop_per_s=1.0,
    exponentials_per_s=1.0,
)


def columns(*records: Record) -> dict[str, list[str]]:
    table = table_of(overview(records))
    (section,) = table.sections
    return {column.label: [column.cell(row) for row in section[1]] for column in table.columns}


def test_the_floor_and_the_percent_of_it_are_columns(make_record: Callable[..., Record]) -> None:
    record = make_record(floor=FLOOR)
    other = make_record(Case(unet="83M", steps=3))
    found = columns(record, other)
    assert found["floor ms per step"] == ["2.500", "-"]
    assert found["% of floor"] == [f"{100 * 2.5 / (record.ms_per_step or 0):.0f}", "-"]
    assert any("% of floor" in note for note in table_of(overview([record, other])).notes)
    assert "floor ms per step" not in columns(other)
    assert not any("floor" in note for note in table_of(overview([other])).notes)


def test_a_failed_case_keeps_its_floor_and_has_no_percent(make_record: Callable[..., Record]) -> None:
    record = make_record(status="oom", floor=FLOOR)
    assert record.percent_of_floor is None
    assert record.floor == FLOOR
    assert Record.model_validate_json(record.model_dump_json()) == record
