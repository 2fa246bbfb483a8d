"""The autoencoder against diffusers' AutoencoderKL with the same weights."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.model import (
    Autoencoder,
    AutoencoderConfig,
    Moments,
    UnsupportedConfig,
    autoencoder_diffusers_config,
    autoencoder_state_dict,
)
from ldmperf.samplers import initial_noise

pytestmark = pytest.mark.usefixtures("_one_thread")

SMALL = AutoencoderConfig((8, 16), layers_per_block=1, norm_groups=4, sample_size=16)


def pair(config: AutoencoderConfig, dtype: torch.dtype = torch.float64) -> tuple[Autoencoder, AutoencoderKL]:
    """Ours with random weights, every bias and norm weight included, and diffusers' with the same."""
    torch.manual_seed(0)
    ours = Autoencoder(config, backend="torch").to(dtype).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = AutoencoderKL(**autoencoder_diffusers_config(config)).to(dtype).eval()
    theirs.load_state_dict(autoencoder_state_dict(ours), strict=True)
    return ours, theirs


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    assert found.shape == exact.shape
    return ((found.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        wider = torch.randn(*x.shape[:2], x.shape[2] + 1, 2 * x.shape[3], dtype=x.dtype)
        wider[:, :, 1:, ::2] = x
        return wider[:, :, 1:, ::2]
    return x


@st.composite
def configs(draw: st.DrawFn) -> AutoencoderConfig:
    groups = draw(st.sampled_from((1, 2, 4)))
    widths = st.integers(1, 3).map(lambda n: 4 * groups * n)
    return AutoencoderConfig(
        tuple(draw(st.lists(widths, min_size=1, max_size=3))),
        layers_per_block=draw(st.integers(1, 2)),
        in_channels=draw(st.integers(1, 4)),
        out_channels=draw(st.integers(1, 4)),
        latent_channels=draw(st.integers(1, 5)),
        norm_groups=groups,
        attention=draw(st.booleans()),
        quant_conv=draw(st.booleans()),
        post_quant_conv=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), config=configs())
def test_equals_diffusers_in_float64(data: st.DataObject, config: AutoencoderConfig) -> None:
    ours, theirs = pair(config)
    batch, layout = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(("plain", "channels_last", "slice")))
    height, width = (data.draw(st.integers(1, 5)) for _ in range(2))
    with torch.set_grad_enabled(data.draw(st.booleans())):
        latents = torch.randn(batch, config.latent_channels, height, width, dtype=torch.float64)
        given_latents = in_layout(latents, layout)
        image = ours.decode(given_latents)
        assert error(image, theirs.decode(latents).sample) < 1e-9
        assert image.is_contiguous(memory_format=torch.channels_last)
        # Pixels beside the last whole latent, on either side, where a latent has more than one.
        rest = data.draw(st.integers(0, config.scale - 1))
        size = height * config.scale + rest, width * config.scale + config.scale - 1 - rest
        image = torch.randn(batch, config.in_channels, *size, dtype=torch.float64)
        given_image = in_layout(image, layout)
        moments, exact = ours.encode(given_image), theirs.encode(image).latent_dist
        assert error(moments.mean, exact.mean) < 1e-9
        assert error(moments.logvar, exact.logvar) < 1e-9
    # Nothing that the caller holds was written.
    assert torch.equal(given_latents, latents)
    assert torch.equal(given_image, image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_errs_no_more_than_diffusers_in_other_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = pair(AutoencoderConfig((16, 32, 32), norm_groups=8), dtype)
    exact, _ = pair(ours.config)
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    latents, image = torch.randn(2, 4, 6, 5).to(dtype), torch.randn(2, 3, 20, 24).to(dtype)
    # In float32 both err by the order of additions alone, which differs from processor to processor.
    most = 3.0 if dtype == torch.float32 else 1.5
    found, expected = ours.decode(latents), exact.decode(latents.double())
    assert found.dtype == dtype
    assert error(found, expected) < most * error(theirs.decode(latents).sample, expected)
    found, expected = ours.encode(image).mean, exact.encode(image.double()).mean
    assert error(found, expected) < most * error(theirs.encode(image).latent_dist.mean, expected)
    # Another dtype than the weights' is cast.
    assert ours.decode(latents.double()).dtype == dtype


def test_gradients_equal_diffusers() -> None:
    ours, theirs = pair(SMALL)
    image = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    mean = theirs.encode(image).latent_dist.mean
    theirs.decode(mean).sample.square().sum().backward()
    ours(image).square().sum().backward()
    with torch.device("meta"):
        other = Autoencoder(SMALL)
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    other.load_state_dict(found, assign=True)
    gradients = autoencoder_state_dict(other)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            assert error(gradients[name], parameter.grad) < 1e-9 or parameter.grad.abs().max() < 1e-12, name


def test_a_decoder_learns() -> None:
    ours, _ = pair(SMALL)
    ours.encoder.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in ours.parameters() if p.requires_grad), lr=1e-3)
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    losses = []
    for _ in range(3):
        loss = (ours(image) - image).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


def test_compiled_whole_equals_eager() -> None:
    ours, _ = pair(SMALL)
    image = torch.randn(1, 3, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        # The encoder and the decoder of its mean.
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert error(compiled(image), ours(image)) < 1e-12


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        ours = Autoencoder(AutoencoderConfig())
    assert ours.decode(torch.empty(2, 4, 64, 48, device="meta")).shape == (2, 3, 512, 384)
    assert ours.encode(torch.empty(1, 3, 515, 384, device="meta")).mean.shape == (1, 4, 64, 48)
    # The published size of the autoencoder of Stable Diffusion.
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863


class Writes(TorchDispatchMode):
    """Counts operators that write an image, and those that write a vector."""

    def __init__(self, vector: int) -> None:
        super().__init__()
        self.vector = vector
        self.images: Counter[str] = Counter()
        self.vectors = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        is_view = isinstance(out, Tensor) and any(
            isinstance(a, Tensor) and a.untyped_storage()._cdata == out.untyped_storage()._cdata for a in args
        )
        if isinstance(out, Tensor) and (not is_view or name.endswith("_")):
            if out.numel() <= self.vector:
                self.vectors += 1
            else:
                self.images[name] += 1
        return out


@torch.no_grad()
def test_operators_that_write() -> None:
    ours, theirs = pair(AutoencoderConfig((32, 64, 96, 96)), torch.float32)
    latents = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    with Writes(vector=96) as found:
        ours.decode(latents)
    assert found.images == {
        "convolution": 33,
        "group_norm_silu": 30,
        "residual_add": 12,
        # The two shortcuts and the projection of the attention, added in place; qkv and the post_quant_conv.
        "addmm_": 3,
        "addmm": 2,
        "attention": 1,
    }
    assert found.vectors == 9
    with Writes(vector=96) as theirs_found:
        theirs.decode(latents)
    # GroupNorm and attention return tuples.
    assert sum(theirs_found.images.values()) + 30 + 1 == 137


class Keeper:
    """Keeps what a module gave, and its values then."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.kept += [(out, out.clone())]


@torch.no_grad()
def test_what_a_hook_keeps_is_not_overwritten() -> None:
    ours, _ = pair(AutoencoderConfig((8, 16, 16), norm_groups=4))
    latents = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    plain = ours.decode(latents)
    keeper = Keeper()
    for module in ours.modules():
        module.register_forward_hook(keeper)
    assert error(ours.decode(latents), plain) < 1e-12
    ours.encode(plain)
    assert len(keeper.kept) > 20
    assert all(torch.equal(now, then) for now, then in keeper.kept)


def test_a_copy_and_a_pickle_are_networks_of_their_own() -> None:
    ours, _ = pair(SMALL)
    latents = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = ours.decode(latents)
        content = pickle.dumps(ours)
        # What it remembers of its modules is neither copied nor kept in a file.
        assert b"Structure" not in content
        others = copy.deepcopy(ours), pickle.loads(content)
        next(ours.parameters()).zero_()
        ours.decoder.conv_out.weight.zero_()
        for other in others:
            assert torch.equal(other.decode(latents), expected)
            assert next(other.modules()) is not ours


def test_views_write_through() -> None:
    ours, theirs = pair(SMALL)
    fresh = Autoencoder(SMALL, backend="torch").double()
    with torch.no_grad():
        for key, view in autoencoder_state_dict(fresh).items():
            view.copy_(theirs.state_dict()[key])
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), ours.parameters(), strict=True))


def test_moments() -> None:
    mean, logvar = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    moments = Moments(mean, logvar)
    noise = initial_noise([3, 2**40], (4, 3, 5))
    expected = mean.double().numpy() + np.exp(logvar.double().numpy() / 2) * noise.double().numpy()
    for sampled in (moments.sample(seeds=[3, 2**40]), moments.sample(noise=noise.double())):
        assert sampled.dtype == torch.float32
        assert np.allclose(sampled.numpy(), expected, rtol=1e-5, atol=1e-6)
    for wrong in ({}, {"seeds": [1, 2], "noise": noise}, {"seeds": [1]}, {"noise": noise[:1]}):
        with pytest.raises(ValueError, match="noise") as caught:
            moments.sample(**wrong)
        assert "\n" not in str(caught.value)


def test_the_variance_is_bounded() -> None:
    ours, theirs = pair(SMALL)
    with torch.no_grad():
        assert ours.quant_conv is not None
        ours.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 0.0, 5.0], dtype=torch.float64)
        theirs.load_state_dict(autoencoder_state_dict(ours))
        image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
        logvar = ours.encode(image).logvar
        assert torch.equal(logvar[:, :2].amax((0, 2, 3)), torch.tensor([20.0, -30.0], dtype=torch.float64))
        assert error(logvar, theirs.encode(image).latent_dist.logvar) < 1e-9


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("decode", torch.zeros(4, 3, 3)),
        ("decode", torch.zeros(1, 3, 3, 3)),
        ("decode", torch.zeros(1, 4, 0, 3)),
        ("decode", None),
        ("encode", torch.zeros(1, 3, 1, 8)),
        ("encode", torch.zeros(1, 4, 8, 8)),
        ("decode_tiled", torch.zeros(1, 3, 3, 3)),
        ("encode_tiled", torch.zeros(1, 3, 8, 1)),
    ],
)
def test_wrong_shapes_are_named(method: str, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, [34], H, W\]") as caught:
        getattr(Autoencoder(SMALL), method)(wrong)
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        Autoencoder(SMALL, backend="cuda")


def test_a_batch_of_none() -> None:
    ours, _ = pair(SMALL)
    with torch.no_grad():
        assert ours.decode(torch.zeros(0, 4, 2, 3)).shape == (0, 3, 4, 6)
        assert ours.encode(torch.zeros(0, 3, 4, 6)).mean.shape == (0, 4, 2, 3)


def test_every_field_of_diffusers_is_read_or_named() -> None:
    fields = inspect.signature(AutoencoderKL.__init__).parameters.keys() - {"self"}
    config = AutoencoderConfig(
        (8, 16), 1, 4, 2, 5, 4, False, False, False, 24, 0.5, 0.1, (1.0,) * 5, (2.0,) * 5, False
    )
    written = autoencoder_diffusers_config(config)
    assert written.keys() == fields
    assert AutoencoderConfig.from_diffusers(written) == config
    # What diffusers writes into config.json, with its version, reads back.
    theirs = AutoencoderKL(**written)
    assert AutoencoderConfig.from_diffusers(dict(theirs.config)) == config
    # Its defaults are ours.
    defaults = AutoencoderConfig.from_diffusers({})
    assert AutoencoderConfig.from_diffusers(dict(AutoencoderKL().config)) == defaults


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "AutoencoderTiny"),
        ("act_fn", "gelu"),
        ("act_fn", None),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("up_block_types", "UpDecoderBlock2D"),
        ("block_out_channels", 8),
        ("layers_per_block", [1, 2]),
        ("layers_per_block", True),
        ("latent_channels", 4.0),
        ("norm_num_groups", None),
        ("sample_size", [16, 24]),
        ("scaling_factor", "0.18"),
        ("scaling_factor", float("nan")),
        ("shift_factor", [0.1]),
        ("latents_mean", 0.0),
        ("latents_std", ["a"]),
        ("use_quant_conv", None),
        ("force_upcast", 1),
        ("norm_type", "spatial"),
        ("a\nb", 1),
    ],
)
def test_what_is_not_implemented_is_named(field: str, value: Any) -> None:
    raw = {**autoencoder_diffusers_config(SMALL), field: value}
    with pytest.raises(UnsupportedConfig) as caught:
        AutoencoderConfig.from_diffusers(raw)
    assert field.replace("\n", "\\n") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"block_channels": ()}, "at least one level"),
        ({"block_channels": (8,) * 18}, "at most 17"),
        ({"block_channels": 8}, "one entry per level"),
        ({"block_channels": (8, 6)}, "norm_groups"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"latent_channels": True}, "latent_channels"),
        ({"sample_size": 0}, "sample_size"),
        ({"scaling_factor": "a"}, "scaling_factor"),
        ({"latents_mean": (0.0,) * 3}, "3 numbers for 4 latent channels"),
        ({"latents_std": (float("inf"),) * 4}, "latents_std"),
    ],
)
def test_sizes_that_are_none_are_named(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedConfig, match=told) as caught:
        dataclasses.replace(SMALL, **wrong)
    assert "\n" not in str(caught.value)


def test_the_dtype_to_compute_in() -> None:
    wide, narrow = AutoencoderConfig(force_upcast=True), AutoencoderConfig(force_upcast=False)
    assert wide.compute_dtype(torch.float16) == torch.float32
    assert narrow.compute_dtype(torch.float16) == torch.float16
    assert {config.compute_dtype(torch.bfloat16) for config in (wide, narrow)} == {torch.bfloat16}
    assert wide.compute_dtype(torch.float64) == torch.float64
