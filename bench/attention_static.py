"""Attention beside a textbook kernel, both compiled for sm_90: `make attention-static`. Predicted, not measured.

Writes bench/static/attention-triton-<version>.json, and its table into docs/attention.md. Takes no GPU and some
minutes. For each head dimension of the family: our kernel with its default tile, and the naive one with the best
of the usual tiles by the same prediction. Cycles are one multiprocessor's for 128 x 128 scores of one head.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from markers import with_blocks

from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.static.display import UNITS
from ldmperf.profiling.static.inspection import inspect_launch
from ldmperf.profiling.static.loop_order import ATTENTION
from ldmperf.profiling.static.planned import planned
from ldmperf.profiling.static.shapes import SHAPES, Shape
from ldmperf.profiling.step.calls import FAMILY_HEAD_DIMS

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).with_name("static")
DOCUMENT = ROOT / "docs" / "attention.md"
ARCH = "sm_90"
# The units that have a column.
COLUMNS = [unit for unit in UNITS if unit != "memory"]
MATMULS = tuple(ATTENTION.values())

Entry = dict[str, Any]


def compiled(head_dim: int) -> dict[str, Any]:
    """{"head_dim", "ours", "naive", "ratio"} of one head dimension, 4096 tokens, batch 2, bf16."""
    from naive_attention import naive_launches

    torch.set_num_threads(1)
    machine = MACHINES[ARCH]
    call = SHAPES["attention"][0](Shape(head_dim=head_dim))
    (launch,) = planned("attention", call, machine)
    told = inspect_launch(launch, machine).as_json()
    ours = entry(told) | loop(told)
    naive = [entry(inspect_launch(launch, machine).as_json()) for launch in naive_launches(**call)]
    best = min(naive, key=lambda found: (found["spills"], busiest(found)))
    return {"head_dim": head_dim, "ours": ours, "naive": best, "ratio": round(busiest(best) / busiest(ours), 2)}


def entry(inspection: Mapping[str, Any]) -> Entry:
    """What the table tells of an inspection."""
    attention = inspection["attention"]
    tile, bound = attention["tile"], attention["bound"]
    constants = inspection["constants"]
    parts = [int(constants[name]) for name in ("PART_1", "PART_2", "BLOCK_D") if name in constants]
    per_pass = 128 * 128 / (tile["block_m"] * tile["keys"])
    return {
        "parts": [part for part in parts if part],
        "tile": [tile["block_m"], tile["block_n"]],
        "warps": inspection["num_warps"],
        "polynomial": tile["polynomial"],
        "registers": inspection["resources"]["registers"],
        "shared_bytes": inspection["shared_bytes"],
        "resident_warps": inspection["occupancy"]["warps"],
        "spills": inspection["region"]["spills"] > 0 or inspection["resources"]["stack"] > 0,
        "cycles": attention["cycles_per_16384_scores"],
        "analytic": {"cycles": round(per_pass * bound["cycles"], 1), "unit": bound["unit"]},
        "distance": attention["distance"],
    }


def loop(inspection: Mapping[str, Any]) -> Entry:
    """The order of the hot loop, and what of it overlaps."""
    return {
        "programs": inspection["occupancy"]["programs"],
        "ahead": inspection["constants"]["AHEAD"] == "True",
        "serialized": inspection["serialized"],
        "overlap": inspection["attention"]["overlap"],
        "order": inspection["region"]["order"]["steps"],
    }


def condensed(steps: Sequence[Sequence[Any]]) -> str:
    """Steps between waits and matmuls in one line: "q k^T x8 with exponential x34, wait, p v x8"."""
    segments: list[dict[str, int]] = [{}]
    for name, count in steps:
        if name == "barrier":
            continue
        ends = name.startswith("wait") or (name in MATMULS and name not in segments[-1])
        if (ends or any(key.startswith("wait") for key in segments[-1])) and segments[-1]:
            segments.append({})
        segments[-1][name] = segments[-1].get(name, 0) + count
    return ", ".join(map(_segment, segments))


def _segment(counts: Mapping[str, int]) -> str:
    """What stands between two waits, a matmul first: "q k^T x8 with exponential x34 and mma.sync"."""
    names = sorted(counts, key=lambda name: name not in MATMULS)
    first, *others = (f"{name} x{counts[name]}" if counts[name] > 1 else name for name in names)
    return f"{first} with {' and '.join(others)}" if others else first


def busiest(found: Entry) -> float:
    """The cycles of the unit that is the limit."""
    return float(max(found["cycles"].values()))


def markdown(document: Mapping[str, Any]) -> str:
    """The table: ours / naive in each cell, and what that predicts."""
    heads = [
        "D",
        "held as",
        "tile, warps",
        "registers",
        *COLUMNS,
        "limit",
        "analytic bound",
        "of it",
        "naive / ours",
    ]
    lines = [
        f"*Predicted* by compiling for {document['arch']} with triton {document['triton']}, 4096 tokens, bf16:",
        "cycles of one multiprocessor for 128 x 128 scores of one head, ours / naive. The limit is the unit with",
        "most cycles, all others hidden beside it: a lower bound, without latency. *of it*: our limit over the",
        "analytic bound. Naive is a textbook kernel (bench/naive_attention.py) at its best tile by this count: D",
        "padded to a power of two, scale, mask and row sum as instructions of their own, every tile masked.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---:|' * len(heads)}",
    ]
    for row in document["entries"]:
        ours, naive = row["ours"], row["naive"]
        both = (ours, naive)
        cells = [
            str(row["head_dim"]),
            " / ".join("+".join(map(str, found["parts"])) for found in both),
            " / ".join(f"{found['tile'][0]}x{found['tile'][1]}, {found['warps']}" for found in both),
            " / ".join(f"{found['registers']}{' (spills)' if found['spills'] else ''}" for found in both),
            *(" / ".join(f"{found['cycles'].get(unit, 0):.0f}" for found in both) for unit in COLUMNS),
            " / ".join(max(found["cycles"], key=found["cycles"].get) for found in both),
            f"{ours['analytic']['cycles']:.0f} {ours['analytic']['unit']}",
            f"{ours['distance']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *order_lines(document)])


def order_lines(document: Mapping[str, Any]) -> list[str]:
    """The second table: one pass of each default's loop, as its machine code stands."""
    names = ("D", "tile, warps", "programs", "serialized", "exponentials during q k^T", "the loop, in order")
    lines = [
        "One pass of each default's loop in machine code. *exponentials during q k^T*: those issued between that",
        "matmul and its wait, of all. *programs*: how many fit a multiprocessor. Where two or more fit, the",
        "matmuls of one can run during the exponentials of another.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---:|' * (len(names) - 1)}---|",
    ]
    for row in document["entries"]:
        ours = row["ours"]
        cells = [
            str(row["head_dim"]),
            f"{ours['tile'][0]}x{ours['tile'][1]}, {ours['warps']}",
            str(ours["programs"]),
            ", ".join(ours["serialized"]) or "no",
            f"{ours['overlap']['beside_scores']}/{ours['overlap']['exponentials']}",
            condensed(ours["order"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def with_table(text: str, document: Mapping[str, Any]) -> str:
    """The text of docs/attention.md with the table between its markers."""
    return with_blocks(text, {"attention": lambda _: markdown(document)})


def latest(folder: Path = FOLDER) -> Path:
    """The committed results of the newest release of triton; docs/attention.md shows them."""
    found = folder.glob("attention-triton-*.json")
    return max(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)])


def write(path: Path, version: str, entries: Sequence[Entry]) -> None:
    lines = ",\n".join(f"    {json.dumps(row)}" for row in entries)
    text = (
        f'{{\n  "triton": "{version}",\n  "arch": "{ARCH}",\n'
        '  "what": "compiled, not measured: predicted cycles of one multiprocessor for 128 x 128 scores",\n'
        f'  "entries": [\n{lines}\n  ]\n}}\n'
    )
    write_whole(path, text.encode())


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--table", action="store_true", help="compile nothing, write the table of what is committed"
    )
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()
    if not options.table:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
            entries = list(pool.map(compiled, FAMILY_HEAD_DIMS))
        write(FOLDER / f"attention-triton-{triton.__version__}.json", triton.__version__, entries)
    document = json.loads(latest().read_text(encoding="utf-8"))
    write_whole(DOCUMENT, with_table(DOCUMENT.read_text(encoding="utf-8"), document).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
