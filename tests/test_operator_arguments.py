"""What operators take and refuse whatever the backend, and what torch's global state changes: nothing."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldmperf.kernels import (
    OPERATORS,
    attention,
    channel_statistics,
    dependent_launch_reasons,
    dependent_launches,
    float8_rows,
    geglu,
    group_norm_silu,
    layer_norm,
    like_statistics,
    linear,
    linear_separate,
    sampler_update,
)
from ldmperf.kernels._recipes import ByLayout
from ldmperf.kernels.attention import _warn_of_layout
from ldmperf.model import FAMILY, UNet

BACKENDS = ("torch", "auto", "triton")


def tensors(*shapes):
    generator = torch.Generator("cpu").manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]


X, IMAGE, VECTOR, QKV = *tensors((5, 8), (2, 8, 4, 6), (8,)), tensors(*[(2, 9, 3, 8)] * 3)
(KERNEL,) = tensors((8, 8, 3, 3))
SQUARE, ATTENDED, CONTEXT, INNER = tensors((8, 8), (2, 24, 8), (2, 5, 2, 2, 4), (8, 6))


def update(**changes):
    """The registers and the next model input after a step with generated noise."""
    registers, output, model_input = tensors((2, 3, 4, 5, 5), (6, 4, 5, 5), (6, 4, 5, 5))
    table, guidance, scale = tensors((7, 2, 4), (7,), (7,))
    arguments = {
        "registers": registers,
        "model_output": output,
        "table": table,
        "step": torch.tensor([3], device="cpu"),
        "guidance_scale": guidance,
        "seeds": torch.tensor([1, 2, 3], device="cpu"),
        "model_input": model_input,
        "input_scale": scale,
        "backend": "torch",
    }
    sampler_update(**(arguments | changes))
    return registers, model_input


# All that an operator takes; sampler_update is `update`.
ARGUMENTS = {
    "attention": {"q": QKV[0], "k": QKV[1], "v": QKV[2], "key_lengths": torch.tensor([4, 0])},
    "group_norm_silu": {
        **{"x": IMAGE[:, :5], "num_groups": 4, "weight": VECTOR, "bias": VECTOR, "skip": IMAGE[:, 5:]},
        "x_bias": IMAGE[:, :, 0, 0],
    },
    "layer_norm": {"x": X, "weight": VECTOR, "bias": VECTOR, "x_bias": VECTOR, "residual": X},
    "linear": {
        **{"x": X, "weight": X[:4], "bias": VECTOR[:4], "norm_weight": VECTOR, "norm_bias": VECTOR},
        **{"x_bias": VECTOR, "activation": "geglu"},
    },
    "conv3x3": {
        **{"x": IMAGE, "weight": KERNEL, "bias": VECTOR, "shortcut": IMAGE[:, :5], "skip": IMAGE[:, 5:]},
        **{"shortcut_weight": X[0].expand(8, 8), "residual": IMAGE, "statistics": True},
    },
    "transformer_front": {
        **{"image": IMAGE, "num_groups": 4, "group_weight": VECTOR, "group_bias": VECTOR, "proj_weight": SQUARE},
        **{"norm_weight": VECTOR, "norm_bias": VECTOR, "qkv_weight": SQUARE[:6], "proj_bias": VECTOR},
        **{"statistics": channel_statistics(IMAGE, 8), "x_bias": VECTOR},
    },
    "transformer_tail": {
        **{"attended": ATTENDED, "x": ATTENDED, "image": IMAGE, "context": CONTEXT, "out_weight": SQUARE},
        **{"norm2_weight": VECTOR, "norm2_bias": VECTOR, "q_weight": SQUARE, "cross_weight": SQUARE},
        **{"norm3_weight": VECTOR, "norm3_bias": VECTOR, "ff_in_weight": X[:4].repeat(3, 1)},
        **{"ff_out_weight": INNER, "proj_weight": SQUARE, "out_bias": VECTOR, "cross_bias": VECTOR},
        **{"ff_in_bias": VECTOR[:6].repeat(2), "ff_out_bias": VECTOR, "proj_bias": VECTOR},
    },
    "geglu": {"x": X, "bias": VECTOR},
    "residual_add": {"x": IMAGE, "residual": IMAGE, "bias": VECTOR, "size": (8, 12)},
}


def call(name, **changes):
    """The result of an operator, as a tuple; `changes` replace its arguments."""
    if name == "sampler_update":
        return update(**changes)
    result = OPERATORS[name].call(**{"backend": "torch", **ARGUMENTS[name], **changes})
    return result if isinstance(result, tuple) else (result,)


def test_every_operator_is_called_here():
    assert {*ARGUMENTS, "sampler_update"} == set(OPERATORS)


# Numbers

FLOATS = st.sampled_from(
    [np.float32, np.float64, np.float16, torch.tensor, lambda v: torch.tensor([v])[0], lambda v: np.array(v)]
)
INTEGERS = st.sampled_from([np.int64, np.int8, np.uint32, torch.tensor, lambda v: np.array(v)])


@settings(max_examples=30, deadline=None)
@given(of_float=FLOATS, of_int=INTEGERS, backend=st.sampled_from(["torch", "auto"]))
def test_numbers_of_numpy_and_torch_are_numbers(of_float, of_int, backend):
    # A power of two: every dtype holds it.
    eps, scale = of_float(2.0**-10), of_float(0.25)
    pairs = [
        (call("attention", scale=scale, backend=backend), call("attention", scale=0.25)),
        (call("layer_norm", eps=eps, backend=backend), call("layer_norm", eps=2.0**-10)),
        (call("linear", eps=eps, backend=backend), call("linear", eps=2.0**-10)),
        (
            call("group_norm_silu", eps=eps, num_groups=of_int(4), backend=backend),
            call("group_norm_silu", eps=2.0**-10),
        ),
        (call("conv3x3", stride=of_int(1), backend=backend), call("conv3x3")),
        (call("residual_add", size=(of_int(8), of_int(12)), backend=backend), call("residual_add")),
        (call("residual_add", size=np.array([8, 12]), backend=backend), call("residual_add")),
    ]
    for actual, expected in pairs:
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("attention", {"scale": "0.5"}, "scale must be a number; got '0.5'"),
        ("attention", {"scale": torch.ones(2)}, "scale must be a number"),
        ("layer_norm", {"eps": None}, "eps must be a number; got None"),
        ("linear", {"eps": "1e-5"}, "eps must be a number"),
        ("group_norm_silu", {"eps": 1j}, "eps must be a number"),
        ("group_norm_silu", {"num_groups": 4.0}, "num_groups must be a whole number; got 4.0"),
        (
            "group_norm_silu",
            {"num_groups": torch.zeros(64)},
            r"num_groups must be a whole number; got a tensor, float32 \[64\]",
        ),
        ("group_norm_silu", {"num_groups": torch.tensor(4.0)}, "num_groups must be a whole number"),
        ("group_norm_silu", {"num_groups": True}, "num_groups must be a whole number; got True"),
        ("group_norm_silu", {"num_groups": np.bool_(True)}, "num_groups must be a whole number"),
        ("group_norm_silu", {"num_groups": torch.tensor(True)}, "num_groups must be a whole number"),
        ("group_norm_silu", {"num_groups": torch.tensor([4])}, "num_groups must be a whole number"),
        ("group_norm_silu", {"num_groups": np.array([4])}, "num_groups must be a whole number"),
        ("group_norm_silu", {"num_groups": 3}, "8 channels .* must be a divisor of 8$"),
        ("attention", {"q": QKV[0][:, :, :2]}, r"k must be \[2, Nk, 2, 8\] .*transpose\(1, 2\)"),
        ("conv3x3", {"stride": 3}, "stride must be 1 or 2, with upsample 1; got 3"),
        ("conv3x3", {"stride": "2"}, "stride must be a whole number; got '2'"),
        ("conv3x3", {"upsample": 1}, "upsample must be True or False; got 1"),
        ("conv3x3", {"statistics": "yes"}, "statistics must be True or False; got 'yes'"),
        ("conv3x3", {"upsample": True, "stride": 2}, "stride must be 1 or 2, with upsample 1; got 2"),
        ("conv3x3", {"shortcut": None}, "shortcut and shortcut_weight come together, and skip only with them"),
        ("residual_add", {"size": 2}, r"size must be \(height, width\); got 2"),
        ("residual_add", {"size": (8.0, 12.0)}, "size must be a whole number"),
        ("residual_add", {"size": (8, 12, 1)}, "size must be twice"),
        ("residual_add", {"statistics": 1}, "statistics must be True or False; got 1$"),
        ("conv3x3", {"statistics": IMAGE}, "statistics must be True or False; got a tensor, float32"),
        ("transformer_tail", {"statistics": IMAGE}, "statistics must be True or False; got a tensor, float32"),
        ("transformer_tail", {"statistics": 1}, "statistics must be True or False; got 1$"),
        (
            "transformer_tail",
            {"ff_out_weight": VECTOR},
            r"ff_out_weight must be float32 \[8, F\]; got float32",
        ),
        ("geglu", {"float8": "yes"}, "float8 must be True or False; got 'yes'"),
        ("layer_norm", {"float8": 2}, "float8 must be True or False; got 2"),
        ("residual_add", {"statistics": True, "size": (8, 12)}, "statistics are of a sum .*; leave out size or"),
        (
            "group_norm_silu",
            {"statistics": torch.ones(2, 1, 2, 8)},
            r"statistics must be float32 \[2, tiles, 2, 5\];",
        ),
        ("group_norm_silu", {"statistics": torch.ones(2, 1, 2, 5).double()}, "statistics must be float32"),
        (
            "group_norm_silu",
            {"statistics": torch.ones(2, 0, 2, 5)},
            "statistics must be .* tiles of a power of two",
        ),
        ("group_norm_silu", {"statistics": torch.ones(2, 11, 2, 5)}, "statistics must be .* of 24 pixels"),
    ],
)
def test_what_does_not_fit_is_refused_by_every_backend_and_told_what_does(name, changes, message, backend):
    with pytest.raises(ValueError, match=f"^{name}: {message}") as caught:
        call(name, **changes, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (channel_statistics, (None, 16), r"image must be a float \[B, C, H, W\]; got NoneType"),
        (
            channel_statistics,
            (IMAGE[0], 16),
            r"image must be a float \[B, C, H, W\]; got torch.float32 \[8",
        ),
        (channel_statistics, (IMAGE.int(), 16), "image must be a float .*; got torch.int32"),
        (channel_statistics, (IMAGE, 0), "tile must be a power of two of pixels; got 0"),
        (channel_statistics, (IMAGE, -8), "tile must be a power of two of pixels; got -8"),
        (channel_statistics, (IMAGE, 24), "tile must be a power of two of pixels; got 24"),
        (channel_statistics, (IMAGE, "16"), "tile must be a whole number; got '16'"),
        (like_statistics, (None, IMAGE), "statistics must be a tensor; got NoneType"),
        (like_statistics, (torch.ones(2, 1, 2, 8), None), "image must be a float"),
        (like_statistics, (torch.ones(2, 1, 2, 5), IMAGE), r"statistics must be float32 \[2, tiles, 2, 8\]"),
        (float8_rows, (None,), "x must be a tensor; got NoneType"),
        (dependent_launch_reasons, (torch.device("cpu"),), r"chip must be a Chip, chip_of\(device\)"),
    ],
)
def test_what_does_not_fit_is_refused_beside_the_operators_too(function, arguments, message):
    with pytest.raises(ValueError, match=f"^{function.__name__}: {message}") as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def test_dependent_launches_are_on_or_off():
    with pytest.raises(ValueError, match="enabled must be True or False; got 'graph'"):
        dependent_launches("graph").__enter__()


def test_statistics_of_no_skip_are_refused():
    given = torch.zeros(2, 1, 2, 8)
    with pytest.raises(ValueError, match="skip_statistics must be None without skip; got"):
        group_norm_silu(torch.zeros(2, 8, 4, 6), 4, skip_statistics=given)


def test_statistics_past_32_bits_are_a_reason_against_the_kernels():
    """A pixel a tile, of so many that their numbers are not counted in 32 bits."""
    x, given = (torch.empty(1, *size, device="meta") for size in ((64, 2**12, 2**12), (2**24, 2, 64)))
    operator = OPERATORS["group_norm_silu"]
    call = operator.bind(x, 4, statistics=given.float())
    operator.check(call)
    told = f"statistics of a sample are {2**31} numbers, more than {2**30}"
    assert told in operator.unsupported_reasons(call)


# Tensors


def tensor_names(name):
    values = inspect.signature(OPERATORS[name].call).parameters
    numbers = ("num_groups", "eps", "scale", "tf32", "activation", "backend", "size", "shift", "out")
    numbers += ("stride", "upsample", "group_eps", "norm_eps")
    return [name for name, value in values.items() if name not in numbers and value.annotation != "bool"]


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_no_tensor_is_refused_with_the_signature(name):
    for argument in tensor_names(name):
        for value in ((8,), 8, [1.0], np.ones(8), "torch"):
            for backend in BACKENDS:
                with pytest.raises(ValueError, match=f"^{name}: {argument} must be a tensor; got ") as caught:
                    call(name, **{argument: value}, backend=backend)
                parameters = inspect.signature(OPERATORS[name].call).parameters
                assert all(parameter in str(caught.value) for parameter in parameters)
                assert "\n" not in str(caught.value)


def test_the_habit_of_torchs_layer_norm_is_told_the_signature():
    signature = "layer_norm(x, weight, bias, eps=1e-05, *, x_bias=None, residual=None, float8=False, backend="
    with pytest.raises(ValueError, match="weight must be a tensor; got tuple; call") as caught:
        layer_norm(X, (8,), VECTOR, VECTOR)
    assert signature in str(caught.value)
    with pytest.raises(ValueError, match="weight must be a tensor; got NoneType"):
        layer_norm(X, None, None)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tensor_of_another_device_is_refused_by_every_backend(name):
    """One without memory would have come back as a result that nobody computed."""
    given = ARGUMENTS.get(name) or {"model_output": torch.empty(6, 4, 5, 5), "seeds": torch.tensor([1, 2, 3])}
    for argument, value in given.items():
        if isinstance(value, torch.Tensor):
            for backend in BACKENDS:
                with pytest.raises(ValueError, match=rf"^(add_)?{name}: .*meta"):
                    call(name, **{argument: value.to("meta")}, backend=backend)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "sampler_update"])
def test_every_backend_refuses_wrong_dtypes_and_shapes_alike(name):
    for argument, value in ARGUMENTS[name].items():
        if not isinstance(value, torch.Tensor):
            continue
        wrong = [value[None], value.to(torch.complex64), value[..., :1].repeat_interleave(7, -1)]
        wrong += [value.int()] if value.is_floating_point() else [value.float()]
        for other in wrong:
            for backend in BACKENDS:
                # More dimensions of rows are rows too.
                if other is wrong[0] and (name, argument) in {("geglu", "x"), ("linear", "x")}:
                    continue
                with pytest.raises(ValueError, match=f"^{name}: ") as caught:
                    call(name, **{argument: other}, backend=backend)
                assert "\n" not in str(caught.value)


# What raises while it is traced runs eagerly, and dynamo says what it could not follow there.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_a_wrong_call_is_told_as_itself_where_it_is_compiled():
    function = torch.compile(lambda x: geglu(x, backend="torch"), backend="aot_eager")
    with pytest.raises(ValueError, match=r"^geglu: x must be a float \[..., 2C\]; got torch.float32 \[5, 7\]$"):
        function(X[:, :7])


@pytest.mark.parametrize(
    "wrong", [torch.nn.functional.silu, 1, True, b"silu", X, "gelu"], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_an_activation_that_is_none_is_refused_in_one_line(wrong, backend):
    for call, arguments, valid in (
        (group_norm_silu, {"x": IMAGE, "num_groups": 4}, "silu"),
        (linear, {"x": X, "weight": X}, "geglu"),
        (linear_separate, {"x": X, "weight": X}, "geglu"),
    ):
        with pytest.raises(ValueError, match=f'^[a-z_]+: activation must be "{valid}" or None; got ') as refusal:
            call(**arguments, activation=wrong, backend=backend)
        assert "\n" not in str(refusal.value)


def test_a_product_apart_refuses_what_a_merged_one_refuses():
    for bad in ({"weight": X[:, :3]}, {"norm_bias": None}, {"activation": "gelu"}, {"backend": "cuda"}):
        for function in (linear, linear_separate):
            with pytest.raises(ValueError, match=r"^linear: "):
                function(**ARGUMENTS["linear"] | bad)
    with pytest.raises(ValueError, match=r"^linear: unknown backend"):
        linear_separate(X, X, backend="cuda")


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_bias_of_another_float_dtype_is_taken(backend):
    x, weight = X.bfloat16(), X[:4].bfloat16()
    for function in (linear, linear_separate):
        out = function(x, weight, VECTOR[:4], backend=backend)
        exact = F.linear(x.double(), weight.double(), VECTOR[:4].double())
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).norm() / exact.norm() < 1e-2


# The former name


def test_shift_is_x_bias_under_its_former_name():
    with pytest.warns(DeprecationWarning, match="pass x_bias=") as caught:
        (former,) = call("group_norm_silu", x_bias=None, shift=IMAGE[:, :, 0, 0])
    assert len(caught) == 1
    assert torch.equal(former, *call("group_norm_silu"))
    with pytest.raises(ValueError, match="shift is the former name of x_bias"):
        call("group_norm_silu", shift=IMAGE[:, :, 0, 0])
    function = torch.compile(
        lambda x, s: group_norm_silu(x, 4, shift=s, backend="torch"), fullgraph=True, backend="aot_eager"
    )
    expected = group_norm_silu(IMAGE, 4, x_bias=IMAGE[:, :, 0, 0], backend="torch")
    assert torch.equal(function(IMAGE, IMAGE[:, :, 0, 0]), expected)


def test_x_bias_acts_before_the_norm_and_diffusers_scale_shift_after_it():
    """As docs/kernels.md has both."""
    scale, shift = tensors((2, 8), (2, 8))
    norm = nn.GroupNorm(4, 8)
    before = F.silu(norm(IMAGE + shift[:, :, None, None]))
    ours = group_norm_silu(IMAGE, 4, norm.weight, norm.bias, x_bias=shift, backend="torch")
    torch.testing.assert_close(ours, before)
    after = F.silu(norm(IMAGE) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    ours = group_norm_silu(IMAGE, 4, norm.weight, norm.bias, activation=None, backend="torch")
    torch.testing.assert_close(F.silu(ours * (1 + scale[:, :, None, None]) + shift[:, :, None, None]), after)


def test_diffusers_masks_as_the_docs_write_them():
    q, k, v = QKV
    keep = torch.arange(18).view(2, 9) % 4 != 1
    bias = ((1 - keep.float()) * -10000.0)[:, None]
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=bias[:, None]).transpose(1, 2)
    for key_mask in (keep, bias[:, 0] == 0):
        torch.testing.assert_close(attention(q, k, v, key_mask=key_mask, backend="torch"), theirs)


# The layout of scaled_dot_product_attention


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_fewer_tokens_than_heads_are_warned_of_once_where_the_call_is(backend):
    q, k, v = tensors(*[(2, 3, 77, 8)] * 3)
    _warn_of_layout.cache_clear()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        _warn_of_layout.cache_clear()
        ByLayout.forget()
        with mode(), pytest.warns(UserWarning, match=r"\[B, H, N, D\].*q.transpose\(1, 2\)") as caught:
            attention(q, k, v, backend=backend)
        assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q[:, :2], k[:, :2], v[:, :2], backend=backend)
        _warn_of_layout.cache_clear()
        ours = attention(*(t.transpose(1, 2) for t in (q, k, v)), backend=backend).transpose(1, 2)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v))


def test_a_folder_whose_name_begins_as_ours_is_the_callers():
    filename = f"{Path(attention.__code__.co_filename).parent}_demo/use.py"
    _warn_of_layout.cache_clear()
    ByLayout.forget()
    q, k, v = tensors(*[(2, 3, 77, 8)] * 3)
    with pytest.warns(UserWarning, match="fewer tokens than heads") as caught:
        exec(
            compile('attention(q, k, v, backend="torch")', filename, "exec"),
            {"attention": attention, "q": q, "k": k, "v": v},
        )
    assert [warning.filename for warning in caught] == [filename]


@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_slices_of_a_packed_projection_and_masked_calls_are_not_warned_of(tokens):
    _warn_of_layout.cache_clear()
    ByLayout.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*torch.randn(2, tokens, 3, 8, 4).unbind(2), backend="torch")
        attention(torch.randn(2, tokens, 8, 4), *torch.randn(2, tokens, 2, 8, 4).unbind(2), backend="torch")
        q = torch.randn(2, tokens, 8, 4)
        attention(q, q, q, key_mask=torch.ones(2, tokens, dtype=torch.bool), backend="torch")


def test_our_network_is_not_warned_of_at_small_latents():
    """At 8x8 the deepest level has one token, and the context here as many."""
    _warn_of_layout.cache_clear()
    ByLayout.forget()
    config = replace(FAMILY["39M"], layers_per_block=1, block_channels=(64, 64, 64, 64))
    unet = UNet(config, backend="torch")
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        for size in (8, 16):
            unet(torch.randn(1, 4, size, size), 5.0, torch.randn(1, (size // 8) ** 2, config.context_dim))


# Global state


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "default device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "autocast elsewhere": lambda: torch.autocast("cuda", torch.bfloat16),
    "one thread at a time": lambda: torch.autograd.set_multithreading_enabled(False),
}


@settings(max_examples=40, deadline=None)
@given(states=st.lists(st.sampled_from(list(STATES)), unique=True), backend=st.sampled_from(["torch", "auto"]))
@pytest.mark.filterwarnings("ignore:.*isabling autocast:UserWarning")
@pytest.mark.parametrize("name", OPERATORS)
def test_global_state_changes_no_result(name, states, backend):
    expected = call(name)
    with contextlib.ExitStack() as stack:
        for state in states:
            stack.enter_context(STATES[state]())
        actual = call(name, backend=backend)
    for result, wanted in zip(actual, expected, strict=True):
        assert (result.dtype, result.device) == (wanted.dtype, wanted.device)
        assert torch.equal(result, wanted)
        assert not math.isnan(wanted.sum())
