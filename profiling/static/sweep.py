"""Many launches inspected at once: those of the family, compiled by a few processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..cases import DType
from .compile import Specialization
from .family import family_launches
from .inspection import inspect_launch
from .machines import MACHINES

# Constants that decide how a program's tile lies in registers; the others change a few instructions.
_TILE = ("BLOCK", "ONE_TILE", "SCALE", "REGISTERS")


@dataclass(frozen=True)
class Item:
    """A launch of a family size's step, by the digest of its specialization on sm_90, and where it is compiled."""

    size: str
    batch: int
    dtype: DType
    key: str
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
        for dtype in selection.dtypes:
            found: dict[Specialization, tuple[str, int]] = {}
            for batch in selection.batches:
                for size in selection.sizes:
                    for specialization in family_launches(size, batch, dtype):
                        found.setdefault(specialization, (size, batch))
            chosen = _representatives(found, selection.one_of_each)
            for specialization in chosen:
                for arch in selection.archs:
                    item = Item(*found[specialization], dtype, specialization.key, arch)
                    items.setdefault((item.key, arch), item)
    return list(items.values())


def inspect_items(items: Sequence[Item], processes: int = 2) -> Iterator[dict[str, Any]]:
    """`Inspection.as_json` of each item, in order, with the item's size, batch and dtype."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_inspect, items, chunksize=4)


def _inspect(item: Item) -> dict[str, Any]:
    torch.set_num_threads(1)
    launches = {s.key: launch for s, launch in family_launches(item.size, item.batch, item.dtype).items()}
    found = inspect_launch(launches[item.key], MACHINES[item.arch]).as_json()
    return {"size": item.size, "batch": item.batch, "dtype": item.dtype} | found | {"specialization": item.key}


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
