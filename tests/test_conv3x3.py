"""conv3x3 without a GPU: its values by torch in float64, what "auto" takes and why, its configurations."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.kernels import (
    OPERATORS,
    Chip,
    _dispatch,
    _launch,
    conv3x3,
    conv3x3_backend,
    conv3x3_ref,
    conv3x3_separate,
    pack_phases,
    planned_for,
)
from ldmperf.kernels._conv3x3_config import (
    Conv3x3Config,
    Conv3x3Shape,
    candidate_configs,
    default_config,
    predicted_to_gain,
)
from ldmperf.kernels._conv3x3_torch import Conv3x3Call
from ldmperf.kernels._recipes import ByLayout
from ldmperf.kernels._statistics import channel_statistics, statistics_misfit
from ldmperf.kernels.conv3x3 import plan, tuning_key

ARCHS = ("sm_90", "sm_80", "gfx942", "sm_86")
# Bytes of shared memory that a program may have.
SHARED = {"sm_90": 232_448, "sm_80": 166_912, "gfx942": 65_536, "sm_86": 101_376}
H200 = Chip("NVIDIA H200", 132)
SHAPES = st.builds(
    Conv3x3Shape,
    batch=st.integers(1, 32),
    height=st.integers(1, 256),
    width=st.integers(1, 256),
    channels=st.integers(1, 4096),
    columns=st.integers(1, 4096),
    stride=st.sampled_from([1, 2]),
    upsample=st.booleans(),
    packed=st.booleans(),
    pointwise=st.sampled_from([(), (64,), (640, 320)]),
    residual=st.booleans(),
    statistics=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


def block(channels: int, side: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> dict[str, Any]:
    """Arguments of a residual block's second convolution, at batch 2."""
    x = meta(2, channels, side, side, dtype=dtype)
    return {"x": x, "weight": meta(channels, channels, 3, 3, dtype=dtype), "residual": x, **options}


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("kind", ["plain", "stride 2", "upsample", "packed"])
@pytest.mark.parametrize("way", [conv3x3_ref, conv3x3_separate, conv3x3])
def test_values_are_torchs_in_float64(way: Any, kind: str, statistics: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 6, 7).double(), torch.randn(8, 5, 3, 3).double(), torch.randn(8).double()
    stride, upsample = (2 if kind == "stride 2" else 1), kind in ("upsample", "packed")
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else x
    expected = F.conv2d(enlarged, weight, bias, stride, padding=1)
    shortcut, skip, residual = (torch.randn(2, n, *expected.shape[2:]).double() for n in (3, 4, 8))
    own = torch.randn(8, 7).double()
    expected = expected + F.conv2d(torch.cat([shortcut, skip], 1), own[:, :, None, None]) + residual
    options: dict[str, Any] = {"stride": stride, "upsample": upsample, "statistics": statistics}
    options |= {"shortcut": shortcut, "skip": skip, "shortcut_weight": own, "residual": residual}
    if way is not conv3x3_ref:
        options["backend"] = "torch"
    result = way(x, pack_phases(weight) if kind == "packed" else weight, bias, **options)
    y = result[0] if statistics else result
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if statistics:
        assert statistics_misfit(result[1], y) is None
        torch.testing.assert_close(result[1], channel_statistics(expected, 16))


@pytest.mark.parametrize("way", [conv3x3_ref, conv3x3_separate, conv3x3])
def test_of_no_channels_the_result_is_what_stands_beside(way: Any) -> None:
    """Torch's convolution has no channels then."""
    bias, residual = torch.randn(8), torch.randn(2, 8, 4, 5)
    x, weight = torch.empty(2, 0, 4, 5), torch.empty(8, 0, 3, 3)
    torch.testing.assert_close(way(x, weight, bias), bias[:, None, None].expand(2, 8, 4, 5))
    torch.testing.assert_close(way(x, weight, bias, residual=residual), bias[:, None, None] + residual)


def test_statistics_have_one_shape_whatever_computes_them() -> None:
    """Which depends on the image alone: not on the configuration, the chip, nor the images beside it."""
    for size, tile in (((16, 16), 16), ((16, 17), 64), ((5, 7), 16), ((64, 64), 64)):
        for upsample in (False, True):
            x, weight = meta(3, 32, *size), meta(32, 32, 3, 3)
            pixels = math.prod(size) * (4 if upsample else 1)
            expected = (3, -(-pixels // (64 if upsample and pixels > 256 else tile)), 2, 32)
            for config in (None, Conv3x3Config(64, 32, 32, 1, 4, 2), Conv3x3Config(128, 64, 16, 4, 4, 2)):
                call = Conv3x3Call(x, weight, upsample=upsample, statistics=True)
                assert plan(call, config=config)[0][1].shape == expected


def test_what_packs_no_convolution_is_refused() -> None:
    for wrong in (torch.ones(4, 3, 3), torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^pack_phases: weight must be a float \[N, C, 3, 3\]; got "):
            pack_phases(wrong)
    assert pack_phases(meta(6, 8, 3, 3)).shape == (4, 6, 8, 2, 2)
    with pytest.raises(ValueError, match=r"weight must be float32 \[N, 8, 3, 3\] or packed \[4, N, 8, 2, 2\]"):
        conv3x3(torch.ones(1, 8, 4, 4), torch.ones(3, 6, 8, 2, 2), upsample=True)
    with pytest.raises(ValueError, match=r"weight must be float32 \[N, 8, 3, 3\]; got"):
        conv3x3(torch.ones(1, 8, 4, 4), torch.ones(4, 6, 8, 2, 2))


# What "auto" takes


def test_auto_is_torchs_where_no_kernel_can_serve_and_no_log_tells(caplog: pytest.LogCaptureFixture) -> None:
    x, weight = torch.randn(1, 16, 4, 4), torch.randn(16, 16, 3, 3)
    with caplog.at_level(logging.WARNING, _dispatch.logger.name):
        y = conv3x3(x, weight)
    assert not caplog.records
    assert conv3x3_backend(Conv3x3Call(x, weight)) == "torch"
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1))


def test_auto_takes_the_kernels_where_a_clear_gain_is_predicted() -> None:
    with planned_for(H200):
        ByLayout.forget()
        for side, channels in ((64, 64), (16, 256), (8, 256), (8, 1280)):
            assert conv3x3_backend(Conv3x3Call(**block(channels, side), statistics=True)) == "triton"
        for side, channels in ((64, 320), (32, 640), (16, 1280)):
            assert conv3x3_backend(Conv3x3Call(**block(channels, side), statistics=True)) == "torch"
        # The first and the last convolution.
        assert conv3x3_backend(Conv3x3Call(meta(2, 4, 64, 64), meta(64, 4, 3, 3))) == "torch"
        assert conv3x3_backend(Conv3x3Call(meta(2, 64, 64, 64), meta(4, 64, 3, 3))) == "torch"
        # float32, and a convolution with nothing beside it.
        assert conv3x3_backend(Conv3x3Call(**block(64, 64, torch.float32), statistics=True)) == "torch"
        assert conv3x3_backend(Conv3x3Call(meta(2, 256, 32, 32), meta(256, 256, 3, 3))) == "torch"
    ByLayout.forget()


def test_what_was_measured_goes_before_what_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = block(64, 64), block(1280, 8)
    config = dataclasses.asdict(Conv3x3Config(64, 64, 64, 2, 4, 4))
    keys = [tuning_key(Conv3x3Call(**arguments)) for arguments in (slow, quick)]
    document = {"kernels": {"conv3x3": {keys[1]: config}}, "torch": {"conv3x3": [keys[0]]}}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(document))
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    with planned_for(H200):
        ByLayout.forget()
        assert conv3x3_backend(Conv3x3Call(**slow)) == "torch"
        assert conv3x3_backend(Conv3x3Call(**quick)) == "triton"
        launch, reduce = plan(Conv3x3Call(**quick))[1]
        assert (launch.arguments["SPLITS"], launch.arguments["BLOCK_M"]) == (2, 64)
        assert reduce.name == "conv3x3_reduce_kernel"
    ByLayout.forget()


def test_tuning_keys_tell_calls_apart() -> None:
    x, weight = meta(2, 32, 16, 16), meta(32, 32, 3, 3)
    large = meta(2, 32, 32, 32)
    packed = meta(32, 32, 2, 2).expand(4, -1, -1, -1, -1)
    calls = [
        Conv3x3Call(x, weight),
        Conv3x3Call(x, weight, residual=x),
        Conv3x3Call(x, weight, statistics=True),
        Conv3x3Call(x, weight, shortcut=x, shortcut_weight=meta(32, 32, 1, 1)[..., 0, 0]),
        Conv3x3Call(x, weight, shortcut=x, skip=x, shortcut_weight=meta(32, 64, 1, 1)[..., 0, 0]),
        Conv3x3Call(large, weight, stride=2),
        Conv3x3Call(x, weight, upsample=True),
        Conv3x3Call(x, packed, upsample=True),
        Conv3x3Call(large, weight),
    ]
    assert len({tuning_key(call) for call in calls}) == len(calls)


# Configurations


def held_bytes(shape: Conv3x3Shape, config: Conv3x3Config) -> int:
    """What a program has in shared memory at most."""
    return config.num_stages * (config.block_m + config.block_n) * config.block_k * shape.itemsize


@given(shape=SHAPES, arch=st.sampled_from(ARCHS))
def test_tiles_fit_the_chip(shape: Conv3x3Shape, arch: str) -> None:
    shape = dataclasses.replace(shape, packed=shape.packed and shape.upsample)
    chip = Chip("any", 132, arch)
    found = candidate_configs(shape, chip)
    assert len(set(found)) == len(found) > 0
    for config in (default_config(shape, chip), *found):
        assert held_bytes(shape, config) <= SHARED[arch]
        # Whole tiles of statistics in a tile of rows; no more splits than passes.
        assert config.block_m % 64 == 0
        assert 1 <= config.splits <= shape.passes(config.block_k)
        sizes = (config.block_m, config.block_n, config.block_k, config.num_warps)
        assert all(size & (size - 1) == 0 for size in sizes)


@given(shape=SHAPES, arch=st.sampled_from(ARCHS))
def test_no_gain_is_predicted_that_no_measurement_stands_behind(shape: Conv3x3Shape, arch: str) -> None:
    if shape.itemsize == 4 or arch != "sm_90" or min(shape.channels, shape.columns) < 16:
        assert not predicted_to_gain(shape, Chip("any", 132, arch))


def test_few_tiles_are_split_and_many_are_not() -> None:
    def splits(batch: int, side: int, channels: int) -> int:
        call = Conv3x3Call(meta(batch, channels, side, side), meta(channels, channels, 3, 3))
        return default_config(call.shape, H200).splits

    assert splits(2, 8, 1280) > 1
    assert splits(2, 8, 256) > 1
    assert splits(2, 64, 64) == splits(16, 64, 320) == 1


def test_the_first_launch_takes_all_passes_and_the_second_all_that_is_beside() -> None:
    arguments = block(256, 8, statistics=True, bias=meta(256, 1, 1, 1)[:, 0, 0, 0])
    (y, statistics), (first, second) = OPERATORS["conv3x3"].plan(
        Conv3x3Call(**arguments), config=Conv3x3Config(64, 64, 64, 4, 4, 4)
    )
    assert first.arguments["passes"] == 9 * 4
    assert all(first.arguments[name] is None for name in ("bias_ptr", "residual_ptr", "statistics_ptr"))
    assert second.arguments["out_ptr"] is y
    assert second.arguments["statistics_ptr"] is statistics
    assert second.arguments["residual_ptr"] is arguments["residual"]
    assert first.arguments["out_ptr"] is second.arguments["partial_ptr"]
    assert second.arguments["partial_ptr"].shape == (4, y.numel())
