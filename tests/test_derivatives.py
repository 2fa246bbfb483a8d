"""Derivatives of the operators: forward mode, torch.func, second derivatives, against those of torch's own."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ldmperf.kernels import (
    attention,
    conv3x3,
    geglu,
    group_norm_silu,
    layer_norm,
    linear,
    pack_phases,
    residual_add,
    sampler_update,
    sampler_update_ref,
    transformer_front,
    transformer_tail,
)
from ldmperf.model import FAMILY, UNet
from ldmperf.profiling.kernel_bench.plain import PLAIN


def sdpa(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def gated(y):
    value, gate = y.chunk(2, -1)
    return value * F.gelu(gate)


def added_norm(x, residual, weight, bias):
    total = x + residual
    return torch.cat([F.layer_norm(total, total.shape[-1:], weight, bias), total])


def tail_of(call):
    """transformer_tail with one square weight and one vector."""

    def function(attended, x, image, context, square, ff_in, ff_out, vector, **options):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return call(
                *(attended, x, image, context, square, vector, vector, square, square, vector, vector, ff_in),
                *(ff_out, square, 0.1),
                **dict.fromkeys(("out_bias", "cross_bias", "ff_in_bias", "proj_bias"), vector),
                **options,
            )

    return function


# By name: ours, torch's, and the shapes of the tensors.
CALLS = {
    "attention": (attention, sdpa, [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)]),
    "group_norm_silu": (
        lambda x, k, w, b, s, **options: group_norm_silu(x, 4, w, b, x_bias=s, skip=k, **options),
        lambda x, k, w, b, s: F.silu(F.group_norm(torch.cat([x, k], 1) + s[:, :, None, None], 4, w, b)),
        [(2, 5, 3, 2), (2, 3, 3, 2), (8,), (8,), (2, 8)],
    ),
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), [(3, 8), (8,), (8,)]),
    "add_layer_norm": (
        lambda x, r, w, b, **options: torch.cat(layer_norm(x, w, b, residual=r, **options)),
        added_norm,
        [(3, 8), (3, 8), (8,), (8,)],
    ),
    "linear": (
        lambda x, w, b, nw, nb, **options: linear(
            x, w, b, norm_weight=nw, norm_bias=nb, activation="geglu", **options
        ),
        lambda x, w, b, nw, nb: gated(F.linear(F.layer_norm(x, x.shape[-1:], nw, nb), w, b)),
        [(3, 8), (6, 8), (6,), (8,), (8,)],
    ),
    "conv3x3": (
        lambda x, w, b, s, k, sw, r, **options: conv3x3(
            x, w, b, shortcut=s, skip=k, shortcut_weight=sw, residual=r, **options
        ),
        lambda x, w, b, s, k, sw, r: (
            F.conv2d(x, w, b, padding=1) + F.conv2d(torch.cat([s, k], 1), sw[:, :, None, None]) + r
        ),
        [(2, 2, 3, 2), (3, 2, 3, 3), (3,), (2, 1, 3, 2), (2, 2, 3, 2), (3, 3), (2, 3, 3, 2)],
    ),
    "transformer_front": (
        lambda image, p, w, gw, nb, s, **options: torch.cat(
            transformer_front(image, 2, gw, s, p, s, nb, w, proj_bias=s, x_bias=s, **options), dim=2
        ),
        lambda image, p, w, gw, nb, s: torch.cat(
            PLAIN["transformer_front"](image, 2, gw, s, p, s, nb, w, proj_bias=s, x_bias=s), dim=2
        ),
        [(2, 4, 3, 2), (4, 4), (3, 4), (4,), (4,), (4,)],
    ),
    "transformer_tail": (
        tail_of(transformer_tail),
        tail_of(PLAIN["transformer_tail"]),
        [(2, 2, 4), (2, 2, 4), (2, 4, 2, 1), (2, 3, 2, 2, 2), (4, 4), (4, 4), (4, 2), (4,)],
    ),
    "conv3x3 of an enlarged image": (
        lambda x, w, **options: conv3x3(x, pack_phases(w), upsample=True, **options),
        lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1),
        [(1, 2, 2, 3), (2, 2, 3, 3)],
    ),
    "geglu": (geglu, gated, [(3, 8)]),
    "residual_add": (
        lambda x, r, b, **options: residual_add(x, r, b, size=(6, 3), **options),
        lambda x, r, b: F.interpolate(x + r + b[:, None, None], scale_factor=2)[..., :3],
        [(2, 3, 3, 2), (2, 3, 3, 2), (3,)],
    ),
}


def drawn(name, *, channels_last=False):
    """(values, directions) of a call in float64."""
    torch.manual_seed(0)
    _, _, shapes = CALLS[name]
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def one(shape):
        value = torch.randn(shape, dtype=torch.float64)
        return value.contiguous(memory_format=layout) if len(shape) == 4 and name != "attention" else value

    return tuple(map(one, shapes)), tuple(map(one, shapes))


def in_dual_level(function, values, directions):
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, values, directions))
        return forward_ad.unpack_dual(out).tangent


def squared(function):
    return lambda *values: function(*values).pow(3).sum()


def differentiated_again(function, values, directions):
    leaves = [value.clone().requires_grad_() for value in values]
    found = torch.autograd.grad(squared(function)(*leaves), leaves, create_graph=True)
    total = sum((gradient * along).sum() for gradient, along in zip(found, directions, strict=True))
    return torch.autograd.grad(total, leaves)


def everything(values):
    return tuple(range(len(values)))


# By name: a derivative of function(*values) along directions.
DERIVATIVES = {
    "torch.func.jvp": lambda f, x, v: torch.func.jvp(f, x, v)[1],
    "dual_level": in_dual_level,
    "torch.func.vjp": lambda f, x, v: torch.func.vjp(f, *x)[1](f(*x)),
    "torch.func.grad": lambda f, x, v: torch.func.grad(squared(f), everything(x))(*x),
    "jacrev": lambda f, x, v: torch.func.jacrev(f, everything(x))(*x),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f, everything(x))(*x),
    "hessian": lambda f, x, v: torch.func.hessian(squared(f))(*x),
    "jacrev of jacrev": lambda f, x, v: torch.func.jacrev(torch.func.jacrev(squared(f)))(*x),
    "jvp of grad": lambda f, x, v: torch.func.jvp(torch.func.grad(squared(f), everything(x)), x, v)[1],
    "double backward": differentiated_again,
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", CALLS)
def test_derivatives_are_those_of_torchs_counterpart(name, derivative, channels_last):
    ours, theirs, _ = CALLS[name]
    values, directions = drawn(name, channels_last=channels_last)
    plain, plain_directions = drawn(name)
    take = DERIVATIVES[derivative]
    for backend in ("torch", "auto"):
        found = take(functools.partial(ours, backend=backend), values, directions)
        expected = take(theirs, plain, plain_directions)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CALLS)
def test_along_one_input_alone_and_over_a_batch(name):
    ours, theirs, _ = CALLS[name]
    values, directions = drawn(name)
    functions = functools.partial(ours, backend="torch"), theirs
    for i in range(len(values)):
        along = [v if i == j else torch.zeros_like(v) for j, v in enumerate(directions)]
        found, expected = (alone(f, i, values, directions) for f in functions)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found, torch.func.jvp(functions[0], values, tuple(along))[1])
    several = torch.stack([values[0], directions[0]])
    for take in (
        lambda f: torch.func.vmap(f)(several),
        lambda f: torch.func.vmap(torch.func.grad(squared(f)))(several),
        lambda f: torch.func.grad(squared(torch.func.vmap(f)))(several),
    ):
        found, expected = (take(lambda x, f=f: f(x, *values[1:])) for f in functions)
        torch.testing.assert_close(found, expected)


def alone(function, i, values, directions):
    """The tangent along input i; the others carry none."""
    return torch.func.jvp(lambda x: function(*values[:i], x, *values[i + 1 :]), (values[i],), (directions[i],))[1]


def test_one_tensor_may_be_two_arguments():
    (x, _, weight, bias), (v, *_) = drawn("add_layer_norm")
    for take in DERIVATIVES.values():
        pair = (
            take(lambda z: torch.cat(layer_norm(z, weight, bias, residual=z, backend="torch")), (x,), (v,)),
            take(lambda z: added_norm(z, z, weight, bias), (x,), (v,)),
        )
        torch.testing.assert_close(*pair)


def test_under_autocast_a_tangent_is_that_of_torchs_counterpart():
    values, directions = drawn("attention")
    values, directions = (tuple(t.float() for t in some) for some in (values, directions))
    expected = torch.func.jvp(sdpa, values, directions)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.jvp(functools.partial(attention, backend="torch"), values, directions)[1]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_without_a_tangent_the_operator_runs_as_ever(mode):
    """A frozen part beside the one that is differentiated: its values, and its gradients, are the operator's."""
    values, _ = drawn("layer_norm")
    x = values[0].requires_grad_()
    with mode():
        expected = layer_norm(*values, backend="torch")
        with forward_ad.dual_level():
            found = layer_norm(*values, backend="torch")
    assert torch.equal(found, expected)
    assert type(found.grad_fn) is type(expected.grad_fn)
    assert found.requires_grad == (mode is torch.enable_grad)
    assert x.is_leaf


def test_the_backend_is_looked_at_in_forward_mode_too():
    (x,), (v,) = drawn("geglu")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        torch.func.jvp(lambda z: geglu(z, backend="cuda"), (x,), (v,))


@pytest.mark.parametrize("derivative", ["torch.func.jvp", "dual_level", "torch.func.grad", "jvp of grad"])
def test_compiled_derivatives_are_those_of_eager(derivative):
    """Of an operator whose counterpart torch differentiates there; it does not compile the jvp of a layer norm."""
    torch._dynamo.reset()
    values, directions = drawn("geglu")

    def function(x, v):
        return DERIVATIVES[derivative](lambda z: geglu(z, backend="torch"), (x,), (v,))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*values, *directions)
    torch.testing.assert_close(compiled, function(*values, *directions), check_stride=False)


def test_our_network_against_finite_differences():
    torch.manual_seed(0)
    config = replace(FAMILY["39M"], layers_per_block=1, block_channels=(64, 64, 64, 64))
    x, v = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    context = torch.randn(1, 7, config.context_dim, dtype=torch.float64)
    unet = UNet(config, backend="torch").double().requires_grad_(False)

    def function(z):
        return unet(z, 5.0, context)

    tangent = torch.func.jvp(function, (x,), (v,))[1]
    differences = (function(x + 1e-5 * v) - function(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(tangent, differences, rtol=1e-5, atol=1e-7)


def test_a_step_of_a_sampler_has_no_forward_mode_and_says_so():
    registers, output = torch.randn(2, 3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    table, step = torch.randn(7, 2, 4), torch.tensor([3])

    def function(z):
        sampler_update(registers, z, table, step, backend="torch")
        return registers

    for take in (DERIVATIVES["torch.func.jvp"], in_dual_level):
        with pytest.raises(NotImplementedError, match=r"^sampler_update: .*call sampler_update_ref$"):
            take(function, (output,), (output,))

    def by_reference(z):
        state = registers.clone() + 0 * z
        sampler_update_ref(state, z, table, step)
        return state

    # A row of the table is the derivative: one step is linear.
    expected = table[3, :, 2, None, None, None, None] * output
    torch.testing.assert_close(torch.func.jvp(by_reference, (output,), (output,))[1], expected)
