"""Quality records in order: the cells of each closed world, a cell being one network at one step count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..figures.best import by_time
from ..quality import Generator, QualityRecord
from ..terminal.visible import counted
from .pooled_figures import DIFFERENCE, LOGARITHM, PooledFigure, Scale


@dataclass(frozen=True)
class QualityMetric:
    """A distance to real samples, and the scale that it is compared on."""

    name: str
    field: str
    scale: Scale

    def figure(self, cell: QualityCell) -> PooledFigure | None:
        return cell.figure(self.field, self.scale)


# Each judged apart, never averaged.
QUALITY_METRICS = (
    QualityMetric("Frechet distance", "frechet", LOGARITHM),
    QualityMetric("KID", "kid", DIFFERENCE),
    QualityMetric("sliced Wasserstein", "sliced_wasserstein", LOGARITHM),
)


@dataclass(frozen=True)
class QualityCell:
    """One network, sampler and step count: a record for each training seed, by seed.

    failed   further training seeds that were sampled so, without a figure
    """

    records: tuple[QualityRecord, ...]
    failed: frozenset[int] = frozenset()

    @property
    def kind(self) -> Generator:
        return self.records[0].case.kind

    @property
    def network(self) -> str:
        return self.records[0].case.network

    @property
    def sampler(self) -> str:
        return self.records[0].case.sampler

    @property
    def steps(self) -> int:
        return self.records[0].case.steps

    @property
    def takes(self) -> tuple[tuple[str, int], ...]:
        return self.records[0].takes

    @property
    def guided(self) -> bool:
        return any(record.case.guided for record in self.records)

    @property
    def guidance_scale(self) -> float:
        """Of its first seed; cells of `ClosedWorld.guided_cells` have one rate."""
        return self.records[0].case.guidance_scale

    @property
    def gflop_per_image(self) -> float | None:
        """The most of its seeds: one may have been tuned to no guidance."""
        found = [record.gflop_per_image for record in self.records]
        known = [gflop for gflop in found if gflop is not None]
        return max(known) if len(known) == len(found) else None

    @property
    def parameters(self) -> int | None:
        """Of its first seed: a network has as many in each."""
        return self.records[0].parameters

    @property
    def samples(self) -> int:
        return min(record.case.samples for record in self.records)

    @property
    def seeds(self) -> frozenset[int]:
        """Of the trainings."""
        return frozenset(record.case.training_seed for record in self.records)

    @property
    def lost(self) -> frozenset[str]:
        """A name for each failed seed, the same whichever other seeds the cell has."""
        return frozenset(f"{_of_any_seed(self.records[0])} {seed}" for seed in self.failed)

    def at_seeds(self, seeds: Container[int]) -> QualityCell | None:
        """The cell of these trainings alone; null where it has none of them."""
        found = tuple(record for record in self.records if record.case.training_seed in seeds)
        failed = frozenset(seed for seed in self.failed if seed in seeds)
        return QualityCell(found, failed) if found else None

    def figure(self, field: str, scale: Scale) -> PooledFigure | None:
        """A figure over the seeds; null where a seed has none on this scale."""
        estimates = ((r.case.training_seed, r.case.samples, r.estimates[field]) for r in self.records)
        return PooledFigure.of(self.network, scale, estimates)

    def factor(self, name: str) -> PooledFigure | None:
        """The share of a factor that the judge reads right, over the seeds; null where a seed has none."""
        shares = ((r.case.training_seed, r.case.samples, r.factors.get(name)) for r in self.records)
        return PooledFigure.of_shares(self.network, shares)


Cells = Mapping[str, Mapping[int, QualityCell]]


@dataclass(frozen=True)
class ClosedWorld:
    """The records that are ok of one world and task, one of each case.

    failed   the records of cases without one that is ok
    """

    name: str
    task: str
    records: tuple[QualityRecord, ...]
    failed: tuple[QualityRecord, ...] = ()

    @cached_property
    def networks(self) -> tuple[str, ...]:
        """Those of the family, the smallest first; the last is the reference, as 866M is in the paper."""
        return _by_size(self._family)

    @cached_property
    def samplers(self) -> tuple[str, ...]:
        """Those that the family was sampled with, on test prompts at a tuned guidance."""
        return self.samplers_of("diffusion")

    def samplers_of(self, kind: Generator) -> tuple[str, ...]:
        """The same of a kind of generator."""
        return tuple(sorted({r.case.sampler for r in self._of_kind(kind) if r.tuned and _is_test(r)}))

    @property
    def _family(self) -> list[QualityRecord]:
        return self._of_kind("diffusion")

    def _of_kind(self, kind: Generator) -> list[QualityRecord]:
        return [record for record in self.records if record.case.kind == kind]

    def cells(self, sampler: str, kind: Generator = "diffusion") -> Cells:
        """By network, the smallest first, and steps: tuned, on test prompts, after the whole training."""
        found = [record for record in self._of_kind(kind) if record.tuned and _is_test(record)]
        by_network = _by_network([record for record in found if record.case.sampler == sampler])
        cells = {name: self._by_steps(_after_training(of)) for name, of in by_network.items()}
        return {name: cells[name] for name in _by_size(self._of_kind(kind)) if name in cells}

    def others(self, sampler: str) -> list[QualityCell]:
        """Of generators that are none of the family, tuned on test prompts: those of another kind take their own
        sampler, several networks that share a trajectory this one.

        A network of the family that was trained from drawn weights is no other generator.
        """
        found: dict[tuple[str, str, str], list[QualityRecord]] = {}
        for record in self.records:
            case = record.case
            is_other = case.kind not in ("diffusion", "scratch", "real") and record.tuned and _is_test(record)
            if is_other and (case.kind != "stitched" or case.sampler == sampler):
                found.setdefault((case.network, case.kind, case.sampler), []).append(record)
        return [cell for place in sorted(found) for cell in self._by_steps(_after_training(found[place])).values()]

    def held_out(self, cell: QualityCell) -> QualityCell | None:
        """The same cell on held-out prompts, of the seeds that were judged on them; null without any."""
        keys = [record.case.model_copy(update={"split": "held-out"}).key for record in cell.records]
        found = [self._held_out.get(_without_samples(key)) for key in keys]
        known = tuple(record for record in found if record is not None)
        return QualityCell(known) if known else None

    @cached_property
    def _held_out(self) -> dict[str, QualityRecord]:
        """By their keys."""
        return {_without_samples(r.case.key): r for r in self.records if r.case.split == "held-out"}

    def guided_cells(self, sampler: str) -> list[QualityCell]:
        """Each guidance rate apart, of each network, step count and split, after the whole training."""
        found: dict[tuple[str, int, str, float], list[QualityRecord]] = {}
        by_network = _by_network([record for record in self._family if record.case.sampler == sampler])
        for name, of in by_network.items():
            for record in _after_training(of):
                case = record.case
                found.setdefault((name, case.steps, case.split, case.guidance_scale), []).append(record)
        return [self._cell(found[place]) for place in sorted(found)]

    def trainings(
        self, network: str, sampler: str, steps: int, kind: Generator = "diffusion"
    ) -> dict[int, QualityCell]:
        """By training steps: on test prompts, at the guidance that is tuned after the whole training."""
        place = (network, sampler, steps)
        of = [r for r in self._of_kind(kind) if (r.case.network, r.case.sampler, r.case.steps) == place]
        of = [record for record in of if _is_test(record)]
        last = [record for record in _after_training(of) if record.tuned]
        rates = {record.case.training_seed: record.case.guidance_scale for record in last}
        found: dict[int, dict[int, QualityRecord]] = {}
        for record in sorted(of, key=lambda record: record.tuned):
            case = record.case
            if record.tuned or case.guidance_scale == rates.get(case.training_seed):
                found.setdefault(case.training_steps, {})[case.training_seed] = record
        return {trained: self._cell(found[trained].values()) for trained in sorted(found)}

    def _by_steps(self, records: Iterable[QualityRecord]) -> dict[int, QualityCell]:
        """Of a seed that is tuned to two rates the lower counts."""
        found: dict[int, dict[int, QualityRecord]] = {}
        for record in sorted(records, key=lambda record: -record.case.guidance_scale):
            found.setdefault(record.case.steps, {})[record.case.training_seed] = record
        return {steps: self._cell(found[steps].values()) for steps in sorted(found)}

    def _cell(self, records: Iterable[QualityRecord]) -> QualityCell:
        """With the seeds that failed at a guidance which another seed of the cell has."""
        by_seed = tuple(sorted(records, key=lambda record: record.case.training_seed))
        failed = {seed for record in by_seed for seed in self._failed_seeds.get(_of_any_seed(record), ())}
        return QualityCell(by_seed, frozenset(failed - {record.case.training_seed for record in by_seed}))

    @cached_property
    def _failed_seeds(self) -> dict[str, set[int]]:
        """By what the cases of all seeds share."""
        found: dict[str, set[int]] = {}
        for record in self.failed:
            found.setdefault(_of_any_seed(record), set()).add(record.case.training_seed)
        return found

    def real(self, metric: QualityMetric) -> float | None:
        """The metric of real samples against real; null where nobody looked."""
        found = [record.estimates[metric.field] for record in self.real_records]
        return next((estimate.value for estimate in found if estimate is not None), None)

    @property
    def ceiling(self) -> float | None:
        """The share of factors that the judge reads right of real samples; null where nobody looked."""
        found = [record.alignment for record in self.real_records]
        return next((estimate.value for estimate in found if estimate is not None), None)

    @property
    def real_records(self) -> list[QualityRecord]:
        """Of real samples as they are: those that went through tokens are worse."""
        return [record for record in self.records if record.case.kind == record.case.network == "real"]


def closed_worlds(records: Iterable[QualityRecord]) -> list[ClosedWorld]:
    """The worlds and tasks by name. Of a case that was judged twice the one with most samples, then the latest."""
    found: dict[tuple[str, str], dict[str, QualityRecord]] = {}
    failed: dict[tuple[str, str], dict[str, QualityRecord]] = {}
    for record in sorted(by_time(records), key=lambda record: record.case.samples):
        of_world = (found if record.status == "ok" else failed).setdefault(
            (record.case.world, record.case.task), {}
        )
        of_world[_without_samples(record.case.key)] = record
    worlds = []
    for place, of_world in sorted(found.items()):
        without = failed.get(place, {})
        lost = tuple(without[key] for key in sorted(without.keys() - of_world.keys()))
        worlds.append(ClosedWorld(*place, tuple(of_world[key] for key in sorted(of_world)), lost))
    return worlds


def of_the_same_seeds(cells: Sequence[QualityCell]) -> tuple[QualityCell, ...]:
    """The cells of the seeds that have most of them: with other seeds a cell is another mixture of networks."""
    counts = Counter(record.case.training_seed for cell in cells for record in cell.records)
    seeds = {seed for seed, count in counts.items() if count == max(counts.values())}
    found = [tuple(record for record in cell.records if record.case.training_seed in seeds) for cell in cells]
    pairs = zip(cells, found, strict=True)
    return tuple(replace(cell, records=of) for cell, of in pairs if len(of) == len(seeds))


def seeds_in_words(figures: Iterable[PooledFigure]) -> str:
    """ "3 training seeds", "one training seed", "1 to 3 training seeds"."""
    counts = sorted({len(figure.seeds) for figure in figures})
    if counts == [1]:
        return "one training seed"
    return (
        f"{counts[0]} to {counts[-1]} training seeds" if len(counts) > 1 else counted(counts[0], "training seed")
    )


def _is_test(record: QualityRecord) -> bool:
    return record.case.split == "test"


def _without_samples(key: str) -> str:
    return key.rpartition(" samples=")[0]


def _of_any_seed(record: QualityRecord) -> str:
    return _without_samples(record.case.model_copy(update={"training_seed": 0}).key)


def _by_size(records: Iterable[QualityRecord]) -> tuple[str, ...]:
    """Their networks, the smallest first."""
    size: dict[str, tuple[float, float]] = {}
    for record in records:
        one = (record.parameters or 0.0, (record.gflop_per_image or 0.0) / record.case.steps)
        size[record.case.network] = max(one, size.get(record.case.network, one))
    return tuple(sorted(size, key=lambda name: (size[name], name)))


def _by_network(records: Iterable[QualityRecord]) -> dict[str, list[QualityRecord]]:
    found: dict[str, list[QualityRecord]] = {}
    for record in records:
        found.setdefault(record.case.network, []).append(record)
    return found


def _after_training(records: Sequence[QualityRecord]) -> list[QualityRecord]:
    """Those with the most training steps."""
    most = max((record.case.training_steps for record in records), default=0)
    return [record for record in records if record.case.training_steps == most]
