"""`out=` by the kernels, and in place whatever the order of the programs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from ldmperf.kernels import (
    OPERATORS,
    attention,
    conv3x3,
    geglu,
    group_norm_silu,
    layer_norm,
    linear,
    residual_add,
    transformer_front,
    transformer_tail,
)
from ldmperf.kernels._statistics import channel_statistics

X, IMAGE, VECTOR = torch.randn(2, 5, 8), torch.randn(2, 8, 4, 6), torch.randn(8)
LAST = torch.randn(2, 16, 4, 6).contiguous(memory_format=torch.channels_last)
KERNEL = torch.randn(16, 16, 3, 3).contiguous(memory_format=torch.channels_last)
SQUARE, WIDE, TOKENS = torch.randn(16, 16), torch.randn(16), torch.randn(2, 24, 16)
TAIL = (
    *(TOKENS, TOKENS, LAST, torch.randn(2, 5, 2, 2, 8), SQUARE, WIDE, WIDE, SQUARE, SQUARE, WIDE, WIDE),
    *(torch.randn(12, 16), torch.randn(16, 6), SQUARE),
)
CALLS = {
    "attention": lambda **o: attention(*torch.ones(2, 5, 3, 2, 8).unbind(2), **o),
    "group_norm_silu": lambda **o: group_norm_silu(IMAGE, 4, VECTOR, VECTOR, **o),
    "layer_norm": lambda **o: layer_norm(X, VECTOR, VECTOR, **o),
    "layer_norm and a sum": lambda **o: layer_norm(X, VECTOR, VECTOR, residual=X, **o),
    "linear": lambda **o: linear(X, X[0, :4], activation="geglu", **o),
    "linear of a norm": lambda **o: linear(X, X[0, :4], norm_weight=VECTOR, norm_bias=VECTOR, **o),
    "conv3x3": lambda **o: conv3x3(LAST, KERNEL, residual=LAST, **o),
    "conv3x3 and statistics": lambda **o: conv3x3(LAST, KERNEL, statistics=True, **o),
    "transformer_front": lambda **o: transformer_front(
        LAST, 4, WIDE, WIDE, SQUARE, WIDE, WIDE, SQUARE, statistics=channel_statistics(LAST, 8), **o
    ),
    "transformer_tail": lambda **o: transformer_tail(*TAIL, **o),
    "transformer_tail and statistics": lambda **o: transformer_tail(*TAIL, statistics=True, **o),
    "geglu": lambda **o: geglu(X, **o),
    "residual_add": lambda **o: residual_add(IMAGE, IMAGE, size=(8, 11), **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernels_write_what_they_would_have_made(name):
    expected = CALLS[name](backend="triton")
    pair = expected if isinstance(expected, tuple) else (expected,)
    made = tuple(torch.full_like(one, math.nan) for one in pair)
    for _ in range(2):
        found = CALLS[name](backend="triton", out=made if len(made) > 1 else made[0])
        assert found is made or found is made[0]
        assert all(map(torch.equal, made, pair))
        for one in made:
            one.fill_(math.nan)


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), *[st.integers(1, 9)] * 3),
    channels_last=st.booleans(),
    overwritten=st.sampled_from(["x", "residual"]),
    choose=st.randoms(use_true_random=False),
)
def test_a_residual_add_in_place_whatever_the_order_of_its_programs(shape, channels_last, overwritten, choose):
    """Of any two programs each is once the first: neither reads what the other has written.

    The interpreter runs one program after another. On a GPU they run at once; that no program reads an element
    that another one writes is what either order shows.
    """
    operator = OPERATORS["residual_add"]
    values = {
        name: torch.randn(shape).contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        for name in ("x", "residual")
    }
    expected = values["x"] + values["residual"]
    call = operator.bind(**values)
    configs = operator.candidates(call)
    for config in {None, configs[choose.randrange(len(configs))]}:
        for backwards in (False, True):
            given_ = {name: value.clone() for name, value in values.items()}
            result, (launch,) = operator.plan(operator.bind(**given_), config=config)
            launch.arguments["out_ptr"] = given_[overwritten]
            assert result.stride() == given_[overwritten].stride()
            in_order(launch, backwards)
            assert torch.equal(given_[overwritten], expected)


def in_order(launch, backwards):
    """Runs a launch's programs from the first to the last, or from the last to the first."""
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx
    seen = []

    def numbered(x, y, z):
        seen.append(launch.programs - 1 - x if backwards else x)
        original(seen[-1], y, z)

    builder.set_grid_idx = numbered
    try:
        launch.run()
    finally:
        del builder.set_grid_idx
    assert sorted(seen) == list(range(launch.programs))
