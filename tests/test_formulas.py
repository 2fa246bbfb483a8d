"""Gradients by formula and by ordinary autograd, against plain torch and finite differences."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import _library, attention, geglu, group_norm_silu, layer_norm, residual_add


def normed(x, weight=None, bias=None, x_bias=None, skip=None, activation=None):
    x = x if skip is None else torch.cat([x, skip], 1)
    # Torch 2.13's own backward crashes on channels-last images where theirs is not asked for.
    x = (x if x_bias is None else x + x_bias[:, :, None, None]).contiguous()
    y = F.group_norm(x, 4, weight, bias)
    return F.silu(y) if activation == "silu" else y


def added(x, weight, bias, x_bias=None, residual=None):
    total = x if x_bias is None else x + x_bias
    total = total if residual is None else total + residual
    y = F.layer_norm(total, total.shape[-1:], weight, bias)
    return y if residual is None else torch.cat([y, total])


def gated(x, bias=None):
    value, gate = (x if bias is None else x + bias).chunk(2, -1)
    return value * F.gelu(gate)


def enlarged(x, residual, bias=None, size=None):
    total = x + residual if bias is None else x + residual + bias[:, None, None]
    return total if size is None else F.interpolate(total, size=size)


def softmaxed(q, k, v, scale=0.3):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def joined(function):
    def run(*arguments, **options):
        found = function(*arguments, **options)
        return torch.cat(found) if isinstance(found, tuple) else found

    return run


def grouped(x, weight=None, bias=None, **options):
    return group_norm_silu(x, 4, weight, bias, **options)


IMAGE, TOKENS, HEADS = (2, 8, 3, 5), (2, 3, 8), (2, 5, 3, 4)
# By operator: ours, plain torch, tensors that must be there and may be, and other options.
CALLS = {
    "group_norm_silu": (
        functools.partial(grouped, activation="silu"),
        functools.partial(normed, activation="silu"),
        {"x": IMAGE},
        {"weight": (8,), "bias": (8,), "x_bias": (2, 8)},
    ),
    "group_norm of two": (
        functools.partial(grouped, activation=None),
        normed,
        {"x": (2, 5, 3, 5), "skip": (2, 3, 3, 5)},
        {"weight": (8,), "bias": (8,), "x_bias": (2, 8)},
    ),
    "layer_norm": (layer_norm, added, {"x": TOKENS, "weight": (8,), "bias": (8,)}, {"x_bias": (8,)}),
    "layer_norm and a sum": (
        joined(layer_norm),
        added,
        {"x": TOKENS, "weight": (8,), "bias": (8,), "residual": TOKENS},
        {"x_bias": (8,)},
    ),
    "geglu": (geglu, gated, {"x": TOKENS}, {"bias": (8,)}),
    "residual_add": (residual_add, enlarged, {"x": IMAGE, "residual": IMAGE}, {"bias": (8,)}),
    "residual_add, doubled": (
        functools.partial(residual_add, size=(6, 9)),
        functools.partial(enlarged, size=(6, 9)),
        {"x": IMAGE, "residual": IMAGE},
        {"bias": (8,)},
    ),
    "attention": (functools.partial(attention, scale=0.3), softmaxed, dict.fromkeys("qkv", HEADS), {}),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.fixture(params=["formula", "ordinary"])
def way(request, monkeypatch):
    """How float64 is differentiated; recomputing the reference under autograd would fail."""
    if request.param == "formula":
        monkeypatch.setattr(_library, "_COMPUTED", ())
    monkeypatch.setattr(_library, "_gradients", lambda *_: pytest.fail("the reference was recomputed"))
    return request.param


def nodes(node):
    return {node.name()} | {name for parent, _ in node.next_functions if parent for name in nodes(parent)}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_finite_differences(name, way):
    ours, _, must, may = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = must | may
    values = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes.values()]

    def function(*given):
        return ours(**dict(zip(shapes, given, strict=True)), backend="torch")

    assert ("RecomputedBackward" in nodes(function(*values).grad_fn)) is (way == "formula" or name == "attention")
    assert torch.autograd.gradcheck(function, values)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(CALLS)), by_formula=st.booleans())
def test_gradients_are_those_of_plain_torch(data, name, by_formula):
    """Of any arguments, for any of them, in any memory."""
    ours, theirs, must, may = CALLS[name]
    beside = data.draw(st.sets(st.sampled_from(sorted(may)))) if may else set()
    # Torch 2.13's own backward of a group norm fails where there is a bias and no weight.
    beside |= {"weight"} if name.startswith("group_norm") and "bias" in beside else set()
    given_ones = [*must, *sorted(beside)]
    followed = data.draw(st.sets(st.sampled_from(given_ones), min_size=1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))

    def drawn(shape):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
        return LAYOUTS[layout](value) if len(shape) > 1 else value

    values = {key: drawn((must | may)[key]) for key in given_ones}
    pair = []
    with pytest.MonkeyPatch.context() as patch:
        if by_formula:
            patch.setattr(_library, "_COMPUTED", ())
        along = None
        for function in (functools.partial(ours, backend="torch"), theirs):
            leaves = {key: value.detach().requires_grad_(key in followed) for key, value in values.items()}
            out = function(**leaves)
            along = drawn(out.shape) if along is None else along
            pair.append(torch.autograd.grad(out, [leaves[key] for key in sorted(followed)], along))
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CALLS)
def test_half_dtypes_round_at_most_twice_as_much_as_plain_torch(name, way):
    ours, theirs, must, may = CALLS[name]
    errors = torch.zeros(2)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        values = {key: torch.randn(s, generator=generator).bfloat16() for key, s in (must | may).items()}
        found = []
        for function, dtype in (
            (theirs, torch.float64),
            (functools.partial(ours, backend="torch"), torch.bfloat16),
            (theirs, torch.bfloat16),
        ):
            leaves = {key: value.to(dtype).requires_grad_() for key, value in values.items()}
            out = function(**leaves)
            along = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            found.append(torch.autograd.grad(out, list(leaves.values()), along))
        exact, *others = found
        for i, gradients in enumerate(others):
            pairs = zip(gradients, exact, strict=True)
            errors[i] += sum(((a.double() - b) / b.norm()).square().sum() for a, b in pairs)
    # Sums of squares.
    assert errors[0] <= 4 * errors[1] + 1e-12


class Seen(TorchDispatchMode):
    """The last argument of each of torch's backward kernels: which gradients are asked for."""

    def __init__(self):
        super().__init__()
        self.asked = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if str(function).endswith("norm_backward.default"):
            self.asked[str(function)] = arguments[-1]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_gradients_that_nobody_needs_are_not_computed(which, way):
    wanted = [name == which for name in ("x", "weight", "bias")]
    for name in ("group_norm_silu", "layer_norm"):
        ours, _, must, may = CALLS[name]
        values = {key: torch.randn((must | may)[key], dtype=torch.float64) for key in ("x", "weight", "bias")}
        values[which].requires_grad_()
        out = ours(**values, backend="torch")
        with Seen() as seen:
            torch.autograd.grad(out.sum(), values[which])
        assert list(seen.asked.values()) == [wanted]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_large_mean_costs_no_digits(layout, way):
    """Where torch's own of such an image loses some."""
    x = LAYOUTS[layout](torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0)) + 3e4)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def gradient(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, along.to(dtype))[0]

    exact = gradient(normed, torch.float64)
    ours = functools.partial(grouped, activation=None, backend="torch")
    own, theirs = (gradient(function, torch.float32) for function in (ours, normed))

    def error(found):
        return (found - exact).norm() / exact.norm()

    assert error(own) < 1e-6
    assert error(theirs) > 10 * error(own)
