"""What the compiler made of the kernels when it was last looked at, and what a change may not make worse.

Another release of triton makes other code, so there is a file for each: bench/static/triton-<version>.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..measure.store import write_whole
from ..step.calls import FAMILY_HEAD_DIMS
from .shapes import Shape
from .sweep import Item, Selection, ShapeItem, select

# What `make test` compiles. All sizes, both batches and every specialization: bench/static_baseline.py --every.
CHECKED = (
    Selection(("39M", "866M", "5B"), (2,), ("bfloat16",), ("sm_90",)),
    Selection(("866M",), (2,), ("bfloat16",), ("sm_80", "gfx942")),
    Selection(("866M",), (2,), ("float32",), ("sm_90",)),
    Selection(("866M",), (2,), ("float32",), ("sm_80", "gfx942"), one_of_each="kernel"),
    Selection(("866M",), (2,), ("float16",), ("sm_80", "sm_90", "gfx942"), one_of_each="kernel"),
)
TEXT = 77


def checked() -> list[Item | ShapeItem]:
    """What `make test` compiles: CHECKED, attention at every head dimension, linear layers that keep rows."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    few = (8, 40, 160)
    items: list[Item | ShapeItem] = [*select(CHECKED)]
    items += _attention("sm_90", bf16, FAMILY_HEAD_DIMS)
    # So few tokens that all keys are one tile, or that other tiles fill the chip.
    items += _attention("sm_90", bf16, FAMILY_HEAD_DIMS, side=8)
    items += _attention("sm_90", bf16, [dim for dim in FAMILY_HEAD_DIMS if dim > 32], side=16)
    items += _attention("sm_90", bf16, (8, 20, 40, 64, 80, 112, 160, 256, 384), context=TEXT)
    items += _attention("sm_90", bf16, (8, 20, 36, 40, 64, 80, 96, 160), mask=1)
    items += _attention("sm_90", bf16, (192,), side=16, mask=1)
    # With everything beside it, as other networks call it.
    for arch in ("sm_90", "sm_80", "gfx942"):
        items.append(ShapeItem("layer_norm", "64x64", Shape(bf16), arch))
    for arch in ("sm_80", "gfx942"):
        items += _attention(arch, bf16, FAMILY_HEAD_DIMS)
        items += _attention(arch, bf16, few, context=TEXT)
        items += _attention(arch, fp32, (40,))
        # Rows so narrow that these chips can keep them too.
        items.append(ShapeItem("linear", "64x64", Shape(bf16, channels=64), arch))
    items += _attention("sm_90", fp16, few)
    items += _attention("sm_90", fp32, few)
    return items


def every_attention(dtypes: Iterable[str], archs: Iterable[str]) -> list[ShapeItem]:
    """Attention at every head dimension, over many tokens, few, a text, and with a mask of keys."""
    return [
        item
        for dtype in dtypes
        for arch in archs
        for options in (
            {},
            {"side": 16},
            {"side": 8},
            {"context": TEXT},
            {"mask": 1},
            {"mask": 1, "side": 16},
        )
        for item in _attention(arch, getattr(torch, dtype), FAMILY_HEAD_DIMS, **options)
    ]


def _attention(
    arch: str, dtype: torch.dtype, head_dims: Iterable[int], *, side: int = 64, context: int = 0, mask: int = 0
) -> list[ShapeItem]:
    name = f"{side}x{side}" + (f" context={context}" if context else "") + (" mask" if mask else "")
    shape = Shape(dtype, height=side, width=side, context=context, mask=mask)
    return [ShapeItem("attention", name, dataclasses.replace(shape, head_dim=dim), arch) for dim in head_dims]


# A hot region may grow by this much before it counts as longer.
LONGER = 1.02

Entry = dict[str, Any]


def label(result: Mapping[str, Any]) -> str:
    """What an entry is found by: it stays the same when arguments are added to a kernel."""
    tile = [f"{name}={value}" for name, value in sorted(result["constants"].items()) if name.isupper()]
    parts = (result["kernel"], result["dtype"], result["size"], f"batch={result['batch']}", *tile)
    return f"{result['arch']} {' '.join(parts)} warps={result['num_warps']}"


def entries(results: Iterable[Mapping[str, Any]]) -> dict[str, Entry]:
    """{label: entry} of the results on NVIDIA architectures. Raises ValueError where two have one label."""
    found: dict[str, Entry] = {}
    for result in results:
        if "region" not in result:
            continue
        name = label(result)
        if name in found:
            raise ValueError(f"two launches are labelled {name}")
        resources = result["resources"]
        overlap = result.get("attention", {}).get("overlap")
        found[name] = {
            "registers": resources["registers"],
            "shared_bytes": result["shared_bytes"],
            "warps_per_multiprocessor": result["occupancy"]["warps"],
            "spills": resources["spill_loads"] + resources["spill_stores"],
            "loop": result["region"]["loop"],
            "hot_instructions": result["region"]["instructions"],
            "serialized": result["serialized"],
            # Exponentials issued between q k^T and its wait, and all.
            "overlap": None if overlap is None else [overlap["beside_scores"], overlap["exponentials"]],
        }
    return dict(sorted(found.items()))


def regressions(baseline: Mapping[str, Entry], now: Mapping[str, Entry]) -> list[str]:
    """What got worse, in one line each, and entries that only one of the two has."""
    found = [f"{name}: not in the baseline" for name in now if name not in baseline]
    found += [f"{name}: in the baseline, no longer compiled" for name in baseline if name not in now]
    for name, before in baseline.items():
        after = now.get(name)
        if after is None:
            continue
        if after["spills"] > before["spills"]:
            found.append(f"{name}: {before['spills']} -> {after['spills']} spills")
        if after["warps_per_multiprocessor"] < before["warps_per_multiprocessor"]:
            found.append(
                f"{name}: {before['warps_per_multiprocessor']} -> {after['warps_per_multiprocessor']} warps fit, "
                f"with {before['registers']} -> {after['registers']} registers, "
                f"{before['shared_bytes']} -> {after['shared_bytes']} bytes of shared memory"
            )
        if after["hot_instructions"] > LONGER * before["hot_instructions"]:
            found.append(
                f"{name}: the hot region grew from {before['hot_instructions']} to {after['hot_instructions']} "
                "instructions"
            )
        serialized = sorted(set(after["serialized"]) - set(before["serialized"]))
        if serialized:
            found.append(f"{name}: ptxas now serializes the matmuls ({', '.join(serialized)})")
        if _share(after["overlap"]) < _share(before["overlap"]):
            found.append(f"{name}: exponentials beside q k^T, of all: {before['overlap']} -> {after['overlap']}")
    return found


def _share(overlap: list[int] | None) -> float:
    return overlap[0] / max(overlap[1], 1) if overlap else 0.0


def baseline_path(folder: Path, triton_version: str) -> Path:
    return folder / f"triton-{triton_version}.json"


def read_baseline(folder: Path, triton_version: str) -> dict[str, Entry] | None:
    """The entries for this release of triton; None where none were committed."""
    path = baseline_path(folder, triton_version)
    if not path.exists():
        return None
    found: dict[str, Entry] = json.loads(path.read_text())["entries"]
    return found


def write_baseline(folder: Path, triton_version: str, found: Mapping[str, Entry]) -> Path:
    path = baseline_path(folder, triton_version)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items()]
    text = (
        f'{{\n  "triton": "{triton_version}",\n  "what": "compiled, not measured: registers of a thread, '
        'warps that fit a multiprocessor, instructions of the hot loop (or of all, without a loop)",\n'
        '  "entries": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    )
    write_whole(path, text.encode())
    return path
