"""`PartClock`: a part lasts to the end of its work on the device, and progress counts it."""

from __future__ import annotations

import pytest
import torch

from ldmperf.model.pipeline import part_clock
from ldmperf.model.pipeline.part_clock import PartClock


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_part_waits_for_its_own_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    waited: list[torch.device] = []

    def synchronize(of: torch.device) -> None:
        waited.append(of)
        now[0] += 10.0

    monkeypatch.setattr(part_clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    told: list[tuple[str, int, int]] = []
    clock = PartClock(torch.device(device), lambda *progress: told.append(progress))
    with clock.part("steps", 2) as count:
        for _ in range(2):
            now[0] += 1.0
            count()
    with clock.part("decode", 1):
        now[0] += 3.0
    on_device = device != "cpu"
    assert waited == [torch.device(device)] * 2 * on_device
    assert clock.seconds == {"steps": 2.0 + 10 * on_device, "decode": 3.0 + 10 * on_device}
    assert told == [("steps", 0, 2), ("steps", 1, 2), ("steps", 2, 2), ("decode", 0, 1), ("decode", 1, 1)]
