"""Memory in the emulator: loads, stores and atomics of every width, what is legal, and races by a slow oracle."""

import itertools
import re
from unittest import mock

import emulator_kit as kit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.emulator import memory
from ldmperf.profiling.emulator.execution import code_of, run
from ldmperf.profiling.emulator.findings import Findings
from ldmperf.profiling.emulator.global_memory import BASE, GlobalMemory
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.program import UnknownInstruction
from ldmperf.profiling.emulator.tallies import Tallies
from ldmperf.profiling.emulator.threads import LaunchGrid
from ldmperf.profiling.options import CaseError

# ---------------------------------------------------------------- races, by an oracle that keeps everything


class Oracle:
    """Every access since the beginning, by unit of memory. Threads are numbers; a step is an instruction."""

    def __init__(self, memory, threads):
        self.memory, self.threads = memory, threads
        self.reads = {unit: [] for unit in range(len(memory))}
        self.last_write = {}
        self.barriers = []

    def barrier(self, step, threads):
        """These threads wait for each other."""
        self.barriers.append((step, set(threads)))

    def ordered(self, first, second):
        """Whether a barrier of both threads is between two (thread, step)."""
        (one, before), (other, after) = first, second
        return one == other or any(
            before < step < after and one in those and other in those for step, those in self.barriers
        )

    def races(self, first, second):
        return first[0] // self.threads == second[0] // self.threads and not self.ordered(first, second)

    def read(self, step, accesses):
        """accesses: [(thread, units)]. Whether one of them races."""
        found = any(
            self.races(self.last_write[unit], (thread, step))
            for thread, units in accesses
            for unit in units
            if unit in self.last_write
        )
        for thread, units in accesses:
            for unit in units:
                self.reads[unit].append((thread, step))
        return found

    def write(self, step, accesses, values):
        """values: what each stores in its units. (whether one races, whether they store different values)"""
        found = False
        for (thread, units), stored in zip(accesses, values, strict=True):
            for unit, value in zip(units, stored, strict=True):
                found |= any(self.races(read, (thread, step)) for read in self.reads[unit])
                if unit in self.last_write and value != self.memory[unit]:
                    found |= self.races(self.last_write[unit], (thread, step))
        given = {}
        for (thread, units), stored in zip(accesses, values, strict=True):
            for unit, value in zip(units, stored, strict=True):
                given.setdefault(unit, set()).add(value)
                self.memory[unit] = value
                self.last_write[unit] = thread, step
        return found, any(len(those) > 1 for those in given.values())


PROGRAMS, THREADS, BYTES = 2, 64, 16
LANES = PROGRAMS * THREADS
WARPS = [range(first, first + 32) for first in range(0, LANES, 32)]
# Threads that meet often: of two warps of the first program, and one of the second.
FEW = (0, 0, 1, 1, 2, 32, 33, 64)


def lanes_of(rng):
    """A random set of lanes: mostly one or two of a few, else all, a warp's, or some of a program."""
    mask = np.zeros(LANES, bool)
    match rng.integers(12):
        case 0:
            mask[:] = True
        case 1:
            mask[WARPS[rng.integers(4)]] = True
        case 2:
            mask[: LANES // 2] = rng.random(LANES // 2) < 0.1
        case _:
            mask[rng.choice(FEW, rng.choice([1, 1, 2]))] = True
    return mask


KINDS = ["read"] * 6 + ["write"] * 4 + ["warp barrier"] * 2 + ["program barrier", "barrier"]


@st.composite
def sequences(draw):
    """(narrowest access, steps): a step is (kind, lanes, size, [lanes] positions, [lanes, words] values)."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    unit = rng.choice([1, 2, 4])
    steps = []
    for _ in range(draw(st.integers(2, 40))):
        kind = KINDS[rng.integers(len(KINDS))]
        mask = lanes_of(rng)
        if kind == "barrier":
            mask[:] = True
        elif kind == "program barrier":
            mask = np.repeat([True, False] if rng.integers(2) else [False, True], THREADS)
        elif kind == "warp barrier":
            mask = np.repeat(rng.random(4) < 0.5, 32)
        size = unit * rng.choice([1, 1, 1, 2, 4])
        reach = 1 if rng.integers(4) else min(3, BYTES // size)
        position = np.full(LANES, rng.integers(reach)) if rng.integers(2) else rng.integers(0, reach, LANES)
        values = rng.integers(0, 1 + rng.integers(2), (LANES, size // unit))
        steps.append((kind, mask, int(size), position * size, values))
    return int(unit), steps


def instructions(unit, steps):
    """(PTX with a source line for each step, the registers that it needs)."""
    body, registers = [], {}
    for n, (kind, mask, size, position, values) in enumerate(steps, start=1):
        guard, address = f"%p{n}", f"%r{100 * n}"
        registers[guard], registers[address] = mask, position.astype(np.uint32)
        body.append(f"\t.loc 1 {n} 1 // step.py:{n}:1")
        words = [f"%{ {1: 'rs', 2: 'rs', 4: 'r'}[unit] }{100 * n + 1 + k}" for k in range(size // unit)]
        vector = f".v{len(words)}" if len(words) > 1 else ""
        listed = f"{{{', '.join(words)}}}" if vector else words[0]
        match kind:
            case "read":
                body.append(f"\t@{guard} ld.shared{vector}.b{8 * unit} {listed}, [{address}];")
            case "write":
                body.append(f"\t@{guard} st.shared{vector}.b{8 * unit} [{address}], {listed};")
                dtype = np.uint32 if unit == 4 else np.uint16
                registers |= {word: values[:, k].astype(dtype) for k, word in enumerate(words)}
            case "warp barrier":
                body.append(f"\t@{guard} bar.warp.sync -1;")
            case _:
                body.append(f"\t@{guard} bar.sync 0;")
    return "\n".join(body), registers


def expected_findings(unit, steps):
    """{(kind, step)} by the oracle, with units of all programs' shared memory."""
    oracle, found = Oracle([0] * (PROGRAMS * BYTES // unit), THREADS), set()
    for n, (kind, mask, size, position, values) in enumerate(steps, start=1):
        lanes = np.flatnonzero(mask)
        if not len(lanes):
            continue
        at = (position + np.arange(LANES) // THREADS * BYTES) // unit
        accesses = [(lane, range(at[lane], at[lane] + size // unit)) for lane in lanes]
        if kind == "read" and oracle.read(n, accesses):
            found.add(("race", n))
        elif kind == "write":
            race, conflict = oracle.write(n, accesses, [[int(v) for v in values[lane]] for lane in lanes])
            found |= {("race", n)} if race else set()
            found |= {("conflicting stores", n)} if conflict else set()
        elif kind == "warp barrier":
            for warp in WARPS:
                if mask[warp[0]]:
                    oracle.barrier(n, warp)
        elif kind.endswith("barrier"):
            for first in range(0, LANES, THREADS):
                if mask[first]:
                    oracle.barrier(n, range(first, first + THREADS))
    return found, oracle.memory


@settings(max_examples=200, deadline=None)
@given(sequences(), st.sampled_from([3, 256]))
def test_races_are_those_of_an_oracle_that_keeps_everything(sequence, notes):
    unit, steps = sequence
    # Of a register of 16 bits, a byte is stored: its narrowest access decides what memory is watched by.
    body, registers = instructions(unit, steps)
    body += f"\n\t@%p998 ld.shared.b{8 * unit} %rs998, [%r998];"
    registers |= {"%p998": np.zeros(1, bool), "%r998": np.zeros(1, np.uint32), "%rs998": np.zeros(1, np.uint16)}
    if unit == 4:
        body = body.replace("%rs998", "%r997")
    with mock.patch.object(memory, "_NOTES", notes):
        result = kit.execute(
            body,
            registers,
            threads=THREADS,
            programs=PROGRAMS,
            shared=BYTES,
            shared_bytes=np.zeros(BYTES, np.uint8),
        )
    found = {(finding.kind, int(re.search(r"\d+", finding.source)[0])) for finding in result.findings}
    expected, held = expected_findings(unit, steps)
    assert found == expected
    for program in range(PROGRAMS):
        at = program * result.threads.space
        stored = result.threads.shared.bytes[at : at + BYTES].view(f"u{unit}")
        assert stored.tolist() == held[program * BYTES // unit : (program + 1) * BYTES // unit]


# ---------------------------------------------------------------- races, one by one


def shared_race(body, threads=64, **registers):
    """Kinds of findings of statements on 64 bytes of initialised shared memory; %r1 is 4 times the thread."""
    lanes = np.arange(threads, dtype=np.uint32)
    given = {"%r1": lanes * 4 % 64, "%r2": lanes, "%r3": np.zeros(1, np.uint32)}
    given |= {f"%p{n + 1}": lanes == thread for n, thread in enumerate((0, 1, 33))}
    result = kit.execute(body, given | registers, threads=threads, shared=64, shared_bytes=np.zeros(64, np.uint8))
    return result.kinds


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        # p1, p2, p3 are threads 0, 1 and 33; %r3 is address 0, %r2 the thread's number.
        ("@%p1 st.shared.b32 [%r3], 1; @%p3 ld.shared.b32 %r9, [%r3];", {"race"}),
        ("@%p1 st.shared.b32 [%r3], 1; bar.sync 0; @%p3 ld.shared.b32 %r9, [%r3];", set()),
        ("@%p1 st.shared.b32 [%r3], 1; bar.warp.sync -1; @%p3 ld.shared.b32 %r9, [%r3];", {"race"}),
        ("@%p1 st.shared.b32 [%r3], 1; @%p2 ld.shared.b32 %r9, [%r3];", {"race"}),
        ("@%p1 st.shared.b32 [%r3], 1; bar.warp.sync 0xffffffff; @%p2 ld.shared.b32 %r9, [%r3];", set()),
        ("@%p1 st.shared.b32 [%r3], 1; @%p1 ld.shared.b32 %r9, [%r3];", set()),
        ("@%p1 ld.shared.b32 %r9, [%r3]; @%p3 st.shared.b32 [%r3], 1;", {"race"}),
        ("@%p1 ld.shared.b32 %r9, [%r3]; barrier.sync 0; @%p3 st.shared.b32 [%r3], 1;", set()),
        # What all have read, one of them may not overwrite.
        ("ld.shared.b32 %r9, [global_smem]; @%p1 st.shared.b32 [global_smem], 1;", {"race"}),
        ("ld.shared.b32 %r9, [global_smem]; bar.sync 0; @%p1 st.shared.b32 [global_smem], 1;", set()),
        ("@%p1 st.shared.b32 [%r3], 1; @%p3 st.shared.b32 [%r3], 2;", {"race"}),
        ("@%p1 st.shared.b32 [%r3], 1; @%p3 st.shared.b32 [%r3], 1;", set()),
        ("@%p1 st.shared.b32 [%r3], 1; @%p3 st.shared.b32 [%r3+4], 2;", set()),
        # Of 8 bytes, only those that are stored again are another's.
        ("@%p1 st.shared.b32 [%r3], 1; @%p3 st.shared.v2.b32 [%r3], {1, 2};", set()),
        ("@%p1 st.shared.b32 [%r3], 1; @%p3 st.shared.v2.b32 [%r3], {3, 0};", {"race"}),
        ("st.shared.b32 [global_smem], 5;", set()),
        ("st.shared.b32 [global_smem], %r2;", {"conflicting stores"}),
        ("@%p1 st.shared.b8 [%r3+3], 1; @%p3 ld.shared.b32 %r9, [%r3];", {"race"}),
        ("@%p1 st.shared.b8 [%r3+3], 1; @%p3 ld.shared.b16 %rs9, [%r3];", set()),
        # Atomics do not race with each other, but with what is not atomic.
        ("atom.shared.add.u32 %r9, [global_smem], 1; red.shared.max.u32 [global_smem], 3;", set()),
        ("@%p1 st.shared.b32 [%r3], 0; atom.shared.add.u32 %r9, [global_smem], 1;", {"race"}),
        ("atom.shared.add.u32 %r9, [global_smem], 1; ld.shared.b32 %r9, [global_smem];", {"race"}),
        ("ld.shared.b32 %r9, [global_smem]; red.shared.add.u32 [global_smem], 1;", {"race"}),
        ("@%p1 red.shared.add.u32 [%r3], 1; bar.sync 0; ld.shared.b32 %r9, [global_smem];", set()),
    ],
)
def test_races_in_shared_memory(body, kinds):
    assert shared_race(body) == kinds


def test_programs_have_a_shared_memory_each():
    body = "@%p1 st.shared.b32 [global_smem], %r2; @%p2 ld.shared.b32 %r9, [global_smem];"
    lanes = np.arange(64, dtype=np.uint32)
    given = {"%r2": lanes, "%p1": lanes == 0, "%p2": lanes == 32}
    result = kit.execute(body, given, threads=32, programs=2, shared=4, shared_bytes=np.uint32([7]))
    assert not result.kinds
    assert result.register("%r9", np.uint32)[32] == 7


# ---------------------------------------------------------------- global memory


def launched(body, tensors, *, threads=32, grid=(1, 1, 1), stored=None, granule=None):
    """Runs statements whose first parameters are the addresses of tensors, in %rd1 and following."""
    head = "".join(f"\tld.param.b64 %rd{n + 1}, [kernel_param_{n}];\n" for n in range(len(tensors)))
    head += "\tmov.u32 %r1, %tid.x;\n\tmov.u32 %r2, %ctaid.x;\n"
    code = code_of(kit.ptx(head + body + "\n\tret;", threads, ["u64"] * len(tensors)))
    memory = GlobalMemory(tensors, stored or [True] * len(tensors), granule or code.program.granules["global"])
    values = {f"kernel_param_{n}": np.array([memory.address(t)], np.uint64) for n, t in enumerate(tensors)}
    findings = Findings("kernel")
    run(code, LaunchGrid(grid, values, 0), memory, findings, Tallies(code.program), Numerics())
    memory.copy_back()
    return findings


# %rd9 is the address of the thread's element of the first tensor, whatever the program.
MINE = "\tmul.wide.u32 %rd8, %r1, 4;\n\tadd.s64 %rd9, %rd1, %rd8;\n"
# And with the program's number: 32 elements each.
OURS = "\tmad.lo.s32 %r3, %r2, 32, %r1;\n\tmul.wide.u32 %rd8, %r3, 4;\n\tadd.s64 %rd9, %rd1, %rd8;\n"


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (OURS + "ld.global.b32 %r9, [%rd9]; st.global.b32 [%rd9], %r9;", set()),
        (MINE + "ld.global.b32 %r9, [%rd9]; st.global.b32 [%rd9], %r9;", {"race of programs"}),
        (MINE + "st.global.b32 [%rd9], %r1;", set()),
        (MINE + "add.u32 %r4, %r2, %r2; setp.eq.u32 %p1, %r2, 0; @%p1 st.global.b32 [%rd9], 7;", set()),
        (OURS + "st.global.b32 [%rd9], %r1; bar.sync 0; ld.global.b32 %r9, [%rd1];", {"race of programs"}),
        (OURS + "ld.global.b32 %r9, [%rd1]; bar.sync 0; st.global.b32 [%rd9], %r1;", {"race of programs"}),
        (OURS + "ld.global.b32 %r9, [%rd1];", set()),
        (MINE + "red.global.add.u32 [%rd9], 1;", set()),
    ],
)
@pytest.mark.parametrize("programs", [2, 300])
def test_races_of_programs(body, kinds, programs):
    """300 programs do not run at once: those of different chunks race as well."""
    x = torch.arange(32 * programs, dtype=torch.int32)
    # Readers that are of several programs are told as several warps too.
    assert launched(body, [x], grid=(programs, 1, 1)).kinds - {"race"} == kinds


@pytest.mark.parametrize(("programs", "kinds"), [(2, {"conflicting stores"}), (300, {"race of programs"})])
def test_programs_that_store_different_values(programs, kinds):
    """At once, or one chunk of programs after the other."""
    body = MINE + f"setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r2, {programs - 1}; or.pred %p3, %p1, %p2;"
    body += "@%p3 st.global.b32 [%rd9], %r2;"
    assert launched(body, [torch.full((32,), 9, dtype=torch.int32)], grid=(programs, 1, 1)).kinds == kinds


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        # x[i] = x[i] + 1, and with the neighbour's: thread i reads what thread i + 1 overwrites.
        (MINE + "ld.global.b32 %r9, [%rd9]; st.global.b32 [%rd9], %r9;", set()),
        (MINE + "ld.global.b32 %r9, [%rd9]; ld.global.b32 %r8, [%rd9+4]; st.global.b32 [%rd9], %r8;", {"race"}),
        (MINE + "ld.global.b32 %r9, [%rd9+4]; st.global.b32 [%rd9], %r9;", {"race"}),
        (
            MINE
            + "ld.global.b32 %r9, [%rd9]; ld.global.b32 %r8, [%rd9+4]; bar.sync 0; st.global.b32 [%rd9], %r8;",
            set(),
        ),
        (MINE + "st.global.b32 [%rd9], %r1; ld.global.b32 %r9, [%rd9+4];", {"race"}),
        (MINE + "st.global.b32 [%rd9], %r1; bar.warp.sync -1; ld.global.b32 %r9, [%rd9+4];", {"race"}),
        (MINE + "st.global.b32 [%rd9], %r1; bar.sync 0; ld.global.b32 %r9, [%rd9+4];", set()),
        # Lanes that repeat those of a tile of 16: half of the threads store.
        (
            "and.b32 %r1, %r1, 15; setp.eq.u32 %p1, %r1, %tid.x;"
            + MINE
            + "ld.global.b32 %r9, [%rd9]; @%p1 st.global.b32 [%rd9], 5;",
            set(),
        ),
        # The same, but they read by different instructions.
        (
            "and.b32 %r1, %r1, 15; setp.eq.u32 %p1, %r1, %tid.x;"
            + MINE
            + "@%p1 ld.global.b32 %r9, [%rd9]; @!%p1 ld.global.b32 %r9, [%rd9]; @%p1 st.global.b32 [%rd9], 5;",
            {"race"},
        ),
        # The same, but what is stored is not what was read: the next 16.
        (
            "and.b32 %r1, %r1, 15; setp.eq.u32 %p1, %r1, %tid.x;"
            + MINE
            + "ld.global.b32 %r9, [%rd9]; ld.global.b32 %r8, [%rd9+64]; @!%p1 st.global.b32 [%rd9+32], 5;",
            {"race"},
        ),
    ],
)
def test_races_of_threads_in_global_memory(body, kinds):
    assert launched(body, [torch.arange(128, dtype=torch.int32)], threads=64).kinds == kinds


def test_random_accesses_of_programs_race_as_an_oracle_says():
    """Three programs and four words: a read races with another's last write, a write with others' reads too."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        words, last, readers, values = 4, {}, {w: set() for w in range(4)}, [0] * 4
        body, expected = [], set()
        for step in range(8):
            program, word, value = int(rng.integers(3)), int(rng.integers(words)), int(rng.integers(2))
            body.append(f"\t.loc 1 {step} 1 // step.py:{step}:1\n\tsetp.eq.u32 %p1, %r2, {program};")
            if rng.integers(2):
                body.append(f"\t@%p1 ld.global.b32 %r9, [%rd1+{4 * word}];")
                expected |= {step} if last.get(word, program) != program else set()
                readers[word].add(program)
            else:
                body.append(f"\t@%p1 st.global.b32 [%rd1+{4 * word}], {value};")
                changed = value != values[word] and last.get(word, program) != program
                expected |= {step} if readers[word] - {program} or changed else set()
                last[word], values[word] = program, value
            body.append("\tbar.sync 0;")
        findings = launched("\n".join(body), [torch.zeros(words, dtype=torch.int32)], grid=(3, 1, 1))
        found = {int(re.search(r"\d+", f.source)[0]) for f in findings if f.kind == "race of programs"}
        assert found == expected, seed


# ---------------------------------------------------------------- values of every width

KINDS_OF_LOADS = ["b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]
REGISTER = {8: "rs", 16: "rs", 32: "r", 64: "rd"}


def extended(data, kind, bits):
    """Python integers: what a register of `bits` holds of little-endian bytes that are loaded as a kind."""
    return int.from_bytes(data, "little", signed=kind[0] == "s") % (1 << bits)


def random_bytes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS_OF_LOADS)
def test_loads(kind, count, space):
    width = int(kind[1:]) // 8
    if width * count > 16:
        return
    data, order = random_bytes(32 * width * count), np.random.default_rng(1).permutation(32)
    for bits in {16, 32, 64} if kind[0] != "f" else {8 * width}:
        if bits < 8 * width:
            continue
        names = [f"%{REGISTER[bits]}{n + 10}" for n in range(count)]
        listed, vector = (f"{{{', '.join(names)}}}", f".v{count}") if count > 1 else (names[0], "")
        address = "%r1" if space == "shared" else "%rd1"
        body = f"ld.{space}{vector}.{kind} {listed}, [{address}+-8];"
        starts = order * width * count
        if space == "shared":
            result = kit.execute(
                body, {"%r1": (starts + 8).astype(np.uint32)}, shared=len(data), shared_bytes=data
            )
        else:
            memory_ = GlobalMemory([torch.from_numpy(data)], [False], 1)
            base = memory_.address(torch.from_numpy(data))
            result = kit.execute(body, {"%rd1": (starts + base + 8).astype(np.uint64)}, memory=memory_)
        assert not result.kinds
        for n, name in enumerate(names):
            parts = [data[start + n * width : start + n * width + width].tobytes() for start in starts]
            held = result.register(name, f"u{bits // 8}").tolist()
            assert held == [extended(part, kind, bits) for part in parts]


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", ["b8", "u16", "b32", "f32", "b64"])
def test_stores_of_some_lanes(kind, count, space):
    width, size = int(kind[1:]) // 8, int(kind[1:]) // 8 * count
    if size > 16:
        return
    order, here = np.random.default_rng(2).permutation(32), np.random.default_rng(3).random(32) < 0.5
    register = REGISTER[8 * width]
    names = [f"%{register}{n + 10}" for n in range(count)]
    values = {name: random_bytes(32 * {"rs": 2, "r": 4, "rd": 8}[register], n) for n, name in enumerate(names)}
    values = {name: value.view({"rs": "u2", "r": "u4", "rd": "u8"}[register]) for name, value in values.items()}
    listed, vector = (f"{{{', '.join(names)}}}", f".v{count}") if count > 1 else (names[0], "")
    before = random_bytes(32 * size, 9)
    expected = before.copy()
    for lane in np.flatnonzero(here):
        words = b"".join(int(values[name][lane]).to_bytes(8, "little")[:width] for name in names)
        expected[order[lane] * size :][:size] = np.frombuffer(words, np.uint8)
    given = values | {"%p1": here}
    if space == "shared":
        body = f"@%p1 st.shared{vector}.{kind} [%r1], {listed};"
        given |= {"%r1": (order * size).astype(np.uint32)}
        result = kit.execute(body, given, shared=len(before), shared_bytes=before)
        held = result.threads.shared.bytes[: len(before)]
    else:
        tensor = torch.from_numpy(before.copy())
        memory_ = GlobalMemory([tensor], [True], 1)
        body = f"@!%p1 st.global{vector}.{kind} [%rd1+16], {listed};"
        given |= {"%rd1": (order * size + memory_.address(tensor) - 16).astype(np.uint64), "%p1": ~here}
        result = kit.execute(body, given, memory=memory_)
        memory_.copy_back()
        held = tensor.numpy()
    assert held.tolist() == expected.tolist()
    assert not result.kinds


def test_lanes_that_are_elsewhere_keep_what_they_had():
    old = np.arange(32, dtype=np.uint32)
    given = {"%r9": old, "%p1": old % 3 == 0, "%r1": old * 4}
    data = random_bytes(128)
    result = kit.execute("@%p1 ld.shared.b32 %r9, [%r1];", given, shared=128, shared_bytes=data)
    expected = np.where(old % 3 == 0, data.view(np.uint32), old)
    assert result.register("%r9", np.uint32).tolist() == expected.tolist()


def test_an_underscore_and_the_words_beside_it():
    data = random_bytes(16)
    result = kit.execute("ld.shared.v4.b32 {_, %r2, _, %r4}, [global_smem];", shared=16, shared_bytes=data)
    words = data.view(np.uint32)
    assert (result.register("%r2", np.uint32) == words[1]).all()
    assert (result.register("%r4", np.uint32) == words[3]).all()


@pytest.mark.parametrize(
    ("kind", "register", "value", "expected"),
    [
        ("b64", "%rd1", np.array([-3], np.int64), 2**64 - 3),
        ("b32", "%r1", np.array([-3], np.int32), 2**32 - 3),
        ("u32", "%rd1", np.array([-3], np.int32), 2**32 - 3),
        ("s32", "%rd1", np.array([-3], np.int32), 2**64 - 3),
        ("b32", "%r1", np.array([1.5], np.float32), 0x3FC00000),
        ("f32", "%r1", np.array([1.5], np.float32), 0x3FC00000),
        ("u16", "%r1", np.array([0xFFFF], np.uint16), 0xFFFF),
        ("u8", "%rs1", np.array([-1], np.int8), 0xFF),
        ("s8", "%rs1", np.array([-1], np.int8), 0xFFFF),
    ],
)
def test_parameters(kind, register, value, expected):
    result = kit.execute(f"ld.param.{kind} {register}, [kernel_param_3];", values={"kernel_param_3": value})
    bits = {"%rd1": "u8", "%r1": "u4", "%rs1": "u2"}[register]
    assert set(result.register(register, bits).tolist()) == {expected}


@pytest.mark.parametrize(
    "text",
    [
        "ld.local.b32 %r1, [%rd1];",
        "ld.b32 %r1, [%rd1];",
        "ld.const.b32 %r1, [%rd1];",
        "ld.shared.b128 %rd1, [%r1];",
        "ld.shared.b64 %r1, [%r2];",
        "ld.shared.f32 %rd1, [%r2];",
        "ld.shared.v3.b32 {%r1, %r2, %r3}, [%r4];",
        "ld.shared::cluster.b32 %r1, [%r2];",
        "ld.param.b32 %r1, [kernel_param_0+4];",
        "st.param.b32 [kernel_param_0], %r1;",
        "atom.global.add.noftz.f16 %rs1, [%rd1], %rs2;",
        "atom.global.add.noftz.bf16x2 %r1, [%rd1], %r2;",
        "atom.global.v2.f32.add {%r1, %r2}, [%rd1], {%r3, %r4};",
        "atom.global.inc.u32 %r1, [%rd1], %r2;",
    ],
)
def test_accesses_that_are_not_known(text):
    with pytest.raises(UnknownInstruction):
        code_of(kit.ptx(text))


# ---------------------------------------------------------------- atomics


OPERATIONS = {
    "add": lambda old, value, other: old + value,
    "min": lambda old, value, other: min(old, value),
    "max": lambda old, value, other: max(old, value),
    "and": lambda old, value, other: old & value,
    "or": lambda old, value, other: old | value,
    "xor": lambda old, value, other: old ^ value,
    "exch": lambda old, value, other: value,
    "cas": lambda old, value, other: other if old == value else old,
}


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize(
    "operation",
    [
        *["add.u32", "add.s32", "add.u64", "min.u32", "min.s32", "max.s32", "max.u64", "and.b32", "or.b32"],
        *["xor.b64", "exch.b32", "exch.b64", "cas.b32", "cas.b64", "cas.b16"],
    ],
)
def test_atomics_are_done_one_after_the_other(operation, space):
    """64 lanes, some of them, on 5 cells: each finds what those before it left."""
    name, kind = operation.split(".")
    bits, signed = int(kind[1:]), kind[0] == "s"
    dtype = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    rng = np.random.default_rng(4)
    cell, here = rng.integers(0, 5, 64), rng.random(64) < 0.7
    values, others = (rng.integers(0, 4, 64).astype(dtype) - dtype.type(signed * 2) for _ in range(2))
    cells = rng.integers(0, 4, 5).astype(dtype)
    expected, found = [int(value) for value in cells], [77] * 64
    for lane in np.flatnonzero(here):
        old = expected[cell[lane]]
        found[lane] = old
        new = OPERATIONS[name](old, int(values[lane]), int(others[lane]))
        expected[cell[lane]] = int(np.array([new % (1 << bits)], f"u{bits // 8}").view(dtype)[0])
    register, address = f"%{REGISTER[bits]}", "%r1" if space == "shared" else "%rd1"
    extra = f", {register}4" if name == "cas" else ""
    body = f"@%p1 atom.{space}.acq_rel.gpu.{name}.{kind} {register}9, [{address}], {register}3{extra};"
    given = {"%p1": here, f"{register}3": values, f"{register}4": others, f"{register}9": np.full(64, 77, dtype)}
    places = cell * (bits // 8)
    if space == "shared":
        result = kit.execute(
            body, given | {"%r1": places.astype(np.uint32)}, threads=64, shared=64, shared_bytes=cells
        )
        held = result.threads.shared.bytes[: cells.nbytes].view(dtype)
    else:
        tensor = torch.from_numpy(cells.view(np.uint8).copy())
        memory_ = GlobalMemory([tensor], [True], 1)
        given |= {"%rd1": (places + memory_.address(tensor)).astype(np.uint64)}
        result = kit.execute(body, given, threads=64, memory=memory_)
        memory_.copy_back()
        held = tensor.numpy().view(dtype)
    assert held.tolist() == expected
    assert result.register(f"{register}9", dtype).tolist() == found
    assert not result.kinds


def test_a_sum_of_floats_is_rounded_at_each_step():
    values = np.random.default_rng(5).standard_normal(32).astype(np.float32)
    total = np.float32(1e8)
    for value in values:
        total = np.float32(total + value)
    body = "red.shared.add.f32 [global_smem], %r1;"
    result = kit.execute(body, {"%r1": values}, shared=4, shared_bytes=np.float32([1e8]))
    assert result.threads.shared.bytes[:4].view(np.float32)[0] == total


# ---------------------------------------------------------------- what is legal


def touched(body, address, tensors, stored=True, initialised=True):
    """(kinds of findings, count of each) of one thread that accesses an address of the emulated memory."""
    memory_ = GlobalMemory(tensors, [stored] * len(tensors), 1)
    lane = np.arange(32) == 5
    given = {"%rd1": np.array([address(memory_)], np.int64).view(np.uint64), "%p1": lane}
    given |= {f"%r{n}": np.zeros(1, np.uint32) for n in range(2, 6)}
    result = kit.execute(f"@%p1 {body}", given, memory=memory_)
    return {finding.kind: finding.count for finding in result.findings}


X = torch.arange(40, dtype=torch.float32)
Y = torch.arange(10, dtype=torch.float32)
LOAD, STORE = "ld.global.b32 %r2, [%rd1];", "st.global.b32 [%rd1], %r2;"
LOAD_FOUR, STORE_FOUR = (
    "ld.global.v4.b32 {%r2,%r3,%r4,%r5}, [%rd1];",
    "st.global.v4.b32 [%rd1], {%r2,%r3,%r4,%r5};",
)


@pytest.mark.parametrize(
    ("offset", "bodies", "kinds"),
    [
        (0, [LOAD, STORE, LOAD_FOUR, STORE_FOUR], {}),
        (156, [LOAD, STORE], {}),
        (144, [LOAD_FOUR, STORE_FOUR], {}),
        (160, [LOAD, STORE, LOAD_FOUR, STORE_FOUR], {"out of bounds": 1}),
        (-4, [LOAD, STORE], {"out of bounds": 1}),
        (-16, [LOAD_FOUR, STORE_FOUR], {"out of bounds": 1}),
        (1 << 20, [LOAD, STORE], {"out of bounds": 1}),
        (-(1 << 36), [LOAD, STORE], {"out of bounds": 1}),
        (-(1 << 40), [LOAD, STORE], {"out of bounds": 1}),
        (2, [LOAD, STORE], {"misaligned": 1}),
        (8, [LOAD_FOUR, STORE_FOUR], {"misaligned": 1}),
        (158, [LOAD, STORE], {"misaligned": 1}),
    ],
)
@pytest.mark.parametrize("tensors", [[X], [X, Y], [Y, X]])
def test_accesses_beside_a_tensor(offset, bodies, kinds, tensors):
    for body in bodies:
        assert touched(body, lambda memory_: memory_.address(X) + offset, tensors) == kinds, body


def test_the_end_of_a_tensor_that_is_no_multiple_of_the_access():
    """Of 10 elements, the last 16 bytes are half outside."""
    for body in (LOAD_FOUR, STORE_FOUR):
        assert touched(body, lambda memory_: memory_.address(Y) + 32, [Y]) == {"out of bounds": 1}
        assert touched(body, lambda memory_: memory_.address(Y) + 16, [Y]) == {}


@pytest.mark.parametrize("stored", [False, True])
def test_gaps_of_a_strided_tensor(stored):
    whole = torch.zeros(6, 8)
    view = whole[1:5, 2:6]
    inside = {(row, column) for row in range(1, 5) for column in range(2, 6)}
    for row in range(6):
        for column in range(8):
            at = 4 * (8 * row + column) - 4 * view.storage_offset()
            kinds = touched(LOAD, lambda memory_, at=at: memory_.address(view) + at, [view], stored)
            assert kinds == ({} if (row, column) in inside else {"out of bounds": 1}), (row, column)
    # Two tensors of one storage: what either covers is legal, and both are at their places.
    other = whole[:, :2]
    memory_ = GlobalMemory([view, other], [False, False], 4)
    assert memory_.address(view) - memory_.address(other) == 4 * (8 + 2)
    assert touched(LOAD, lambda memory_: memory_.address(whole), [view, other]) == {}
    assert touched(LOAD, lambda memory_: memory_.address(whole), [view, whole[1:, :2]]) == {"out of bounds": 1}


@pytest.mark.parametrize(
    "view",
    [
        torch.zeros(4, 6).T,
        torch.zeros(4, 6, 5).permute(2, 0, 1),
        torch.zeros(4, 1, 5).expand(4, 7, 5),
        torch.zeros(1).expand(100),
        torch.zeros(20)[3:17:4],
        torch.zeros(4, 6)[:, 1:1],
        torch.zeros(0),
        torch.tensor(3.0),
        torch.zeros(30).as_strided((3, 3), (2, 2)),
        torch.zeros(30).as_strided((5, 4), (1, 3), 7),
    ],
)
def test_only_elements_are_legal(view):
    memory_ = GlobalMemory([view], [False], 1)
    begin = memory_.address(view) - BASE - view.storage_offset() * 4
    index = np.array(list(itertools.product(*(range(n) for n in view.shape)))).reshape(view.numel(), view.dim())
    elements = {view.storage_offset() + int(place @ np.array(view.stride(), int)) for place in index}
    legal = {byte - begin for byte in np.flatnonzero(memory_.legal)}
    assert legal == {4 * element + byte for element in elements for byte in range(4)}


def test_addresses_keep_their_alignment():
    """Kernels are specialized by whether 16 divides a pointer."""
    whole = torch.zeros(64, dtype=torch.float16)
    parts = [whole, whole[1:], whole[8:], torch.zeros(7), torch.zeros(3, 5)[1:, 1:]]
    memory_ = GlobalMemory(parts, [False] * len(parts), 2)
    for part in parts:
        assert memory_.address(part) % 256 == part.data_ptr() % 256
    assert len({memory_.address(part) for part in parts}) == len(parts)


def test_storages_that_overlap_and_are_not_the_same_are_refused():
    array = np.zeros(64, np.float32)
    tensors = [torch.from_numpy(array), torch.from_numpy(array[8:])]
    with pytest.raises(CaseError, match="share memory"):
        GlobalMemory(tensors, [False, False], 4)


def test_an_integer_tensor_of_bytes_beside_one_of_words():
    """Memory is watched by the narrowest element, which a wider access covers whole."""
    small, wide = torch.zeros(8, dtype=torch.uint8), torch.zeros(8)
    assert GlobalMemory([small, wide], [True, True], 16).granule == 1
    assert touched("ld.global.b64 %rd2, [%rd1];", lambda memory_: memory_.address(small), [small, wide]) == {}
    assert touched("ld.global.b64 %rd2, [%rd1];", lambda memory_: memory_.address(small[:7]), [small[:7]]) == {
        "out of bounds": 1
    }


def test_what_is_out_of_bounds_is_told_as_nothing_else():
    """All lanes store different values there and read them back; no race, no conflict, nothing uninitialised."""
    body = "st.global.b32 [%rd1+4096], %r1; ld.global.b32 %r9, [%rd1+4096]; shl.b32 %r3, %r1, 2;"
    body += "st.shared.b32 [%r3+64], %r1; ld.shared.b32 %r9, [%r3+64];"
    assert launched(body, [torch.zeros(4)]).kinds == {"out of bounds"}


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ("ld.shared.b32 %r2, [global_smem+60];", set()),
        ("ld.shared.b32 %r2, [global_smem+64];", {"out of bounds"}),
        ("ld.shared.b8 %rs2, [global_smem+63];", set()),
        ("ld.shared.b8 %rs2, [global_smem+64];", {"out of bounds"}),
        ("ld.shared.v4.b32 {%r2,%r3,%r4,%r5}, [global_smem+64];", {"out of bounds"}),
        ("ld.shared.b32 %r2, [global_smem+-4];", {"out of bounds"}),
        ("ld.shared.b32 %r2, [%r1];", {"out of bounds"}),
        ("st.shared.b32 [global_smem+64], 1;", {"out of bounds"}),
        ("st.shared.b32 [global_smem+2], 1;", {"misaligned"}),
        ("ld.shared.v2.b32 {%r2,%r3}, [global_smem+4];", {"misaligned"}),
        ("ld.shared.v2.b32 {%r2,%r3}, [global_smem+60];", {"misaligned"}),
    ],
)
def test_accesses_outside_of_shared_memory(body, kinds):
    result = kit.execute(
        body, {"%r1": np.uint32([0x80000000])}, programs=2, shared=64, shared_bytes=np.zeros(64, np.uint8)
    )
    assert result.kinds == kinds


def test_shared_memory_that_a_kernel_does_not_have():
    assert kit.execute("ld.shared.b32 %r2, [global_smem];").kinds == {"out of bounds"}


def test_uninitialised_shared_memory():
    body = "@%p1 st.shared.b16 [%r1], %rs1; bar.sync 0; ld.shared.b32 %r9, [%r1];"
    lanes = np.arange(32, dtype=np.uint32)
    given = {"%r1": lanes * 4, "%p1": lanes < 20, "%rs1": lanes.astype(np.uint16)}
    (finding,) = kit.execute(body, given, shared=128).findings
    # 20 words are half written, 12 not at all: 20 and 24 units of 2 bytes.
    assert (finding.kind, finding.count) == ("uninitialised", 44)
    assert "byte 2 of shared memory" in finding.detail
    body = body.replace("ld.shared.b32 %r9", "ld.shared.b16 %rs9")
    assert [f.count for f in kit.execute(body, given, shared=128).findings] == [12]


def test_uninitialised_global_memory():
    from ldmperf.profiling.emulator.poison import poison

    x = torch.zeros(32)
    poison(x)
    x[:20] = 1
    (finding,) = launched(MINE + "ld.global.b32 %r9, [%rd9];", [x], stored=[False])
    assert (finding.kind, finding.count) == ("uninitialised", 12)
    # What a program writes, it may read; a view of what is initialised is.
    body = MINE + "st.global.b32 [%rd9], %r1; ld.global.b32 %r9, [%rd9];"
    assert not launched(body, [x.clone()])
    assert not launched("and.b32 %r1, %r1, 7;" + MINE + "ld.global.b32 %r9, [%rd9];", [x[10:20]], stored=[False])


def test_poisoned_elements_of_a_strided_tensor():
    from ldmperf.profiling.emulator.poison import poison

    whole = torch.ones(32, 3)
    poison(column := torch.empty(32))
    whole[:, 1] = column
    whole[:7, 1] = 2
    body = "mul.lo.u32 %r1, %r1, 3;" + MINE + "ld.global.b32 %r9, [%rd9];"
    (finding,) = launched(body, [whole[:, 1]], stored=[False])
    assert (finding.kind, finding.count) == ("uninitialised", 25)
    assert not launched(body, [whole[:, 2]], stored=[False])


def test_only_tensors_that_are_stored_to_are_copied_back():
    x, y = torch.zeros(32), torch.zeros(32)
    memory_ = GlobalMemory([x, y], [True, False], 4)
    memory_.bytes[:] = 1
    memory_.copy_back()
    assert x.view(torch.uint8).eq(1).all()
    assert y.eq(0).all()


def test_a_store_that_was_not_expected_is_copied_back():
    x = torch.zeros(32, dtype=torch.int32)
    launched(MINE + "st.global.b32 [%rd9], %r1;", [x], stored=[False])
    assert x.tolist() == list(range(32))
    # And where lanes store to two storages at once.
    x, y = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = "setp.lt.u32 %p1, %r1, 16; selp.b64 %rd1, %rd1, %rd2, %p1;" + MINE + "st.global.b32 [%rd9], %r1;"
    launched(body, [x, y], stored=[False, False])
    assert (x + y).tolist() == list(range(32))
    assert x.tolist()[16:] == y.tolist()[:16] == [0] * 16


def test_a_store_is_seen_by_loads_after_it_in_all_programs_of_later_chunks():
    """300 programs: the last one reads what the first stored, which is a race, and has the value all the same."""
    body = "setp.eq.u32 %p1, %r2, 0; setp.eq.u32 %p2, %r2, 299; @%p1 st.global.b32 [%rd1], 41;"
    body += "@%p2 ld.global.b32 %r9, [%rd1]; @%p2 st.global.b32 [%rd1+4], %r9;"
    x = torch.zeros(2, dtype=torch.int32)
    assert launched(body, [x], grid=(300, 1, 1)).kinds == {"race of programs"}
    assert x.tolist() == [41, 41]
