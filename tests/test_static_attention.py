"""Attention's loop beside its bound: tiles, cycles, work list, the document's table, against figures by hand."""

from __future__ import annotations

import io
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ldmperf.profiling.cli import main

pytest.importorskip("triton")

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.display import by_distance, print_work_list
from ldmperf.profiling.static.planned import planned
from ldmperf.profiling.static.prediction import Traffic, predict
from ldmperf.profiling.static.sass import hot_region, parse
from ldmperf.profiling.static.score_tile import beside_its_bound, score_tile, tile_bound
from ldmperf.profiling.static.shapes import SHAPES, Shape
from ldmperf.profiling.static.units import shared_operand_bytes, unit_counts
from ldmperf.profiling.step.calls import FAMILY_HEAD_DIMS

ROOT = Path(__file__).parents[1]
H200 = MACHINES["sm_90"]


def program(*lines):
    return parse("\n".join(f"        /*{16 * i:04x}*/        {line} ;" for i, line in enumerate(lines)))


def arguments(**numbers):
    return SHAPES["attention"][0](Shape(**numbers))


def launch_of(config=None, **numbers):
    """The launch for these numbers, with fields of the default configuration replaced."""
    operator = OPERATORS["attention"]
    call = operator.bind(**arguments(**numbers))
    if config is not None:
        config = type(operator.candidates(call)[0])(**config)
    (launch,) = operator.plan(call, config=config)[1]
    return launch


TILE = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2}


def test_self_attention_reads_slices_of_one_projection():
    call = arguments(batch=2, height=4, width=8, heads=8, head_dim=40)
    assert all(call[name].shape == (2, 32, 8, 40) for name in "qkv")
    assert call["q"].stride() == (32 * 3 * 8 * 40, 3 * 8 * 40, 40, 1)
    assert [call[name].storage_offset() for name in "qkv"] == [0, 320, 640]


def test_cross_attention_reads_slices_of_the_context_s_projection():
    call = arguments(batch=2, height=4, width=8, heads=4, head_dim=12, context=77)
    assert call["q"].is_contiguous()
    assert call["k"].shape == call["v"].shape == (2, 77, 4, 12)
    assert call["v"].stride() == (77 * 2 * 48, 2 * 48, 12, 1)
    assert call["v"].storage_offset() == 48


def test_the_tile_of_a_key_loop():
    tile = score_tile(launch_of(TILE | {"polynomial": 2}, head_dim=40))
    assert (tile.head_dim, tile.padded, tile.block_m, tile.block_n, tile.keys) == (40, 48, 128, 64, 64)
    assert (tile.polynomial, tile.bits, tile.passes) == (2, 16, 4096 // 64)
    # A row of 80 bytes at a multiple of 16 lies in 3 sectors of 32: 96. Of k and v for every pass, of q and the
    # result once.
    assert tile.l2_bytes == 2 * 64 * 96 + 2 * 128 * 96 / 64
    # q, k, v and the result, each 2 x 4096 x 8 x 40 elements, over 512 programs of 64 passes.
    assert tile.memory_bytes == 4 * 2 * 4096 * 8 * 40 * 2 / 512 / 64
    assert tile.per_16384 == 2


def test_the_tile_of_a_loop_over_queries():
    config = {"block_m": 64, "block_n": 0, "num_warps": 4, "num_stages": 2, "query_tiles": 4}
    tile = score_tile(launch_of(config, head_dim=16, context=77))
    assert (tile.block_m, tile.block_n, tile.keys, tile.passes) == (64, 80, 77, 4)
    # Rows of 32 bytes, one sector: queries and results of every pass, keys and values once.
    assert tile.l2_bytes == 2 * 64 * 32 + 2 * 77 * 32 / 4
    assert tile.per_16384 == pytest.approx(16384 / (64 * 77))


def test_rows_that_begin_between_sectors_ask_for_more():
    # 24 bytes at multiples of 24: in one sector where they begin at 0 or 8, in two at 16 or 24: 48 on average.
    tile = score_tile(launch_of(TILE, head_dim=12))
    assert tile.l2_bytes == 2 * 64 * 48 + 2 * 128 * 48 / 64


def test_other_kernels_have_no_tile():
    (launch,) = planned("geglu", SHAPES["geglu"][0](Shape(channels=1280)), H200)
    assert score_tile(launch) is None


@pytest.mark.parametrize(
    ("head_dim", "polynomial", "unpadded", "matrix", "exponential", "cycles", "unit"),
    [
        # 128 x 64 scores: 2 x 8192 x D products at 2048 a clock, 8192 exponentials at 16.
        (8, 0, 64, 128, 512, 512, "exponential"),
        (40, 0, 320, 384, 512, 512, "exponential"),
        (40, 4, 320, 384, 256, 384, "matrix"),
        (112, 0, 896, 896, 512, 896, "matrix"),
    ],
)
def test_the_bound_of_a_tile(head_dim, polynomial, unpadded, matrix, exponential, cycles, unit):
    bound = tile_bound(score_tile(launch_of(TILE | {"polynomial": polynomial}, head_dim=head_dim)), H200)
    assert (bound.matrix_unpadded, bound.matrix, bound.exponential) == (unpadded, matrix, exponential)
    assert (bound.cycles, bound.unit) == (cycles, unit)


def test_keys_that_are_not_there_are_no_work():
    config = {"block_m": 64, "block_n": 0, "num_warps": 4, "num_stages": 2}
    bound = tile_bound(score_tile(launch_of(config, head_dim=40, context=77)), H200)
    assert bound.exponential == 64 * 77 / 16


def test_float32_has_no_analytic_bound():
    tile = score_tile(launch_of(TILE, head_dim=40, dtype=torch.float32))
    assert tile_bound(tile, H200) is None
    told = beside_its_bound(tile, H200, {"FMA": 100.0})
    assert told["bound"] is told["distance"] is None


def test_the_distance_is_the_busiest_unit_over_the_bound():
    tile = score_tile(launch_of(TILE, head_dim=40))
    told = beside_its_bound(tile, H200, {"exponential": 544.0, "issue": 640.0, "matrix": 384.0})
    assert told["distance"] == 640 / 512
    # Of 128 x 128 scores: twice as many.
    assert told["cycles_per_16384_scores"] == {"exponential": 1088, "issue": 1280, "matrix": 768}
    # Of several passes, as where a program has no loop: one of them is told.
    assert beside_its_bound(tile, H200, {"issue": 1280.0}, passes=2)["distance"] == 640 / 512


LOOP = (
    "MOV R0, R1",  # 00
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",  # 10
    "@!P0 BRA 0x10",  # 20, waits
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT",  # 30
    "MUFU.EX2 R4, R5",  # 40
    "@!PT LDS RZ, [RZ]",  # 50, never executed
    "HGMMA.64x16x16.F32.BF16 R56, R80, gdesc[UR8].tnspB, R56, gsb0",  # 60
    "HMMA.16816.F32.BF16 R4, R80, R26, R4",  # 70
    "LDGSTS.E.BYPASS.128 [R37], desc[UR20][R24.64], !P4",  # 80
    "@P1 BRA 0x10",  # 90
    "EXIT",
)


def test_a_loop_that_waits_is_not_the_hot_one():
    region = hot_region(program(*LOOP))
    assert region.loop
    assert [i.address for i in region.instructions] == list(range(0x10, 0xA0, 0x10))


def test_a_program_that_only_waits_in_loops_has_no_hot_loop():
    region = hot_region(
        program("MOV R0, R1", "SYNCS.PHASECHK P0, [UR4], R2", "@!P0 BRA 0x10", "FADD R1, R1, R1", "EXIT")
    )
    assert not region.loop
    assert len(region) == 5


def test_cycles_of_a_loop_by_hand():
    """Of 8 warps, 256 lanes: two warp groups."""
    region = hot_region(program(*LOOP)).instructions
    found = predict(H200, region, 8, Traffic(0.0, 5120 / 132 * 7, "a pass")).cycles
    # Multiply-adds at 2048 a clock: 2 x 64 x 64 x 16, 2 x 64 x 16 x 16, and 8 x 16 x 8 x 16 of mma.sync.
    assert found["matrix"] == (2 * 64 * 64 * 16 + 2 * 64 * 16 * 16 + 8 * 16 * 8 * 16) / 2048
    assert found["exponential"] == 256 / 16
    assert found["issue"] == 8 * 9 / 4
    # One copy of 16 bytes a thread; operands in shared memory: a and b of the first product, b of the second.
    assert found["load/store"] == 256 / 32
    assert found["shared memory"] == (256 * 16 + 2 * (64 + 64) * 32 + 2 * 16 * 32) / 128
    assert found["L2"] == pytest.approx(7)
    assert "FMA" not in found


@pytest.mark.parametrize(
    ("text", "size"),
    [
        # A quarter of a warp group's: 64 rows of a and n of b, 32 bytes each.
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT", (64 + 64) * 32 / 4),
        ("HGMMA.64x256x16.F32 R24, gdesc[UR12], R24", (64 + 256) * 32 / 4),
        ("HGMMA.64x32x16.F32.BF16 R56, R80, gdesc[UR8].tnspB, R56", 32 * 32 / 4),
        ("HGMMA.64x8x8.F32.TF32 R56, R80, gdesc[UR8], R56", 8 * 32 / 4),
        ("HMMA.16816.F32.BF16 R4, R80, R26, R4", 0),
        ("LDSM.16.M88.4 R4, [R8]", 0),
    ],
)
def test_operands_of_a_product_in_shared_memory(text, size):
    assert shared_operand_bytes(program(text)[0]) == size


def test_tf32_takes_twice_the_time():
    half = unit_counts(program("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ"))
    # Half the depth in the same time.
    assert unit_counts(program("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR12], RZ"))["matrix"] == half["matrix"]
    hmma = unit_counts(program("HMMA.1688.F32.TF32 R4, R8, R12, R4"))
    assert hmma["matrix"] == unit_counts(program("HMMA.16816.F32.BF16 R4, R8, R12, R4"))["matrix"]


def result(head_dim, distance, **cycles):
    bound = None if distance is None else {"cycles": 512.0, "unit": "exponential"}
    tile = {"head_dim": head_dim, "padded": 48, "block_m": 128, "block_n": 64, "keys": 64}
    cycles = {"exponential": 1088.0, "issue": 1264.0, **cycles}
    return {
        "num_warps": 8,
        "resources": {"registers": 111},
        "faults": [],
        "attention": {
            "tile": tile,
            "cycles_per_16384_scores": cycles,
            "bound": bound,
            "distance": distance,
            "overlap": None if distance is None else {"beside_scores": 27, "exponentials": 34},
        },
    }


def test_the_work_list_begins_with_the_farthest():
    results = [result(8, 1.04), result(16, None), result(384, 1.83), result(40, 1.24)]
    assert [r["attention"]["tile"]["head_dim"] for r in by_distance(results)] == [384, 40, 8, 16]
    out = io.StringIO()
    print_work_list(results, Console(file=out, width=250))
    text = out.getvalue()
    assert "PREDICTION, not measured" in text
    lines = [line for line in text.splitlines() if "128x64" in line]
    assert [line.split()[0] for line in lines] == ["384", "40", "8", "16"]
    assert "issue" in lines[1]
    # The bound of 128 x 64 scores, told of 128 x 128.
    assert "1024 exponential" in lines[1]
    assert "1.24" in lines[1]
    assert [("27/34" in line) for line in lines] == [True, True, True, False]


@pytest.mark.parametrize("columns", [60, 80])
def test_the_work_list_on_a_narrow_terminal_has_every_number_of_a_wide_one(columns, monkeypatch):
    results = [result(8, 1.04), result(16, None), result(384, 1.83)]

    def shown(width):
        monkeypatch.setenv("COLUMNS", str(width))
        out = io.StringIO()
        print_work_list(results, Console(file=out))
        return out.getvalue()

    narrow, wide = shown(columns), shown(300)
    assert max(map(len, narrow.splitlines())) <= columns
    assert "..." not in narrow
    assert "…" not in narrow
    numbers = re.compile(r"\d[\d./x]*")
    # Below the title; "L2" is the name of a unit.
    told = [sorted(numbers.findall(text.partition("\n")[2].replace("L2", ""))) for text in (wide, narrow)]
    assert told[0] == told[1]


def test_the_family_s_head_dimensions_are_those_of_its_sizes():
    from ldmperf.model import FAMILY

    dims = {channels // 8 for config in FAMILY.values() for channels in config.block_channels}
    assert dims <= set(FAMILY_HEAD_DIMS)


@pytest.fixture
def inspect(capsys, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inspect-cache"))
    monkeypatch.setenv("COLUMNS", "250")

    def run(*options):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *options])
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return run


def test_inspect_tells_the_bound_and_the_distance(inspect):
    code, out, _ = inspect("attention", "--head-dim", "40", "--arch", "sm_90")
    assert code == 0
    assert "of 128 x 128 scores" in out
    assert "of one head of 40, held as 48" in out
    assert "(640.0 without padding)" in out or "(320.0 without padding)" in out
    assert "times the analytic bound" in out
    assert out.index("PREDICTION, not measured") < out.index("times the analytic bound")


def test_inspect_of_a_text_s_tokens_as_json(inspect):
    _, out, _ = inspect(
        "attention", "--head-dim", "16", "--context", "77", "--heads", "4", "--batch", "1", "--json"
    )
    (told,) = json.loads(out)
    attention = told["attention"]
    assert (attention["tile"]["head_dim"], attention["tile"]["keys"]) == (16, 77)
    assert told["tensor_bytes"]["k_ptr"] == 77 * 4 * 16 * 2
    cycles = told["prediction"]["cycles"]
    passes = 1 if told["region"]["loop"] else attention["tile"]["passes"]
    assert attention["distance"] == pytest.approx(
        max(cycles.values()) / passes / attention["bound"]["cycles"], rel=1e-3
    )


def test_inspect_of_the_family_is_sorted_by_the_distance(inspect, monkeypatch):
    """With two head dimensions in place of all."""
    monkeypatch.setattr("ldmperf.profiling.step.calls.FAMILY_HEAD_DIMS", (8, 112))
    code, out, _ = inspect("attention", "--head-dim", "family", "--json")
    assert code == 0
    distances = [told["attention"]["distance"] for told in json.loads(out)]
    assert len(distances) == 2
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("attention", "--head-dim", "7"), "--head-dim 7 is neither a multiple of 4 up to 384 nor `family`"),
        (("attention", "--head-dim", "388"), "nor `family`"),
        (("attention", "--head-dim", "0"), "nor `family`"),
        (("attention", "--head-dim", "all"), "--head-dim all is neither"),
        (("attention", "--head-dim", "family", "--arch", "gfx942"), "no units of gfx942 are modelled"),
        (("attention", "--head-dim", "family", "--sass"), "for --sass give one number"),
        (("attention", "--head-dim", "family", "--size", "866M"), "leave out --head-dim"),
        (("attention", "--channels", "320"), "attention takes no --channels"),
        (("geglu", "--head-dim", "40"), "geglu takes no --head-dim"),
        (("geglu", "--head-dim", "family"), "geglu takes no --head-dim"),
        (("geglu", "--context", "77"), "geglu takes no --context"),
        (("attention", "--size", "866M", "--head-dim", "40"), "leave out --head-dim"),
        (("attention", "--heads", "0"), "--heads"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(inspect, options, error):
    code, out, err = inspect(*options)
    assert code == 2
    assert out == ""
    assert error in err
    assert err.count("\n") == 1


def test_the_document_has_the_table_of_the_committed_results():
    tool = runpy.run_path(str(ROOT / "bench" / "attention_static.py"))
    path = tool["latest"]()
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [row["head_dim"] for row in document["entries"]] == list(FAMILY_HEAD_DIMS)
    text = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert tool["with_table"](text, document) == text
    assert "*Predicted*" in tool["markdown"](document)
    for row in document["entries"]:
        busiest = {name: max(row[name]["cycles"].values()) for name in ("ours", "naive")}
        assert row["ratio"] == pytest.approx(busiest["naive"] / busiest["ours"], abs=0.006)


def test_the_newest_release_of_triton_is_shown(tmp_path):
    latest = runpy.run_path(str(ROOT / "bench" / "attention_static.py"))["latest"]
    for version in ("3.6.0", "3.10.0", "3.9.1"):
        (tmp_path / f"attention-triton-{version}.json").touch()
    (tmp_path / "triton-4.0.0.json").touch()
    assert latest(tmp_path).name == "attention-triton-3.10.0.json"


def test_the_naive_kernel_pads_to_the_next_power_of_two(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import naive_attention

    for head_dim, padded in ((8, 16), (40, 64), (80, 128), (384, 512)):
        launches = naive_attention.naive_launches(**arguments(head_dim=head_dim))
        assert launches
        assert {score_tile(launch).padded for launch in launches} == {padded}
        assert {score_tile(launch).head_dim for launch in launches} == {head_dim}
