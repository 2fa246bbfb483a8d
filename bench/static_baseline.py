"""Writes bench/static/triton-<version>.jsonl: what the installed triton makes of the kernels.

`make static-baseline` runs it; no GPU is needed. With --every it writes nothing and checks every launch of the
family instead, and attention at every head dimension: all sizes, model batches 2 and 16, three dtypes, three
architectures; thousands of compilations.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from ldmperf.model import FAMILY
from ldmperf.profiling.compare.code_gate import regressions
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.measure.recorded import utc_now
from ldmperf.profiling.static.baseline import (
    checked,
    entries,
    every_attention,
    read_baseline,
    write_baseline,
)
from ldmperf.profiling.static.inspection_records import compiler_environment
from ldmperf.profiling.static.launch_items import Selection, inspect_items, select
from ldmperf.profiling.terminal.visible import console, prepare_streams, say

FOLDER = Path(__file__).parent / "static"


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", action="store_true", help="check every launch of the family, write nothing")
    parser.add_argument("--arch", action="append", choices=list(MACHINES), help="with --every: only these")
    parser.add_argument("--dtype", action="append", help="with --every: only these")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.every:
        dtypes = tuple(options.dtype or ("bfloat16", "float16", "float32"))
        return check_every(dtypes, tuple(options.arch or MACHINES), options.processes)
    found = entries(inspect_items(checked(), options.processes), compiler_environment(), utc_now())
    before = read_baseline(FOLDER, triton.__version__)
    prepare_streams()
    out = console()
    for line in [] if before is None else regressions(before, found):
        say(out, line)
    path = write_baseline(FOLDER, triton.__version__, found)
    say(out, f"{path}: {len(found)} entries")
    return 0


def check_every(dtypes: tuple[str, ...], archs: tuple[str, ...], processes: int) -> int:
    """Prints the faults and the counts; 1 if there are faults."""
    family = Selection(tuple(FAMILY), (2, 16), dtypes, archs, one_of_each=None)
    items = [*select([family]), *every_attention(dtypes, archs)]
    print(f"{len(items)} compilations", flush=True)
    counts: Counter[str] = Counter()
    faulty = 0
    for result in inspect_items(items, processes):
        counts[f"{result['arch']} {result['dtype']} {result['kernel']}"] += 1
        if result["faults"]:
            faulty += 1
            print(
                result["kernel"],
                result["arch"],
                result["dtype"],
                result["constants"],
                result["faults"],
                flush=True,
            )
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")
    print(f"{sum(counts.values())} compiled, {faulty} with faults")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
