"""Threads together in the emulator, as the PTX ISA has them: barriers, shuffles, votes, special registers."""

import itertools

import emulator_kit as kit
import numpy as np
import pytest
import torch

from ldmperf.profiling.emulator.execution import code_of, run
from ldmperf.profiling.emulator.findings import Findings
from ldmperf.profiling.emulator.global_memory import GlobalMemory
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.program import UnknownInstruction
from ldmperf.profiling.emulator.tallies import Tallies
from ldmperf.profiling.emulator.threads import LaunchGrid

LANES = np.arange(64, dtype=np.uint32)


def random_words(count=64, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)


# ---------------------------------------------------------------- shuffles


def shuffled(mode, lane, b, c):
    """(source lane, predicate) by the pseudocode of PTX ISA 9.7.9.6."""
    bval, cval, segmask = b & 31, c & 31, c >> 8 & 31
    max_lane = lane & segmask | cval & ~segmask & 31
    min_lane = lane & segmask
    match mode:
        case "up":
            j = lane - bval
            p = j >= max_lane
        case "down":
            j = lane + bval
            p = j <= max_lane
        case "bfly":
            j = lane ^ bval
            p = j <= max_lane
        case "idx":
            j = min_lane | bval & ~segmask & 31
            p = j <= max_lane
    return (j, True) if p else (lane, False)


# Segments of 32, 16, 8 lanes, with the clamps that compilers give and others.
CLAMPS = [0, 31, 0x101F, 0x1000, 0x181F, 0x1800, 0x1C1F, 0x0F, 0x1807, 0x1F1F, 13]


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_by_literals(mode, clamp):
    values = random_words()
    offsets = [0, 1, 2, 5, 16, 31, 33]
    body = [f"shfl.sync.{mode}.b32 %r{n + 10}|%p{n + 1}, %r1, {b}, {clamp}, -1;" for n, b in enumerate(offsets)]
    result = kit.execute("\n".join(body), {"%r1": values}, threads=64)
    for n, b in enumerate(offsets):
        expected = [shuffled(mode, lane % 32, b, clamp) for lane in range(64)]
        taken = [values[lane // 32 * 32 + j] for lane, (j, _) in enumerate(expected)]
        assert result.register(f"%r{n + 10}", np.uint32).tolist() == taken, b
        assert result.register(f"%p{n + 1}", bool).tolist() == [p for _, p in expected], b
    assert not result.kinds


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_by_registers(mode):
    """Each lane gives its own offset and clamp; floats are bits."""
    values, offsets = random_words(), random_words(seed=1)
    clamps = np.random.default_rng(2).choice(CLAMPS, 64).astype(np.uint32)
    body = f"shfl.sync.{mode}.b32 %r9, %r1, %r2, %r3, %r4; shfl.sync.{mode}.b32 %r8, %r1, %r2, 31, 0xffffffff;"
    given = {"%r1": values.view(np.float32), "%r2": offsets, "%r3": clamps, "%r4": np.uint32([0xFFFFFFFF])}
    result = kit.execute(body, given, threads=64)
    for name, limits in (("%r9", clamps), ("%r8", [31] * 64)):
        sources = [shuffled(mode, lane % 32, int(offsets[lane]), int(limits[lane]))[0] for lane in range(64)]
        assert result.register(name, np.uint32).tolist() == [
            values[lane & 32 | j] for lane, j in enumerate(sources)
        ]


def test_a_shuffle_of_one_value_for_all():
    result = kit.execute("shfl.sync.bfly.b32 %r9, %r1, 16, 31, -1;", {"%r1": np.uint32([5])}, threads=64)
    assert (result.register("%r9", np.uint32) == 5).all()


# ---------------------------------------------------------------- votes and reductions


REDUCTIONS = {
    "add": lambda values: sum(values),
    "min": min,
    "max": max,
    "and": lambda values: list(itertools.accumulate(values, lambda a, b: a & b))[-1],
    "or": lambda values: list(itertools.accumulate(values, lambda a, b: a | b))[-1],
    "xor": lambda values: list(itertools.accumulate(values, lambda a, b: a ^ b))[-1],
}


@pytest.mark.parametrize(
    "operation",
    ["add.s32", "add.u32", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32"],
)
def test_reductions(operation):
    name, kind = operation.split(".")
    # Bits that are mostly set, so that not all of an and is 0.
    values = random_words() | (random_words(seed=1) | random_words(seed=2) if name == "and" else 0)
    typed = values.view(np.int32) if kind == "s32" else values
    result = kit.execute(
        f"redux.sync.{operation} %r9, %r1, %r2;", {"%r1": values, "%r2": np.int32([-1])}, threads=64
    )
    expected = [REDUCTIONS[name]([int(value) for value in typed[first : first + 32]]) for first in (0, 32)]
    assert result.register("%r9", np.uint32).tolist() == [e % (1 << 32) for e in expected for _ in range(32)]


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("pattern", ["all", "none", "some", "one"])
def test_votes(pattern, negated):
    votes = {"all": LANES < 64, "none": LANES > 64, "some": random_words() % 3 == 0, "one": LANES % 32 == 31}[
        pattern
    ]
    sign = "!" if negated else ""
    body = [f"vote.sync.{mode}.pred %p{n + 2}, {sign}%p1, -1;" for n, mode in enumerate(["any", "all", "uni"])]
    result = kit.execute(
        "\n".join([*body, f"vote.sync.ballot.b32 %r9, {sign}%p1, -1;"]), {"%p1": votes}, threads=64
    )
    for first in (0, 32):
        cast = [bool(vote) != negated for vote in votes[first : first + 32]]
        told = [result.register(f"%p{n}", bool)[first : first + 32].tolist() for n in (2, 3, 4)]
        assert told == [[any(cast)] * 32, [all(cast)] * 32, [len(set(cast)) == 1] * 32]
        ballot = sum(1 << lane for lane, vote in enumerate(cast) if vote)
        assert result.register("%r9", np.uint32)[first : first + 32].tolist() == [ballot] * 32
    assert not result.kinds


@pytest.mark.parametrize(
    "text",
    [
        "shfl.bfly.b32 %r1, %r2, 1, 31;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 0xffff;",
        "shfl.sync.across.b32 %r1, %r2, 1, 31, -1;",
        "vote.any.pred %p1, %p2;",
        "vote.sync.any.pred %p1, %p2, 1;",
        "vote.sync.ballot.pred %p1, %p2, -1;",
        "redux.sync.add.b32 %r1, %r2, -1;",
        "redux.sync.and.u32 %r1, %r2, -1;",
        "redux.sync.max.f32 %r1, %r2, -1;",
        "redux.sync.add.u32 %r1, %r2, 3;",
        "bar.warp.sync 1;",
        "bar.sync 0, 64;",
        "bar.arrive 0, 64;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "barrier.cluster.arrive;",
        "activemask.b32 %r1;",
        "elect.sync %r1|%p1, -1;",
        "match.any.sync.b32 %r1, %r2, -1;",
        "mbarrier.init.shared.b64 [%r1], 1;",
        "nanosleep.u32 100;",
        "fence.mbarrier_init.release.cluster;",
        "fence.proxy.tensormap::generic.release.gpu;",
    ],
)
def test_what_is_not_known(text):
    with pytest.raises(UnknownInstruction):
        code_of(kit.ptx(text))


def test_other_lanes_than_all_are_refused_when_a_register_names_them():
    body = "redux.sync.add.u32 %r9, %r1, %r2;"
    with pytest.raises(UnknownInstruction, match="not for all lanes"):
        kit.execute(body, {"%r1": LANES[:32], "%r2": np.uint32([0xFFFF])})


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    ("mask", "body", "kinds"),
    [
        (LANES < 64, "bar.sync 0;", set()),
        (LANES < 63, "bar.sync 0;", {"divergent barrier"}),
        (LANES < 32, "bar.sync 0;", {"divergent barrier"}),
        (LANES < 32, "barrier.cta.sync.aligned 1;", {"divergent barrier"}),
        (LANES < 32, "bar.warp.sync -1;", set()),
        (LANES < 33, "bar.warp.sync -1;", {"divergent warp"}),
        (LANES < 32, "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;", set()),
        (LANES % 2 == 0, "shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;", {"divergent warp"}),
        (LANES > 0, "vote.sync.any.pred %p2, %p1, -1;", {"divergent warp"}),
        (LANES > 31, "redux.sync.add.u32 %r9, %r1, -1;", set()),
        (LANES > 32, "redux.sync.add.u32 %r9, %r1, -1;", {"divergent warp"}),
        (LANES == 7, "membar.gl; fence.acq_rel.gpu; fence.sc.cta; fence.proxy.async;", set()),
    ],
)
def test_instructions_that_threads_reach_together(mask, body, kinds):
    given = {"%p1": mask, "%r1": LANES, "%r9": LANES}
    for guarded in (
        "\n".join(f"@%p1 {part};" for part in body.rstrip(";").split(";")),
        f"@!%p1 bra $End;\n{body}\n$End:",
        f"@%p1 bra $There;\nbra.uni $End;\n$There:\n{body}\n$End:",
    ):
        assert kit.execute(guarded, given, threads=64).kinds == kinds, guarded


def test_a_shuffle_of_a_warp_leaves_others_alone():
    body = "@!%p1 bra $End;\nshfl.sync.idx.b32 %r9, %r1, 0, 31, -1;\n$End:"
    result = kit.execute(body, {"%p1": LANES > 31, "%r1": LANES, "%r9": LANES + 100}, threads=64)
    assert result.register("%r9", np.uint32).tolist() == [*range(100, 132), *[32] * 32]


def test_threads_that_are_gone_miss_at_a_barrier():
    """Each program is told of once."""
    lanes = np.arange(128, dtype=np.uint32)
    result = kit.execute("@%p1 ret;\nbar.sync 0;", {"%p1": lanes % 64 > 40}, threads=64, programs=2)
    (finding,) = result.findings
    assert (finding.kind, finding.count) == ("divergent barrier", 2)


def test_programs_that_go_apart_are_no_divergence():
    """One program is in the branch, the other not; each reaches its barrier whole."""
    program = np.arange(128) // 64
    body = """
	setp.eq.u32 %p1, %ctaid.x, 0;
	@%p1 bra $First;
	st.shared.b32 [%r1], 5;
	bar.sync 0;
	ld.shared.b32 %r9, [%r2];
	bra.uni $End;
$First:
	st.shared.b32 [%r1], 6;
	bar.sync 0;
	ld.shared.b32 %r9, [%r2];
$End:
"""
    lanes = np.arange(128, dtype=np.uint32) % 64
    result = kit.execute(body, {"%r1": lanes * 4, "%r2": (63 - lanes) * 4}, threads=64, programs=2, shared=256)
    assert not result.kinds
    assert result.register("%r9", np.uint32).tolist() == np.where(program == 0, 6, 5).tolist()
    # Without the barrier of one of them, its threads race.
    result = kit.execute(
        body.replace("bar.sync 0;", "", 1),
        {"%r1": lanes * 4, "%r2": (63 - lanes) * 4},
        threads=64,
        programs=2,
        shared=256,
    )
    (finding,) = result.findings
    assert (finding.kind, finding.ptx) == ("race", "ld.shared.b32 %r9, [%r2]")


# ---------------------------------------------------------------- special registers and masks


@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 1, 1), (2, 3, 4), (1, 5, 2), (300, 1, 1)])
@pytest.mark.parametrize("threads", [32, 96])
def test_special_registers(grid, threads):
    """What each thread of a launch stores; more than 8192 threads run in parts."""
    names = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + [
        "%laneid",
        "%warpid",
    ]
    x, y, z = grid
    out = torch.full((x * y * z * threads, len(names)), -1, dtype=torch.int32)
    body = f"""
	ld.param.b64 %rd1, [kernel_param_0];
	mad.lo.u32 %r1, %ctaid.z, {y}, %ctaid.y;
	mad.lo.u32 %r1, %r1, {x}, %ctaid.x;
	mad.lo.u32 %r1, %r1, {threads}, %tid.x;
	mul.wide.u32 %rd2, %r1, {4 * len(names)};
	add.s64 %rd1, %rd1, %rd2;
"""
    body += "".join(f"\tst.global.b32 [%rd1+{4 * n}], {name};\n" for n, name in enumerate(names))
    code = code_of(kit.ptx(body + "\tret;", threads, ["u64"]))
    memory, findings = GlobalMemory([out], [True], 4), Findings("kernel")
    values = {"kernel_param_0": np.array([memory.address(out)], np.uint64)}
    run(code, LaunchGrid(grid, values, 0), memory, findings, Tallies(code.program), Numerics())
    memory.copy_back()
    assert not findings
    expected = [
        [tid, 0, 0, threads, 1, 1, i, j, k, *grid, tid % 32, tid // 32]
        for k in range(z)
        for j in range(y)
        for i in range(x)
        for tid in range(threads)
    ]
    assert out.tolist() == expected


def test_loops_of_lanes_that_differ():
    """Each lane goes round as often as its number says, and all meet after it."""
    body = """
	mov.u32 %r2, 0;
$Loop:
	setp.ge.u32 %p1, %r2, %r1;
	@%p1 bra $Done;
	add.u32 %r2, %r2, 1;
	bra.uni $Loop;
$Done:
	vote.sync.ballot.b32 %r3, %p1, -1;
"""
    rounds = random_words(64, 3) % 9
    result = kit.execute(body, {"%r1": rounds}, threads=64)
    assert result.register("%r2", np.uint32).tolist() == rounds.tolist()
    assert (result.register("%r3", np.uint32) == 0xFFFFFFFF).all()
    assert not result.kinds


def test_guards_of_written_and_unwritten_registers():
    body = "@%p1 mov.u32 %r1, 5; @!%p1 mov.u32 %r1, 6; @%p1 mov.u32 %r2, 7; add.u32 %r3, %r2, 0;"
    result = kit.execute(body, {"%p1": LANES[:32] < 10})
    assert result.register("%r1", np.uint32).tolist() == [5] * 10 + [6] * 22
    assert result.register("%r2", np.uint32).tolist()[:10] == [7] * 10
    # What was never written is a NaN, which is seen in a result.
    assert np.isnan(result.register("%r3", np.float32)[10:]).all()
    assert kit.execute("add.u32 %r3, %r2, 0;").kinds == {"unwritten register"}


def test_guards_where_lanes_are_apart():
    """Lanes that are elsewhere do not pass, whatever their predicates."""
    body = """
	mov.u32 %r2, 1;
	@%p1 bra $There;
	@%p2 mov.u32 %r2, 2;
	@!%p2 mov.u32 %r2, 3;
	@%p2 ret;
$There:
	mov.u32 %r3, 4;
"""
    apart, passing = LANES % 2 == 0, LANES % 3 == 0
    result = kit.execute(body, {"%p1": apart, "%p2": passing, "%r3": np.zeros(1, np.uint32)}, threads=64)
    assert result.register("%r2", np.uint32).tolist() == np.where(apart, 1, np.where(passing, 2, 3)).tolist()
    assert result.register("%r3", np.uint32).tolist() == np.where(apart | ~passing, 4, 0).tolist()


def test_a_guard_that_no_lane_passes_does_nothing():
    result = kit.execute(
        "@%p1 st.shared.b32 [%r1], 5; @%p1 bar.sync 0; @%p1 bra $Away; mov.u32 %r2, 3;\n$Away:",
        {"%p1": np.zeros(1, bool)},
    )
    assert not result.kinds
    assert (result.register("%r2", np.uint32) == 3).all()


@pytest.mark.parametrize(
    ("declared", "given", "read", "expected"),
    [
        ("%r1", np.float32([-0.0]), np.uint32, 0x80000000),
        ("%rd1", np.int64([-1]), np.uint64, 2**64 - 1),
        ("%rs1", np.int16([-2]), np.uint16, 0xFFFE),
    ],
)
def test_registers_hold_bits(declared, given, read, expected):
    width = 8 * given.itemsize
    result = kit.execute(f"mov.b{width} {declared[:-1]}9, {declared};", {declared: given})
    assert set(result.register(f"{declared[:-1]}9", read).tolist()) == {expected}


def test_a_shuffle_orders_what_was_read_before_it_and_nothing_that_was_written():
    """A lane may overwrite what another has read and handed to it; it may not read what another has written."""
    lanes = np.arange(32, dtype=np.uint32)
    registers = {"%r1": 4 * lanes, "%r2": 4 * (lanes ^ 1), "%r3": lanes}
    exchange = "\tshfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;"
    held = np.zeros(32, np.uint32)
    read_first = f"\tld.shared.b32 %r3, [%r1];\n{exchange}\n\tst.shared.b32 [%r2], %r4;"
    assert kit.execute(read_first, registers, shared=128, shared_bytes=held).kinds == set()
    without = "\tld.shared.b32 %r5, [%r1];\n\tst.shared.b32 [%r2], %r3;"
    assert kit.execute(without, registers, shared=128, shared_bytes=held).kinds == {"race"}
    write_first = f"\tst.shared.b32 [%r1], %r3;\n{exchange}\n\tld.shared.b32 %r5, [%r2];"
    assert kit.execute(write_first, registers, shared=128, shared_bytes=held).kinds == {"race"}
