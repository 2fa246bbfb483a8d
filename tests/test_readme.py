"""README's figures are those of the committed records, and its examples run."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_committed_records():
    with_table = runpy.run_path(str(ROOT / "bench" / "readme.py"))["with_table"]
    assert with_table(README) == README


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_local_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
