"""Rivals beside the family, on records made by hand: which sizes stand beside which, and the times to an image."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from ldmperf.profiling import Case, Record
from ldmperf.profiling.figures import overview
from ldmperf.profiling.figures.beside import ends_with, ms_to_image, rivals_beside
from ldmperf.profiling.figures.derived import decoder_share
from ldmperf.profiling.measure.environment import DeviceState
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.report.columns import table_of
from ldmperf.profiling.report.rivals_table import rivals_grid
from ldmperf.profiling.report.tables import markdown_table, print_table

Make = Callable[..., Record]


def of_family(make: Make, size: str, parameters: int, ms: float, **fields: Any) -> Record:
    case = Case(**({"unet": size, "steps": 20} | fields))
    return make(case, parameters=parameters, wall_ms=Samples.of([ms] * 3))


def of_rival(
    make: Make, name: str, parameters: int, ms: float, *, decoder: float | None = None, **fields: Any
) -> Record:
    own = {
        "unet": name,
        "task": "rival",
        "sampler": "none",
        "steps": 1,
        "guidance_scale": 1.0,
        "context_tokens": 0,
    }
    return make(
        Case(**(own | {"backend": "eager"} | fields)),
        parameters=parameters,
        wall_ms=Samples.of([ms] * 3),
        decoder_ms=None if decoder is None else Samples.of([decoder] * 3),
    )


@pytest.fixture
def family(make_record: Make) -> list[Record]:
    return [
        of_family(make_record, "39M", 39_000_000, 900.0),
        of_family(make_record, "39M", 39_000_000, 800.0, backend="diffusers"),
        of_family(make_record, "39M", 39_000_000, 700.0, batch=2),
        of_family(make_record, "145M", 145_000_000, 2000.0),
        of_family(make_record, "866M", 866_000_000, 9000.0),
        of_family(make_record, "866M", 866_000_000, 2000.0, steps=4),
    ]


@pytest.fixture
def gan(make_record: Make) -> Record:
    return of_rival(make_record, "gan-30M", 30_000_000, 50.0)


@pytest.fixture
def large(make_record: Make) -> Record:
    return of_rival(make_record, "masked-transformer-608M", 608_000_000, 3000.0, decoder=500.0, steps=12)


def test_each_rival_has_the_nearest_size_and_of_that_the_fastest_backend(
    family: list[Record], gan: Record, large: Record
) -> None:
    rows = rivals_beside(overview([*family, large, gan]))
    assert [(row.name, row.case.steps, row.case.backend) for row in rows] == [
        ("gan-30M", 1, "eager"), ("39M", 20, "diffusers"),
        ("masked-transformer-608M", 12, "eager"), ("866M", 4, "torch"), ("866M", 20, "torch"),
    ]  # fmt: skip
    # Each by itself: the one nearest to it.
    assert [row.name for row in rivals_beside(overview([*family, gan]))] == ["gan-30M", "39M"]
    turned = rivals_beside(overview([gan, large, *family[::-1]]))
    assert [row.record for row in turned] == [row.record for row in rows]


def test_nothing_is_beside_a_rival_but_what_was_measured_under_its_conditions(
    family: list[Record], make_record: Make
) -> None:
    for fields in ({"dtype": "float16"}, {"batch": 3}, {"latent_width": 32}, {"device": "cuda"}):
        other = of_rival(make_record, "gan-30M", 30_000_000, 50.0, **fields)
        assert [row.name for row in rivals_beside(overview([*family, other]))] == ["gan-30M"]
    assert rivals_beside(overview(family)) == ()


def test_a_sample_ends_with_what_its_kind_makes_and_an_image_needs_no_decoder(
    family: list[Record], gan: Record, large: Record
) -> None:
    rows = rivals_beside(overview([*family, large, gan]))[:3]
    assert [ends_with(row) for row in rows] == ["image", "latents", "tokens"]
    assert [ms_to_image(row.record, ends_with(row)) for row in rows] == [50.0, None, 3500.0]
    assert decoder_share(large) == pytest.approx(500 / 3500)
    assert decoder_share(gan) is None


def test_rivals_have_no_place_in_the_tables_of_the_family(
    family: list[Record], gan: Record, make_record: Make
) -> None:
    shown = overview([*family, gan])
    assert {row.case.task for row in shown.rows} == {"t2i"}
    assert [row.name for row in shown.rivals] == ["gan-30M"]
    assert not any("gan" in row.name for _, rows in table_of(shown).sections for row in rows)
    assert not any("cost" in heading for heading in rivals_grid(shown).headings)
    failed = make_record(gan.case, status="unsupported", message="no square image")
    assert "unsupported: no square image" in rivals_grid(overview([*family, failed])).rows[0]


def test_a_flagged_rival_is_flagged_in_its_table(family: list[Record], gan: Record) -> None:
    throttled = gan.model_copy(update={"device_after": DeviceState(throttle_reasons=("SwPowerCap",))})
    grid = rivals_grid(overview([*family, throttled]))
    place = grid.headings.index("flags")
    assert [row[place] for row in grid.rows] == ["throttled", "-"]
    assert "flags" not in rivals_grid(overview([*family, gan])).headings


def test_rivals_alone_are_a_report(gan: Record) -> None:
    shown = overview([gan])
    lines = io.StringIO()
    print_table(shown, Console(file=lines, width=200))
    for said in (lines.getvalue(), markdown_table(shown)):
        assert "gan-30M" in said
        assert "cost" not in said


def test_the_decoders_share_is_a_column_where_it_was_timed(family: list[Record]) -> None:
    timed = family[0].model_copy(update={"decoder_ms": Samples.of([100.0] * 3)})
    (column,) = (c for c in table_of(overview([timed])).columns if c.label == "decoder share")
    (row,) = overview([timed]).rows
    assert column.cell(row) == "10.0%"
    assert "decoder share" not in [c.label for c in table_of(overview(family)).columns]


def test_a_rival_beside_another_process_is_flagged(family: list[Record], gan: Record) -> None:
    assert "flags" not in rivals_grid(overview([*family, gan])).headings
    crowded = gan.model_copy(update={"device_during": DeviceState(foreign_processes=2)})
    grid = rivals_grid(overview([*family, crowded]))
    marked = [row[grid.headings.index("flags")] for row in grid.rows]
    assert marked == ["shared GPU", "-"]
