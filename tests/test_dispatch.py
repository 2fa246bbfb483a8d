"""The choice of a backend: named, explained, and logged once."""

import logging

import pytest
import torch

from ldmperf.kernels import (
    KernelUnsupported,
    attention,
    geglu,
    transformer_front_backend,
    transformer_tail_backend,
)
from ldmperf.kernels._dispatch import _logged, choose_backend


def test_a_named_backend_is_taken_or_refused_with_every_reason():
    assert choose_backend("op", "torch", ["anything"]) == "torch"
    assert choose_backend("op", "triton", []) == "triton"
    with pytest.raises(KernelUnsupported) as caught:
        choose_backend("op", "triton", ["head_dim 7 is not a multiple of 4", "tensors are on the CPU"])
    assert caught.value.operator == "op"
    assert caught.value.reasons == ("head_dim 7 is not a multiple of 4", "tensors are on the CPU")
    assert "head_dim 7 is not a multiple of 4; tensors are on the CPU" in str(caught.value)
    with pytest.raises(ValueError, match="choose one of auto, torch, triton"):
        choose_backend("op", "cuda", [])


def test_auto_takes_the_kernel_where_it_can_and_logs_a_fallback_once(caplog):
    _logged.clear()
    with caplog.at_level(logging.WARNING):
        assert choose_backend("op", "auto", []) == "triton"
        assert caplog.records == []
        for _ in range(3):
            assert choose_backend("op", "auto", ["tensors are on the CPU"]) == "torch"
        assert choose_backend("op", "auto", ["another reason"]) == "torch"
        for stride in (64, 255):
            assert choose_backend("op", "auto", [f"stride {stride}, not 1"]) == "torch"
    assert [record.message for record in caplog.records] == [
        "op: falling back to the torch reference: tensors are on the CPU",
        "op: falling back to the torch reference: another reason",
        "op: falling back to the torch reference: stride 64, not 1",
    ]


def test_auto_takes_the_faster_of_two_that_can_serve_and_logs_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_backend("op", "auto", [], lambda: "torch") == "torch"
        assert choose_backend("op", "auto", [], lambda: "triton") == "triton"
    assert caplog.records == []

    def not_asked():
        raise AssertionError("the table was asked")

    assert choose_backend("op", "triton", [], not_asked) == "triton"
    assert choose_backend("op", "torch", [], not_asked) == "torch"
    assert choose_backend("op", "auto", ["tensors are on the CPU"], not_asked) == "torch"


@pytest.mark.parametrize("backend_of", [transformer_front_backend, transformer_tail_backend])
def test_autocast_takes_the_parts_and_hides_no_unknown_backend(backend_of):
    """Whatever the call."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [backend_of(None, backend) for backend in ("auto", "triton", "torch")] == ["torch"] * 3
        with pytest.raises(ValueError, match="choose one of auto, torch, triton"):
            backend_of(None, "cuda")


def test_operators_go_through_the_dispatch(caplog):
    _logged.clear()
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(KernelUnsupported, match="attention"):
        attention(x, x, x, backend="triton")
    with pytest.raises(KernelUnsupported, match="geglu"):
        geglu(x, backend="triton")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(geglu(x), geglu(x, backend="torch"))
        geglu(x)
    assert len(caplog.records) == 1
