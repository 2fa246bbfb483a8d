"""Text shown to people: nothing unseen, nothing that a stream cannot take, and no print that goes another way."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from ldmperf.profiling import Record
from ldmperf.profiling.cli import main
from ldmperf.profiling.figures import overview
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.report import print_table
from ldmperf.profiling.report.tables import markdown_table
from ldmperf.profiling.terminal.layout import MISSING, laid_out
from ldmperf.profiling.terminal.visible import console, counted, for_markdown, say_wrapped, visible, width_of
from ldmperf.profiling.trajectory.case import Case
from ldmperf.profiling.trajectory.progress import ProgressLines

ROOT = Path(__file__).parents[1]
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
ANY_TEXT = st.text(
    st.one_of(st.sampled_from("\x1b\n\r\t\0\u202e\u2028\udcff[/x]:smile:|`ü模"), st.characters(codec=None)),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("runs[/x]", "runs[/x]"),
        ("größe ∞ 模型 🙂", "größe ∞ 模型 🙂"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nb\r\tc\0", r"a\nb\r\tc\x00"),
        ("\x7f\x9b", r"\x7f\x9b"),
        ("\u202egnp", r"\u202egnp"),
        ("a\u200b\u2028\u2029\ufeff", r"a\u200b\u2028\u2029\ufeff"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("\U000e0001", r"\U000e0001"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(ANY_TEXT)
def test_what_is_shown_has_nothing_unseen_and_can_be_encoded(text: str) -> None:
    shown = visible(text)
    assert not [c for c in shown if unicodedata.category(c) in UNSEEN]
    shown.encode("utf-8")
    assert visible(shown) == shown
    assert "".join(c for c in text if unicodedata.category(c) not in UNSEEN) == text or shown != text
    assert "\n" not in for_markdown(text)
    assert "<" not in for_markdown(text)


def test_a_count_agrees_with_its_noun() -> None:
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(n, "pass", "passes") for n in (1, 2)] == ["1 pass", "2 passes"]


def calls_that_print(path: Path) -> Iterator[tuple[int, str]]:
    """(line, source) of every call in a file that writes to a terminal by its own means."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        prints = called in ("print", "Console", "sys.stderr.write", "sys.stdout.write") or called.endswith(
            ("typer.echo", "typer.secho", ".print", ".print_json", ".log", "console.out")
        )
        # JSON is plain ASCII.
        is_json = bool(node.args) and ast.unparse(node.args[0]).startswith("json.dumps(")
        if prints and not is_json and called != "math.log":
            yield node.lineno, ast.unparse(node)


def test_no_text_goes_past_the_one_way_to_a_terminal() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {call}"
        for path in sorted((ROOT / "profiling").rglob("*.py"))
        if path.name != "visible.py"
        for line, call in calls_that_print(path)
    ]
    assert found == []


class AsciiTerminal:
    """stdout and stderr of a process whose encoding is ASCII, as `main` makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raw = io.BytesIO()
        self.stream = io.TextIOWrapper(self.raw, encoding="ascii", errors="backslashreplace", write_through=True)
        monkeypatch.setattr(sys, "stdout", self.stream)
        monkeypatch.setattr(sys, "stderr", self.stream)

    def text(self) -> str:
        self.stream.flush()
        text = self.raw.getvalue().decode("ascii")
        self.raw.seek(0)
        self.raw.truncate()
        return text


def as_ascii(name: str) -> str:
    """What an ASCII terminal shows of a name."""
    return visible(name).encode("ascii", "backslashreplace").decode("ascii")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=ANY_TEXT)
def test_tables_progress_and_errors_take_any_name(name: str, make_record: Callable[..., Record]) -> None:
    """A name is one line's part wherever it is shown: whole, with what is unseen spelled out."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        terminal = AsciiTerminal(monkeypatch)
        # Strict models refuse lone surrogates, as does UTF-8: of a path they cannot come this far.
        label = name.encode("utf-8", "ignore").decode().replace("/", "") or "x"
        if label.strip(".") == "":
            label += "x"
        case = Case(unet=f"/models/{label}", steps=1)
        record = make_record(case, status="error", message=f"no\x1b {label}".splitlines()[0])
        with ProgressLines(console(stderr=True), [case], RepetitionRule(1, 0.0)) as lines:
            lines.begin([case])
            lines.recorded(record)
            lines.end()
        told = terminal.text()
        assert told.count("\n") == 2
        assert as_ascii(label) in told
        print_table(overview([record]), console())
        told = terminal.text()
        assert as_ascii(label) in told
        assert "\x1b" not in told + markdown_table(overview([record]))

        with pytest.raises(SystemExit) as stopped:
            main(["inspect", "--", f"no {name}"])
        assert stopped.value.code == 2
        told = terminal.text()
        assert told.count("\n") == 1
        assert not [c for c in told[:-1] if unicodedata.category(c) in UNSEEN]


def run(arguments: list[Any], **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from ldmperf.profiling.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, check=False, timeout=120, env=os.environ | environment)


def test_an_ascii_process_shows_any_path(tmp_path: Path) -> None:
    """Not UTF-8, an escape, a line break, markup, a letter that ASCII lacks: one line, nothing raised."""
    out = bytes(tmp_path) + b"/\xff\x1b[31m\n[/x]" + "ü".encode()
    ended = run(["kernels", "--device", "cpu", "--seconds", "0", "--out", out], PYTHONIOENCODING="ascii")
    assert ended.returncode == 1
    assert b"Traceback" not in ended.stderr
    shown = rb"/\udcff\x1b[31m\n[/x]\xfc/"
    assert shown in ended.stdout.splitlines()[-1]
    assert shown in ended.stderr.splitlines()[0]
    assert b"\x1b" not in ended.stdout + ended.stderr


def test_prose_is_wrapped_to_a_width_and_a_pipe_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "  name          " + " ".join(str(1000 + n) for n in range(60))
    for columns in (60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        printed = io.StringIO()
        say_wrapped(Console(file=printed), line, indent=16)
        lines = printed.getvalue().splitlines()
        assert max(map(len, lines)) <= columns
        assert printed.getvalue().split() == line.split()
        assert all(part.startswith(" " * 16) for part in lines[1:])
    monkeypatch.delenv("COLUMNS")
    printed = io.StringIO()
    assert width_of(Console(file=printed)) is None
    say_wrapped(Console(file=printed), line, indent=16)
    assert printed.getvalue() == line + "\n"


NUMBER = st.integers(0, 10**8).map(str)


@given(
    rows=st.lists(st.lists(st.one_of(NUMBER, st.just(MISSING)), min_size=6, max_size=6), min_size=1, max_size=5),
    width=st.one_of(st.none(), st.integers(24, 120)),
    messages=st.lists(st.sampled_from(["unsupported: it needs a GPU", "error: " + "no " * 40]), max_size=2),
)
def test_a_table_fits_and_no_number_is_cut(rows: list[list[str]], width: int | None, messages: list[str]) -> None:
    headings = ("peer", "p50 ms", "GB/s", "% of copy", "error", "L2")
    told = [*rows, *(["triton", message] for message in messages)]
    laid = laid_out(headings, told, words=("peer",), width=width)
    assert len(laid.rows) == len(told)
    for row, lines in zip(told, laid.rows, strict=True):
        words = " ".join(lines).split()
        for cell in row:
            assert cell == MISSING or not [word for word in cell.split() if word not in words]
    if width is not None:
        assert all(len(line) <= max(width, 34) for line in laid.lines)
    else:
        assert laid.head is not None
        assert all(len(lines) == 1 for lines in laid.rows)


def test_a_column_without_a_value_is_left_out() -> None:
    laid = laid_out(("peer", "ms", "bound"), [("a", "1", MISSING), ("b", "23", MISSING)], words=("peer",))
    assert laid.lines == ["  peer  ms", "  a      1", "  b     23"]
