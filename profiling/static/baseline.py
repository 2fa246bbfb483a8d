"""What the compiler made of the kernels when it was last looked at, and what `make test` compiles to compare.

Another release of triton makes other code, so there is a file of records for each:
bench/static/triton-<version>.jsonl. What a change may not make worse of them: compare/code_gate.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..measure.environment import Environment
from ..measure.store import read_lines, write_whole
from ..step.calls import FAMILY_HEAD_DIMS
from .inspection_records import InspectionRecord
from .launch_items import Item, Selection, ShapeItem, select
from .shapes import SHAPES, Shape

# What `make test` compiles. All sizes, both batches and every specialization: bench/static_baseline.py --every.
CHECKED = (
    Selection(("39M", "866M", "5B"), (2,), ("bfloat16",), ("sm_90",)),
    Selection(("866M",), (2,), ("bfloat16",), ("sm_80",)),
    Selection(("866M",), (2,), ("bfloat16",), ("gfx942",), one_of_each="kernel"),
    Selection(("866M",), (2,), ("float32",), ("sm_80", "sm_90", "gfx942"), one_of_each="kernel"),
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
        # Of the smallest size, which is compiled for sm_90 alone.
        for name in ("transformer_front", "transformer_tail"):
            items.append(ShapeItem(name, "64x64", Shape(bf16, **SHAPES[name][2]), arch))
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


def entries(
    results: Iterable[Mapping[str, Any]], environment: Environment, started_at: datetime
) -> list[InspectionRecord]:
    """The records of the results on NVIDIA architectures, in the order of their keys.

    Raises ValueError where two launches have one key: a baseline would hold one of them alone.
    """
    found: dict[str, InspectionRecord] = {}
    for result in results:
        if "region" not in result:
            continue
        record = InspectionRecord.of(result, environment, started_at)
        if record.case_key in found:
            raise ValueError(f"two launches are called {record.case_key}")
        found[record.case_key] = record
    return [found[key] for key in sorted(found)]


def baseline_path(folder: Path, triton_version: str) -> Path:
    return folder / f"triton-{triton_version}.jsonl"


def read_baseline(folder: Path, triton_version: str) -> list[InspectionRecord] | None:
    """The records for this release of triton; None where none were committed. Raises ValueError for a torn one."""
    path = baseline_path(folder, triton_version)
    if not path.exists():
        return None
    records, aside = read_lines(path, InspectionRecord)
    if aside.in_file:
        raise ValueError(str(aside.first[0]))
    return records


def write_baseline(folder: Path, triton_version: str, records: Iterable[InspectionRecord]) -> Path:
    """The file of these records, without their null fields: most of the environment is."""
    path = baseline_path(folder, triton_version)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record.model_dump_json(exclude_none=True) + "\n" for record in records)
    write_whole(path, "".join(lines).encode())
    return path
