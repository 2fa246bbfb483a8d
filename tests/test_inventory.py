"""The step inventory against counts made by hand, figures published elsewhere, and the committed document."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inventory import (
    LAUNCHES_OF_A_CAPTURE,
    SIZES,
    floors_markdown,
    inventory,
    measured_steps,
    with_inventory,
)

pytest.importorskip("diffusers")

from ldmperf.kernels import linear
from ldmperf.model import SEPARATE, UNet, UNetConfig
from ldmperf.profiling import Case, Record
from ldmperf.profiling.measure.recorded import KernelTime
from ldmperf.profiling.step.call import nbytes
from ldmperf.profiling.step.launches import GpuLaunch, total
from ldmperf.profiling.step.recorded_steps import diffusers_network, diffusers_step, our_step, record_evaluation
from ldmperf.profiling.step.recording import Recorder
from ldmperf.profiling.step.rules import UnknownOperator, flash_splits, launches_of
from ldmperf.profiling.trajectory.records import Trace

ROOT = Path(__file__).parents[1]
BF16 = torch.bfloat16
# One level: a block going down, two going up with skips, a transformer after each; 16x16 latents and 7 tokens.
TINY = UNetConfig(
    block_channels=(32,),
    num_heads=(4,),
    attention=(True,),
    layers_per_block=1,
    has_middle=False,
    context_dim=16,
    norm_groups=8,
)


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def image(*shape: int) -> torch.Tensor:
    return meta(*shape).to(memory_format=torch.channels_last)


def launches(function: Any, *args: Any, **kwargs: Any) -> list[GpuLaunch]:
    recorder = Recorder()
    with recorder, recorder.network():
        function(*args, **kwargs)
    return launches_of(recorder.calls)


def names(found: list[GpuLaunch]) -> list[str]:
    return [launch.name for launch in found]


# GFLOP of one sample in the paper's family, counted apart with diffusers' network.
@pytest.mark.parametrize(("size", "gflop"), [("39M", 53.0), ("866M", 804.3)])
def test_matrix_work_is_that_of_the_family(size: str, gflop: float) -> None:
    assert round(total(inventory(size).diffusers).flops / 2e9, 1) == gflop
    ours = total(inventory(size).ours).flops
    # What is computed once per trajectory is not in our step, and nothing else is missing.
    assert 0.98 * gflop < ours / 2e9 < gflop


@pytest.mark.parametrize(("size", "floor_ms", "digits"), [("39M", 0.45, 2), ("866M", 2.2, 1)])
def test_the_compute_floor_is_the_one_the_targets_were_set_by(size: str, floor_ms: float, digits: int) -> None:
    found = inventory(size)
    for step in (found.diffusers, found.separate):
        assert round(total(step).compute_floor_s * 1e3, digits) == floor_ms
    # Of a merged launch the longer of matmuls and softmax counts, not both.
    assert 0.98 * floor_ms < total(found.ours).compute_floor_s * 1e3 <= 1.02 * floor_ms


@pytest.mark.parametrize("size", SIZES)
def test_exponentials_are_the_same_at_every_width(size: str) -> None:
    # 2 samples x 8 heads; five transformers at each of 4096, 1024 and 256 tokens, one at 64; 77 keys beside those.
    expected = 16 * sum(count * n * (n + 77) for count, n in ((5, 4096), (5, 1024), (5, 256), (1, 64)))
    for step in inventory(size).steps:
        assert total(step).exponentials == expected


@pytest.mark.parametrize("size", SIZES)
def test_a_step_has_61_group_norms(size: str) -> None:
    found = inventory(size)
    for kind in ("moments", "coefficients", "apply"):
        assert sum(launch.name == f"group norm: {kind}" for launch in found.diffusers) == 61
    ours = Counter(launch.name for launch in found.ours)
    last = ("group_norm", "group_norm_apply", "group_norm_given", "transformer_front")
    assert sum(ours[name] for name in last) == 61


def test_our_step_counted_by_hand() -> None:
    found = launches_of(our_step(TINY, BF16, 16, 7, choices=SEPARATE))
    assert Counter(names(found)) == {
        "convolution": 2 + 3 * 2,
        "bias of a convolution": 1,  # of the last: the others' ride elsewhere
        "group_norm": 3 * (2 + 1) + 1,
        # Of the block without a shortcut: all other sums are in their last product.
        "residual_add": 1,
        # in, packed qkv, out, cross q, cross out, two of the feed-forward, out; two shortcuts of two halves.
        "linear": 3 * 8 + 2 * 2,
        "layer_norm": 3 * 3,
        "attention": 3,
        "cross-attention": 3,
        "geglu": 3,
        "sampler_update": 1,
    }
    (update,) = (launch for launch in found if launch.group == "sampler")
    # Latents in float32 read and written, two outputs and two inputs in bf16; tables of a two-step plan.
    assert update.nbytes == 4 * 16 * 16 * (4 + 4 + 2 * 2 + 2 * 2) + 4 * (2 * 3 + 2 + 2) + 8


def test_of_a_network_with_classes_one_attention_more_reads_the_context() -> None:
    config = dataclasses.replace(TINY, only_cross_attention=True, num_class_embeds=5, time_cond_proj_dim=4)
    found = Counter(names(launches_of(our_step(config, BF16, 16, 7, choices=SEPARATE))))
    usual = Counter(names(launches_of(our_step(TINY, BF16, 16, 7, choices=SEPARATE))))
    assert found - usual == {"cross-attention": 3}
    assert usual - found == {"attention": 3}
    recorder = Recorder()
    record_evaluation(recorder, diffusers_network(config, BF16), config, 16, 7)
    launches = launches_of(recorder.calls)
    theirs = Counter(names(launches))
    assert (theirs["attention"], theirs["cross-attention"]) == (0, 6)
    assert theirs["linear"] > found["linear"]
    # Two labels, and two rows of bf16 read and written.
    (gather,) = (launch for launch in launches if launch.name == "gather of a row")
    assert gather.nbytes == 2 * 8 + 2 * 2 * 2 * 4 * TINY.block_channels[0]


def test_diffusers_step_counted_by_hand() -> None:
    found = launches_of(diffusers_step(TINY, BF16, 16, 7))
    network = [launch for launch in found if launch.group != "sampler"]
    assert Counter(names(network)) == {
        "convolution": 2 + 3 * 2 + 2,
        "bias of a convolution": 10,
        # Behind a SiLU, the last one among them, or a concatenation.
        "copy to channels-last for a convolution": 10,
        "group norm: moments": 10,
        "group norm: coefficients": 10,
        "group norm: apply": 10,
        # Of 10 norms three read contiguous memory (two concatenations and the last); each transformer ends in one.
        "copy to contiguous": 7 + 3,
        "SiLU": 7 + 4,
        "layer norm": 9,
        # Two of the time embedding, a shift per block; q, k, v, out twice, two of the feed-forward, out.
        "linear": 2 + 3 + 3 * 11,
        "linear, batched": 3,
        "attention": 3,
        "cross-attention": 3,
        "GELU": 3,
        # The gate, and three of the sinusoids.
        "mul": 3 + 3,
        # Shift and residual of a block; in a transformer the first projection's bias and four residuals.
        "add": 3 * 2 + 3 * 5,
        # Scales of one: after every block and every attention; one of the sinusoids.
        "div": 3 + 6 + 1,
        "concatenation": 2 + 2,
        "cast": 2,
        "arange": 1,
        "exp": 1,
        "sin": 1,
        "cos": 1,
    }
    sampler = Counter(names([launch for launch in found if launch.group == "sampler"]))
    # Guidance: sub, mul, add. The update: sub, div, mul, mul, mul, add. t - 20, whether it is >= 0, twice.
    assert sampler == {
        "concatenation": 1,
        "sub": 3,
        "mul": 4,
        "div": 1,
        "add": 2,
        "ge": 2,
        "copy of a number to the host, which waits": 6,
    }


def test_a_convolution_of_contiguous_memory_is_copied_and_its_bias_is_a_pass() -> None:
    weight, bias = image(8, 4, 3, 3), meta(8)
    found = launches(F.conv2d, meta(2, 4, 6, 6), weight, bias, padding=1)
    assert names(found) == ["copy to channels-last for a convolution", "convolution", "bias of a convolution"]
    read, out = 2 * 2 * 4 * 36, 2 * 2 * 8 * 36
    assert [launch.nbytes for launch in found] == [2 * read, read + 2 * 8 * 4 * 9 + out, 2 * out + 2 * 8]
    assert found[1].flops == 2 * 2 * 8 * 36 * 4 * 9
    assert names(launches(F.conv2d, image(2, 4, 6, 6), weight, padding=1)) == ["convolution"]


def test_a_convolution_keeps_the_layout_that_the_next_operator_sees() -> None:
    x, first, second = meta(2, 4, 6, 6), image(8, 4, 3, 3), image(8, 8, 3, 3)

    def two() -> None:
        F.conv2d(F.conv2d(x, first), second)

    assert names(launches(two)) == ["copy to channels-last for a convolution", "convolution", "convolution"]


def test_group_norm_copies_what_is_channels_last() -> None:
    weight = meta(8)
    found = launches(F.group_norm, image(2, 8, 6, 6), 4, weight, weight)
    size, coefficients = 2 * 2 * 8 * 36, 2 * 4 * 2 * 8
    assert names(found) == [
        "copy to contiguous",
        "group norm: moments",
        "group norm: coefficients",
        "group norm: apply",
    ]
    assert found[0].nbytes == 2 * size
    assert found[3].nbytes == 2 * size + coefficients
    assert names(launches(F.group_norm, meta(2, 8, 6, 6), 4, weight, weight)) == names(found)[1:]


def test_layer_norm_of_rows_that_are_no_whole_vectors_takes_two() -> None:
    assert len(launches(F.layer_norm, meta(2, 5, 8), [8], meta(8), meta(8))) == 1
    assert len(launches(F.layer_norm, meta(2, 5, 6), [6], meta(6), meta(6))) == 2


def test_views_are_free_and_copies_are_not() -> None:
    x = meta(2, 4, 6)
    assert not launches(lambda: x.view(8, 6).t().unsqueeze(0).expand(3, -1, -1)[1:].chunk(2))
    (copied,) = launches(lambda: x.transpose(1, 2).contiguous())
    assert (copied.group, copied.nbytes) == ("copies", 2 * 2 * 48)


def test_an_expanded_tensor_is_read_once_and_one_that_is_given_twice_too() -> None:
    assert nbytes(meta(3, 1).expand(3, 100)) == 6
    (added,) = launches(torch.add, meta(4, 8), meta(1, 8))
    assert added.nbytes == 2 * (32 + 8 + 32)
    x = meta(1, 4, 6, 6)
    (both,) = launches(torch.cat, [x, x])
    assert both.nbytes == 3 * nbytes(x)


def test_what_no_rule_covers_is_named() -> None:
    with pytest.raises(UnknownOperator, match=r"aten::tan \(4x8\)"):
        launches(torch.tan, meta(4, 8))


# Tiles of 64 queries on 2 x 132 places, keys in blocks of 256, 128 or 64 by head dimension (flash_api.cpp).
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "dim", "parts"),
    [
        (16, 4096, 4096, 40, 1),  # 1024 tiles fill the chip
        (16, 256, 256, 32, 1),  # a single block of keys
        (16, 256, 256, 160, 4),  # 64 tiles, 4 blocks: 4 parts reach 256 of 264
        (16, 256, 77, 160, 2),
        (16, 64, 64, 160, 1),
        (1, 64, 4096, 128, 32),
    ],
)
def test_flash_attention_divides_its_keys_where_the_chip_is_empty(
    heads: int, queries: int, keys: int, dim: int, parts: int
) -> None:
    assert flash_splits(heads, queries, keys, dim) == parts


def test_divided_attention_is_combined_by_a_second_launch() -> None:
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    q, k, v = (meta(2, 8, 256, 160) for _ in range(3))
    divided, combined = launches(operator, q, k, v)
    partial = 4 * 4 * 16 * 256 * (192 + 1)
    assert divided.nbytes == 3 * nbytes(q) + partial
    assert combined.nbytes == partial + nbytes(q)
    assert divided.flops == 4 * 16 * 256 * 256 * 160
    assert divided.exponentials == 16 * 256 * 256
    assert not combined.flops


def test_floors_add_up_by_launch() -> None:
    # 1, 2 and 4 us of memory, matrix work and exponentials.
    memory = GpuLaunch("", "copies", "", "", 4_070_000)
    product = GpuLaunch("", "linear", "", "", 4_070_000, flops=1_484_000_000)
    softmax = GpuLaunch("", "attention", "", "", 0, flops=1_484_000_000, exponentials=15_480_000)
    found = total([memory, product, softmax])
    assert found.floor_s * 1e6 == pytest.approx(1 + 2 + 2)
    assert found.compute_floor_s * 1e6 == pytest.approx(2 + 4)
    assert found.longest_floor_s * 1e6 == pytest.approx(1 + 2 + 4)


def test_merged_products_counted_by_hand() -> None:
    found = launches_of(our_step(TINY, BF16, 16, 7, choices=SEPARATE._replace(products="auto")))
    counts = Counter(names(found))
    # Of each of three transformers: the norm before qkv, that before cross q, that before the gated product.
    assert (counts["layer_norm + linear"], counts["layer_norm + linear + geglu"]) == (3 * 2, 3)
    assert counts["linear"] == 3 * (8 - 3) + 2 * 2
    assert not counts["layer_norm"] + counts["geglu"]
    gated = next(launch for launch in found if launch.name == "layer_norm + linear + geglu")
    tokens, width = 2 * 16 * 16, 32
    # Rows, the result, the weight, its bias and three vectors of the norm.
    assert gated.nbytes == 2 * (tokens * (width + 4 * width) + 8 * width * (width + 1) + 3 * width)
    assert gated.flops == 2 * tokens * width * 8 * width


def test_a_norm_of_rows_too_wide_to_keep_is_a_launch_of_its_own() -> None:
    arguments = {"norm_weight": meta(640), "norm_bias": meta(640), "activation": "geglu"}
    norm, product = launches(linear, meta(2, 64, 640), meta(5120, 640), backend="triton", **arguments)
    assert (norm.name, norm.group) == ("layer_norm", "layer norm")
    assert (product.name, product.group) == ("linear + geglu", "linear")
    assert (norm.flops, product.flops) == (0, 2 * 128 * 640 * 5120)
    assert norm.nbytes == 2 * (2 * 128 * 640 + 2 * 640)


@pytest.mark.parametrize("size", SIZES)
def test_merging_only_takes_launches_and_bytes_away(size: str) -> None:
    before, after = total(inventory(size).separate), total(inventory(size).ours)
    assert after.flops == before.flops
    assert after.nbytes < before.nbytes
    assert after.launches < before.launches


@pytest.mark.parametrize("name", ["step-inventory.md", "performance.md"])
def test_the_document_is_what_make_inventory_writes(name: str) -> None:
    text = (ROOT / "docs" / "step-inventory.md").read_text(encoding="utf-8")
    recorded = re.search(r"from diffusers (\S+) and torch (\S+)\. ", text)
    assert recorded is not None
    installed = (version("diffusers"), version("torch").split("+")[0])
    if recorded.groups() != installed:
        pytest.skip(f"the document was made with diffusers and torch {recorded.groups()}, here are {installed}")
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert with_inventory(name, text) == text


def test_measured_times_go_beside_their_floors(
    make_record: Callable[..., Record],
) -> None:
    def record(unet: str, **changes: Any) -> Record:
        options: dict[str, Any] = {"backend": "graph", "dtype": "bfloat16", "device": "cuda"}
        step = (
            KernelTime(name="sm90_xmma_fprop_implicit_gemm", launches=52.0, ms=0.2),
            KernelTime(name="attention_kernel", launches=16.0, ms=0.4123),
            KernelTime(name="unheard_of", launches=1.0, ms=0.0077),
        )
        trace = Trace(launches=9, busy_ms=1.0, step=step)
        return make_record(Case(unet=unet, **options | changes), trace=trace)

    others = [record("866M", backend="triton"), record("866M", batch=4), record("866M", guidance_scale=1.0)]
    of_peer = record("866M", backend="diffusers")
    found = measured_steps([*others, record("39M"), of_peer, record("866M", dtype="float16")])
    assert list(found.steps) == [("39M", "graph"), ("866M", "diffusers")]
    assert found.source.startswith("GPU of unknown name, torch ")
    text = floors_markdown([inventory("39M"), inventory("866M")], found)
    small, large = text.split("### 866M")
    for table, cells in ((small, r"not measured \| {}"), (large, r"{} \| not measured")):
        for group, us in (("convolution", 200), ("attention", 412), (r"\*\*all\*\*", 620)):
            assert re.search(rf"\| {group} \|.*\| {cells.format(us)} \|", table), (group, table)
        assert table.count("not measured") == 10
    assert "Kernels of no group: none of diffusers', 8 us of ours" in small
    assert "Kernels of no group: 8 us of diffusers', none of ours" in large


def test_a_captured_step_has_two_launches_more() -> None:
    """`denoise` with a step in device memory gathers its shifts; the step is counted on once."""
    with torch.device("meta"):
        unet = UNet(TINY).to(BF16)
        conditioning = unet.condition([1.0, 2.0], meta(2, 7, 16))
        x = image(2, 4, 16, 16)
        eager = launches(unet.denoise, x, conditioning, 1)
        captured = launches(unet.denoise, x, conditioning, torch.zeros(1, dtype=torch.int64))
    more = Counter(names(captured))
    more.subtract(Counter(names(eager)))
    assert {name: count for name, count in more.items() if count} == {"gather of a row": 1}
    assert LAUNCHES_OF_A_CAPTURE == 1 + 1


def test_the_text_around_the_tables_states_no_figures_of_its_own() -> None:
    text = (ROOT / "docs" / "step-inventory.md").read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- inventory: .*?<!-- end of inventory -->", "", text, flags=re.DOTALL)
    # The conditions of the step, and names.
    allowed = {"bf16", "64x64", "77", "H200", "L2", "UNet2DConditionModel"}
    assert set(re.findall(r"\w*\d\w*", by_hand)) <= allowed
