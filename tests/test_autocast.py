"""Operators under autocast: torch's counterpart tells the dtype, eager and compiled, with gradients."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from ldmperf.kernels import (
    attention,
    conv3x3,
    conv3x3_separate,
    geglu,
    group_norm_silu,
    layer_norm,
    linear,
    linear_separate,
    residual_add,
    transformer_front,
    transformer_tail,
)
from ldmperf.model import FAMILY, UNet
from ldmperf.profiling.kernel_bench.plain import PLAIN

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOWER = st.sampled_from([torch.bfloat16, torch.float16])


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def gated(y):
    value, gate = y.chunk(2, -1)
    return value * F.gelu(gate)


def norm_linear(x, weight, bias, norm_weight, norm_bias):
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), weight, bias)


def conv(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def added_norm(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


def tail_of(call):
    """transformer_tail with a bias, and one vector for its norms."""

    def function(attended, x, image, context, out, q, cross, ff_in, ff_out, proj, bias, vector, **options):
        norm = vector, vector
        return call(
            attended, x, image, context, out, *norm, q, cross, *norm, ff_in, ff_out, proj, out_bias=bias, **options
        )

    return function


# By name: ours, torch's, the shapes of tensors, and which of them may each have a dtype of their own.
CALLS = {
    "attention": (attention, sdpa, [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)], (0, 1, 2)),
    "linear": (linear, F.linear, [(2, 5, 8), (6, 8), (6,)], (0, 1, 2)),
    "linear_separate": (linear_separate, F.linear, [(2, 5, 8), (6, 8), (6,)], (0, 1, 2)),
    "linear of a norm": (
        lambda x, w, b, nw, nb, **options: linear(x, w, b, norm_weight=nw, norm_bias=nb, **options),
        norm_linear,
        [(2, 5, 8), (6, 8), (6,), (8,), (8,)],
        (1, 2),
    ),
    "linear and its gate": (
        lambda x, w, b, **options: linear(x, w, b, activation="geglu", **options),
        lambda x, w, b: gated(F.linear(x, w, b)),
        [(2, 5, 8), (6, 8), (6,)],
        (0, 1, 2),
    ),
    "conv3x3": (conv3x3, conv, [(2, 5, 4, 6), (6, 5, 3, 3), (6,)], (0, 1, 2)),
    "transformer_front": (
        lambda image, p, w, b, gw, gb, nw, nb, **options: transformer_front(
            image, 2, gw, gb, p, nw, nb, w, proj_bias=b, **options
        ),
        lambda image, p, w, b, gw, gb, nw, nb: PLAIN["transformer_front"](
            image, 2, gw, gb, p, nw, nb, w, proj_bias=b
        ),
        [(2, 8, 4, 6), (8, 8), (6, 8), (8,), (8,), (8,), (8,), (8,)],
        (1, 2),
    ),
    "transformer_tail": (
        tail_of(transformer_tail),
        tail_of(PLAIN["transformer_tail"]),
        [
            (2, 24, 8),
            (2, 24, 8),
            (2, 8, 4, 6),
            (2, 5, 2, 2, 4),
            *[(8, 8)] * 3,
            (12, 8),
            (8, 6),
            (8, 8),
            (8,),
            (8,),
        ],
        (4, 5),
    ),
    "conv3x3_separate": (conv3x3_separate, conv, [(2, 5, 4, 6), (6, 5, 3, 3), (6,)], (0, 1, 2)),
    "geglu": (geglu, gated, [(2, 5, 8)], (0,)),
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, (8,), w, b), [(2, 5, 8), (8,), (8,)], ()),
    "layer_norm and a sum": (
        lambda x, r, w, b, **options: layer_norm(x, w, b, residual=r, **options),
        added_norm,
        [(2, 5, 8), (2, 5, 8), (8,), (8,)],
        (),
    ),
    "group_norm_silu": (
        lambda x, w, b, **options: group_norm_silu(x, 4, w, b, **options),
        lambda x, w, b: F.silu(F.group_norm(x, 4, w, b)),
        [(2, 8, 4, 6), (8,), (8,)],
        (),
    ),
    "group_norm_silu of two": (
        lambda x, k, **options: group_norm_silu(x, 4, skip=k, **options),
        lambda x, k: F.silu(F.group_norm(torch.cat([x, k], 1), 4)),
        [(2, 5, 4, 6), (2, 3, 4, 6)],
        (0, 1),
    ),
    "residual_add": (residual_add, torch.add, [(2, 3, 4, 6), (2, 3, 4, 6)], (0, 1)),
    "residual_add, doubled": (
        lambda x, r, **options: residual_add(x, r, size=(8, 12), **options),
        lambda x, r: F.interpolate(x + r, scale_factor=2),
        [(2, 3, 4, 6), (2, 3, 4, 6)],
        (0, 1),
    ),
}


@contextlib.contextmanager
def autocast(device, dtype):
    """Also of a GPU that is not there, which torch.autocast would leave off."""
    was = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_dtype(device, was[0])
        torch.set_autocast_enabled(device, was[1])
        torch.clear_autocast_cache()


def outputs(function, *arguments, **options):
    result = function(*arguments, **options)
    return result if isinstance(result, tuple) else (result,)


def of_dtypes(name, dtype, other, free, device="cpu"):
    """Tensors of a call in `dtype`; those whose bit of `free` is set, and that may, in `other`."""
    _, _, shapes, may = CALLS[name]
    torch.manual_seed(0)
    return [
        torch.randn(shape, device=device, dtype=other if i in may and free & (1 << i) else dtype)
        for i, shape in enumerate(shapes)
    ]


MIXED = {"dtype": st.sampled_from(DTYPES), "other": st.sampled_from(DTYPES), "free": st.integers(0, 7)}


@settings(max_examples=15, deadline=None)
@given(lower=LOWER, backend=st.sampled_from(["torch", "auto"]), **MIXED)
@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_that_of_torchs_counterpart(name, lower, backend, dtype, other, free):
    ours, theirs, _, _ = CALLS[name]
    arguments = of_dtypes(name, dtype, other, free)
    with autocast("cpu", lower):
        try:
            expected = outputs(theirs, *arguments)
        except RuntimeError:
            # float64, which autocast leaves alone, beside another dtype: ours serves it, or says what must be.
            with contextlib.suppress(ValueError):
                outputs(ours, *arguments, backend=backend)
            return
        actual = outputs(ours, *arguments, backend=backend)
    exact = outputs(theirs, *(t.double() for t in arguments))
    for result, wanted, value in zip(actual, expected, exact, strict=True):
        assert result.dtype == wanted.dtype
        # Each is a rounding or two of the inputs and of the result away from the value.
        error = (wanted.double() - value).norm() / value.norm()
        assert (result.double() - value).norm() / value.norm() <= 1.5 * error + 4e-6


@pytest.mark.parametrize("name", CALLS)
def test_on_a_gpu_the_dtype_is_that_of_torchs_counterpart(name):
    """By tensors without memory: autocast's rules of CUDA are compiled in everywhere."""
    ours, theirs, _, _ = CALLS[name]
    for lower, dtype, other in itertools.product((torch.float16, torch.bfloat16), DTYPES[:3], DTYPES[:3]):
        for free in (0, 1, 6):
            with FakeTensorMode(), autocast("cuda", lower):
                arguments = of_dtypes(name, dtype, other, free, "cuda")
                wanted = [t.dtype for t in outputs(theirs, *arguments)]
                assert [t.dtype for t in outputs(ours, *arguments, backend="torch")] == wanted, (
                    lower,
                    dtype,
                    other,
                )


@pytest.mark.parametrize("name", CALLS)
def test_compiled_and_its_gradients_are_those_of_eager(name):
    torch._dynamo.reset()
    ours, _, _, _ = CALLS[name]
    arguments = [t.requires_grad_() for t in of_dtypes(name, torch.float32, torch.bfloat16, 0b10)]

    def function(*values):
        return outputs(ours, *values, backend="torch")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with autocast("cpu", torch.bfloat16):
        eager, traced = function(*arguments), compiled(*arguments)
    for actual, expected in zip(traced, eager, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    found = [torch.autograd.grad(sum(t.float().sum() for t in result), arguments) for result in (traced, eager)]
    for actual, expected, argument in zip(*found, arguments, strict=True):
        assert actual.dtype == argument.dtype
        torch.testing.assert_close(actual, expected)


OPERATORS = torch.ops.ldmperf


@pytest.mark.parametrize(
    ("operator", "shapes", "others"),
    [
        (OPERATORS.attention, [(2, 5, 3, 8)] * 3, (None, None, None, False)),
        (OPERATORS.linear, [(2, 5, 8), (6, 8), (6,)], (None, None, 1e-5, None, "geglu")),
        (OPERATORS.linear, [(2, 5, 8), (6, 8), (6,), (8,), (8,)], (1e-5, None, None)),
        (OPERATORS.conv3x3, [(2, 5, 4, 6), (6, 5, 3, 3), (6,)], (1, False, None, None, None, None, False)),
        (OPERATORS.add_layer_norm, [(2, 5, 8), (2, 5, 8), (8,), (8,)], (1e-5, None)),
        (OPERATORS.residual_add, [(2, 3, 4, 6)] * 2, (None, None)),
        (OPERATORS.geglu, [(2, 5, 8)], (None,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_opcheck_under_autocast(operator, shapes, others):
    arguments = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with autocast("cpu", torch.bfloat16):
        opcheck(operator.default, (*arguments, *others, "torch"))


def test_a_norm_before_a_product_is_of_what_x_was():
    """x rounded to bfloat16 first would have lost its variance."""
    x = torch.randn(4, 9, 64) + 1e3
    weight, norm = torch.randn(32, 64), torch.ones(64)
    exact = norm_linear(x.double(), weight.double(), None, norm.double(), norm.double())
    with autocast("cpu", torch.bfloat16):
        direct = OPERATORS.linear.default(x, weight, None, norm, norm, 1e-5, None, None, "torch")
        out = linear(x, weight, norm_weight=norm, norm_bias=norm, backend="torch")
    assert torch.equal(out, direct)
    assert (out.double() - exact).norm() / exact.norm() < 1e-2


def test_off_inside_an_operator_and_in_its_backward():
    """A gradient taken inside autocast is that of the operator as it ran outside."""
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    out = linear(x, weight, backend="torch")
    (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    with autocast("cpu", torch.bfloat16):
        (actual,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("products", ["torch", "auto"])
def test_our_network_takes_mixed_dtypes_there(products):
    config = replace(FAMILY["39M"], layers_per_block=1, block_channels=(64, 64, 64, 64))
    torch.manual_seed(0)
    unet = UNet(config, backend="torch", products=products)
    inputs = torch.randn(1, 4, 16, 16), 5.0, torch.randn(1, 7, config.context_dim)
    with torch.inference_mode():
        expected = unet(*inputs)
        with autocast("cpu", torch.bfloat16):
            actual = unet(*inputs)
            half = unet(inputs[0].bfloat16(), 5.0, inputs[2].bfloat16())
    for out in (actual, half):
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() / expected.norm() < 3e-2
