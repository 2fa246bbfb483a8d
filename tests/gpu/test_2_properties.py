"""What kernels must honour beside being right: determinism, large offsets, graphs, compilers, gradients."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from ldmperf.kernels import (
    OPERATORS,
    attention,
    conv3x3,
    geglu,
    group_norm_silu,
    layer_norm,
    linear,
    pack_phases,
    residual_add,
    sampler_update,
    transformer_front,
    transformer_tail,
)
from ldmperf.kernels._statistics import channel_statistics

pytestmark = pytest.mark.gpu


def randn(*shape, dtype=torch.bfloat16, channels_last=False):
    x = torch.randn(shape, device="cuda").to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def packed(batch, tokens, count, heads, dim):
    return dict(zip("qkv"[-count:], randn(batch, tokens, count, heads, dim).unbind(2), strict=True))


def front(channels, side):
    """The arguments of transformer_front; every draw is of another image and its own statistics."""
    image, vector = randn(2, channels, side, side, channels_last=True), randn(channels)
    return {
        "image": image,
        "num_groups": 32,
        **dict.fromkeys(("group_weight", "group_bias", "norm_weight", "norm_bias", "proj_bias"), vector),
        "proj_weight": randn(channels, channels),
        "qkv_weight": randn(3 * channels, channels),
        "statistics": channel_statistics(image, 16),
        "x_bias": randn(channels),
    }


def tail(channels, side):
    """The arguments of transformer_tail of 8 heads and 77 keys."""
    vectors = ("norm2_weight", "norm2_bias", "norm3_weight", "norm3_bias", "out_bias", "cross_bias", "proj_bias")
    matrices = ("out_weight", "q_weight", "cross_weight", "proj_weight")
    return {
        **{name: randn(2, side * side, channels) for name in ("attended", "x")},
        "image": randn(2, channels, side, side, channels_last=True),
        "context": randn(2, 77, 2, 8, channels // 8),
        **{name: randn(channels, channels) for name in matrices},
        **{name: randn(channels) for name in vectors},
        "ff_in_weight": randn(8 * channels, channels),
        "ff_out_weight": randn(channels, 4 * channels),
        "ff_in_bias": randn(8 * channels),
        "statistics": True,
    }


CALLS = {
    "attention": (attention, lambda: packed(2, 1024, 3, 8, 40)),
    "attention, ragged, D = 384": (attention, lambda: packed(2, 250, 3, 8, 384)),
    "attention over a text": (
        attention,
        lambda: {
            "q": randn(3, 1024, 8, 80),
            **packed(3, 77, 2, 8, 80),
            "key_lengths": torch.randint(0, 78, (3,), device="cuda"),
        },
    ),
    "attention, masked": (
        attention,
        lambda: {**packed(2, 250, 3, 8, 20), "key_mask": torch.rand(2, 250, device="cuda") < 0.7},
    ),
    "group_norm_silu, one launch": (
        group_norm_silu,
        lambda: {"x": randn(2, 320, 8, 8, channels_last=True), "num_groups": 32, "x_bias": randn(2, 320)},
    ),
    "group_norm_silu, two launches": (
        group_norm_silu,
        lambda: {
            "x": randn(2, 320, 64, 64, channels_last=True),
            "skip": randn(2, 320, 64, 64, channels_last=True),
            "num_groups": 32,
            "weight": randn(640),
            "bias": randn(640),
        },
    ),
    "group_norm_silu, contiguous": (group_norm_silu, lambda: {"x": randn(2, 320, 32, 32), "num_groups": 32}),
    "layer_norm": (
        layer_norm,
        lambda: {
            "x": randn(2, 1024, 640),
            "weight": randn(640),
            "bias": randn(640),
            "x_bias": randn(640),
            "residual": randn(2, 1024, 640),
        },
    ),
    "linear, rows kept for their norm": (
        linear,
        lambda: {
            "x": randn(2, 1024, 160),
            "weight": randn(1280, 160),
            "bias": randn(1280),
            **dict.fromkeys(("norm_weight", "norm_bias", "x_bias"), randn(160)),
            "activation": "geglu",
        },
    ),
    "linear, ragged, its norm apart": (
        linear,
        lambda: {
            "x": randn(3, 333, 1288),
            "weight": randn(1000, 1288),
            **dict.fromkeys(("norm_weight", "norm_bias"), randn(1288)),
        },
    ),
    "conv3x3, residual and statistics": (
        conv3x3,
        lambda: {
            "x": randn(2, 64, 32, 32, channels_last=True),
            "weight": randn(128, 64, 3, 3, channels_last=True),
            "bias": randn(128),
            "residual": randn(2, 128, 32, 32, channels_last=True),
            "statistics": True,
        },
    ),
    "conv3x3, split, a shortcut": (
        conv3x3,
        lambda: {
            "x": randn(2, 256, 8, 8, channels_last=True),
            "weight": randn(256, 256, 3, 3, channels_last=True),
            "shortcut": randn(2, 256, 8, 8, channels_last=True),
            "skip": randn(2, 128, 8, 8, channels_last=True),
            "shortcut_weight": randn(256, 384),
            "statistics": True,
        },
    ),
    "conv3x3, ragged, stride 2": (
        conv3x3,
        lambda: {
            "x": randn(3, 40, 33, 31, channels_last=True),
            "weight": randn(96, 40, 3, 3, channels_last=True),
            "stride": 2,
            "statistics": True,
        },
    ),
    "conv3x3, packed": (
        conv3x3,
        lambda: {
            "x": randn(2, 64, 16, 16, channels_last=True),
            "weight": pack_phases(randn(64, 64, 3, 3, channels_last=True)),
            "upsample": True,
        },
    ),
    "transformer_front": (transformer_front, lambda: front(64, 32)),
    "transformer_front, two parts, ragged": (transformer_front, lambda: front(96, 13)),
    "transformer_front, few rows": (transformer_front, lambda: front(128, 16)),
    "transformer_tail": (transformer_tail, lambda: tail(64, 64)),
    "transformer_tail, two parts, ragged": (transformer_tail, lambda: tail(96, 13)),
    "transformer_tail, few rows": (transformer_tail, lambda: tail(128, 16)),
    "geglu": (geglu, lambda: {"x": randn(2, 1024, 2560), "bias": randn(2560)}),
    "residual_add": (
        residual_add,
        lambda: {
            "x": randn(2, 320, 32, 32, channels_last=True),
            "residual": randn(2, 320, 32, 32, channels_last=True),
            "bias": randn(320),
            "size": (64, 63),
        },
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@every_call
def test_two_runs_and_another_stream_give_the_same_bits(name):
    function, make = CALLS[name]
    arguments = make()
    first = as_tuple(function(**arguments, backend="triton"))
    second = as_tuple(function(**arguments, backend="triton"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        third = as_tuple(function(**arguments, backend="triton"))
    torch.cuda.synchronize()
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@every_call
def test_a_captured_graph_replays_with_changed_inputs(name):
    function, make = CALLS[name]
    static = make()
    function(**static, backend="triton")  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = as_tuple(function(**static, backend="triton"))
    for _ in range(3):
        fresh = make()
        for key, value in fresh.items():
            if isinstance(value, torch.Tensor):
                static[key].copy_(value)
        graph.replay()
        for got, want in zip(captured, as_tuple(function(**fresh, backend="triton")), strict=True):
            assert torch.equal(got, want)


def update_arguments():
    registers = randn(2, 2, 64, 64, 4, dtype=torch.float32).movedim(-1, 2)
    return {
        "registers": registers,
        "model_output": randn(4, 4, 64, 64, channels_last=True),
        "table": randn(9, 2, 4, dtype=torch.float32),
        "step": torch.tensor([0], device="cuda"),
        "guidance_scale": randn(9, dtype=torch.float32),
        "seeds": torch.tensor([3, -4], device="cuda"),
        "model_input": randn(4, 4, 64, 64, channels_last=True),
        "input_scale": randn(9, dtype=torch.float32),
    }


def test_a_graph_walks_the_table_by_itself():
    static = update_arguments()
    start = static["registers"].clone()
    sampler_update(**static, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler_update(**static, backend="triton")
        static["step"].add_(1)
    for seeds in ([3, -4], [7, 8]):
        static["seeds"].copy_(torch.tensor(seeds))
        static["registers"].copy_(start)
        static["step"].zero_()
        eager = {**static, "registers": start.clone(), "model_input": static["model_input"].clone()}
        for k in range(9):
            graph.replay()
            sampler_update(**{**eager, "step": torch.tensor([k], device="cuda")}, backend="triton")
            assert torch.equal(static["registers"], eager["registers"])
            assert torch.equal(static["model_input"], eager["model_input"])


@every_call
def test_compiled_and_exported_values_equal_eager(name):
    function, make = CALLS[name]
    arguments = make()
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    constants = {key: value for key, value in arguments.items() if key not in tensors}

    class Module(torch.nn.Module):
        def forward(self, **values):
            return function(**values, **constants, backend="triton")

    # All calls' modules have one code, of which dynamo keeps eight compilations.
    torch.compiler.reset()
    eager = as_tuple(Module()(**tensors))
    compiled = torch.compile(Module(), fullgraph=True)
    exported = torch.export.export(Module(), (), tensors).module()
    for other in (compiled, exported):
        for got, want in zip(as_tuple(other(**tensors)), eager, strict=True):
            assert torch.equal(got, want)


@every_call
def test_gradients_are_the_references(name):
    function, make = CALLS[name]
    arguments = make()
    gradients = []
    for backend in ("triton", "torch"):
        leaves = {
            key: value.detach().clone().requires_grad_()
            for key, value in arguments.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        out = as_tuple(function(**{**arguments, **leaves}, backend=backend))
        if arguments.get("statistics") is True:
            # Squared deviations are as large as the image's squares. Squared once more, what rounding leaves of a
            # bias's gradient, which they do not depend on, would be larger than that gradient.
            image, statistics = out
            means, deviations = statistics.unbind(2)
            loss = image.float().square().sum() + means.square().sum() + deviations.sum()
        else:
            loss = sum(part.float().square().sum() for part in out)
        loss.backward()
        gradients.append({key: leaf.grad for key, leaf in leaves.items()})
    for key, gradient in gradients[0].items():
        if gradient is None:
            # Statistics that are given: derivatives take the image alone.
            assert key == "statistics"
            assert gradients[1][key] is None
            continue
        # The outputs that the loss squares differ by rounding; the backward computes the same.
        expected = gradients[1][key].float()
        assert (gradient.float() - expected).norm() <= 2e-2 * expected.norm() + 1e-3


def test_opcheck():
    namespace = torch.ops.ldmperf
    x = randn(2, 64, 8, 8, channels_last=True)
    q, lengths = randn(2, 5, 3, 40), torch.tensor([0, 4], device="cuda")
    calls = [
        (namespace.attention, (q, q, q, None, None, None, False)),
        (namespace.attention, (q, q, q, 0.1, lengths, None, False)),
        (namespace.group_norm_silu, (x, 32, None, None, 1e-5, randn(2, 128), x, "silu", None, None)),
        (namespace.layer_norm, (randn(2, 5, 64), randn(64), randn(64), 1e-5, None)),
        (namespace.add_layer_norm, (randn(2, 5, 64), randn(2, 5, 64), randn(64), randn(64), 1e-5, randn(64))),
        (namespace.geglu, (randn(2, 5, 64), randn(64))),
        (namespace.residual_add, (x, x, None, [16, 15])),
    ]
    for operator, arguments in calls:
        opcheck(operator.default, (*arguments, "triton"))
    a = update_arguments()
    order = ("registers", "model_output", "table", "step", "guidance_scale", "seeds")
    rest = (None, a["model_input"], a["input_scale"], "triton")
    opcheck(namespace.sampler_update.default, (*(a[key] for key in order), *rest))


@pytest.mark.alone
@pytest.mark.parametrize("config_chunks", [0, 16])
def test_group_norm_past_2_to_31_elements(kit, config_chunks):
    kit.needs_memory(16)
    from ldmperf.kernels.group_norm import GroupNormConfig

    images = 2**31 // (256 * 512 * 512) + 2
    x = torch.empty(images, 256, 512, 512, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x.normal_()
    assert x.numel() > 2**31
    config = GroupNormConfig(4, 64, config_chunks, 4)
    out = kit.launch(OPERATORS["group_norm_silu"], config, x=x, num_groups=32)
    last = x[-1:]
    exact = OPERATORS["group_norm_silu"].reference(last.float(), 32)
    assert kit.relative_rms(out[-1:], exact) < 4e-3
    assert out[0].isfinite().all()


@pytest.mark.alone
def test_rows_past_2_to_31_elements(kit):
    kit.needs_memory(20)
    rows = 2**31 // 1024 + 3
    x = torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda").normal_()
    weight, bias = randn(1024), randn(1024)
    out = layer_norm(x, weight, bias, backend="triton")
    assert kit.relative_rms(out[-3:], layer_norm(x[-3:].double(), weight, bias, backend="torch")) < 4e-3
    del out
    out = geglu(x, backend="triton")
    assert kit.relative_rms(out[-3:], geglu(x[-3:].double(), backend="torch")) < 4e-3
    del out
    image = x.view(rows, 1024, 1, 1)
    out = residual_add(image, image, backend="triton")
    assert torch.equal(out[-3:], image[-3:] * 2)


@pytest.mark.alone
def test_images_that_lie_past_2_to_31_elements(kit):
    """Small tensors, far apart: only the stride is large."""
    kit.needs_memory(14)
    storage = torch.zeros(2**31 + 2**20, dtype=torch.float32, device="cuda")
    x = storage.as_strided((2, 64, 8, 8), (2**31, 1, 512, 64)).normal_()
    for function, arguments in (
        (group_norm_silu, {"num_groups": 32}),
        (residual_add, {"residual": x}),
    ):
        out = function(x, **arguments, backend="triton")
        exact = function(
            x.double(), **{k: v.double() if k == "residual" else v for k, v in arguments.items()}, backend="torch"
        )
        assert kit.relative_rms(out, exact) < 1e-6
    registers = storage.as_strided((2, 1, 4, 8, 8), (2**31, 256, 1, 32, 4))
    before = registers.clone()
    table = torch.randn(1, 2, 4, device="cuda")
    sampler_update(
        registers,
        torch.zeros(1, 4, 8, 8, device="cuda"),
        table,
        torch.tensor([0], device="cuda"),
        backend="triton",
    )
    exact = torch.einsum("ij,j...->i...", table[0, :, :2].double(), before.double())
    torch.testing.assert_close(registers.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.alone
def test_attention_past_2_to_31_elements(kit):
    kit.needs_memory(24)
    batch = 2**31 // (4096 * 3 * 320) + 2
    qkv = torch.empty(batch, 4096, 3, 8, 40, dtype=torch.bfloat16, device="cuda").normal_()
    assert qkv.numel() > 2**31
    out = attention(*qkv.unbind(2), backend="triton")
    last = qkv[-1:].float()
    assert kit.relative_rms(out[-1:], attention(*last.unbind(2), backend="torch")) < 6e-3
    del qkv, out
    # Small tensors, far apart: only the strides are large.
    storage = torch.zeros(2**32 + 2**20, dtype=torch.bfloat16, device="cuda")
    q = storage.as_strided((2, 100, 2, 40), (2**31, 40, 2**30, 1)).normal_()
    k = torch.randn(2, 77, 2, 40, device="cuda").bfloat16()
    for keys in (q, k):
        exact = attention(q.float(), keys.float(), keys.float(), backend="torch")
        assert kit.relative_rms(attention(q, keys, keys, backend="triton"), exact) < 6e-3


def test_attention_of_what_is_not_finite_and_of_large_logits(kit):
    q, k, v = torch.randn(3, 2, 300, 2, 40, device="cuda").bfloat16()
    exact = attention(q, k, v, backend="triton")
    k[1, 7, 0, 3] = math.nan
    out = attention(q, k, v, backend="triton")
    assert out[1, :, 0].isnan().all()
    assert torch.equal(out[0], exact[0])
    assert torch.equal(out[1, :, 1], exact[1, :, 1])
    q, k, v = torch.randn(3, 2, 300, 2, 16, device="cuda")
    q[..., 0], k[..., 0] = 100.0, torch.linspace(-100, 100, 300, device="cuda")[None, :, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "scale": 1.0}
        exact = kit.exact_of(OPERATORS["attention"], call)
        kit.judge(attention(**call, backend="triton"), exact, attention(**call, backend="torch"), 1.5)


def test_more_than_65535_programs(kit):
    q = randn(70_001, 3, 1, 8)
    out = attention(q, q, q, backend="triton")
    assert kit.relative_rms(out, attention(*[q.double()] * 3, backend="torch")) < 6e-3
    x = randn(70_001, 64)
    config = type(OPERATORS["geglu"].candidates(OPERATORS["geglu"].bind(x=x))[0])(1, 32, 1)
    out = kit.launch(OPERATORS["geglu"], config, x=x)
    assert kit.relative_rms(out, geglu(x.double(), backend="torch")) < 4e-3
    images = randn(70_001, 4, 2, 2)
    out = group_norm_silu(images, 2, backend="triton")
    assert kit.relative_rms(out, group_norm_silu(images.double(), 2, backend="torch")) < 4e-3


def test_values_that_are_not_finite_and_large_means(kit):
    x = randn(2, 64, 16, 16, dtype=torch.float32, channels_last=True)
    x[1, 3, 4, 5] = math.nan
    out = group_norm_silu(x, 32, backend="triton")
    assert out[1, 2:4].isnan().all()
    assert out.isnan().sum() == out[1, 2:4].numel()
    x = randn(2, 64, 32, 32, dtype=torch.float32, channels_last=True) + 1e4
    out = group_norm_silu(x, 32, activation=None, backend="triton")
    exact = group_norm_silu(x.double(), 32, activation=None, backend="torch")
    assert kit.relative_rms(out, exact) < 2e-4
    extremes = torch.empty(1, 64, 16, 16, device="cuda").uniform_(-65000, 65000).half()
    assert group_norm_silu(extremes, 32, backend="triton").isfinite().all()
    gate = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0, 1e-30], device="cuda")
    out = geglu(torch.cat([torch.ones_like(gate), gate]), backend="triton")
    torch.testing.assert_close(out, torch.nn.functional.gelu(gate), equal_nan=True)


SANITIZED = """
import torch
from ldmperf.kernels import attention, geglu, group_norm_silu, layer_norm, residual_add, sampler_update
q, k, v = torch.randn(2, 150, 3, 2, 20, device="cuda").bfloat16().unbind(2)
attention(q, k, v, backend="triton")
attention(q, k[:, :77], v[:, :77], key_lengths=torch.tensor([0, 70], device="cuda"), backend="triton")
x = torch.randn(2, 60, 7, 9, device="cuda").to(memory_format=torch.channels_last)
group_norm_silu(x, 6, skip=x, x_bias=torch.randn(2, 120, device="cuda"), backend="triton")
group_norm_silu(torch.randn(1, 320, 64, 64, device="cuda").half(), 32, backend="triton")
rows = torch.randn(3, 5, 130, device="cuda")
layer_norm(rows, torch.ones(130, device="cuda"), torch.zeros(130, device="cuda"), residual=rows, backend="triton")
geglu(rows, backend="triton")
residual_add(x, x, size=(13, 18), backend="triton")
sampler_update(torch.zeros(3, 2, 4, 7, 9, device="cuda"), torch.randn(2, 4, 7, 9, device="cuda"),
               torch.randn(5, 3, 5, device="cuda"), torch.tensor([4], device="cuda"),
               seeds=torch.tensor([1, 2], device="cuda"), backend="triton")
torch.cuda.synchronize()
"""


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    (tmp_path / "calls.py").write_text(SANITIZED)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", sys.executable, "calls.py"]
    with (tmp_path / "output").open("w+") as told:
        # It runs python as a child of its own, which is to end with it.
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=told, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            pytest.skip("compute-sanitizer took longer than 90 seconds")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = (tmp_path / "output").read_text()
    if "not supported" in output or "Unable to" in output:
        pytest.skip("compute-sanitizer does not work here: " + output.strip().splitlines()[-1])
    assert code == 0, output[-3000:]
