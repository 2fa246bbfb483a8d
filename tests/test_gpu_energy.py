"""The energy counter and the state of a real GPU."""

from __future__ import annotations

import pytest
import torch

from ldmperf.profiling.measure.energy import LEAST_COUNTED_S, CounterWatch, count_energy
from ldmperf.profiling.measure.environment import DeviceState, state_now
from ldmperf.profiling.measure.nvml import Sensor


@pytest.mark.gpu
@pytest.mark.alone
def test_a_busy_gpu_takes_energy_and_tells_its_state() -> None:
    sensor = Sensor.of("cuda")
    if (reason := sensor.why_no_energy()) is not None:
        pytest.skip(reason)
    states: list[DeviceState] = []
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()

    call()
    watch = CounterWatch(sensor.millijoules, lambda: states.append(state_now(sensor)))
    energy = count_energy(call, watch)
    limit = states[-1].power_limit_w
    assert limit is not None
    # A GPU takes something, and no more than its limit but for a peak.
    assert 10.0 < energy.joules / energy.window_s < 1.2 * limit
    assert energy.counted_s >= LEAST_COUNTED_S
    assert energy.relative_error < 0.1
    assert all(state.throttle_reasons is not None for state in states)
