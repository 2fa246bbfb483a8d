"""bench/conv_padding.py without a GPU."""

from __future__ import annotations

import sys

import conv_padding
import pytest
import torch


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["conv_padding.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert conv_padding.main() == 2
    assert capsys.readouterr().err == "cuda is not here: this measures a GPU\n"


def test_a_size_that_is_none_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["conv_padding.py", "--sizes", "39M,7M"])
    assert conv_padding.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("conv_padding.py: --sizes: no sizes '7M'; choose from 39M, ")
    assert error.count("\n") == 1
