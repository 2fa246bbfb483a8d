"""Times a function that sleeps 10 ms, as everything is timed here: the median has to be 10 ms within 2 %.

    python bench/timer_honesty.py

On a GPU the events around the sleep are read too. No test does this: on a busy machine a sleep is longer. Exit
code 1 where a clock is off.
"""

from __future__ import annotations

import sys
import time

import torch

from ldmperf.profiling.measure.integrity import impossible
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import Timed, timed

SLEEP_MS, WITHIN, COUNT = 10.0, 0.02, 100


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [timed(lambda: time.sleep(SLEEP_MS / 1e3), device) for _ in range(COUNT)]
    clocks = {"wall": Samples.of([one.wall_ms for one in found])}
    gpu_ms = [one.gpu_ms for one in found if one.gpu_ms is not None]
    if gpu_ms:
        clocks["gpu"] = Samples.of(gpu_ms)
    for name, samples in clocks.items():
        off = 100 * (samples.p50 / SLEEP_MS - 1)
        print(f"{name}: p50 {samples.p50:.4f} ms, {off:+.2f} % (min {samples.min:.4f}, p80 {samples.p80:.4f})")
    reason = impossible([Timed(None, one.wall_ms, one.gpu_ms, one.second_ms) for one in found], None, "a sleep")
    if reason is not None:
        print(reason)
    is_right = all(abs(samples.p50 / SLEEP_MS - 1) <= WITHIN for samples in clocks.values())
    print(f"{SLEEP_MS:g} ms {'are' if is_right else 'are not'} measured within {100 * WITHIN:g} %")
    return int(not is_right or reason is not None)


if __name__ == "__main__":
    sys.exit(main())
