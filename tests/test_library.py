"""torch.library registration: opcheck, gradients, compile, export and FLOPs of every operator."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from ldmperf.kernels import attention, geglu, group_norm_silu, layer_norm, linear, linear_separate, residual_add


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


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
        (leaf(2, 8, 4, 6), 4, leaf(8), leaf(8), 1e-5, leaf(2, 8), None, "silu"),
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
        ),
    ),
    "layer_norm": lambda: (OPERATORS.layer_norm.default, (leaf(2, 5, 8), leaf(8), leaf(8), 1e-5, leaf(8))),
    "add_layer_norm": lambda: (
        OPERATORS.add_layer_norm.default,
        (leaf(2, 5, 8), leaf(2, 5, 8), leaf(8), leaf(8), 1e-5, leaf(8)),
    ),
    "group_norm_silu of a concatenation": lambda: (
        OPERATORS.group_norm_silu.default,
        (leaf(2, 5, 4, 6), 4, leaf(8), leaf(8), 1e-5, leaf(2, 8), leaf(2, 3, 4, 6), "silu"),
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
    "linear alone": (lambda x, w: linear(x, w, backend="torch"), [(2, 5, 8), (6, 8)]),
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


def test_norms_and_geglu_count_as_torchs_own_none():
    x = torch.empty(2, 8, 4, 6, device="meta")
    with FlopCounterMode(display=False) as counter:
        group_norm_silu(x, 4, backend="torch")
        geglu(x, backend="torch")
    assert counter.get_total_flops() == 0
