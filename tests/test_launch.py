"""Layouts and launch configurations: pure functions, proven without a kernel running."""

import inspect
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import OPERATORS, _launch
from ldmperf.kernels._group_norm_config import GroupNormConfig, default_config
from ldmperf.kernels._launch import NO_GPU, Chip, constant_to_a_compiler, fastest, next_power_of_two, tuned
from ldmperf.kernels._layout import collapse_rows, column_block, image_strides
from ldmperf.kernels.geglu import GegluConfig
from ldmperf.kernels.group_norm import GroupNormSiluCall, plan
from ldmperf.profiling.static.shapes import SHAPES, Shape

fuzz = settings(max_examples=200, deadline=None)


@fuzz
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    keep=st.lists(st.booleans(), min_size=4, max_size=4),
    expand=st.booleans(),
)
def test_collapsed_rows_number_the_rows_in_order(shape, order, keep, expand):
    """Any permuted, sliced or expanded tensor: either its rows are where the strides say, or it is refused."""
    dims = list(range(len(shape)))
    order.shuffle(dims)
    storage = torch.arange(20_000).as_strided([2 * n for n in shape] + [3], _dense([2 * n for n in shape] + [3]))
    view = storage[
        tuple(slice(0, n) if kept else slice(None, None, 2) for n, kept in zip(shape, keep, strict=False))
    ]
    view = view.permute(*dims, len(shape))
    if expand:
        view = view[:1].expand(3, *view.shape[1:])
    rows = collapse_rows([view])
    if rows is None:
        return
    assert rows.count == view[..., 0].numel()
    ((outer, inner),) = rows.strides
    start = int(view.flatten()[0]) if view.numel() else 0
    for r, row in enumerate(view.reshape(-1, 3)):
        offset = (r // rows.inner) * outer + (r % rows.inner) * inner
        assert int(row[0]) == start + offset
        if rows.flat:
            assert offset == r * inner


def _dense(shape):
    strides, step = [], 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= n
    return strides


def test_rows_of_two_tensors_need_a_common_numbering():
    flat, sliced = torch.empty(2, 5, 8), torch.empty(2, 7, 8)[:, :5]
    assert collapse_rows([flat]).flat
    both = collapse_rows([flat, sliced])
    assert (both.inner, both.strides) == (5, ((40, 8), (56, 8)))
    assert collapse_rows([torch.empty(2, 3, 4, 8).permute(1, 0, 2, 3)[:, :, ::2]]) is None


@pytest.mark.parametrize(
    ("view", "flat"),
    [
        (lambda: torch.empty(2, 8, 5, 6), True),
        (lambda: torch.empty(2, 8, 5, 6).contiguous(memory_format=torch.channels_last), True),
        (lambda: torch.empty(2, 8, 5, 6)[:, 2:4], True),
        (lambda: torch.empty(2, 8, 5, 6)[:, :, 1:3], True),
        (lambda: torch.empty(2, 8, 5, 6)[..., :3], False),
        (lambda: torch.empty(2, 8, 5, 6)[..., :1], True),
        (lambda: torch.empty(2, 8, 5, 6)[:, :, :1, ::2], True),
        (lambda: torch.empty(2, 8, 5, 6).transpose(2, 3), False),
        (lambda: torch.empty(2, 8, 1, 1).expand(2, 8, 5, 6), True),
    ],
)
def test_flat_images_have_one_pixel_stride(view, flat):
    x = view()
    strides = image_strides(x)
    assert strides.flat is flat
    for h in range(x.shape[2]):
        for w in range(x.shape[3]):
            true = h * x.stride(2) + w * x.stride(3)
            pixel = h * x.shape[3] + w
            assert true == (pixel * strides.w if flat else h * strides.h + w * strides.w)


@fuzz
@given(columns=st.integers(1, 5000), most=st.sampled_from([64, 512, 1024]))
def test_a_column_block_wastes_the_fewest_lanes(columns, most):
    block = column_block(columns, most)
    assert block & (block - 1) == 0
    assert block <= most
    waste = lambda size: -(-columns // size) * size - columns  # noqa: E731
    allowed = [1 << i for i in range(most.bit_length()) if (1 << i) >= min(64, next_power_of_two(columns))]
    assert waste(block) == min(waste(size) for size in allowed)


def test_the_tuned_table_is_read_by_chip_kernel_and_key(tmp_path, monkeypatch):
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    chip = Chip("NVIDIA H200", 132)
    assert chip.file_name == "nvidia-h200"
    config = {"block_m": 2, "block_n": 256, "num_warps": 2}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"kernels": {"geglu": {"some key": config}}}))
    assert tuned("geglu", "some key", chip, GegluConfig) == GegluConfig(**config)
    assert tuned("geglu", "another", chip, GegluConfig) is None
    assert tuned("layer_norm", "some key", chip, GegluConfig) is None
    assert tuned("geglu", "some key", Chip("NVIDIA A100", 108), GegluConfig) is None


def test_the_fastest_is_who_was_measured_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    chip = Chip("NVIDIA H200", 132)
    config = {"block_m": 2, "block_n": 256, "num_warps": 2}
    document = {
        "kernels": {"geglu": {"ours": config, "theirs": config}, "layer_norm": {"ours": config, "default": None}},
        "torch": {"geglu": ["theirs", "theirs alone"]},
    }
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(document))

    def who(kernel, key, unmeasured="triton", chip=chip):
        return fastest(kernel, chip, lambda: key, unmeasured=unmeasured)

    for unmeasured in ("torch", "triton"):
        assert who("geglu", "ours", unmeasured) == "triton"
        assert who("geglu", "theirs", unmeasured) == "torch"
        assert who("geglu", "theirs alone", unmeasured) == "torch"
        assert who("geglu", "new", unmeasured) == unmeasured
        assert who("layer_norm", "new", unmeasured) == unmeasured
        assert who("geglu", "ours", unmeasured, Chip("NVIDIA A100", 108)) == unmeasured
    assert who("layer_norm", "ours", "torch") == who("layer_norm", "default", "torch") == "triton"
    assert tuned("layer_norm", "default", chip, GegluConfig) is None
    # Where torch is faster, our kernel by name still takes its own best configuration.
    assert tuned("geglu", "theirs", chip, GegluConfig) == GegluConfig(**config)
    assert tuned("geglu", "theirs alone", chip, GegluConfig) is None


@pytest.mark.parametrize(("measured", "called"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_a_16_bit_call_that_nobody_measured_takes_what_was_found_in_the_other(
    tmp_path, monkeypatch, measured, called
):
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    chip = Chip("NVIDIA H200", 132)
    config, own = ({"block_m": m, "block_n": 256, "num_warps": 2} for m in (2, 4))
    document = {
        "kernels": {
            "geglu": {
                f"a {measured} b": config,
                f"both {measured}": config,
                f"both {called}": own,
                f"default {measured}": config,
                f"default {called}": None,
                "wide float32": config,
            }
        },
        "torch": {"geglu": [f"theirs {measured}", f"both {measured}"]},
    }
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(document))

    def found(key):
        return tuned("geglu", key, chip, GegluConfig), fastest("geglu", chip, lambda: key, unmeasured="torch")

    assert found(f"a {called} b") == (GegluConfig(**config), "triton")
    assert found(f"theirs {called}") == (None, "torch")
    # What was measured of the call itself comes first.
    assert found(f"both {called}") == (GegluConfig(**own), "triton")
    assert found(f"both {measured}") == (GegluConfig(**config), "torch")
    assert found(f"default {called}") == (None, "triton")
    # No other dtype is served by these, nor these by another.
    for key in ("a float32 b", "wide float16", "wide bfloat16", f"a {called}"):
        assert found(key) == (None, "torch")


def test_no_key_is_made_where_the_table_cannot_tell(tmp_path, monkeypatch):
    def no_key():
        raise AssertionError("a key was made")

    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    chip = Chip("NVIDIA H200", 132)
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"kernels": {"geglu": {"ours": {}}}}))
    assert fastest("geglu", chip, no_key) == "triton"
    assert fastest("attention", chip, no_key, unmeasured="torch") == "torch"
    assert fastest("attention", NO_GPU, no_key, unmeasured="torch") == "torch"


def meta(*shape, dtype=torch.bfloat16, channels_last=False):
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(*shape, dtype=dtype, device="meta", memory_format=format_)


def norm_call(batch, channels, size, skip=0, channels_last=True, dtype=torch.bfloat16):
    x = meta(batch, channels, size, size, channels_last=channels_last, dtype=dtype)
    other = meta(batch, skip, size, size, channels_last=channels_last, dtype=dtype) if skip else None
    return {"x": x, "num_groups": 32, "skip": other, "x_bias": meta(batch, channels + skip)}


# Every width of the family's norms, of their concatenations, and an autoencoder's.
BASES = [64, 96, 128, 160, 192, 224, 256, 288, 320, 512, 768]
NORMS = [
    norm_call(batch, base * a, 64 // a, skip=base * b)
    for base in BASES
    for a, b in ((1, 0), (1, 1), (2, 0), (2, 1), (4, 2), (4, 4))
    for batch in (2, 16)
] + [
    norm_call(1, 128, 512),
    norm_call(1, 256, 512),
    norm_call(1, 512, 64),
    norm_call(2, 320, 64, channels_last=False),
]


@pytest.mark.parametrize("call", NORMS, ids=lambda call: "-".join(map(str, call["x"].shape)))
def test_group_norm_configurations_are_sound(call):
    """Programs cover all groups, tiles and statistics stay small, and rows of channels-last memory are whole."""
    _, launches = plan(GroupNormSiluCall(**call))
    x, skip = call["x"], call["skip"]
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    assert len(launches) in (1, 2)
    for launch in launches:
        a = launch.arguments
        tile = a["BLOCK_C"] * a["BLOCK_HW"]
        assert a["bundles"] * a["GROUPS"] * a["GROUP_CHANNELS"] >= channels
        assert 256 <= tile <= 16384
        assert tile // (32 * launch.num_warps) <= 64
        if x.stride(1) == 1:
            assert a["GROUPS"] * a["GROUP_CHANNELS"] * x.element_size() % 16 == 0
            assert channels / (a["bundles"] * a["BLOCK_C"]) > 0.45
        if "chunks" in a:
            assert (a["chunks"] - 1) * a["chunk_pixels"] < a["pixels"] <= a["chunks"] * a["chunk_pixels"]
            assert a["chunk_pixels"] % a["BLOCK_HW"] == 0


def test_a_configuration_that_is_searched_for_is_searched_for_once():
    x = norm_call(2, 320, 64)["x"]
    first, second = (default_config(GroupNormSiluCall(x, 32).shape, Chip("NVIDIA H200", 132)) for _ in range(2))
    assert first is second


def test_small_norms_take_one_launch_and_large_ones_fill_the_chip():
    assert len(plan(GroupNormSiluCall(**norm_call(2, 1280, 8)))[1]) == 1
    assert len(plan(GroupNormSiluCall(**norm_call(2, 1280, 16)))[1]) == 1
    for call in (norm_call(2, 320, 64), norm_call(1, 128, 512)):
        statistics, apply = plan(GroupNormSiluCall(**call))[1]
        assert min(statistics.programs, apply.programs) >= NO_GPU.multiprocessors


def test_a_named_configuration_is_the_one_that_runs():
    config = GroupNormConfig(groups=4, block_hw=32, chunks=5, num_warps=8)
    _, launches = plan(GroupNormSiluCall(**norm_call(2, 320, 64)), config=config)
    assert [launch.num_warps for launch in launches] == [8, 8]
    assert all(launch.arguments["GROUPS"] == 4 and launch.arguments["BLOCK_HW"] == 32 for launch in launches)


@pytest.mark.parametrize("name", OPERATORS)
def test_candidates_are_distinct_and_include_no_absurd_ones(name):
    calls = {
        "attention": dict.fromkeys("qkv", meta(2, 4096, 8, 40)),
        "group_norm_silu": norm_call(2, 320, 64),
        "layer_norm": {"x": meta(2, 1024, 640), "weight": meta(640), "bias": meta(640)},
        "geglu": {"x": meta(2, 1024, 2560)},
        "linear": {
            "x": meta(2, 4096, 320),
            "weight": meta(2560, 320),
            "norm_weight": meta(320),
            "norm_bias": meta(320),
            "activation": "geglu",
        },
        "conv3x3": {
            "x": meta(2, 320, 32, 32, channels_last=True),
            "weight": meta(640, 320, 3, 3, channels_last=True),
            "residual": meta(2, 640, 32, 32, channels_last=True),
        },
        "transformer_front": SHAPES["transformer_front"][0](Shape(channels=64)),
        "transformer_tail": SHAPES["transformer_tail"][0](Shape(channels=64, context=77)),
        "residual_add": {"x": meta(2, 320, 64, 64, channels_last=True), "residual": meta(2, 320, 64, 64)},
        "sampler_update": {
            "registers": meta(2, 1, 4, 64, 64, dtype=torch.float32),
            "model_output": meta(1, 4, 64, 64),
            "table": meta(9, 2, 4, dtype=torch.float32),
            "step": meta(1, dtype=torch.int64),
        },
    }
    operator = OPERATORS[name]
    call = operator.bind(**calls[name])
    found = operator.candidates(call)
    assert len(set(found)) == len(found) >= 4
    for config in found:
        _, launches = operator.plan(call, config=config)
        assert all(0 < launch.programs < 2**31 for launch in launches)
    assert "\n" not in operator.tuning_key(call)


def test_the_mark_of_a_constant_is_torchs_own():
    ours, theirs = (mark(lambda: 0) for mark in (constant_to_a_compiler, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs)


# What a launch tells of itself


def test_a_launch_tells_whose_it_is_what_it_computes_and_moves():
    def told(name, **arguments):
        operator = OPERATORS[name]
        return [
            (one.operator, one.role, one.flops, one.exponentials)
            for one in operator.plan(operator.bind(**arguments))[1]
        ]

    q, k = meta(2, 256, 8, 40), meta(2, 77, 8, 40)
    assert told("attention", q=q, k=q, v=q) == [("attention", "", 4 * 16 * 256 * 256 * 40, 16 * 256 * 256)]
    assert told("attention", q=q, k=k, v=k) == [
        ("attention", "cross-attention", 4 * 16 * 256 * 77 * 40, 16 * 256 * 77)
    ]
    x, norm = meta(2, 1024, 320), {"norm_weight": meta(320), "norm_bias": meta(320)}
    flops = 2 * 2048 * 320 * 640
    assert told("linear", x=x, weight=meta(640, 320)) == [("linear", "linear", flops, 0)]
    assert told("linear", x=x, weight=meta(640, 320), activation="geglu", **norm) == [
        ("layer_norm", "", 0, 0),
        ("linear", "linear + geglu", flops, 0),
    ]
    x, norm = meta(2, 1024, 64), {"norm_weight": meta(64), "norm_bias": meta(64)}
    assert told("linear", x=x, weight=meta(640, 64), activation="geglu", **norm) == [
        ("linear", "layer_norm + linear + geglu", flops // 5, 0)
    ]
    image, weight = meta(2, 64, 16, 16, channels_last=True), meta(128, 64, 3, 3, channels_last=True)
    flops = 2 * 512 * 128 * (9 * 64 + 64)
    beside = {"shortcut": image, "shortcut_weight": meta(128, 64)}
    assert [one for one in told("conv3x3", x=image, weight=weight, **beside) if one[2]] == [
        ("conv3x3", "conv3x3 + shortcut", flops, 0)
    ]
    flops = 2 * 2048 * 320 * 640
    # Rows too wide to keep: the norm is a launch of layer_norm.
    wide = {"norm_weight": meta(640), "norm_bias": meta(640)}
    assert told("linear", x=meta(2, 1024, 640), weight=meta(320, 640), **wide) == [
        ("layer_norm", "", 0, 0),
        ("linear", "linear", flops, 0),
    ]
    assert [role for _, role, *_ in told("group_norm_silu", **norm_call(2, 1280, 8))] == ["group_norm"]
    assert [role for _, role, *_ in told("group_norm_silu", **norm_call(2, 320, 64))] == [
        "group_norm_statistics",
        "group_norm_apply",
    ]


def test_a_launch_moves_every_tensor_once_and_what_it_updates_twice():
    def moved(name, **arguments):
        (launch,) = OPERATORS[name].plan(OPERATORS[name].bind(**arguments))[1]
        return launch.nbytes

    x = meta(2, 8, 4, 4)
    assert moved("residual_add", x=x, residual=x) == 2 * x.nbytes
    assert moved("residual_add", x=x, residual=meta(1, 8, 4, 4).expand(2, -1, -1, -1)) == 2.5 * x.nbytes
    registers, table = meta(2, 1, 4, 8, 8, dtype=torch.float32), meta(9, 2, 4, dtype=torch.float32)
    output, step = meta(1, 4, 8, 8), meta(1, dtype=torch.int64)
    assert moved("sampler_update", registers=registers, model_output=output, table=table, step=step) == (
        2 * registers.nbytes + output.nbytes + table.nbytes + step.nbytes
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_a_call_holds_what_the_operator_takes_in_its_order_and_with_its_defaults(name):
    """Calls are made from the dispatcher's arguments by position, and passed to references by name."""
    bind = OPERATORS[name].bind
    schema = getattr(torch.ops.ldmperf, name).default._schema
    # Of another entry of the dispatcher, which returns two results.
    others = {
        ("layer_norm", "residual"),
        ("layer_norm", "float8"),
        ("geglu", "float8"),
        ("residual_add", "statistics"),
    }
    fields = [field for field in bind._fields if (name, field) not in others]
    assert [argument.name for argument in schema.arguments] == [*fields, "backend"]
    for function in (OPERATORS[name].call, OPERATORS[name].reference):
        parameters = inspect.signature(function).parameters
        assert set(bind._fields) == set(parameters) - {"backend", "shift", "out"}
        defaults = {key: value.default for key, value in parameters.items() if value.default is not value.empty}
        assert bind._field_defaults.items() <= defaults.items()
        assert set(defaults) - {"backend", "shift", "out"} == set(bind._field_defaults)
