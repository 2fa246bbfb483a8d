"""What the emulator counts: instructions, sectors, wavefronts, divergence, by hand and against slow loops."""

import numpy as np
import pytest
import torch
from emulator_kit import ptx
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.emulator.execution import code_of, run
from ldmperf.profiling.emulator.findings import Findings
from ldmperf.profiling.emulator.global_memory import GlobalMemory
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.program import parse_ptx
from ldmperf.profiling.emulator.ptx_classes import CLASSES, class_of_ptx, multiply_adds_of
from ldmperf.profiling.emulator.tallies import Tallies, sectors, wavefronts
from ldmperf.profiling.emulator.threads import LaunchGrid
from ldmperf.profiling.static.units import CLASSES as UNIT_CLASSES

LANE = np.arange(32)


# ---------------------------------------------------------------- global memory


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [
        # A warp reads 128 bytes in a row: four sectors.
        (4 * LANE, 4, (4, 4)),
        (2 * LANE, 2, (2, 2)),
        (16 * LANE, 16, (16, 16)),
        # Every second word: half of each of eight sectors.
        (8 * LANE, 4, (8, 4)),
        # A column of a row-major matrix: a sector for each word.
        (4096 * LANE, 4, (32, 4)),
        # In a row, and 4 bytes past a sector's begin: part of a fifth.
        (4 * LANE + 4, 4, (5, 4)),
        # All lanes one word.
        (np.full(32, 64), 4, (1, 1)),
        # Two words, 16 lanes each, in one sector and in two.
        (4 * (LANE // 16), 4, (1, 1)),
        (128 * (LANE // 16), 4, (2, 1)),
        # Backwards is as good as forwards.
        (4 * LANE[::-1], 4, (4, 4)),
        # 32 bytes a lane (v8.b32), each a sector; at half a sector's offset each touches two.
        (32 * LANE, 32, (32, 32)),
        (64 * LANE, 32, (32, 32)),
    ],
)
def test_sectors_by_hand(start, size, expected):
    assert sectors(LANE, start, size) == expected


def test_warps_do_not_share_sectors():
    lanes = np.arange(64)
    assert sectors(lanes, np.zeros(64, int), 4) == (2, 2)
    # One lane of each of two warps.
    assert sectors(np.array([3, 40]), np.array([0, 4]), 4) == (2, 2)


# ---------------------------------------------------------------- shared memory


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [
        (4 * LANE, 4, (1, 1)),
        # Stride 2, 4 and 32 words: so many lanes want each used bank.
        (8 * LANE, 4, (2, 1)),
        (16 * LANE, 4, (4, 1)),
        (128 * LANE, 4, (32, 1)),
        # A row padded by a word: a column has every bank once.
        (132 * LANE, 4, (1, 1)),
        # Odd strides have no conflicts.
        (12 * LANE, 4, (1, 1)),
        # A broadcast, and two words of different and of one bank.
        (np.full(32, 8), 4, (1, 1)),
        (4 * (LANE % 2), 4, (1, 1)),
        (128 * (LANE % 2), 4, (2, 1)),
        # 16-bit elements in a row: two lanes share a word. Every second: none does. Every 64th: one bank.
        (2 * LANE, 2, (1, 1)),
        (4 * LANE, 2, (1, 1)),
        (128 * LANE, 2, (32, 1)),
        # v2: half warps; v4: quarter warps.
        (8 * LANE, 8, (2, 2)),
        (16 * LANE, 16, (4, 4)),
        # 8 bytes with as much between: 16 lanes want 16 of the banks, two words each.
        (16 * LANE, 8, (4, 2)),
        # v4 with a row of 128 bytes a lane: eight lanes of a quarter want the same four banks.
        (128 * LANE, 16, (32, 4)),
        # The same, padded by 16 bytes.
        (144 * LANE, 16, (4, 4)),
        # The same, swizzled: the 16 bytes of row r stand at column r of eight.
        (128 * LANE + 16 * (LANE % 8), 16, (4, 4)),
        # A broadcast of 16 bytes is one for each quarter.
        (np.zeros(32, int), 16, (4, 4)),
    ],
)
def test_wavefronts_by_hand(start, size, expected):
    assert wavefronts(LANE, start, size) == expected


def test_rows_of_ldmatrix_are_wavefronts():
    # x1: eight rows by the lanes 0 to 7. Rows of 64 bytes: four lanes share banks.
    assert wavefronts(LANE[:8], 16 * LANE[:8], 16) == (1, 1)
    assert wavefronts(LANE[:8], 64 * LANE[:8], 16) == (4, 1)
    # x4: four matrices.
    assert wavefronts(LANE, 80 * LANE, 16) == (4, 4)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_counts_agree_with_loops(data):
    """Lane by lane in Python sets."""
    size = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    lanes = np.array(sorted(data.draw(st.sets(st.integers(0, 127), min_size=1))))
    spread = data.draw(st.sampled_from([4, 64, 1024]))
    start = size * np.array(data.draw(st.lists(st.integers(0, spread), min_size=len(lanes), max_size=len(lanes))))
    touched = least = waves = least_waves = 0
    for warp in range(4):
        accesses = [int(s) for lane, s in zip(lanes, start, strict=True) if lane // 32 == warp]
        touched += len({byte // 32 for s in accesses for byte in range(s, s + size)})
        least += -(-len({byte for s in accesses for byte in range(s, s + size)}) // 32)
    at_once = min(32, 128 // size)
    for group in range(128 // at_once):
        words = {
            byte // 4
            for lane, s in zip(lanes, start, strict=True)
            if lane // at_once == group
            for byte in range(int(s), int(s) + size)
        }
        waves += max((sum(word % 32 == bank for word in words) for bank in range(32)), default=0)
        least_waves += -(-len(words) // 32)
    assert sectors(lanes, start, size) == (touched, least)
    assert wavefronts(lanes, start, size) == (waves, least_waves)


# ---------------------------------------------------------------- a run


def tallied(body, *, threads=32, programs=1, shared=0, tensor=None):
    """The tallies of statements; a tensor's address is in %rd1."""
    parameters = () if tensor is None else ("u64",)
    load = "" if tensor is None else "\tld.param.b64 \t%rd1, [kernel_param_0];\n"
    code = code_of(ptx(f"{load}{body}\n\tret;", threads, parameters))
    findings, tallies = Findings("kernel"), Tallies(code.program, detailed=True, programs=programs)
    tensors = [] if tensor is None else [tensor]
    memory = GlobalMemory(tensors, [True] * len(tensors), code.program.granules["global"])
    values = {} if tensor is None else {"kernel_param_0": np.array([memory.address(tensor)], np.uint64)}
    run(code, LaunchGrid((programs, 1, 1), values, shared), memory, findings, tallies, Numerics())
    assert not findings, list(map(str, findings))
    return tallies


DIVERGENT = """
	mov.u32 	%r1, %tid.x;
	setp.lt.u32 	%p1, %r1, 40;
	@%p1 bra 	$L1;
	add.s32 	%r2, %r1, 1;
	add.s32 	%r2, %r2, 1;
	bra 	$L2;
$L1:
	mov.u32 	%r2, 7;
$L2:
	@%p1 mov.u32 	%r3, %r2;
"""


def test_a_split_warp_is_counted():
    """96 threads: warp 0 jumps, lanes 0 to 7 of warp 1 jump, warp 2 goes on."""
    tallies = tallied(DIVERGENT, threads=96)
    classes = tallies.by_class()
    # mov, setp: 3 warps each; the mov at $L1: 2; the guarded one: 2 of three warps have lanes that pass.
    assert (classes["ALU"].warps, classes["ALU"].lanes) == (3 + 3 + 2 + 2, 96 + 96 + 40 + 40)
    assert (classes["integer"].warps, classes["integer"].lanes) == (2 + 2, 56 + 56)
    # Two branches and the return, which all come to together again.
    assert (classes["branch"].warps, classes["branch"].lanes, classes["branch"].code) == (
        3 + 2 + 3,
        96 + 56 + 96,
        3,
    )
    assert tallies.splits == 1
    assert tallies.executions.warps == sum(c.warps for c in classes.values())
    assert tallies.instructions == tallies.executions.lanes == sum(c.lanes for c in classes.values())
    assert classes["integer"].lanes_per_warp == 28


def test_only_threads_are_counted_without_details():
    code = code_of(ptx(DIVERGENT + "\tret;", 96))
    tallies = Tallies(code.program)
    run(code, LaunchGrid((5, 1, 1), {}, 0), GlobalMemory([], [], 1), Findings("k"), tallies, Numerics())
    assert tallies.instructions == 5 * tallied(DIVERGENT, threads=96).instructions
    assert tallies.accesses() == tallies.by_class() == {}


def test_accesses_of_a_run():
    """Two programs: a column of shared memory is written and read again as a row; global memory in vectors."""
    body = """
	.loc 1 10 3 // mine.py:10:3
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 7;
	st.shared.b32 	[%r2], %r1;
	bar.sync 	0;
	.loc 1 20 3 // mine.py:20:3
	ld.shared.b32 	%r3, [%r2];
	shl.b32 	%r4, %r1, 4;
	mov.u32 	%r6, %ctaid.x;
	mad.lo.u32 	%r7, %r6, 512, %r4;
	cvt.u64.u32 	%rd2, %r7;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.v4.b32 	[%rd3], {%r3, %r3, %r3, %r3};
	setp.lt.u32 	%p1, %r1, 8;
	@%p1 ld.global.b32 	%r5, [%rd3];
"""
    tallies = tallied(body, programs=2, shared=4096, tensor=torch.zeros(256, dtype=torch.int32))
    found = tallies.accesses()
    told = {kind: (a.warps, a.bytes, a.touched, a.least) for kind, a in found.items()}
    assert told == {
        ("shared", "write"): (2, 256, 64, 2),
        ("shared", "read"): (2, 256, 64, 2),
        ("global", "write"): (2, 1024, 32, 32),
        # Eight lanes, 16 bytes apart: a sector has two of their words.
        ("global", "read"): (2, 64, 8, 2),
    }
    assert found["global", "read"].efficiency == 0.25
    by_line = tallies.accesses_by_line()
    assert by_line["mine.py:10", "shared", "write"].touched == 64
    assert by_line["mine.py:20", "global", "read"].bytes == 64
    # The most wasteful first.
    assert [line for line, *_ in by_line][-1] == "mine.py:20"
    lines = tallies.by_line()
    assert lines["mine.py:10"].warps == 2 * 4
    assert lines["mine.py:20"].code == 10


def test_copies_count_in_both_spaces():
    """Lanes from 16 on copy no bytes, and write zeros."""
    body = """
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 4;
	cvt.u64.u32 	%rd2, %r2;
	add.s64 	%rd3, %rd1, %rd2;
	setp.lt.u32 	%p1, %r1, 16;
	selp.b32 	%r3, 16, 0, %p1;
	cp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, %r3;
	cp.async.commit_group;
	cp.async.wait_group 0;
"""
    tallies = tallied(body, shared=512, tensor=torch.zeros(64, dtype=torch.int32))
    told = {kind: (a.warps, a.bytes, a.touched, a.least) for kind, a in tallies.accesses().items()}
    assert told == {("global", "read"): (1, 256, 8, 8), ("shared", "write"): (1, 512, 4, 4)}
    classes = tallies.by_class()
    assert classes["async copy"].warps == 1
    assert classes["barrier"].warps == 2


def test_launches_of_one_code_are_added():
    code = code_of(ptx(DIVERGENT + "\tret;", 96))
    one, two = (Tallies(code.program, detailed=True, programs=n) for n in (1, 2))
    for tallies, programs in ((one, 1), (two, 2)):
        run(code, LaunchGrid((programs, 1, 1), {}, 0), GlobalMemory([], [], 1), Findings("k"), tallies, Numerics())
    warps, splits = one.executions.warps, one.splits
    one.add(two)
    assert (one.executions.warps, one.splits, one.programs, one.launches) == (3 * warps, 3 * splits, 3, 2)
    other = code_of(ptx("\tret;")).program
    with pytest.raises(ValueError, match="other code"):
        one.add(Tallies(other, detailed=True))


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("add.f32 %r1, %r2, %r3", "FMA"),
        ("fma.rn.bf16x2 %r1, %r2, %r3, %r4", "FMA"),
        ("mul.rn.f32 %r1, %r2, %r3", "FMA"),
        ("max.f32 %r1, %r2, %r3", "ALU"),
        ("add.s32 %r1, %r2, %r3", "integer"),
        ("mad.lo.s32 %r1, %r2, %r3, %r4", "integer"),
        ("shr.u32 %r1, %r2, 3", "integer"),
        ("xor.b32 %r1, %r2, %r3", "ALU"),
        ("setp.lt.f32 %p1, %r2, %r3", "ALU"),
        ("cvt.rn.bf16x2.f32 %r1, %r2, %r3", "conversion"),
        ("ex2.approx.ftz.f32 %r1, %r2", "exponential"),
        ("div.full.f32 %r1, %r2, %r3", "exponential"),
        ("div.s32 %r1, %r2, %r3", "integer"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]", "global load"),
        ("st.shared.b16 [%r1], %rs1", "shared store"),
        ("st.shared::cta.b16 [%r1], %rs1", "shared store"),
        ("ld.param.b64 %rd1, [kernel_param_0]", "param"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5]", "shared load"),
        ("atom.global.gpu.acq_rel.add.f32 %r1, [%rd1], %r2", "atomic"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 0x10, %r2", "async copy"),
        ("cp.async.wait_group 0", "barrier"),
        ("wgmma.wait_group.sync.aligned 0", "barrier"),
        ("wgmma.fence.sync.aligned", "barrier"),
        ("fence.proxy.async.shared::cta", "barrier"),
        ("bar.sync 0", "barrier"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1", "shuffle"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4}", "matrix"),
        ("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0", "matrix"),
        ("bra $L1", "branch"),
        ("nanosleep.u32 5", "other"),
    ],
)
def test_classes_of_instructions(text, name):
    first = parse_ptx(ptx(f"$L1:\n\t{text};")).instructions[0]
    assert class_of_ptx(first) == name


def test_classes_are_those_of_inspect():
    assert set(CLASSES.values()) <= set(UNIT_CLASSES)


def test_multiply_adds():
    text = """
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
"""
    # A warp group's four warps share 64 x 32 x 16.
    assert [multiply_adds_of(i) for i in parse_ptx(ptx(text)).instructions] == [16 * 8 * 16, 16 * 32 * 16, 0]
