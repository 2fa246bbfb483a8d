"""Tiled decode and encode: against diffusers' tiles, against the whole, and how much memory they hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmperf.model import Autoencoder, AutoencoderConfig, autoencoder_diffusers_config, autoencoder_state_dict
from ldmperf.model.tiles import Tiling, apply_tiled

pytestmark = pytest.mark.usefixtures("_one_thread")

SMALL = {"layers_per_block": 1, "norm_groups": 4, "sample_size": 16}
CONFIGS = {
    scale: AutoencoderConfig(widths, **SMALL)  # type: ignore[arg-type]
    for scale, widths in ((1, (8,)), (2, (8, 12)), (4, (4, 8, 8)))
}
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def network(config: AutoencoderConfig) -> Autoencoder:
    torch.manual_seed(0)
    ours = Autoencoder(config, backend="torch").double().eval().requires_grad_(False)
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return ours


@pytest.fixture(scope="module")
def pairs() -> dict[int, tuple[Autoencoder, AutoencoderKL]]:
    """Ours and diffusers' with the same weights, by scale."""
    found = {}
    for scale, config in CONFIGS.items():
        ours = network(config)
        theirs = AutoencoderKL(**autoencoder_diffusers_config(config)).double().eval()
        theirs.load_state_dict(autoencoder_state_dict(ours))
        theirs.enable_tiling()
        found[scale] = ours, theirs
    return found


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return ((found - exact).abs().max() / exact.abs().max()).item()


@settings(FUZZ, max_examples=30)
@given(data=st.data(), scale=st.sampled_from(sorted(CONFIGS)))
@torch.no_grad()
def test_equals_diffusers_tiles(
    pairs: dict[int, tuple[Autoencoder, AutoencoderKL]], data: st.DataObject, scale: int
) -> None:
    ours, theirs = pairs[scale]
    # Where its sizes are whole numbers: else diffusers' image has another size than the whole decode's.
    tile, overlap = data.draw(st.sampled_from(((4, 0.25), (4, 0.5), (8, 0.25), (6, 0.5), (5, 0.0), (8, 0.75))))
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = tile, tile * scale
    theirs.tile_overlap_factor = overlap
    height, width = (data.draw(st.integers(1, 2 * tile + 3)) for _ in range(2))
    batch = data.draw(st.integers(1, 2))
    latents = torch.randn(batch, 4, height, width, dtype=torch.float64)
    before = latents.clone()
    found = ours.decode_tiled(latents, tile=tile, overlap=overlap)
    assert error(found, theirs.decode(latents).sample) < 1e-9
    assert torch.equal(latents, before)
    assert found.is_contiguous(memory_format=torch.channels_last)
    rest = data.draw(st.integers(0, scale - 1))
    image = torch.randn(batch, 3, scale * height + rest, scale * width + rest, dtype=torch.float64)
    before = image.clone()
    moments = ours.encode_tiled(image, tile=tile, overlap=overlap)
    assert moments.mean.shape == latents.shape
    assert torch.equal(image, before)
    # diffusers takes pixels beside the last latent for a tile, whose convolutions have no room then.
    step = int(tile * (1 - overlap)) * scale
    assume(max(image.shape[2:]) <= tile * scale or not any(0 < size % step < scale for size in image.shape[2:]))
    exact = theirs.encode(image).latent_dist
    assert error(moments.mean, exact.mean) < 1e-9
    assert error(moments.logvar, exact.logvar) < 1e-9


@torch.no_grad()
def test_defaults_are_diffusers(pairs: dict[int, tuple[Autoencoder, AutoencoderKL]]) -> None:
    ours = network(CONFIGS[2])
    theirs = AutoencoderKL(**autoencoder_diffusers_config(ours.config)).double().eval()
    theirs.load_state_dict(autoencoder_state_dict(ours))
    theirs.enable_tiling()
    latents = torch.randn(1, 4, 13, 9, dtype=torch.float64)
    assert error(ours.decode_tiled(latents), theirs.decode(latents).sample) < 1e-9
    image = torch.randn(1, 3, 21, 30, dtype=torch.float64)
    assert error(ours.encode_tiled(image).mean, theirs.encode(image).latent_dist.mean) < 1e-9


@torch.no_grad()
def test_what_fits_into_a_tile_is_the_whole_bit_for_bit(
    pairs: dict[int, tuple[Autoencoder, AutoencoderKL]],
) -> None:
    ours, _ = pairs[4]
    latents = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert torch.equal(ours.decode_tiled(latents, tile=6), ours.decode(latents))
    image = torch.randn(2, 3, 24, 22, dtype=torch.float64)
    assert all(map(torch.equal, ours.encode_tiled(image, tile=6), ours.encode(image)))
    assert not torch.equal(ours.decode_tiled(latents, tile=5), ours.decode(latents))


@torch.no_grad()
def test_a_sample_size_below_one_latent_is_a_tile_of_one() -> None:
    ours = network(AutoencoderConfig((4, 8, 8), **SMALL | {"sample_size": 2}))  # type: ignore[arg-type]
    latents = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    assert torch.equal(ours.decode_tiled(latents), ours.decode_tiled(latents, tile=1))


@settings(FUZZ, max_examples=40)
@given(
    tile=st.integers(1, 9),
    overlap=st.floats(0, 0.95),
    size=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    scale=st.integers(1, 3),
    enlarges=st.booleans(),
)
def test_any_tiles_of_a_network_without_surroundings_are_the_whole(
    tile: int, overlap: float, size: tuple[int, int], scale: int, enlarges: bool
) -> None:
    """Both tiles of an overlap agree there: the sum of the weights is one, and no row is left out or doubled."""
    tiles = Tiling.of(tile, overlap)
    if enlarges:
        x = torch.randn(2, 1, *size, dtype=torch.float64)
        whole = F.interpolate(x, scale_factor=scale, mode="nearest")
        given_ = tiles, torch.full_like(whole, torch.nan), tiles.times(scale)
        found = apply_tiled(lambda part: F.interpolate(part, scale_factor=scale, mode="nearest"), x, *given_)
    else:
        x = torch.randn(2, 1, *(scale * n + n % scale for n in size), dtype=torch.float64)
        whole = x[:, :, : scale * size[0] : scale, : scale * size[1] : scale].clone()

        def shrink(part: Tensor) -> Tensor:
            height, width = (n // scale * scale for n in part.shape[2:])
            return part[:, :, :height:scale, :width:scale].clone()

        found = apply_tiled(shrink, x, tiles.times(scale), torch.full_like(whole, torch.nan), tiles)
    assert error(found, whole) < 1e-12


def test_tiles_share_at_least_the_overlap() -> None:
    """diffusers rounds the step down too."""
    for tile, overlap, step in ((5, 0.25, 3), (7, 0.5, 3), (6, 0.3, 4), (8, 0.0, 8), (10, 0.9, 1), (1, 0.5, 1)):
        assert Tiling.of(tile, overlap) == Tiling(tile, step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_blend_of_equal_halves_is_exact(dtype: torch.dtype) -> None:
    """It is computed in float32 and rounded once."""
    x = torch.randn(1, 2, 40, 56).to(dtype)
    tiles = Tiling.of(16, 0.5)
    assert torch.equal(apply_tiled(Tensor.clone, x, tiles, torch.empty_like(x), tiles), x)


def tile_results(ours: Autoencoder, latents: Tensor, tiles: Tiling) -> tuple[Tensor, Tensor]:
    """The least and the largest of what the tiles that cover a pixel give there."""
    scale = ours.config.scale
    size = (*latents.shape[:1], 3, *(scale * n for n in latents.shape[2:]))
    least, most = (torch.full(size, value, dtype=torch.float64) for value in (torch.inf, -torch.inf))
    for top in range(0, latents.shape[2], tiles.step):
        for left in range(0, latents.shape[3], tiles.step):
            part = ours.decode(latents[:, :, top : top + tiles.tile, left : left + tiles.tile])
            place = (
                *(slice(None), slice(None), slice(scale * top, scale * top + part.shape[2])),
                slice(scale * left, scale * left + part.shape[3]),
            )
            least[place] = torch.minimum(least[place], part)
            most[place] = torch.maximum(most[place], part)
    return least, most


@pytest.mark.parametrize(("tile", "overlap", "size"), [(8, 0.25, (19, 21)), (6, 0.3, (6, 17)), (4, 0.75, (9, 8))])
@torch.no_grad()
def test_a_pixel_is_between_what_its_tiles_give(
    pairs: dict[int, tuple[Autoencoder, AutoencoderKL]], tile: int, overlap: float, size: tuple[int, int]
) -> None:
    """The blend's error: no pixel is further from the whole decode than the worst of its own tiles."""
    ours, _ = pairs[2]
    latents = torch.randn(1, 4, *size, dtype=torch.float64)
    least, most = tile_results(ours, latents, Tiling.of(tile, overlap))
    found, whole = ours.decode_tiled(latents, tile=tile, overlap=overlap), ours.decode(latents)
    assert ((least - 1e-12 <= found) & (found <= most + 1e-12)).all()
    worst = torch.maximum((least - whole).abs(), (most - whole).abs())
    assert ((found - whole).abs() <= worst + 1e-12).all()


class Pointwise(nn.GroupNorm):
    """What is left of a group norm with a SiLU where every tile has the same statistics."""

    def forward(self, x: Tensor, x_bias: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        return F.silu(x if x_bias is None else x + x_bias[:, None, None])


@torch.no_grad()
def test_away_from_seams_tiles_differ_in_statistics_alone() -> None:
    ours = network(AutoencoderConfig((8, 8), attention=False, **SMALL))  # type: ignore[arg-type]
    latents = torch.randn(1, 4, 24, 44, dtype=torch.float64)
    for module in [m for m in ours.decoder.modules() if not isinstance(m, nn.GroupNorm)]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, Pointwise(child.num_groups, child.num_channels))
    whole = ours.decode(latents)
    difference = (ours.decode_tiled(latents, tile=32) - whole).abs().amax((0, 1, 2))
    # A pixel reaches conv_in, two blocks of the middle and two of a level: 9 latents; behind the doubling one
    # convolution, two blocks and the last convolution, 6 pixels. The first tile ends with latent 32, the second
    # begins with latent 24.
    reach = 9 + 3
    assert difference[: 2 * (32 - reach)].max() < 1e-12
    assert difference[2 * (24 + reach) :].max() < 1e-12
    assert difference[2 * 24 : 2 * 32].max() > 1e-6


@torch.no_grad()
def test_the_error_of_statistics_falls_with_the_size_of_a_tile() -> None:
    """Statistics of N pixels of one image err by 1 / sqrt(N): the side of a tile doubled, the error is half."""
    ours = network(AutoencoderConfig((8, 8), **SMALL))  # type: ignore[arg-type]
    latents = torch.randn(1, 4, 64, 64, dtype=torch.float64)
    whole = ours.decode(latents)
    errors = []
    for tile in (8, 16, 32):
        found = ours.decode_tiled(latents, tile=tile)
        errors.append(((found - whole).square().mean() / whole.var()).sqrt().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * errors[0]
    assert errors[2] < 0.15


class Live(TorchDispatchMode):
    """Counts the bytes of storages made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given_ = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given_:
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.forget, tensor.untyped_storage().nbytes())
        return out

    def forget(self, size: int) -> None:
        self.now -= size


def peak(call: Callable[[], object]) -> int:
    """The most bytes alive at once that a call made, its result included."""
    live = Live()
    with torch.no_grad(), live:
        call()
    return live.peak


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_memory_is_that_of_a_tile_beside_the_image(
    pairs: dict[int, tuple[Autoencoder, AutoencoderKL]], what: str
) -> None:
    ours, _ = pairs[4]
    scale = 4 if what == "encode" else 1
    whole, tiled = getattr(ours, what), getattr(ours, f"{what}_tiled")

    def image(height: int, width: int) -> Tensor:
        return torch.zeros(1, 3 if what == "encode" else 4, scale * height, scale * width, dtype=torch.float64)

    small = image(8, 8)
    one = peak(lambda: whole(small))
    result = 8 * (2 * 4 if what == "encode" else 3 * 16)
    for height, width in ((32, 32), (56, 24), (24, 56)):
        x = image(height, width)
        found = peak(lambda x=x: tiled(x, tile=8))
        tiles = width // 6 + 1
        # A quarter of each tile of a row, kept twice while the next row is made, and the clamp of logvar.
        strips = 2 * tiles * 8 * 2 * result
        assert found <= height * width * result * (1.5 if what == "encode" else 1) + strips + 1.2 * one
        assert found < peak(lambda x=x: whole(x)) / 2
    # Higher images take their own size more, and nothing else.
    low, high = image(32, 24), image(56, 24)
    grown = peak(lambda: tiled(high, tile=8)) - peak(lambda: tiled(low, tile=8))
    assert grown <= 24 * 24 * result * 1.5


def test_gradients_flow_through_tiles() -> None:
    weight = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 1, 5, 7, dtype=torch.float64, requires_grad=True)

    def tiled(x: Tensor, weight: Tensor) -> Tensor:
        tiles = Tiling.of(4, 0.5)
        return apply_tiled(lambda part: F.conv2d(part, weight, padding=1), x, tiles, torch.empty_like(x), tiles)

    assert torch.autograd.gradcheck(tiled, (x, weight))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"tile": 0}, "tile must be"),
        ({"tile": 2.5}, "tile must be"),
        ({"tile": True}, "tile must be"),
        ({"overlap": 1.0}, "overlap must be"),
        ({"overlap": -0.1}, "overlap must be"),
        ({"overlap": "a"}, "overlap must be"),
        ({"overlap": float("nan")}, "overlap must be"),
    ],
)
def test_no_tiles_are_refused(
    pairs: dict[int, tuple[Autoencoder, AutoencoderKL]], wrong: dict[str, Any], told: str
) -> None:
    ours, _ = pairs[1]
    for call, x in ((ours.decode_tiled, torch.zeros(1, 4, 9, 9)), (ours.encode_tiled, torch.zeros(1, 3, 9, 9))):
        with pytest.raises(ValueError, match=told) as caught:
            call(x, **wrong)
        assert "\n" not in str(caught.value)
