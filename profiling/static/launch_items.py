"""Many launches inspected at once: those of the family, or of shapes, compiled by a few processes."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ldmperf.kernels import Launch

from ..machines import MACHINES
from ..options import DType
from .compile import Specialization
from .inspection import inspect_launches
from .planned import family_launches, planned
from .shapes import SHAPES, Shape
from .tuned import TunedItem

# Constants that decide how a program's tile lies in registers; the others change a few instructions.
_TILE = ("BLOCK", "ONE_TILE", "SCALE", "REGISTERS")


@dataclass(frozen=True)
class Item:
    """A launch of a family size's step, by the digest of its specialization, and where it is compiled."""

    size: str
    batch: int
    dtype: DType
    key: str
    arch: str


@dataclass(frozen=True)
class ShapeItem:
    """The first launch of an operator called with a shape, and where it is compiled. `size` names the shape."""

    operator: str
    size: str
    shape: Shape
    arch: str


@dataclass(frozen=True)
class Selection:
    """Launches to inspect: of these sizes, model batches and dtypes, for these architectures.

    One of each "tile" (and number of warps) or "kernel" is taken, that with the most arguments; None takes all.
    """

    sizes: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[DType, ...]
    archs: tuple[str, ...]
    one_of_each: Literal["tile", "kernel"] | None = "tile"


def select(selections: Iterable[Selection]) -> list[Item]:
    """The items of the selections, without repetitions, in a fixed order."""
    items: dict[tuple[str, str], Item] = {}
    for selection in selections:
        for dtype, arch in itertools.product(selection.dtypes, selection.archs):
            found: dict[Specialization, tuple[str, int]] = {}
            for batch, size in itertools.product(selection.batches, selection.sizes):
                for specialization in family_launches(size, batch, dtype, machine=MACHINES[arch]):
                    found.setdefault(specialization, (size, batch))
            for specialization in _representatives(found, selection.one_of_each):
                item = Item(*found[specialization], dtype, specialization.key, arch)
                items.setdefault((item.key, arch), item)
    return list(items.values())


def inspect_items(items: Sequence[Item | ShapeItem | TunedItem], processes: int = 2) -> Iterator[dict[str, Any]]:
    """`Inspection.as_json` of each item, in order, with the item's size, batch and dtype."""
    context = multiprocessing.get_context("spawn")
    # In small batches: results arrive batch by batch.
    size = 12 if len(items) > 100 else 1
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for results in pool.map(_inspect, batches):
            yield from results


def _inspect(items: Sequence[Item | ShapeItem | TunedItem]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    inspections = inspect_launches([(_launch(item), MACHINES[item.arch]) for item in items])
    return [_named(item) | found.as_json() for item, found in zip(items, inspections, strict=True)]


def _launch(item: Item | ShapeItem | TunedItem) -> Launch:
    if isinstance(item, TunedItem):
        return item.launch
    if isinstance(item, ShapeItem):
        return planned(item.operator, SHAPES[item.operator][0](item.shape), MACHINES[item.arch])[0]
    return _launches_by_key(item.size, item.batch, item.dtype, item.arch)[item.key]


def _named(item: Item | ShapeItem | TunedItem) -> dict[str, Any]:
    if isinstance(item, TunedItem):
        return {"size": item.key, "batch": None, "dtype": item.call.dtype}
    if isinstance(item, ShapeItem):
        dtype = str(item.shape.dtype).removeprefix("torch.")
        return {"size": item.size, "batch": item.shape.batch, "dtype": dtype}
    return {"size": item.size, "batch": item.batch, "dtype": item.dtype}


@functools.lru_cache(maxsize=64)
def _launches_by_key(size: str, batch: int, dtype: DType, arch: str) -> dict[str, Launch]:
    """`family_launches` by the digests of their specializations."""
    found = family_launches(size, batch, dtype, machine=MACHINES[arch])
    return {specialization.key: launch for specialization, launch in found.items()}


def _representatives(
    specializations: Iterable[Specialization], one_of_each: Literal["tile", "kernel"] | None
) -> list[Specialization]:
    if one_of_each is None:
        return list(specializations)
    best: dict[object, Specialization] = {}
    for candidate in specializations:
        shape = tuple((name, value) for name, value in candidate.constants if name.startswith(_TILE))
        group = (candidate.kernel, *((shape, candidate.num_warps) if one_of_each == "tile" else ()))
        if group not in best or _options(candidate) > _options(best[group]):
            best[group] = candidate
    return list(best.values())


def _options(specialization: Specialization) -> int:
    """How many optional tensors and flags are given."""
    return -sum(value is None or value is False for _, value in specialization.constants)
