"""The modules beside torch's and diffusers': state dicts, results, and all that modules are used for."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import activations, attention_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldmperf.kernels import GEGLU, Attention, GroupNormSiLU, KernelUnsupported

pytestmark = pytest.mark.usefixtures("_one_thread")


class NormThenSiLU(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


@dataclass(frozen=True)
class Pair:
    """Our class and theirs, what both are made of, and the shapes of what they are called with."""

    ours: Callable[..., nn.Module]
    theirs: Callable[..., nn.Module]
    given: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    named: tuple[tuple[str, Any], ...] = ()
    own: tuple[tuple[str, Any], ...] = ()

    def make(self, **options: Any) -> tuple[nn.Module, nn.Module]:
        """Both, with random parameters of their own."""
        torch.manual_seed(0)
        ours = self.ours(*self.given, **dict(self.named), **dict(self.own), backend="torch", **options)
        theirs = self.theirs(*self.given, **dict(self.named))
        with torch.no_grad():
            for parameter in (*ours.parameters(), *theirs.parameters()):
                parameter.add_(0.3 * torch.randn_like(parameter))
        return ours, theirs

    def arguments(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in self.shapes]


IMAGE, TOKENS, TEXT = (2, 8, 5, 3), (2, 9, 12), (2, 5, 7)
NO_SILU = (("activation", None),)
PAIRS = {
    "norm and SiLU": Pair(GroupNormSiLU, NormThenSiLU, (4, 8, 1e-3), (IMAGE,)),
    "norm": Pair(GroupNormSiLU, nn.GroupNorm, (2, 8), (IMAGE,), own=NO_SILU),
    "norm, not affine": Pair(GroupNormSiLU, nn.GroupNorm, (2, 8, 1e-5, False), (IMAGE,), own=NO_SILU),
    "GEGLU": Pair(GEGLU, activations.GEGLU, (12, 6), (TOKENS,)),
    "GEGLU, no bias": Pair(GEGLU, activations.GEGLU, (12, 6, False), ((4, 12),)),
    "self-attention": Pair(
        Attention, attention_processor.Attention, (12,), (TOKENS,), (("heads", 3), ("dim_head", 4))
    ),
    "cross-attention": Pair(
        Attention, attention_processor.Attention, (12, 7, 2), (TOKENS, TEXT), (("dim_head", 8),)
    ),
    "attention, biases": Pair(
        *(Attention, attention_processor.Attention, (12, 7, 2), (TOKENS, TEXT)),
        (("dim_head", 8), ("bias", True), ("out_bias", False), ("dropout", 0.5)),
    ),
}
EVERY = pytest.mark.parametrize("name", PAIRS)


def relative_rms(out: Tensor, expected: Tensor) -> float:
    return float(((out.double() - expected).norm() / expected.norm()).detach())


@EVERY
def test_state_dicts_load_strictly_both_ways_and_give_the_same_results(name: str) -> None:
    ours, theirs = PAIRS[name].make()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours, theirs = ours.double().eval(), theirs.double().eval()
    arguments = PAIRS[name].arguments()
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(*arguments)
    torch.testing.assert_close(ours(*arguments), expected, rtol=1e-11, atol=1e-11)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        low_ours, low_theirs = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
        low = PAIRS[name].arguments(dtype)
        out = low_ours(*low)
        assert out.dtype == dtype
        error = relative_rms(out, expected)
        assert error < min(limit, 1.2 * relative_rms(low_theirs(*low), expected) + 1e-7)
    again, other = PAIRS[name].make()
    other.load_state_dict(again.state_dict())
    torch.testing.assert_close(
        other.eval()(*map(Tensor.float, arguments)), again.eval()(*map(Tensor.float, arguments))
    )


@EVERY
def test_a_seed_gives_the_weights_that_it_gives_theirs(name: str) -> None:
    pair = PAIRS[name]
    torch.manual_seed(3)
    ours = pair.ours(*pair.given, **dict(pair.named), **dict(pair.own))
    torch.manual_seed(3)
    theirs = pair.theirs(*pair.given, **dict(pair.named))
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, yours)


def gradients(module: nn.Module, arguments: list[Tensor], run: Callable[..., Tensor]) -> list[Tensor]:
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    run(*leaves).sin().sum().backward()
    return [leaf.grad for leaf in (*leaves, *module.parameters()) if leaf.grad is not None]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_theirs_also_under_checkpointing(name: str, dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name].make()
    ours, theirs = ours.double().eval(), theirs.double().eval()
    ours.load_state_dict(theirs.state_dict())
    arguments = PAIRS[name].arguments()
    expected = gradients(theirs, arguments, theirs)
    ours = ours.to(dtype)
    arguments = [argument.to(dtype) for argument in arguments]
    for run in (ours, lambda *given: checkpoint(ours, *given, use_reentrant=False)):
        ours.zero_grad()
        found = gradients(ours, arguments, run)
        limit = 1e-11 if dtype == torch.float64 else 4e-2
        assert len(found) == len(expected) == len(arguments) + len(list(ours.parameters()))
        # A bias of all keys changes nothing: its gradient is rounding.
        scale = max(gradient.norm() for gradient in expected)
        for mine, yours in zip(found, expected, strict=True):
            assert (mine.double() - yours).norm() < limit * max(yours.norm(), 0.01 * scale)


def test_a_norm_is_trained_on_an_image_that_needs_no_gradient() -> None:
    """Torch's own ends the process there, on a CPU and in channels-last memory."""
    image = torch.randn(2, 8, 5, 3).contiguous(memory_format=torch.channels_last)
    ours, theirs = GroupNormSiLU(4, 8, backend="torch"), NormThenSiLU(4, 8)
    expected = gradients(theirs, [], lambda: theirs(image.contiguous()))
    assert len(expected) == 2
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for run in (ours, compiled):
        ours.zero_grad()
        torch.testing.assert_close(gradients(ours, [], lambda run=run: run(image)), expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_gives_the_dtype_and_values_of_theirs(name: str, dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name].make()
    ours, theirs = ours.eval(), theirs.eval()
    ours.load_state_dict(theirs.state_dict())
    if isinstance(ours, GroupNormSiLU) and dtype == torch.float16:
        ours, theirs = ours.half(), theirs.half()
        arguments = PAIRS[name].arguments(dtype)
    else:
        arguments = PAIRS[name].arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(*arguments), theirs(*arguments)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@EVERY
def test_compiled_without_a_break_copied_pickled_and_moved(name: str) -> None:
    ours, _ = PAIRS[name].make()
    ours = ours.double().eval()
    arguments = PAIRS[name].arguments()
    expected = ours(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-12, atol=1e-12)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert type(other) is type(ours)
        assert torch.equal(other(*arguments), expected)
    assert {parameter.dtype for parameter in ours.half().parameters()} <= {torch.float16}


@EVERY
def test_they_are_made_on_a_device_in_a_dtype(name: str) -> None:
    ours, _ = PAIRS[name].make()
    pair = PAIRS[name]
    options = dict(pair.named) | dict(pair.own) | {"device": "meta", "dtype": torch.bfloat16, "backend": "torch"}
    other = pair.ours(*pair.given, **options)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in other.parameters())
    out = other(*(argument.to("meta") for argument in pair.arguments(torch.bfloat16)))
    arguments = pair.arguments(torch.float32)
    expected = ours.eval()(*arguments)
    assert out.is_meta
    assert out.shape == expected.shape
    other.load_state_dict(ours.state_dict(), assign=True)
    assert torch.equal(other.eval()(*arguments), expected)


def test_they_show_themselves_and_what_they_are_made_of() -> None:
    norm = repr(GroupNormSiLU(2, 8, activation=None, backend="torch"))
    assert norm.startswith("GroupNormSiLU(2, 8, eps=1e-05, affine=True")
    assert norm.endswith("activation=None, backend='torch')")
    assert "backend='auto'" in repr(GEGLU(4, 6))
    assert "heads=3, backend='auto'" in repr(Attention(8, heads=3))
    assert isinstance(GroupNormSiLU(2, 8), nn.GroupNorm)
    assert GroupNormSiLU(2, 8, 1e-6, True, "meta", torch.float64).weight.is_meta


@EVERY
def test_the_backend_is_the_operators(name: str) -> None:
    ours, _ = PAIRS[name].make()
    ours.backend = "triton"
    with pytest.raises(KernelUnsupported, match="GPU"):
        ours(*PAIRS[name].arguments(torch.float32))
    pair = PAIRS[name]
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto, torch, triton"):
        pair.ours(*pair.given, **dict(pair.named), backend="cuda")


# Spatial sizes of ranks two to six.
SPATIAL = st.lists(st.integers(1, 4), max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_group_norm_of_every_rank_layout_bias_and_skip(data: st.DataObject) -> None:
    """Against F.group_norm in float64; the result has the layout of x."""
    draw = data.draw
    groups, width, batch = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    spatial = draw(SPATIAL)
    channels = groups * width
    beside = draw(st.integers(1, channels - 1)) if channels > 1 and draw(st.booleans()) else 0
    # Torch refuses to normalize single values.
    if width * torch.Size(spatial).numel() == 1:
        spatial = [*spatial, 2]
    torch.manual_seed(draw(st.integers(0, 9)))
    affine, bias = draw(st.booleans()), draw(st.booleans())
    activation = draw(st.sampled_from(["silu", None]))
    module = GroupNormSiLU(groups, channels, 1e-4, affine, bias=bias, activation=activation, backend="torch")
    assert [name for name, _ in module.named_parameters()] == affine * (["weight", "bias"][: 1 + bias])
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_()

    layout = draw(st.sampled_from(["contiguous", "channels last", "slices"]))
    x, *others = (
        laid_out(torch.randn(batch, count, *spatial, dtype=torch.float64), layout)
        for count in (channels - beside, beside)
        if count
    )
    skip = others[0] if others else None
    x_bias = draw(st.sampled_from([None, (channels,), (batch, channels)]))
    x_bias = x_bias and torch.randn(x_bias, dtype=torch.float64)

    together = torch.cat([x, *others], dim=1)
    if x_bias is not None:
        together = together + x_bias.expand(batch, -1)[(..., *[None] * len(spatial))]
    expected = F.group_norm(together, groups, module.weight, module.bias, 1e-4)
    if activation:
        expected = F.silu(expected)
    out = module(x, x_bias, skip)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    if x.is_contiguous():
        assert out.is_contiguous()
    elif layout == "channels last":
        assert out.movedim(1, -1).is_contiguous()


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slices":
        return torch.stack([x, x], dim=-1)[..., 1]
    return x


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("spatial", [(), (4,), (2, 3), (2, 3, 4)])
def test_the_operator_reads_the_very_memory_of_every_rank(
    layout: str, spatial: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append(x)
        return torch.empty_like(x)

    monkeypatch.setattr("ldmperf.kernels.modules.group_norm_silu", watched)
    x = laid_out(torch.randn(2, 8, *spatial), layout)
    out = GroupNormSiLU(4, 8)(x)
    assert seen[0].data_ptr() == x.data_ptr()
    assert out.shape == x.shape
    last = layout == "channels last" and len(spatial) > 0
    assert seen[0].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_keys_that_are_masked_are_not_attended_to() -> None:
    ours, theirs = PAIRS["cross-attention"].make()
    ours.load_state_dict(theirs.state_dict())
    tokens, text = PAIRS["cross-attention"].arguments(torch.float32)
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    # diffusers has a bias for each head.
    bias = torch.where(mask, 0.0, -torch.inf)[:, None].repeat_interleave(2, dim=0)
    torch.testing.assert_close(ours(tokens, text, mask), theirs(tokens, text, bias))
    torch.testing.assert_close(ours(tokens[:1], text[:1, :2], mask[:1, :2]), ours(tokens, text[:, :2])[:1])


@pytest.mark.parametrize(
    ("name", "layer"),
    [("GEGLU", "proj"), *(("self-attention", layer) for layer in ("to_q", "to_k", "to_v", "to_out.0"))],
)
def test_a_layer_that_is_wrapped_or_watched_is_called(name: str, layer: str) -> None:
    """As adapters and offloading need it."""
    ours, theirs = PAIRS[name].make()
    ours.load_state_dict(theirs.state_dict())
    arguments = PAIRS[name].arguments(torch.float32)
    for module in (ours, theirs):
        module.get_submodule(layer).register_forward_hook(lambda module, given, out: out.sin())
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))
    for module in (ours, theirs):
        parent, _, last = layer.rpartition(".")
        setattr(module.get_submodule(parent), last, nn.Sequential(module.get_submodule(layer), nn.Tanh()))
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))


def test_dropout_acts_in_training_alone() -> None:
    ours, _ = PAIRS["attention, biases"].make()
    arguments = PAIRS["attention, biases"].arguments(torch.float32)
    assert torch.equal(ours.eval()(*arguments), ours.eval()(*arguments))
    dropped = (ours.train()(*arguments) == 0).float().mean()
    assert 0.3 < dropped < 0.7


def test_fewer_tokens_than_heads_are_no_mistake() -> None:
    module = Attention(8, heads=4, dim_head=4, backend="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(torch.randn(2, 3, 8))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no tensor": (
        lambda: GroupNormSiLU(2, 8)([1.0], torch.ones(8)),
        "group_norm_silu: x must be a tensor; got list",
    ),
    "one dimension": (lambda: GroupNormSiLU(2, 8)(torch.ones(8)), r"x must be \[B, C, ...\]; got \[8\]"),
    "no dimension": (
        lambda: GroupNormSiLU(2, 8)(torch.tensor(1.0), torch.ones(8)),
        r"x must be \[B, C, ...\]; got \[\]",
    ),
    "channels": (lambda: GroupNormSiLU(2, 8)(torch.ones(2, 6, 4)), r"weight must be a float \[6\]"),
    "bias": (
        lambda: GroupNormSiLU(2, 8)(torch.ones(2, 8, 2, 2), torch.ones(3, 8)),
        r"x_bias must be a float \[2, 8\]",
    ),
    "no bias": (lambda: GroupNormSiLU(2, 8)(torch.ones(2, 8, 2, 2), 1.0), "x_bias must be a tensor; got float"),
    "skip": (
        lambda: GroupNormSiLU(2, 8)(torch.ones(2, 4, 6), skip=torch.ones(2, 4, 7)),
        r"skip must be \[2, C2, 6\]; got \[2, 4, 7\]",
    ),
    "skip's rank": (
        lambda: GroupNormSiLU(2, 8)(torch.ones(2, 4), skip=torch.ones(2, 4, 1)),
        r"skip must be \[2, C2\]; got \[2, 4, 1\]",
    ),
    "activation": (
        lambda: GroupNormSiLU(2, 8, activation="gelu"),
        "activation must be \"silu\" or None; got 'gelu'",
    ),
    "groups": (lambda: GroupNormSiLU(3, 8), "divisible by num_groups"),
    "dtype": (
        lambda: GEGLU(4, 6)(torch.ones(2, 4).half()),
        r"weight must be float16 \[N, 4\] on cpu; got float32",
    ),
    "width": (lambda: GEGLU(4, 6)(torch.ones(2, 5)), r"weight must be float32 \[N, 5\]"),
    "image": (
        lambda: Attention(8)(torch.ones(2, 8, 4, 4)),
        r"hidden_states must be \[B, N, 8\]; got \[2, 8, 4, 4\]; an image \[B, C, H, W\] goes in as x.flatten",
    ),
    "no context": (
        lambda: Attention(8, 12)(torch.ones(2, 3, 8)),
        r"encoder_hidden_states must be \[B, Nk, 12\]; got \[2, 3, 8\]",
    ),
    "no tokens": (lambda: Attention(8)(3), r"hidden_states must be \[B, N, 8\]; got int"),
    "batch": (lambda: Attention(8, 12)(torch.ones(2, 9, 8), torch.ones(1, 9, 12)), r"k must be \[2, Nk, 8, 64\]"),
    "mask": (
        lambda: Attention(8, 12)(torch.ones(2, 9, 8), torch.ones(2, 3, 12), torch.ones(2, 3)),
        r"key_mask must be bool \[2, 3\] on cpu; got float32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_in_one_line(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
