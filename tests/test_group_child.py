"""What a group's process tells of, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from ldmperf.profiling import Case, Record
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.sweep import group_child
from ldmperf.profiling.sweep.child_end import ParentPipe
from ldmperf.profiling.sweep.events import Broken, Recorded
from ldmperf.profiling.sweep.patience import COMPILED_S, LEAST_S, patience
from ldmperf.profiling.trajectory.network import FAMILY_SUBJECTS


class Heard:
    def __init__(self) -> None:
        self.messages: list[Any] = []

    def say(self, message: Any) -> None:
        self.messages.append(message)


@pytest.mark.parametrize("status", ["error", "oom", "ok"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("answer", [None, "AcceleratorError: an illegal memory access was encountered"])
def test_a_device_that_answers_no_more_ends_the_process_once_its_case_is_recorded(
    make_record: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    device: str,
    answer: str | None,
) -> None:
    monkeypatch.setattr(group_child, "_cuda_is_broken", lambda: answer)
    heard = Heard()
    record = make_record(Case(unet="39M", device=device), status=status)
    group_child._Teller(cast("ParentPipe", heard), lambda case, phase: pytest.fail("nothing begins")).recorded(
        record
    )
    broken = (
        [Broken("error", answer, blames_all=False)] if answer and (status, device) == ("error", "cuda") else []
    )
    assert heard.messages == [Recorded(record), *broken]


def test_patience_grows_with_the_work_and_is_longer_for_what_compiles() -> None:
    rule = RepetitionRule()

    def seconds(**fields: Any) -> float:
        return patience(
            Case(**({"unet": "39M", "steps": 1, "guidance_scale": 1.0} | fields)), rule, FAMILY_SUBJECTS
        )

    one = seconds() - LEAST_S
    # 39M at 64x64 latents takes 53 GFLOP; half a GFLOP a second is far below any machine's pace.
    assert one == pytest.approx(2 * 53, rel=0.05)
    assert seconds(steps=7, batch=3, guidance_scale=7.5) - LEAST_S == pytest.approx(2 * 7 * 3 * one)
    assert seconds(device="cuda") - LEAST_S == pytest.approx(one / 40)
    assert seconds(backend="diffusers-compile-max", device="cuda") - COMPILED_S == pytest.approx(one / 40)
