"""The lines around the table of a run: what its columns mean, and what to know before the numbers."""

from __future__ import annotations

from ..figures import text
from ..figures.derived import PEER, Overview
from ..figures.phrases import environment_notes, machine_notes
from ..measure.conditions import WIDE_SPREAD, busy_notes, commit, flag_notes, is_unsteady
from ..measure.intervals import FEWEST
from ..terminal.visible import counted, visible


def notes(shown: Overview) -> tuple[str, ...]:
    """What the columns of the table mean, and how many cases have no time."""
    rows = shown.rows
    if not rows:
        return ()
    references = list(dict.fromkeys(row.reference for row in rows if row.reference))
    notes = ["step: a model evaluation of the whole batch with its share of the sampler, wall clock, median"]
    if any(row.case.guided for row in rows):
        notes[0] += "; guidance doubles the batch inside it"
    notes.append("GFLOP: of one forward of one sample")
    if any(row.record.floor is not None for row in rows):
        notes.append(
            "floor: for each launch of a step the longest of its bytes, FLOPs and exponentials at the ceilings "
            "measured on this machine; % of floor: floor over ms per step"
        )
        if any((row.record.percent_of_floor or 0.0) > 100 for row in rows):
            notes[-1] += (
                ", above 100 where caches serve the bytes or where other work ran while the ceilings were measured"
            )
    if references:
        base = f"{references[0]}, the" if len(references) == 1 else "the row with 1.00, each backend's"
        notes.append(
            f"cost here: ms per step relative to {base} largest size measured; "
            "cost paper: the paper's normalized cost (FLOPs) relative to the same size"
        )
    if any(row.gflop_ratio is not None for row in rows):
        notes.append("GFLOP ratio: GFLOP relative to that size, for networks that the paper does not have")
    if any(row.record.decoder_ms is not None for row in rows):
        notes.append(
            "decoder share: decoding the latents over the time of a trajectory and that decode; it is in no other "
            "column, and the paper leaves it out"
        )
    if any(row.case.backend == PEER for row in rows):
        notes.append(f"times faster: the time of {PEER} over that of the row's backend, same case and environment")
    if any(row.record.joules_per_image is not None for row in rows):
        notes.append(
            "J per image: the whole GPU's energy by NVML's counter, in a window of whole trajectories after "
            "timing; what it takes when idle is not subtracted"
        )
    without = [row.record.status for row in rows if row.record.status != "ok"]
    if without:
        cases = counted(len(rows), "case")
        notes.append(f"{len(without)} of {cases} without a time: {text.statuses_in_words(without)}")
    return tuple(notes)


def warnings(shown: Overview) -> tuple[str, ...]:
    """What to know before the numbers: mixed environments, changed code, unsteady times, busy hosts."""
    found = [*environment_notes(shown.environments), *machine_notes(shown.measured_in)]
    dirty = sorted({commit(e) for e in shown.environments if e.git_dirty})
    if dirty:
        found.append(f"Measured on commit {', '.join(dirty)}: the commit alone does not say what ran.")
    cases = counted(len(shown.all_rows), "case")
    wide = [row for row in shown.all_rows if is_unsteady(row.record.wall_ms)]
    if wide:
        named = [(row.name, row.case.backend, shown.conditions.heading(row)) for row in wide]
        names = text.first_of(list(dict.fromkeys(" ".join(filter(None, parts)) for parts in named)))
        found.append(
            f"Unsteady: p20 to p80 spans more than {WIDE_SPREAD:.0%} of the median in {len(wide)} of "
            f"{cases} ({visible(names)}); ratios of these are no better than that."
        )
    found += busy_notes([row.record for row in shown.all_rows], "case")
    timed = [row for row in shown.all_rows if row.record.wall_ms is not None]
    found += flag_notes([row.record for row in timed], "case")
    cut = [row for row in timed if row.record.harness.stopped_by is not None]
    few = [row for row in timed if row.record.wall_ms and row.record.wall_ms.n < FEWEST]
    if few:
        found.append(
            f"Fewer than {FEWEST} samples in {len(few)} of {cases}: their p20 to p80 says nothing of the spread; "
            "--min-count asks for more."
        )
    if cut:
        found.append(
            f"Cut short by --seconds: {len(cut)} of {cases} with fewer trajectories than "
            "were asked for (n in the details); --resume measures them again."
        )
    if shown.superseded:
        found.append(
            "Cases measured more than once: "
            f"{counted(shown.superseded, 'other record is', 'other records are')} not shown (those cut short, "
            "beside fewer backends, without a trace, or earlier)."
        )
    return tuple(found)
