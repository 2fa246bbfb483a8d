"""The command `ldmperf plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..options import dtype_named, joules, milliseconds, split_values
from ..terminal.visible import console
from .shared import AsJson, RecordPaths, given_records, list_option, print_json, stop, tell, with_options

if TYPE_CHECKING:
    from ..claims.planning import Answer

FILTERS = {
    name: list_option(f"{text} All that were measured unless told.")
    for name, text in {
        "size": "Networks, by the names that the report has for them: 39M ... 5B.",
        "sampler": "Samplers.",
        "batch": "Images made at once.",
        "dtype": "float32, bfloat16, float16.",
        "backend": "Backends.",
    }.items()
}


@with_options("only", FILTERS)
def plan(
    records: RecordPaths = None,
    *,
    budget: Annotated[str, typer.Option(help="Wall time, with its unit: 50ms, 1.5s.", metavar="TIME")],
    joules_: Annotated[
        str | None,
        typer.Option("--joules", help="Energy beside the time, with its unit: 5J, 300mJ.", metavar="ENERGY"),
    ] = None,
    per: Annotated[
        Literal["image", "batch"],
        typer.Option(help="image: the budget is of one image, of a batch's time its share; batch: of the batch."),
    ] = "image",
    only: dict[str, list[str]],
    out: Annotated[
        Path | None, typer.Option(help="A folder for the chart of time against FID: pareto.png, pareto.svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell which sizes, samplers and step counts fit a budget.

    The answer comes from records, the best by the paper's FID first. A step count that was not measured is told by
    the line through those that were, and marked. The FID is the paper's, of 50 steps of ddim; where it has none
    that is said. Environments and conditions are never mixed.

    \b
    Examples:
      ldmperf plan --budget 50ms
      ldmperf plan --budget 1.5s --size 39M,866M --sampler ddim --backend graph
      ldmperf plan --budget 200ms --joules 60J --batch 8 --per batch runs/20261124T093000Z-1a84ffb
      ldmperf plan --budget 60s --out page bench/results/cpu-amd-epyc-2-cores/2026-11-25-f68d664.jsonl
    """
    from ..claims.offers import Budget
    from ..claims.planning import answer
    from ..report.plan_text import answer_json, print_answer

    limit = Budget(
        milliseconds("budget", budget),
        None if joules_ is None else joules("joules", joules_),
        per,
    )
    if "dtype" in only:
        only = only | {"dtype": [dtype_named(text) for text in split_values(only["dtype"])]}
    found, is_whole = given_records(records)
    answered = answer(found, limit, only)
    if as_json:
        print_json(answer_json(answered))
    else:
        print_answer(answered, console())
    if out is not None:
        _write_chart(answered, out)
    if not is_whole:
        raise typer.Exit(1)


def _write_chart(answered: Answer, out: Path) -> None:
    try:
        from ..report.pareto import write_pareto
    except ModuleNotFoundError as missing:
        stop(f"no chart: {missing.name} is not installed; pip install altair vl-convert-python", 1)
    try:
        written, reason = write_pareto(answered, out)
    except OSError as failure:
        stop(f"cannot write the chart to {out} ({failure.strerror}); choose another folder with --out", 1)
    if reason:
        stop(f"no chart: {reason}", 1)
    for path in written:
        tell(str(path))
