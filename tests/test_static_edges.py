"""Sizes of one: Triton makes an integer argument of 1 a constant, and so another code to compile."""

import pytest

pytest.importorskip("triton")

import torch

from ldmperf.kernels import OPERATORS
from ldmperf.kernels._conv3x3_config import Conv3x3Config
from ldmperf.kernels._linear_config import LinearConfig
from ldmperf.kernels.group_norm import GroupNormConfig
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import compile_launch
from ldmperf.profiling.static.shapes import SHAPES, Shape


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "edges-cache"))


ONE = {"height": 1, "width": 1}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def channels_last(*shape):
    return meta(*shape).to(memory_format=torch.channels_last)


def update(registers, *image, guided=True):
    """Arguments of a sampler_update of [B, ...] images."""
    batch = image[0]
    evaluations = 2 * batch if guided else batch
    return {
        "registers": meta(registers, *image),
        "model_output": meta(evaluations, *image[1:]),
        "table": meta(4, registers, registers + 2),
        "step": meta(1, dtype=torch.int64),
        "guidance_scale": meta(4) if guided else None,
        "seeds": meta(batch, dtype=torch.int64),
        "model_input": meta(evaluations, *image[1:]),
        "input_scale": meta(4),
    }


def norm(x, groups, **options):
    return {"x": x, "num_groups": groups, **options}


def attention(queries, keys, heads=1, dim=4, **options):
    q, k = meta(1, queries, heads, dim), meta(1, keys, heads, dim)
    return {"q": q, "k": k, "v": k, **options}


def product(rows, channels, columns, norm=False, bias=False, **options):
    norms = {name: meta(channels) for name in ("norm_weight", "norm_bias", "x_bias")} if norm else {}
    given = {"bias": meta(columns)} if bias else {}
    return {"x": meta(rows, channels), "weight": meta(columns, channels), **given, **norms, **options}


def convolution(height, width, channels=16, columns=16, **options):
    weight = channels_last(columns, channels, 3, 3)
    return {"x": channels_last(1, channels, height, width), "weight": weight, **options}


# By operator: the case, its arguments, and a configuration where the default comes to other code.
CASES = {
    "group_norm_silu": {
        "one pixel": (norm(meta(2, 8, 1, 1), 2), None),
        "one of everything": (norm(meta(1, 1, 1, 1), 1), None),
        "one pixel, channels-last, shifted": (norm(channels_last(2, 64, 1, 1), 32, x_bias=meta(2, 64)), None),
        "one column": (norm(channels_last(2, 64, 9, 1), 32), None),
        "one channel and a skip": (norm(meta(2, 1, 4, 4), 1, skip=meta(2, 1, 4, 4)), None),
        "tiles of one pixel": (norm(channels_last(1, 64, 5, 1), 32), GroupNormConfig(8, 1, 0, 4)),
        "chunks of one pixel": (norm(channels_last(1, 64, 5, 1), 32), GroupNormConfig(8, 1, 5, 4)),
        "one chunk": (norm(channels_last(1, 64, 8, 8), 32), GroupNormConfig(8, 64, 1, 4)),
        "one pixel in one chunk": (norm(channels_last(1, 64, 1, 1), 32), GroupNormConfig(8, 8, 1, 4)),
        "every other column": (norm(meta(2, 8, 5, 12)[..., ::2], 2), None),
        "transposed, split": (norm(meta(2, 8, 16, 16).transpose(2, 3), 2), GroupNormConfig(1, 16, 4, 4)),
        "expanded": (norm(meta(1, 8, 5, 6).expand(3, 8, 5, 6), 2, x_bias=meta(1, 8).expand(3, 8)), None),
    },
    "layer_norm": {
        "one row": ({"x": meta(1, 64), "weight": meta(64), "bias": meta(64)}, None),
        "one column": ({"x": meta(5, 1), "weight": meta(1), "bias": meta(1)}, None),
        "no rows' dimension": ({"x": meta(64), "weight": meta(64), "bias": meta(64)}, None),
        "one of everything": (
            {"x": meta(1, 1), "weight": meta(1), "bias": meta(1), "residual": meta(1, 1), "x_bias": meta(1)},
            None,
        ),
    },
    "linear": {
        "one of everything": (product(1, 1, 1), None),
        "one row": (product(1, 64, 128, norm=True, activation="geglu"), None),
        "one channel": (product(5, 1, 64, norm=True), None),
        "one column": (product(5, 64, 1, bias=True), LinearConfig(64, 32, 32, 1, 4, 2)),
        "one gated column": (
            product(300, 64, 2, bias=True, activation="geglu"),
            LinearConfig(64, 32, 32, 1, 4, 2),
        ),
        "tiles past the columns": (product(5, 64, 96, norm=True), LinearConfig(32, 32, 0, 2, 4, 2)),
        "channels past the tile": (product(64, 40, 64), LinearConfig(64, 32, 32, 1, 4, 2)),
    },
    "transformer_front": {
        "one of everything": (SHAPES["transformer_front"][0](Shape(batch=1, channels=1, **ONE, groups=1)), None),
        "one row of two parts": (
            SHAPES["transformer_front"][0](Shape(batch=1, channels=40, **ONE, groups=5)),
            None,
        ),
        "one column": (
            SHAPES["transformer_front"][0](Shape(batch=1, channels=64, height=5, width=13, features=1)),
            None,
        ),
    },
    "transformer_tail": {
        "one of everything": (
            SHAPES["transformer_tail"][0](
                Shape(batch=1, channels=1, **ONE, heads=1, context=1, features=1, dtype=torch.float32)
            ),
            None,
        ),
        "one row, one key": (SHAPES["transformer_tail"][0](Shape(batch=1, channels=96, **ONE, context=1)), None),
        "one channel of the feed-forward": (
            SHAPES["transformer_tail"][0](Shape(batch=3, channels=40, height=5, width=13, context=81, features=1)),
            None,
        ),
    },
    "conv3x3": {
        "one pixel": (convolution(1, 1), None),
        "one column, statistics": (convolution(5, 1, statistics=True), None),
        "one row, a shortcut": (
            convolution(1, 5, shortcut=channels_last(1, 16, 1, 5), shortcut_weight=meta(16, 16)),
            Conv3x3Config(64, 32, 16, 1, 4, 2),
        ),
        "one pixel, split": (convolution(1, 1, statistics=True), Conv3x3Config(64, 32, 16, 3, 4, 2)),
        "one pixel, enlarged": (convolution(1, 1, upsample=True), None),
        "one channel": (convolution(3, 3, channels=1, columns=1), Conv3x3Config(64, 32, 16, 1, 4, 2)),
        "channels past the tile": (convolution(9, 9, channels=40, columns=24), Conv3x3Config(64, 32, 32, 1, 4, 2)),
    },
    "geglu": {
        "one of everything": ({"x": meta(1, 2)}, None),
        "one column": ({"x": meta(5, 2), "bias": meta(2)}, None),
        "rows of two strides": ({"x": meta(2, 7, 64)[:, :5]}, None),
    },
    "residual_add": {
        "one of everything": ({"x": meta(1, 1, 1, 1), "residual": meta(1, 1, 1, 1), "bias": meta(1)}, None),
        "enlarged from one column": (
            {"x": meta(2, 3, 4, 1), "residual": meta(2, 3, 4, 1), "size": (7, 1)},
            None,
        ),
    },
    "sampler_update": {
        "one of everything": (update(1, 1, 1, 1, 1), None),
        "one column": (update(2, 1, 4, 5, 1), None),
        "one row, one image": (update(3, 1, 3, 1, 7, guided=False), None),
        "images of one dimension": (update(2, 1, 11), None),
    },
    "attention": {
        "one of everything": (attention(1, 1), None),
        "one query": (attention(1, 300, heads=8, dim=40), None),
        "one key": (attention(300, 1, heads=8, dim=40), None),
        "one query, lengths": (attention(1, 300, key_lengths=meta(1, dtype=torch.int64)), None),
        "one key, a mask": (attention(300, 1, key_mask=meta(1, 1, dtype=torch.bool)), None),
        "one key, a mask of every tile": (attention(300, 129, key_mask=meta(1, 129, dtype=torch.bool)), None),
    },
}


@pytest.mark.parametrize(("operator", "case"), [(o, c) for o in OPERATORS for c in CASES[o]])
def test_sizes_of_one_compile(operator, case):
    arguments, config = CASES[operator][case]
    _, launches = OPERATORS[operator].plan(OPERATORS[operator].bind(**arguments), config=config)
    assert launches
    for launch in launches:
        compile_launch(launch, MACHINES["sm_90"])
