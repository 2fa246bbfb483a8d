"""docs/drop-in.md: its tables are what reports say, its example is the file, its models are the published ones."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import drop_in_models

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
# Parameters and tensors of the published checkpoints.
PUBLISHED = {
    "SD1.5": (859_520_964, 686),
    "SD1.5 inpainting": (859_535_364, 686),
    "SD2.1": (865_910_724, 686),
    "BK-SDM-Base": (579_384_964, 442),
    "BK-SDM-Small": (482_346_884, 396),
    "BK-SDM-Tiny, tiny-sd": (323_384_964, 358),
    "SDXL, SDXL-turbo": (2_567_463_684, 1680),
    "AutoencoderKL": (83_653_863, 248),
}


def test_the_page_is_what_make_inventory_writes() -> None:
    assert drop_in_models.with_tables(PAGE) == PAGE


def test_the_models_are_those_that_were_published() -> None:
    found = {
        name: (sum(p.numel() for p in model.parameters()), len(model.state_dict()))
        for name, model in drop_in_models.models().items()
    }
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    assert set(found) - set(PUBLISHED) == {"SD x4 upscaler"}


@pytest.mark.parametrize(
    ("name", "layers", "levels", "has_middle"),
    [("SD1.5", 2, 4, True), ("BK-SDM-Base", 1, 4, True), ("BK-SDM-Small", 1, 4, False)],
)
def test_every_block_of_a_unet_is_replaced(name: str, layers: int, levels: int, has_middle: bool) -> None:
    """By the architecture: `layers` blocks at each level down and one more up, and all but one level attends."""
    kinds = Counter(one.kind for one in drop_in_models.reports()[name].replaced)
    per_level = 2 * layers + 1
    transformers = per_level * (levels - 1) + has_middle
    assert kinds["resnet"] == per_level * levels + 2 * has_middle
    assert kinds["transformer block"] == kinds["geglu"] == transformers
    assert kinds["attention"] == 2 * transformers
    # A norm in each transformer, and the output's with its SiLU.
    assert kinds["norm"] == transformers + 2


def test_the_lines_by_hand_are_as_many_as_the_page_says() -> None:
    (code,) = re.findall(r"<!-- by hand: .*?```python\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    (told,) = re.findall(r"These (\d+) lines", PAGE)
    assert len(lines) == int(told)
    assert code.strip() in (ROOT / "examples" / "by_hand.py").read_text(encoding="utf-8")


def test_the_reasons_that_the_page_explains_are_those_that_reports_give() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "model" / "dropin").glob("*.py"))
    (table,) = re.findall(r"\| reason \| when \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.DOTALL)
    told = [row.split("|")[1].strip() for row in table.splitlines()]
    assert told
    for reason in told:
        for part in re.split(r" \.\.\.|: peft's.*|, |; ", reason):
            # The option's name is filled in.
            assert re.sub(r"\w+=False", "=False", part) in source, reason
