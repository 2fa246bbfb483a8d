"""cp.async and fences in the emulator: what is copied, when it may be read, and what is told otherwise."""

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

LANES = np.arange(32, dtype=np.uint32)
# Bytes 0 to 4095 that differ from their neighbours.
SOURCE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4096, np.uint8))
WAIT = "cp.async.commit_group; cp.async.wait_group 0;"


def execute(body, registers=None, *, shared=1024, threads=32, source=SOURCE, **options):
    """Statements with %r1 the thread's number, and %rd1 the address of SOURCE."""
    memory = GlobalMemory([source], [False], 1)
    given = {"%r1": np.arange(threads, dtype=np.uint32), "%rd1": np.array([memory.address(source)], np.uint64)}
    return kit.execute(body, given | (registers or {}), threads=threads, shared=shared, memory=memory, **options)


def copy(size, to="%r2", source="%rd2", extra=""):
    """cp.async of a lane's `size` bytes from its place in SOURCE to the same in shared memory."""
    head = f"mul.lo.u32 %r2, %r1, {size}; mul.wide.u32 %rd2, %r1, {size}; add.u64 %rd2, %rd2, %rd1;"
    kind = "cg" if size == 16 else "ca"
    return head + f"cp.async.{kind}.shared.global [ {to} + 0 ], [ {source} + 0 ], 0x{size:x}{extra};"


def held(result, count, at=0):
    return result.threads.shared.bytes[at : at + count].tolist()


# ---------------------------------------------------------------- what is copied


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies(size):
    result = execute(copy(size) + WAIT)
    assert held(result, 32 * size) == SOURCE[: 32 * size].tolist()
    assert not result.kinds


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_of_some_lanes_and_zeros_for_others(size):
    """%r3 bytes are copied, all or none; lanes that copy none read nothing, wherever they point."""
    copied, here = LANES % 3 != 0, LANES % 5 != 0
    body = copy(size, extra=", %r3").replace("cp.async", "@%p1 cp.async")
    astray = f"@!%p2 mov.u64 %rd2, 64; {body.rsplit('@%p1', 1)[1]}"
    body = body.rsplit("@%p1", 1)[0] + astray.replace("cp.async", "@%p1 cp.async", 1)
    given = {"%r3": np.where(copied, size, 0).astype(np.uint32), "%p1": here, "%p2": copied}
    before = np.full(32 * size, 9, np.uint8)
    result = execute(body + WAIT, given, shared_bytes=before)
    expected = before.reshape(32, size)
    expected[here & copied] = SOURCE[: 32 * size].view(32, size).numpy()[here & copied]
    expected[here & ~copied] = 0
    assert held(result, 32 * size) == expected.ravel().tolist()
    assert not result.kinds


def test_a_predicate_ignores_the_source():
    result = execute(copy(8, extra=", %p3") + WAIT, {"%p3": LANES < 8})
    assert held(result, 256) == [0] * 64 + SOURCE[64:256].tolist()
    assert not result.kinds


def test_no_lane_copies():
    assert held(execute(copy(8, extra=", 0") + WAIT), 256) == [0] * 256


@pytest.mark.parametrize(
    "text",
    [
        "cp.async.ca.shared.global [%r1], [%rd1], 2;",
        "cp.async.ca.shared.global.L2::cache_hint [%r1], [%rd1], 16, %rd2;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 64, [%r2];",
        "cp.async.mbarrier.arrive.shared.b64 [%r1];",
        "cp.async.ca.shared.global [%r1], [%rd1], 16, %r2, %rd2;",
    ],
)
def test_copies_that_are_not_known(text):
    with pytest.raises(UnknownInstruction):
        code_of(kit.ptx(text))


def test_a_part_of_the_bytes_is_refused():
    with pytest.raises(UnknownInstruction, match="part of its bytes"):
        execute(copy(16, extra=", %r3"), {"%r3": np.uint32([4])})


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (copy(16, to="%r1"), {"misaligned"}),
        ("add.u64 %rd2, %rd1, 4; cp.async.cg.shared.global [global_smem], [%rd2], 16;", {"misaligned"}),
        ("add.u64 %rd2, %rd1, 4096; cp.async.ca.shared.global [global_smem], [%rd2], 4;", {"out of bounds"}),
        ("add.u64 %rd2, %rd1, -16; cp.async.ca.shared.global [global_smem], [%rd2], 16;", {"out of bounds"}),
        ("cp.async.ca.shared.global [global_smem+1024], [%rd1], 4;", {"out of bounds"}),
    ],
)
def test_copies_from_and_to_places_that_are_not_legal(body, kinds):
    only = "setp.eq.u32 %p1, %r1, 1;" + body.replace("cp.async", "@%p1 cp.async")
    assert execute(only + WAIT).kinds == kinds


# ---------------------------------------------------------------- when it may be read

READ = "ld.shared.b32 %r9, [%r2];"


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (copy(4) + WAIT + READ, set()),
        (copy(4) + "cp.async.wait_all;" + READ, set()),
        (copy(4) + "cp.async.commit_group; cp.async.wait_all;" + READ, set()),
        (copy(4) + READ + "cp.async.wait_all;", {"copy not awaited", "uninitialised"}),
        # A group has to be committed to be waited for.
        (copy(4) + "cp.async.wait_group 0;" + READ + "cp.async.wait_all;", {"copy not awaited", "uninitialised"}),
        (
            copy(4) + "cp.async.commit_group; cp.async.wait_group 1;" + READ + "cp.async.wait_all;",
            {"copy not awaited", "uninitialised"},
        ),
        # An empty group counts.
        (copy(4) + "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;" + READ, set()),
        (copy(4), {"unfinished"}),
        (copy(4) + "cp.async.commit_group;", {"unfinished"}),
        # What is written while a copy is on its way.
        (copy(4) + "st.shared.b32 [%r2], 1;" + WAIT, {"copy not awaited"}),
        (copy(4) + copy(4) + WAIT, {"copy not awaited"}),
        (copy(4) + WAIT + "bar.sync 0;" + copy(4) + WAIT + READ, set()),
        ("shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], 1;" + copy(4) + WAIT + READ, set()),
    ],
)
def test_a_thread_waits_for_its_copies(body, kinds):
    memory = GlobalMemory([SOURCE], [False], 1)
    head = "ld.param.b64 %rd1, [kernel_param_0]; mov.u32 %r1, %tid.x;"
    code = code_of(kit.ptx(f"{head}{body}\n\tret;", 32, ["u64"]))
    findings = Findings("kernel")
    values = {"kernel_param_0": np.array([memory.address(SOURCE)], np.uint64)}
    run(code, LaunchGrid((3, 1, 1), values, 1024), memory, findings, Tallies(code.program), Numerics())
    assert findings.kinds == kinds


# The word of the thread whose number differs in the last bit, and of another warp.
NEIGHBOUR = "xor.b32 %r3, %r2, 4; ld.shared.b32 %r9, [%r3];"
FAR = "xor.b32 %r3, %r2, 128; ld.shared.b32 %r9, [%r3];"


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (copy(4) + WAIT + NEIGHBOUR, {"race"}),
        (copy(4) + WAIT + "bar.warp.sync -1;" + NEIGHBOUR, set()),
        (copy(4) + WAIT + "bar.warp.sync -1;" + FAR, {"race"}),
        (copy(4) + WAIT + "bar.sync 0;" + FAR, set()),
        # A barrier before the wait orders nothing of the copy.
        (copy(4) + "cp.async.commit_group; bar.sync 0; cp.async.wait_group 0;" + FAR, {"race"}),
        # What others read, or wrote, may not be overwritten before a barrier.
        (copy(4) + WAIT + "bar.sync 0;" + FAR + copy(4) + WAIT, {"race"}),
        (copy(4) + WAIT + "bar.sync 0;" + FAR + "bar.sync 0;" + copy(4) + WAIT, set()),
        ("shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; st.shared.b32 [%r3], 1;" + copy(4) + WAIT, {"race"}),
        (
            "shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128; st.shared.b32 [%r3], 1; bar.sync 0;"
            + copy(4)
            + WAIT
            + READ,
            set(),
        ),
        (
            copy(4) + "cp.async.commit_group;" + FAR + "cp.async.wait_group 0;",
            {"copy not awaited", "uninitialised"},
        ),
    ],
)
def test_copies_race_as_stores_do_when_they_are_awaited(body, kinds):
    assert execute(body, threads=64).kinds == kinds


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_groups_arrive_in_their_order(left):
    """Four groups of one copy each; all but the last `left` are there."""
    body = "shl.b32 %r2, %r1, 2; mul.wide.u32 %rd2, %r1, 4; add.u64 %rd2, %rd2, %rd1;"
    for group in range(4):
        at = 128 * group
        body += f"cp.async.ca.shared.global [%r2+{at}], [%rd2+{at}], 4; cp.async.commit_group;"
    body += f"cp.async.wait_group {left};"
    for group in range(4):
        body += f"\n\t.loc 1 {group} 1 // step.py:{group}:1\n\tld.shared.b32 %r1{group}, [%r2+{128 * group}];"
    result = execute(body + "\n\tcp.async.wait_all;", shared_bytes=np.zeros(512, np.uint8))
    words = SOURCE.numpy()[:512].view(np.uint32).reshape(4, 32)
    for group in range(4):
        arrived = group < 4 - left
        expected = words[group] if arrived else words[group] * 0
        assert result.register(f"%r1{group}", np.uint32).tolist() == expected.tolist()
    told = {(finding.kind, finding.source) for finding in result.findings}
    assert told == {("copy not awaited", f"step.py:{group}") for group in range(4 - left, 4)}


def test_threads_count_their_own_groups():
    """Even lanes commit a group after each of two copies, odd lanes one after both: they wait for others."""
    body = """
	shl.b32 %r2, %r1, 2;
	mul.wide.u32 %rd2, %r1, 4;
	add.u64 %rd2, %rd2, %rd1;
	cp.async.ca.shared.global [%r2], [%rd2], 4;
	@%p1 cp.async.commit_group;
	cp.async.ca.shared.global [%r2+128], [%rd2+128], 4;
	cp.async.commit_group;
	cp.async.wait_group 1;
	.loc 1 1 1 // step.py:1:1
	ld.shared.b32 %r11, [%r2];
	.loc 1 2 1 // step.py:2:1
	ld.shared.b32 %r12, [%r2+128];
	@%p1 cp.async.wait_group 0;
	.loc 1 3 1 // step.py:3:1
	@%p1 ld.shared.b32 %r13, [%r2+128];
	.loc 1 4 1 // step.py:4:1
	@!%p1 ld.shared.b32 %r14, [%r2+128];
	@!%p1 cp.async.wait_group 0;
	bar.sync 0;
	ld.shared.b32 %r15, [%r2+128];
"""
    result = execute(body, {"%p1": LANES % 2 == 0}, shared_bytes=np.zeros(256, np.uint8))
    words = SOURCE.numpy()[:256].view(np.uint32).reshape(2, 32)
    assert result.register("%r11", np.uint32).tolist() == np.where(LANES % 2 == 0, words[0], 0).tolist()
    assert result.register("%r12", np.uint32).tolist() == [0] * 32
    assert result.register("%r15", np.uint32).tolist() == words[1].tolist()
    told = {(finding.source, finding.count) for finding in result.findings if finding.kind == "copy not awaited"}
    # Memory is watched in units of 4 bytes here.
    assert told == {("step.py:1", 16), ("step.py:2", 32), ("step.py:4", 16)}
    assert result.kinds == {"copy not awaited"}


def test_what_is_copied_is_read_when_the_copy_is_issued_and_has_to_be_initialised():
    from ldmperf.profiling.emulator.poison import poison

    source = torch.zeros(64)
    poison(source)
    source[:20] = 1
    (finding,) = execute(copy(4) + WAIT, source=source).findings
    assert (finding.kind, finding.count) == ("uninitialised", 12 * 4)


def test_programs_copy_to_their_own_memory():
    body = "mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd3, %r5, 128; add.u64 %rd1, %rd1, %rd3;" + copy(4) + WAIT
    memory = GlobalMemory([SOURCE], [False], 1)
    given = {"%r1": np.arange(64, dtype=np.uint32) % 32, "%rd1": np.array([memory.address(SOURCE)], np.uint64)}
    result = kit.execute(body, given, programs=2, shared=128, memory=memory)
    assert held(result, 128) == SOURCE[:128].tolist()
    assert held(result, 128, result.threads.space) == SOURCE[128:256].tolist()


# ---------------------------------------------------------------- the asynchronous proxy

# Nothing is multiplied here: that the kernel has a wgmma is what makes fences matter.
NEVER = (
    "\n\t@%p9 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r91,%r92,%r93,%r94}, "
    "%rd9, %rd8, 1, 1, 1, 0, 0;"
)


def unfenced(body, threads=128):
    """[threads] of a program: whether the word that a thread stored is hidden from the asynchronous proxy."""
    given = {"%r1": np.arange(threads, dtype=np.uint32) * 4, "%p9": np.zeros(1, bool)}
    given["%p1"] = np.arange(threads) < 32
    result = kit.execute(body + NEVER, given, threads=threads, shared=4 * threads)
    assert not result.kinds
    shared = result.threads.shared
    each = 4 // shared.granule
    return shared.unfenced[: threads * each].reshape(threads, each).all(axis=1).tolist()


@pytest.mark.parametrize(
    ("body", "hidden"),
    [
        ("st.shared.b32 [%r1], 5;", [True] * 128),
        ("st.shared.b32 [%r1], 5; fence.proxy.async.shared::cta;", [False] * 128),
        ("st.shared.b32 [%r1], 5; fence.proxy.async;", [False] * 128),
        ("st.shared.b32 [%r1], 5; fence.proxy.async.global;", [True] * 128),
        ("st.shared.b32 [%r1], 5; fence.acq_rel.cta; membar.cta;", [True] * 128),
        ("fence.proxy.async.shared::cta; st.shared.b32 [%r1], 5;", [True] * 128),
        # A warp's fence is of its own stores, and of all that a barrier ordered before it.
        ("st.shared.b32 [%r1], 5; @%p1 fence.proxy.async.shared::cta;", [False] * 32 + [True] * 96),
        ("st.shared.b32 [%r1], 5; bar.sync 0; @%p1 fence.proxy.async.shared::cta;", [False] * 128),
        (
            "st.shared.b32 [%r1], 5; bar.sync 0; st.shared.b32 [%r1], 6; @%p1 fence.proxy.async.shared::cta;",
            [False] * 32 + [True] * 96,
        ),
        (
            "st.shared.b32 [%r1], 5; bar.sync 0; st.shared.b32 [%r1], 6; @!%p1 fence.proxy.async.shared::cta;",
            [True] * 32 + [False] * 96,
        ),
        # A read between makes the notes of stores be entered.
        (
            "st.shared.b32 [%r1], 5; bar.sync 0; @%p1 st.shared.b32 [%r1], 6; @%p1 ld.shared.b32 %r9, [%r1];"
            "bar.sync 0; @%p1 fence.proxy.async.shared::cta;",
            [False] * 128,
        ),
        (
            "st.shared.b32 [%r1], 5; bar.sync 0; @!%p1 st.shared.b32 [%r1], 6; @!%p1 ld.shared.b32 %r9, [%r1];"
            "@%p1 fence.proxy.async.shared::cta;",
            [False] * 32 + [True] * 96,
        ),
    ],
)
def test_fences_of_the_asynchronous_proxy(body, hidden):
    assert unfenced(body) == hidden


def test_a_fence_orders_nothing_between_threads():
    body = "st.shared.b32 [%r1], 5; fence.proxy.async.shared::cta; xor.b32 %r2, %r1, 4; ld.shared.b32 %r9, [%r2];"
    for between, kinds in (("", {"race"}), ("bar.sync 0;", set())):
        given = {"%r1": np.arange(128, dtype=np.uint32) * 4, "%p9": np.zeros(1, bool)}
        fenced = body.replace("xor", f"{between} xor")
        assert kit.execute(fenced + NEVER, given, threads=128, shared=512).kinds == kinds


def test_a_fence_of_one_program_is_not_of_another():
    given = {
        "%r1": np.arange(256, dtype=np.uint32) % 128 * 4,
        "%p9": np.zeros(1, bool),
        "%p1": np.arange(256) < 128,
    }
    body = "st.shared.b32 [%r1], 5; bar.sync 0; @%p1 fence.proxy.async.shared::cta;" + NEVER
    shared = (result := kit.execute(body, given, threads=128, programs=2, shared=512)).threads.shared
    words = shared.unfenced.reshape(-1, 4 // shared.granule)
    assert not words[:128].any()
    assert words[result.threads.space // 4 :][:128].all()
