"""torch.library registration: opcheck, gradients, compile, export and FLOPs of every operator."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from ldmperf.kernels import (
    attention,
    conv3x3,
    conv3x3_separate,
    geglu,
    group_norm_silu,
    layer_norm,
    linear,
    linear_separate,
    pack_phases,
    residual_add,
    transformer_front,
    transformer_tail,
)
from ldmperf.profiling.kernel_bench.plain import PLAIN


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def tail_arguments(biased):
    """Those of transformer_tail up to its biases: 24 tokens of 8 channels, 5 keys of 2 heads."""
    tokens, image = [leaf(2, 24, 8), leaf(2, 24, 8)], torch.randn(2, 8, 4, 6)
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
    square, vector = (lambda: leaf(8, 8)), (lambda: leaf(8))
    biases = (vector(), vector(), leaf(12), vector(), vector()) if biased else (None,) * 5
    return (
        *(*tokens, image, leaf(2, 5, 2, 2, 4), square(), vector(), vector(), square(), square(), vector()),
        *(vector(), leaf(12, 8), leaf(8, 6), square(), 1e-5, *biases),
    )


OPERATORS = torch.ops.ldmperf
CALLS = {
    "attention": lambda: (
        OPERATORS.attention.default,
        (leaf(2, 5, 3, 8), leaf(2, 7, 3, 8), leaf(2, 7, 3, 8), None, None, None, False),
    ),
    "attention with lengths": lambda: (
        OPERATORS.attention.default,
        (leaf(2, 5, 3, 8), leaf(2, 7, 3, 8), leaf(2, 7, 3, 8), None, torch.tensor([0, 4]), None, False),
    ),
    "attention with a mask": lambda: (
        OPERATORS.attention.default,
        (leaf(2, 5, 3, 8), leaf(2, 7, 3, 8), leaf(2, 7, 3, 8), None, None, torch.arange(14).view(2, 7) > 6, False),
    ),
    "group_norm_silu": lambda: (
        OPERATORS.group_norm_silu.default,
        (leaf(2, 8, 4, 6), 4, leaf(8), leaf(8), 1e-5, leaf(2, 8), None, "silu", None, None),
    ),
    "group_norm channels-last": lambda: (
        OPERATORS.group_norm_silu.default,
        (
            torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last),
            4,
            None,
            None,
            1e-5,
            None,
            None,
            None,
            torch.rand(2, 1, 2, 8),
            None,
        ),
    ),
    "layer_norm": lambda: (OPERATORS.layer_norm.default, (leaf(2, 5, 8), leaf(8), leaf(8), 1e-5, leaf(8))),
    "add_layer_norm": lambda: (
        OPERATORS.add_layer_norm.default,
        (leaf(2, 5, 8), leaf(2, 5, 8), leaf(8), leaf(8), 1e-5, leaf(8)),
    ),
    "group_norm_silu of a concatenation": lambda: (
        OPERATORS.group_norm_silu.default,
        (leaf(2, 5, 4, 6), 4, leaf(8), leaf(8), 1e-5, leaf(2, 8), leaf(2, 3, 4, 6), "silu", None, None),
    ),
    "statistics_residual_add": lambda: (
        OPERATORS.statistics_residual_add.default,
        (leaf(2, 3, 4, 6), leaf(2, 3, 4, 6), leaf(3), True),
    ),
    "residual_add": lambda: (
        OPERATORS.residual_add.default,
        (leaf(2, 3, 4, 6), leaf(2, 3, 4, 6), leaf(3), None),
    ),
    "residual_add doubled": lambda: (
        OPERATORS.residual_add.default,
        (leaf(2, 3, 4, 6), leaf(2, 3, 4, 6), None, [7, 12]),
    ),
    "linear": lambda: (
        OPERATORS.linear.default,
        (leaf(2, 5, 8), leaf(6, 8), leaf(6), leaf(8), leaf(8), 1e-5, leaf(8), "geglu"),
    ),
    "linear alone": lambda: (
        OPERATORS.linear.default,
        (leaf(2, 5, 8), leaf(6, 8), None, None, None, 1e-5, None, None),
    ),
    "conv3x3": lambda: (
        OPERATORS.conv3x3.default,
        (leaf(2, 5, 4, 6), leaf(8, 5, 3, 3), leaf(8), 2, False, *[None] * 3, leaf(2, 8, 2, 3), False),
    ),
    "conv3x3 and statistics": lambda: (
        OPERATORS.statistics_conv3x3.default,
        (
            *(leaf(2, 5, 4, 6), leaf(8, 5, 3, 3), leaf(8), 1, False, leaf(2, 3, 4, 6), leaf(2, 4, 4, 6)),
            *(leaf(8, 7), leaf(2, 8, 4, 6), True),
        ),
    ),
    "conv3x3 of an enlarged image": lambda: (
        OPERATORS.conv3x3.default,
        (leaf(2, 5, 4, 6), leaf(8, 5, 3, 3), None, 1, True, *[None] * 4, False),
    ),
    "conv3x3 of packed weights": lambda: (
        OPERATORS.statistics_conv3x3.default,
        (leaf(2, 5, 4, 6), leaf(4, 8, 5, 2, 2), leaf(8), 1, True, *[None] * 4, True),
    ),
    "transformer_front": lambda: (
        OPERATORS.transformer_front.default,
        (
            *(leaf(2, 8, 4, 6), 4, leaf(8), leaf(8), leaf(8, 8), leaf(8), leaf(8), leaf(6, 8), 1e-6, 1e-5),
            *(torch.randn(2, 3, 2, 8), leaf(8), leaf(8)),
        ),
    ),
    "transformer_tail": lambda: (OPERATORS.transformer_tail.default, (*tail_arguments(True), False)),
    "transformer_tail without biases": lambda: (
        OPERATORS.transformer_tail.default,
        (*tail_arguments(False), False),
    ),
    "transformer_tail and statistics": lambda: (
        OPERATORS.statistics_transformer_tail.default,
        (*tail_arguments(True), True),
    ),
    "geglu": lambda: (OPERATORS.geglu.default, (leaf(2, 5, 8), leaf(8))),
    "float8_layer_norm": lambda: (
        OPERATORS.float8_layer_norm.default,
        (torch.randn(2, 5, 8), torch.randn(8), torch.randn(8), 1e-5, torch.randn(8)),
    ),
    "float8_geglu": lambda: (OPERATORS.float8_geglu.default, (torch.randn(2, 5, 8), torch.randn(8))),
    "sampler_update": lambda: (
        OPERATORS.sampler_update.default,
        (
            torch.randn(2, 3, 4, 5, 5),
            torch.randn(6, 4, 5, 5),
            torch.randn(7, 2, 4),
            torch.tensor([3]),
            torch.randn(7),
            torch.tensor([1, 2, 3]),
            None,
            torch.empty(6, 4, 5, 5),
            torch.randn(7),
        ),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    operator, arguments = CALLS[name]()
    opcheck(operator, (*arguments, "torch"))


def tail_of(attended, x, image, context, ff_in, ff_out, vector, **options):
    """transformer_tail with a square weight made of the feed-forward's."""
    square = ff_out @ ff_in[:3]
    tokens, matrices = (attended, x, image, context), (square, vector, vector, square, square, vector, vector)
    biases = dict.fromkeys(("out_bias", "cross_bias", "ff_out_bias", "proj_bias"), vector)
    ff_in_bias = vector.repeat(2)[:6]
    return transformer_tail(
        *tokens, *matrices, ff_in, ff_out, square, eps=0.1, ff_in_bias=ff_in_bias, **biases, **options
    )


FUNCTIONS = {
    "attention": (lambda q, k, v: attention(q, k, v, backend="torch"), [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)]),
    "group_norm_silu": (
        lambda x, w, b, s: group_norm_silu(x, 4, w, b, x_bias=s, backend="torch"),
        [(2, 8, 4, 6), (8,), (8,), (2, 8)],
    ),
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b, backend="torch"), [(2, 5, 8), (8,), (8,)]),
    "add_layer_norm": (
        lambda x, r, w, b: torch.cat(layer_norm(x, w, b, residual=r, backend="torch")),
        [(2, 5, 8), (2, 5, 8), (8,), (8,)],
    ),
    "group_norm_silu of a concatenation": (
        lambda x, k, w, b: group_norm_silu(x, 4, w, b, skip=k, backend="torch"),
        [(2, 5, 4, 6), (2, 3, 4, 6), (8,), (8,)],
    ),
    "add_layer_norm with a bias": (
        lambda x, r, xb, w, b: torch.cat(layer_norm(x, w, b, x_bias=xb, residual=r, backend="torch")),
        [(2, 5, 8), (2, 5, 8), (8,), (8,), (8,)],
    ),
    "residual_add": (lambda x, r, b: residual_add(x, r, b, backend="torch"), [(2, 3, 4, 5), (2, 3, 4, 5), (3,)]),
    "residual_add doubled": (
        lambda x, r, b: residual_add(x, r, b, size=(7, 10), backend="torch"),
        [(2, 3, 4, 5), (2, 3, 4, 5), (3,)],
    ),
    "geglu": (lambda x, b: geglu(x, bias=b, backend="torch"), [(2, 5, 8), (8,)]),
    "linear": (
        lambda x, w, b, nw, nb, xb: linear(
            x, w, b, norm_weight=nw, norm_bias=nb, x_bias=xb, activation="geglu", backend="torch"
        ),
        [(2, 5, 8), (6, 8), (6,), (8,), (8,), (8,)],
    ),
    "transformer_front": (
        lambda x, gw, gb, p, nw, nb, w, b, s: torch.cat(
            transformer_front(x, 2, gw, gb, p, nw, nb, w, proj_bias=b, x_bias=s, backend="torch"), dim=2
        ),
        [(1, 4, 3, 2), (4,), (4,), (4, 4), (4,), (4,), (3, 4), (4,), (4,)],
    ),
    "transformer_front, chosen": (
        lambda x, gw, gb, p, nw, nb, w: torch.cat(transformer_front(x, 2, gw, gb, p, nw, nb, w), dim=2),
        [(1, 4, 3, 2), (4,), (4,), (4, 4), (4,), (4,), (3, 4)],
    ),
    "transformer_tail": (
        functools.partial(tail_of, backend="torch"),
        [(1, 6, 4), (1, 6, 4), (1, 4, 3, 2), (1, 3, 2, 2, 2), (6, 4), (4, 3), (4,)],
    ),
    "transformer_tail, chosen": (
        functools.partial(tail_of, backend="auto"),
        [(1, 6, 4), (1, 6, 4), (1, 4, 3, 2), (1, 3, 2, 2, 2), (6, 4), (4, 3), (4,)],
    ),
    "linear alone": (lambda x, w: linear(x, w, backend="torch"), [(2, 5, 8), (6, 8)]),
    "conv3x3": (
        lambda x, w, b, s, k, sw, r: conv3x3(
            x, w, b, shortcut=s, skip=k, shortcut_weight=sw, residual=r, backend="torch"
        ),
        [(1, 2, 3, 4), (3, 2, 3, 3), (3,), (1, 1, 3, 4), (1, 2, 3, 4), (3, 3), (1, 3, 3, 4)],
    ),
    "conv3x3 of an enlarged image": (
        lambda x, w: conv3x3(x, w, upsample=True, backend="torch"),
        [(1, 2, 3, 2), (3, 2, 3, 3)],
    ),
    "conv3x3 of packed weights": (
        lambda x, w, b: conv3x3(x, pack_phases(w), b, upsample=True, backend="torch"),
        [(1, 2, 3, 2), (3, 2, 3, 3), (3,)],
    ),
    "conv3x3, chosen": (
        lambda x, w, r: conv3x3(x, w, stride=2, residual=r, backend="auto"),
        [(1, 2, 4, 3), (3, 2, 3, 3), (1, 3, 2, 2)],
    ),
    "conv3x3, separate": (
        lambda x, w, r: conv3x3_separate(x, w, residual=r, backend="torch"),
        [(1, 2, 4, 3), (3, 2, 3, 3), (1, 3, 4, 3)],
    ),
    "linear, chosen": (
        lambda x, w, nw, nb: linear(x, w, norm_weight=nw, norm_bias=nb, backend="auto"),
        [(2, 5, 8), (6, 8), (8,), (8,)],
    ),
    "linear, separate": (
        lambda x, w, b, nw, nb: linear_separate(
            x, w, b, norm_weight=nw, norm_bias=nb, activation="geglu", backend="torch"
        ),
        [(2, 5, 8), (6, 8), (6,), (8,), (8,)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_against_finite_differences(name):
    function, shapes = FUNCTIONS[name]
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(function, [leaf(*shape, dtype=torch.float64) for shape in shapes])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_fullgraph_and_exported_values_equal_eager(name):
    function, shapes = FUNCTIONS[name]
    arguments = [leaf(*shape) for shape in shapes]
    eager = function(*arguments)
    gradients = torch.autograd.grad(eager.sum(), arguments)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, eager)
    for actual, expected in zip(torch.autograd.grad(compiled.sum(), arguments), gradients, strict=True):
        torch.testing.assert_close(actual, expected)

    class Module(torch.nn.Module):
        def forward(self, *values):
            return function(*values)

    detached = tuple(value.detach() for value in arguments)
    exported = torch.export.export(Module(), detached)
    assert torch.equal(exported.module()(*detached), eager)


def test_only_the_wanted_gradients_are_computed():
    q, k, v = torch.randn(2, 5, 3, 8), leaf(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    attention(q, k, v, backend="torch").sum().backward()
    assert q.grad is None
    assert v.grad is None
    assert k.grad.shape == k.shape


def test_attention_counts_as_torchs_own():
    with torch.device("meta"):
        q, k = torch.empty(2, 50, 3, 8), torch.empty(2, 77, 3, 8)
    with FlopCounterMode(display=False) as ours:
        attention(q, k, k, backend="torch")
    with FlopCounterMode(display=False) as theirs:
        F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))
    assert ours.get_total_flops() == theirs.get_total_flops() == 2 * 2 * 2 * 3 * 50 * 77 * 8


def test_a_product_counts_as_torchs_own():
    with torch.device("meta"):
        x, weight, norm = torch.empty(2, 50, 64), torch.empty(256, 64), torch.empty(64)
    with FlopCounterMode(display=False) as ours:
        linear(x, weight, norm_weight=norm, norm_bias=norm, activation="geglu", backend="torch")
    with FlopCounterMode(display=False) as theirs:
        F.linear(x, weight)
    assert ours.get_total_flops() == theirs.get_total_flops() == 2 * 2 * 50 * 64 * 256


def test_a_convolution_counts_as_torchs_own():
    with torch.device("meta"):
        x, weight, shortcut = torch.empty(2, 8, 5, 7), torch.empty(6, 8, 3, 3), torch.empty(2, 4, 5, 7)
        own = torch.empty(6, 4)
        packed = torch.empty(4, 6, 8, 2, 2)
    pairs = [
        (lambda: conv3x3(x, weight, backend="torch"), lambda: F.conv2d(x, weight, padding=1)),
        (lambda: conv3x3(x, weight, stride=2, backend="torch"), lambda: F.conv2d(x, weight, stride=2, padding=1)),
        (
            lambda: conv3x3(x, weight, shortcut=shortcut, shortcut_weight=own, statistics=True, backend="torch"),
            lambda: (F.conv2d(x, weight, padding=1), F.conv2d(shortcut, own[:, :, None, None])),
        ),
        (
            lambda: conv3x3(x, packed, upsample=True, backend="torch"),
            lambda: [F.conv2d(x, one, padding="same") for one in packed],
        ),
    ]
    for ours, theirs in pairs:
        with FlopCounterMode(display=False) as own_count:
            ours()
        with FlopCounterMode(display=False) as torchs_count:
            theirs()
        assert own_count.get_total_flops() == torchs_count.get_total_flops() > 0


def test_a_transformers_parts_count_as_torchs_own():
    with torch.device("meta"):
        attended, x, image = torch.empty(2, 35, 8), torch.empty(2, 35, 8), torch.empty(2, 8, 5, 7)
        context, square, vector = torch.empty(2, 9, 2, 2, 4), torch.empty(8, 8), torch.empty(8)
        ff_in, ff_out = torch.empty(48, 8), torch.empty(8, 24)
        tail = (attended, x, image, context, square, vector, vector, square, square, vector, vector, ff_in, ff_out)
        front = (image, 2, vector, vector, square, vector, vector, ff_in)
    for function, plain, arguments in (
        (transformer_tail, PLAIN["transformer_tail"], (*tail, square)),
        (transformer_front, PLAIN["transformer_front"], front),
    ):
        with FlopCounterMode(display=False) as ours:
            function(*arguments, backend="torch")
        with FlopCounterMode(display=False) as theirs:
            plain(*arguments)
        assert ours.get_total_flops() == theirs.get_total_flops() > 0


def test_norms_and_geglu_count_as_torchs_own_none():
    x = torch.empty(2, 8, 4, 6, device="meta")
    with FlopCounterMode(display=False) as counter:
        group_norm_silu(x, 4, backend="torch")
        geglu(x, backend="torch")
    assert counter.get_total_flops() == 0
