"""Text shown to people: nothing unseen, nothing that a stream cannot take."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling.visible import visible

ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=40)


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
def test_what_is_shown(text, shown):
    assert visible(text) == shown


@given(ANY_TEXT)
def test_what_is_shown_has_nothing_unseen_and_can_be_encoded(text):
    shown = visible(text)
    # Unassigned and private characters, and wide spaces, are what isprintable() refuses beyond the unseen.
    assert all(c.isprintable() or unicodedata.category(c) in ("Cn", "Co", "Zs") for c in shown)
    shown.encode("utf-8")
    assert visible(shown) == shown
    seen = [c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert not [c for c in seen if c not in shown]
