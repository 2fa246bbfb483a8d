"""linear without a GPU: its values by the formulas, its errors, what "auto" takes and why, its configurations."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.kernels import KernelUnsupported, _dispatch, _launch, linear, linear_ref, linear_separate
from ldmperf.kernels._launch import NO_GPU, Chip
from ldmperf.kernels._linear_config import (
    LinearConfig,
    LinearShape,
    candidate_configs,
    default_config,
    keeps_rows,
    predicted_to_gain,
)
from ldmperf.kernels._parts import padded
from ldmperf.kernels._recipes import ByLayout
from ldmperf.kernels.linear import LinearCall, plan, tuning_key
from ldmperf.profiling.step.recording import Recorder

ARCHS = ("sm_90", "sm_80", "gfx942", "sm_86")
# Bytes of shared memory that a program may have.
SHARED = {"sm_90": 232_448, "sm_80": 166_912, "gfx942": 65_536, "sm_86": 101_376}
SHAPES = st.builds(
    LinearShape,
    rows=st.integers(1, 40_000),
    channels=st.integers(1, 4096),
    columns=st.integers(1, 16_384),
    gated=st.booleans(),
    normed=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call(rows: int, channels: int, features: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """Arguments of a normed call on the meta device; `features` are the weight's rows."""
    x, weight, vector = meta(rows, channels, dtype=dtype), meta(features, channels, dtype=dtype), meta(channels)
    return {"x": x, "weight": weight, "norm_weight": vector, "norm_bias": vector, **options}


@pytest.mark.parametrize("activation", [None, "geglu"])
@pytest.mark.parametrize("way", [linear_ref, linear_separate, linear])
def test_values_are_those_of_the_formulas(way: Any, activation: str | None) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 24).double(), torch.randn(16, 24).double(), torch.randn(16).double()
    g, b, x_bias = torch.randn(3, 24).double()
    backend = {} if way is linear_ref else {"backend": "torch"}
    out = way(
        x, weight, bias, norm_weight=g, norm_bias=b, eps=1e-3, x_bias=x_bias, activation=activation, **backend
    )
    s = x + x_bias
    centred = s - s.mean(-1, keepdim=True)
    expected = (centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * g + b) @ weight.t() + bias
    if activation:
        value, gate = expected.chunk(2, dim=-1)
        expected = value * gate * torch.special.erfc(-gate / math.sqrt(2)) / 2
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


X, W = torch.randn(3, 8), torch.randn(4, 8)
ONES = torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x": X.int()}, "x must be a float"),
        ({"weight": torch.randn(4, 7)}, r"weight must be float32 \[N, 8\]"),
        ({"weight": W.half()}, "weight must be float32"),
        ({"weight": torch.randn(2, 4, 8)}, "weight must be"),
        ({"activation": "relu"}, 'activation must be "geglu" or None'),
        ({"weight": torch.randn(3, 8), "activation": "geglu"}, "rows must be even; got 3"),
        ({"norm_weight": ONES}, "come together"),
        ({"norm_bias": ONES}, "come together"),
        ({"x_bias": ONES}, "only with them"),
        ({"bias": torch.ones(5)}, r"bias must be a float \[4\]"),
        ({"norm_weight": torch.ones(7), "norm_bias": ONES}, r"norm_weight must be a float \[8\]"),
        ({"norm_weight": ONES, "norm_bias": ONES.int()}, "norm_bias must be a float"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        linear(**{"x": X, "weight": W, **arguments})
    assert "\n" not in str(raised.value)


def test_on_a_cpu_the_kernels_are_refused_and_auto_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KernelUnsupported, match="need a GPU"):
        linear(X, W, backend="triton")
    _dispatch._logged.clear()
    ByLayout.forget()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(linear(X, W), linear_ref(X, W))
    assert [record.message for record in caplog.records if record.message.startswith("linear: falling back")] != []
    assert len([record for record in caplog.records if record.message.startswith("linear")]) == 1


def operators(arguments: dict[str, Any], **options: Any) -> list[str]:
    """The operators that a call comes to."""
    recorder = Recorder()
    with recorder:
        linear(**arguments, **options)
    return [call.name.partition("::")[2] for call in recorder.calls if not call.is_view]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of what was measured on the chip that stands for none."""
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    ByLayout.forget()
    yield tmp_path / f"{NO_GPU.file_name}.json"
    ByLayout.forget()


def test_auto_takes_what_is_predicted_until_it_was_measured(table: Path) -> None:
    narrow, wide = call(8192, 64, 512, activation="geglu"), call(8192, 768, 2304)
    assert operators(narrow) == ["linear"]
    assert operators(wide) == ["layer_norm", "mm"]
    assert operators(call(8192, 64, 512, torch.float32)) == ["layer_norm", "mm"]
    keys = [tuning_key(LinearCall(**arguments)) for arguments in (narrow, wide)]
    fields = {"block_m": 64, "block_n": 64, "block_k": 32, "tiles_n": 1, "num_warps": 8, "num_stages": 2}
    table.write_text(json.dumps({"kernels": {"linear": {keys[1]: fields}}, "torch": {"linear": keys[:1]}}))
    ByLayout.forget()
    assert operators(narrow) == ["layer_norm", "mm", "geglu"]
    assert operators(wide) == ["linear"]
    (_, product) = plan(LinearCall(**wide))[1]
    assert (product.arguments["BLOCK_K"], product.num_warps) == (32, 8)


def test_a_norm_is_in_the_product_where_rows_can_be_kept_and_else_before_it() -> None:
    (both,) = plan(LinearCall(**call(2048, 128, 384)))[1]
    assert both.name == "norm_linear_kernel"
    # Rows so wide that the program would only wait for them: an H200 takes 8.5 us so, and 6.4 us in two launches.
    apart = plan(LinearCall(**call(512, 512, 512)))[1]
    assert [launch.name for launch in apart] == ["layer_norm_kernel", "linear_kernel"]
    x_bias = meta(640)
    norm, product = plan(LinearCall(**call(512, 640, 1920, x_bias=x_bias)))[1]
    assert [norm.name, product.name] == ["layer_norm_kernel", "linear_kernel"]
    assert norm.arguments["x_bias_ptr"] is x_bias
    assert product.arguments["x_ptr"] is norm.arguments["out_ptr"]
    (alone,) = plan(LinearCall(meta(512, 640), meta(1920, 640)))[1]
    assert alone.name == "linear_kernel"


@given(shape=SHAPES, arch=st.sampled_from(ARCHS))
def test_default_tiles_fit_the_chip_and_cover_the_result(shape: LinearShape, arch: str) -> None:
    config = default_config(shape, Chip("any", 132, arch))
    assert all(size & (size - 1) == 0 for size in (config.block_m, config.block_n, config.num_warps))
    if config.block_k == 0:
        assert shape.normed
        assert keeps_rows(shape.channels, shape.itemsize, arch)
        tiles = -(-shape.columns // config.block_n)
        assert tiles % config.tiles_n == 0
    assert held_bytes(shape, config) <= SHARED[arch]


def held_bytes(shape: LinearShape, config: LinearConfig) -> int:
    """What a program has in shared memory at least: its rows, and tiles of the weight in every stage."""
    accumulators = 2 if shape.gated else 1
    if config.block_k == 0:
        width = padded(shape.channels)
        return (config.block_m + accumulators * config.block_n) * width * shape.itemsize
    stage = (config.block_m + accumulators * config.block_n) * config.block_k * shape.itemsize
    return (config.num_stages - 1) * stage


@given(shape=SHAPES, arch=st.sampled_from(ARCHS))
def test_candidates_are_distinct_and_fit(shape: LinearShape, arch: str) -> None:
    found = candidate_configs(shape, Chip("any", 132, arch), SHARED[arch])
    assert len(set(found)) == len(found) > 0
    for config in found:
        assert held_bytes(shape, config) <= SHARED[arch]
        assert config.block_k or (shape.normed and keeps_rows(shape.channels, shape.itemsize, arch))


@given(shape=SHAPES)
def test_nothing_is_predicted_to_gain_that_spares_nothing(shape: LinearShape) -> None:
    if not (shape.gated or shape.normed) or shape.itemsize == 4:
        assert not predicted_to_gain(shape, NO_GPU)


def test_the_smaller_the_network_the_more_is_predicted_to_gain() -> None:
    """What decides is the share of launches and bytes in the product's own time."""

    def gains(channels: int, rows: int, gated: bool) -> bool:
        return predicted_to_gain(LinearShape(rows, channels, 4 * channels, gated, True, 2), NO_GPU)

    levels = [(1, 8192), (2, 2048), (4, 512)]
    merged = {
        width: sum(gains(width * factor, rows, gated) for factor, rows in levels for gated in (True, False))
        for width in (64, 128, 320, 768)
    }
    assert merged[64] > merged[128] > merged[320] > merged[768]
