"""Launch configurations of attention: parts of a dimension, the defaults of every architecture, the candidates."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.kernels._attention_config import candidate_configs, default_config
from ldmperf.kernels._launch import Chip
from ldmperf.kernels._parts import padded, parts
from ldmperf.kernels.attention import AttentionCall, plan

HEAD_DIMS = (8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 160, 192, 256, 384)
ARCHS = ("sm_90", "sm_80", "gfx942", "sm_86", "sm_120")


def default(queries, keys, dim, heads, itemsize=2, arch="sm_90", tf32=False, has_mask=False):
    chip = Chip("any", 132, arch)
    return default_config(queries, keys, dim, heads, itemsize, chip, tf32=tf32, has_mask=has_mask)


@given(st.integers(1, 512))
def test_parts_are_the_least_sum_of_one_or_two_powers_of_two(size):
    powers = [16, 32, 64, 128, 256, 512]
    sums = [p for p in powers if p >= size] + [p + q for p in powers for q in powers if q < p and p + q >= size]
    larger, smaller = parts(size)
    assert larger in powers
    assert smaller in (0, *powers)
    assert larger > smaller
    assert larger + smaller == min(sums) == padded(size)


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (8, (16, 0)),
        (40, (32, 16)),
        (56, (64, 0)),
        (77, (64, 16)),
        (112, (128, 0)),
        (160, (128, 32)),
        (384, (256, 128)),
    ],
)
def test_parts_of_known_dimensions(dim, expected):
    assert parts(dim) == expected


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_dimension_has_a_default_whose_buffers_fit(arch, itemsize, dim):
    shared = {"sm_90": 227, "sm_80": 163, "gfx942": 64}.get(arch, 99) * 1024
    for queries, keys, heads in ((4096, 4096, 128), (1024, 1024, 16), (64, 64, 16), (4096, 77, 16), (1, 1, 1)):
        for tf32 in (False, True) if itemsize == 4 else (False,):
            for has_mask in (False, True):
                config = default(queries, keys, dim, heads, itemsize, arch, tf32, has_mask)
                held = padded(keys) if config.block_n == 0 else config.num_stages * config.block_n
                # On AMD queries stay in registers, and a pass's own buffers are one fewer.
                if arch == "gfx942":
                    held = padded(keys) if config.block_n == 0 else max(config.num_stages - 1, 1) * config.block_n
                    assert 2 * held * padded(dim) * itemsize <= shared
                else:
                    assert (2 * held + config.block_m) * padded(dim) * itemsize <= shared


def test_few_queries_take_smaller_tiles():
    many, few = default(4096, 4096, 40, 128), default(256, 256, 40, 16)
    assert many.block_m == 128
    assert few.block_m == 64


@pytest.mark.parametrize("images", [1, 2, 16, 64])
def test_short_contexts_share_the_keys_among_tiles_without_leaving_the_chip_empty(images):
    config = default(4096, 77, 40, 8 * images)
    assert config.block_n == 0
    programs = 8 * images * -(-4096 // (config.block_m * config.query_tiles))
    assert programs >= min(8 * images * 64, 132)
    assert config.query_tiles == {1: 1, 2: 1, 16: 8, 64: 16}[images]


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("keys", "heads"), [(4096, 128), (1024, 16), (77, 128)])
def test_candidates_hold_the_default_of_an_h200_and_differ(dim, keys, heads):
    found = candidate_configs(4096, keys, dim, 2)
    assert len(set(found)) == len(found)
    assert len(found) <= 100
    # A search that is cut short has tried it: among the first of its kind.
    chosen = default(4096, keys, dim, heads)
    short = [config for config in found if config.block_n == 0]
    assert found[: len(short)] == short
    assert bool(short) == (keys <= 128)
    assert chosen in (found[len(short) : len(short) + 2] if chosen.block_n else short)
    assert found == candidate_configs(4096, keys, dim, 2)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_variants_of_a_default_s_tile_come_before_other_tiles(dim, itemsize):
    found = candidate_configs(4096, 4096, dim, itemsize)
    options = {"tf32": (False, True)} if itemsize == 4 else {"tf32": (False,)}
    defaults = [
        default(queries, queries, dim, heads, itemsize, tf32=tf32)
        for tf32 in options["tf32"]
        for queries, heads in ((4096, 128), (256, 16))
    ]
    tiles = {(c.block_m, c.block_n, c.num_warps) for c in defaults}
    assert set(defaults) <= set(found)
    of_defaults = [(c.block_m, c.block_n, c.num_warps) in tiles for c in found]
    # float32's tables, and the one at 36, list more tiles than these two calls take.
    assert of_defaults == sorted(of_defaults, reverse=True) or itemsize == 4 or dim == 36


def test_tiles_of_128_queries_by_4_warps_are_tried():
    tiles = {(c.block_m, c.block_n, c.num_warps) for c in candidate_configs(4096, 4096, 64, 2)}
    assert (128, 64, 4) in tiles


def test_products_run_ahead_only_in_tiles_of_64_queries_a_warp_group():
    """ptxas serializes the others."""
    for dim in HEAD_DIMS:
        found = [c for c in candidate_configs(4096, 4096, dim, 2) if c.ahead]
        assert all(c.block_m == 16 * c.num_warps for c in found)
        assert found or dim == 384


@pytest.mark.parametrize(
    ("dim", "tile", "ahead"),
    [
        *((dim, (64, 128, 4), False) for dim in (8, 16, 20, 24, 28, 32)),
        # Rows of 72 bytes: with triton 3.9.0, 128 queries by 4 warps would spill.
        (36, (64, 128, 4), False),
        *((dim, (128, 64, 4), False) for dim in (40, 48, 56, 64)),
        *((dim, (128, 64, 8), False) for dim in (72, 80, 96)),
        *((dim, (128, 64, 8), True) for dim in (112, 128, 144, 160, 192)),
        (256, (128, 32, 8), True),
    ],
)
def test_defaults_of_sm_90(dim, tile, ahead):
    """Those that a simulation of the machine code preferred (docs/attention.md)."""
    config = default(4096, 4096, dim, 16)
    assert (config.block_m, config.block_n, config.num_warps) == tile
    assert config.ahead == ahead


def test_a_mask_of_every_tile_takes_another_tile_where_registers_end():
    masked = {dim: default(4096, 4096, dim, 16, has_mask=True) for dim in (32, 40, 64, 256)}
    assert {dim: (c.block_m, c.block_n) for dim, c in masked.items()} == {
        32: (64, 128),
        40: (64, 128),
        64: (128, 64),
        256: (64, 64),
    }
    assert default(256, 256, 192, 16, has_mask=True).block_m == 128


def test_a_plan_says_what_can_be_left_out():
    """Comparisons only where keys may be missing; scores ahead only where none is."""

    def masks(keys, dim=40, **given):
        q, k = (torch.empty(2, n, 8, dim, dtype=torch.bfloat16, device="meta") for n in (256, keys))
        config = dataclasses.replace(default(256, keys, dim, 16), block_n=64, ahead=True)
        arguments = plan(AttentionCall(q, k, k, **given), config=config)[1][0].arguments
        return arguments["MASKS"], arguments["AHEAD"]

    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    assert masks(256) == ("none", True)
    assert masks(250) == ("last", False)
    assert masks(256, key_lengths=lengths) == ("last", False)
    assert masks(256, key_mask=torch.empty(2, 256, dtype=torch.bool, device="meta")) == ("every", False)
    assert masks(250, dim=160) == ("every", False)


def test_values_are_copied_by_ptx_only_where_wgmma_would_be_serialized():
    def copied(arch, dim=160, **given):
        q = torch.empty(2, 256, 8, dim, dtype=torch.bfloat16, device="meta")
        config = dataclasses.replace(default(256, 256, dim, 16), ahead=given.pop("ahead", True))
        return plan(AttentionCall(q, q, q, **given), config=config, chip=Chip("any", 132, arch))[1][0].arguments[
            "PTX_COPY"
        ]

    assert copied("sm_90")
    assert not copied("sm_90", ahead=False)
    assert not any(copied(arch) for arch in ("sm_80", "gfx942", "sm_120", ""))
    mask = torch.empty(2, 256, dtype=torch.bool, device="meta")
    assert copied("sm_90", dim=40, key_mask=mask)
    assert copied("sm_90", dim=160, key_mask=mask)
    assert not copied("sm_90", dim=64, key_mask=mask)
    assert not copied("sm_80", dim=40, key_mask=mask)
