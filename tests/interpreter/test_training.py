"""Training by the kernels: they run in the forward, and the backward has the reference's gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ldmperf import kernels
from ldmperf.kernels import _recipes
from ldmperf.kernels._statistics import channel_statistics

TOKENS, VECTOR = (2, 5, 8), (8,)


def beside(image):
    return channel_statistics(image.detach(), 8)


# By operator: a call of it, or of its reference, and the shapes of the tensors.
CALLS = {
    "attention": (lambda f, q, k, v: f(q, k, v), [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)]),
    "group_norm_silu": (
        lambda f, x, w, b, s, k: f(x, 4, w, b, x_bias=s, skip=k),
        [(2, 5, 4, 6), VECTOR, VECTOR, (2, 8), (2, 3, 4, 6)],
    ),
    "layer_norm": (
        lambda f, x, w, b, s, r: torch.cat(f(x, w, b, x_bias=s, residual=r)),
        [TOKENS, VECTOR, VECTOR, VECTOR, TOKENS],
    ),
    "linear": (
        lambda f, x, w, b, n, m: f(x, w, b, norm_weight=n, norm_bias=m, activation="geglu"),
        [TOKENS, (6, 8), (6,), VECTOR, VECTOR],
    ),
    "conv3x3": (
        lambda f, x, w, b, s, sw, r: f(
            *map(last, (x, w)), b, shortcut=last(s), shortcut_weight=sw, residual=last(r)
        ),
        [(1, 16, 4, 6), (16, 16, 3, 3), (16,), (1, 8, 4, 6), (16, 8), (1, 16, 4, 6)],
    ),
    "transformer_front": (
        lambda f, x, *v: torch.cat(f(last(x), 4, *v, statistics=beside(x)), dim=2),
        [(2, 8, 4, 6), VECTOR, VECTOR, (8, 8), VECTOR, VECTOR, (6, 8)],
    ),
    "transformer_tail": (
        lambda f, h, x, image, *others: f(h, x, last(image), *others[:-1], out_bias=others[-1]),
        [
            *((2, 24, 8), (2, 24, 8), (2, 8, 4, 6), (2, 5, 2, 2, 4), (8, 8), VECTOR, VECTOR, (8, 8), (8, 8)),
            *(VECTOR, VECTOR, (12, 8), (8, 6), (8, 8), VECTOR),
        ],
    ),
    "geglu": (lambda f, x, b: f(x, bias=b), [TOKENS, VECTOR]),
    "residual_add": (lambda f, x, r, b: f(x, r, b, size=(8, 11)), [(2, 8, 4, 6), (2, 8, 4, 6), VECTOR]),
}


def last(image):
    return image.contiguous(memory_format=torch.channels_last)


def gradients(run, values):
    out = run(*values)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((out.float() * weights).sum(), values)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", CALLS)
def test_the_forward_is_the_kernels_and_the_gradients_are_the_references(name, dtype, limit, kit, monkeypatch):
    launched = []
    run = _recipes._BoundLaunch.run
    monkeypatch.setattr(_recipes._BoundLaunch, "run", lambda self, t: launched.append(self) or run(self, t))
    call, shapes = CALLS[name]
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]

    expected = gradients(functools.partial(call, getattr(kernels, f"{name}_ref")), values)
    assert not launched
    ours = functools.partial(call, functools.partial(getattr(kernels, name), backend="triton"))
    found = gradients(ours, values)
    once = len(launched)
    assert once
    again = gradients(lambda *given: checkpoint(ours, *given, use_reentrant=False), values)
    # The recomputation ends at once where nothing was kept.
    assert len(launched) >= 2 * once
    assert all(map(torch.equal, again, found))
    for one, reference in zip(found, expected, strict=True):
        # A norm of a sum keeps the kernel's sum.
        limit_of_it = limit if name == "layer_norm" else 0.0
        assert kit.relative_rms(one, reference.double()) <= limit_of_it
