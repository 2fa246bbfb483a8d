"""wgmma in the emulator: matrices in shared memory by the PTX ISA's layouts (9.7.15.5), and what is in flight."""

from dataclasses import dataclass

import emulator_kit as kit
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ldmperf.profiling.emulator.emulation import emulated
from ldmperf.profiling.emulator.execution import code_of
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.program import UnknownInstruction

TORCH = {
    **{"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "s8": torch.int8, "u8": torch.uint8},
    **{"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2},
}
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes: the code in bits 62 and 63 of a descriptor


def raw(values, kind):
    """[..., bytes] of integers in a type, by torch."""
    typed = torch.from_numpy(np.array(values)).to(TORCH[kind]).contiguous()
    return typed.view(torch.uint8).numpy().reshape(*values.shape, typed.element_size())


@dataclass(frozen=True)
class Placement:
    """Where the elements of a matrix [rows, K] lie: rows are those of A, or the columns of B.

    swizzle   bytes: 0, 32, 64, 128
    leading, stride   the two byte offsets, as table "Strides" of the ISA defines them
    turned    MN-major: rows are contiguous in memory, K-major: K is
    """

    start: int
    swizzle: int
    leading: int
    stride: int
    turned: bool = False

    def at(self, row, k, size):
        """The byte position of an element of `size` bytes, by 16-byte units as the ISA's figures draw them."""
        per_unit = 16 // size
        along, across = (row, k) if self.turned else (k, row)
        unit, inside = along // per_unit, along % per_unit * size
        eight, line = across // 8, across % 8
        if self.swizzle == 0:
            # Units of eight lines: the core matrices.
            block = (
                unit * self.stride + eight * self.leading
                if self.turned
                else unit * self.leading + eight * self.stride
            )
            return self.start + block + line * 16 + inside
        units = self.swizzle // 16  # of a line
        # The pattern repeats each 8 lines; it changes each 128 bytes.
        swapped = unit % units ^ line * self.swizzle // 128 % units
        block = unit // units * self.leading if self.turned else 0
        if not self.turned:
            assert unit < units
        return self.start + block + eight * self.stride + line * self.swizzle + swapped * 16 + inside

    def descriptor(self, ahead=0):
        parts = (self.start + ahead, 0), (self.leading, 16), (self.stride, 32)
        return sum((offset >> 4 & 0x3FFF) << bit for offset, bit in parts) | SWIZZLES[self.swizzle] << 62


def place(memory, matrix, kind, placement):
    data = raw(matrix, kind)
    for row in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            at = placement.at(row, k, data.shape[-1])
            memory[at : at + data.shape[-1]] = data[row, k]


def names(count, first=100):
    return [f"%r{first + k}" for k in range(count)]


def braces(registers):
    return "{" + ",".join(registers) + "}"


AFTER = "\twgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n"


def issue(shape, kinds, flags, *, a="%rd1", b="%rd2", scale="1", d=None):
    """The text of one wgmma. kinds: of D, A and B; flags: signs and transpositions."""
    columns = int(shape[4:].split("k")[0])
    d = d or names(columns // (4 if kinds[0] == "f16" else 2))
    operands = ", ".join([braces(d), a, b, scale, *map(str, flags)])
    return f"\twgmma.mma_async.sync.aligned.{shape}.{'.'.join(kinds)} {operands};\n"


def result_of(result, kind, columns):
    """D [warp groups, 64, columns]: element i of a lane is in row 16 w + lane / 4 + 8 (i / 2 % 2), and so on."""
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[kind]
    each = 4 // np.dtype(dtype).itemsize
    values = [result.register(name, dtype).reshape(-1, each) for name in names(columns // 2 // each)]
    d = np.empty((result.threads.lanes // 128, 64, columns))
    for group in range(len(d)):
        for thread in range(128):
            warp, lane = thread // 32, thread % 32
            for i in range(columns // 2):
                row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
                d[group, row, 8 * (i // 4) + lane % 4 * 2 + i % 2] = values[i // each][
                    128 * group + thread, i % each
                ]
    return d


def integers(seed, *shape, least=-4, most=4):
    return np.random.default_rng(seed).integers(least, most + 1, shape)


def zeros(count):
    return dict.fromkeys(names(count), np.zeros(1, np.uint32))


def quiet(result):
    assert not result.kinds, list(map(str, result.findings))
    return result


# ---------------------------------------------------------------- matrices in shared memory

# (swizzle, leading, stride) for 64 rows or columns of 32 bytes of K, packed and with gaps.
K_MAJOR = [
    (0, 128, 256),
    (0, 1024, 128),
    (0, 2064, 160),
    (32, 16, 256),
    (64, 16, 512),
    (128, 16, 1024),
    (128, 0, 2048),
]
# The same 64 of 16-bit elements, MN-major: offsets between units of 8, and between eights of K.
MN_MAJOR = [
    (0, 128, 256),
    (0, 1024, 128),
    (32, 512, 256),
    (32, 256, 1024),
    (64, 1024, 512),
    (128, 1024, 1024),
    (128, 0, 2048),
]


def check_layouts(a_placed, b_placed, kind="bf16", columns=64):
    size = raw(np.zeros(1, int), kind).shape[-1]
    depth = 32 // size
    a, b = integers(1, 64, depth), integers(2, depth, columns)
    memory = np.zeros(32768, np.uint8)
    place(memory, a, kind, a_placed)
    place(memory, b.T, kind, b_placed)
    turned = [int(a_placed.turned), int(b_placed.turned)] if size == 2 else []
    shape = f"m64n{columns}k{depth}"
    body = issue(shape, ("f32", kind, kind), [1, 1, *turned], scale="0") + AFTER
    fill = {"%rd1": np.uint64([a_placed.descriptor()]), "%rd2": np.uint64([b_placed.descriptor()])}
    result = quiet(kit.execute(body, fill, threads=128, shared=len(memory), shared_bytes=memory))
    np.testing.assert_array_equal(result_of(result, "f32", columns)[0], a @ b)


B_PLACED = Placement(16384, 128, 0, 1024)


@pytest.mark.parametrize(("swizzle", "leading", "stride"), K_MAJOR)
def test_a_k_major_matrix_is_read_as_the_isa_lays_it_out(swizzle, leading, stride):
    check_layouts(Placement(1024, swizzle, leading, stride), B_PLACED)
    check_layouts(Placement(16384, 128, 0, 1024), Placement(1024, swizzle, leading, stride))


@pytest.mark.parametrize(("swizzle", "leading", "stride"), MN_MAJOR)
def test_an_mn_major_matrix_is_read_as_the_isa_lays_it_out(swizzle, leading, stride):
    check_layouts(Placement(1024, swizzle, leading, stride, turned=True), B_PLACED)
    check_layouts(Placement(16384, 128, 0, 1024), Placement(1024, swizzle, leading, stride, turned=True))


@pytest.mark.parametrize("kind", ["f16", "tf32", "e4m3", "e5m2"])
@pytest.mark.parametrize(("swizzle", "leading", "stride"), [(0, 128, 256), (64, 16, 512)])
def test_a_row_of_k_is_thirty_two_bytes_of_any_type(kind, swizzle, leading, stride):
    check_layouts(Placement(1024, swizzle, leading, stride), Placement(16384, swizzle, leading, stride), kind)


@pytest.mark.parametrize("columns", [8, 24, 128, 256])
def test_any_multiple_of_eight_columns_is_multiplied(columns):
    check_layouts(Placement(0, 128, 16, 1024), Placement(8192, 0, 128, 256), columns=columns)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_descriptors_within_a_swizzled_tile_walk_over_k(swizzle, turned):
    """A K-major tile is as wide as its swizzle, and its descriptors start 32 bytes apart within its first line."""
    kind, depth = "f16", 64 if turned else swizzle // 2
    a, b = integers(3, 64, depth), integers(4, depth, 64)
    if turned:
        # Eights of K follow one another, and the units of rows them.
        placed = [Placement(start, swizzle, swizzle * depth, swizzle * 8, turned=True) for start in (1024, 16384)]
        ahead = 2 * swizzle * 8
    else:
        placed, ahead = [Placement(start, swizzle, 0, swizzle * 8) for start in (1024, 16384)], 32
    memory = np.zeros(32768, np.uint8)
    place(memory, a, kind, placed[0])
    place(memory, b.T, kind, placed[1])
    body, fill = "", {}
    for step in range(depth // 16):
        registers = f"%rd{10 + 2 * step}", f"%rd{11 + 2 * step}"
        flags = [1, 1, int(turned), int(turned)]
        body += issue(
            "m64n64k16", ("f32", kind, kind), flags, a=registers[0], b=registers[1], scale=str(step and 1)
        )
        fill |= {
            name: np.uint64([matrix.descriptor(step * ahead)])
            for name, matrix in zip(registers, placed, strict=True)
        }
    result = quiet(kit.execute(body + AFTER, fill, threads=128, shared=len(memory), shared_bytes=memory))
    np.testing.assert_array_equal(result_of(result, "f32", 64)[0], a @ b)


def test_warp_groups_and_programs_read_matrices_of_their_own():
    """Two warp groups of each of two programs: A differs between the groups, and its values between programs."""
    memory = np.zeros((2, 32768), np.uint8)
    placed = [Placement(start, 128, 0, 1024) for start in (0, 8192, 16384)]
    a, b = integers(5, 2, 2, 64, 16), integers(6, 2, 16, 64)
    for program in range(2):
        place(memory[program], a[program, 0], "bf16", placed[0])
        place(memory[program], a[program, 1], "bf16", placed[1])
        place(memory[program], b[program].T, "bf16", placed[2])
    a_descriptors = np.tile(np.repeat(np.uint64([p.descriptor() for p in placed[:2]]), 128), 2)
    fill = {"%rd1": a_descriptors, "%rd2": np.uint64([placed[2].descriptor()])}
    # The programs' memories differ: each thread stores its program's, and fences it.
    store = "\tst.shared.b32 [%r1+{0}], %r{1};\n"
    body, step = "", 256 * 4
    for k in range(32768 // step):
        body += store.format(k * step, 500 + k)
        fill[f"%r{500 + k}"] = memory.view(np.uint32).reshape(2, -1, 256)[:, k].ravel()
    fill["%r1"] = np.tile(np.arange(256, dtype=np.uint32) * 4, 2)
    body += "\tfence.proxy.async.shared::cta;\n\tbar.sync 0;\n"
    body += issue("m64n64k16", ("f32", "bf16", "bf16"), [1, 1, 0, 0], scale="0") + AFTER
    result = quiet(kit.execute(body, fill, threads=256, programs=2, shared=32768))
    expected = (a @ b[:, None]).reshape(4, 64, 64)
    np.testing.assert_array_equal(result_of(result, "f32", 64), expected)


# ---------------------------------------------------------------- operands, accumulators, scales


def a_registers(a, kind):
    """A [64, K] in registers of a warp group: a warp has 16 rows, in the fragments of mma.m16n8k{K}."""
    data = raw(a, kind)
    size = data.shape[-1]
    per = 4 // size
    held = np.zeros((4, 128, 4), np.uint8)
    for thread in range(128):
        for register in range(4):
            for part in range(per):
                row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
                k = thread % 4 * per + part + 4 * per * (register // 2)
                held[register, thread, part * size : part * size + size] = data[row, k]
    return held.view(np.uint32)[..., 0]


@pytest.mark.parametrize("kind", ["bf16", "tf32", "e4m3", "s8"])
def test_a_may_be_in_registers(kind):
    size = raw(np.zeros(1, int), kind).shape[-1]
    depth, d_kind = 32 // size, "s32" if kind == "s8" else "f32"
    a, b, c = integers(7, 64, depth), integers(8, depth, 32), integers(9, 64, 32, least=-50, most=50)
    placed = Placement(0, 32, 0, 256, turned=size == 2)
    if size == 2:
        placed = Placement(0, 64, 0, 512, turned=True)
    memory = np.zeros(4096, np.uint8)
    place(memory, b.T, kind, placed)
    flags = [*([] if kind == "s8" else [1, 1]), *([1] if size == 2 else [])]
    body = issue(f"m64n32k{depth}", (d_kind, kind, kind), flags, a="{%r1,%r2,%r3,%r4}") + AFTER
    fill = {f"%r{1 + k}": row for k, row in enumerate(a_registers(a, kind))}
    fill |= {"%rd2": np.uint64([placed.descriptor()])} | c_registers(c, np.int32 if kind == "s8" else np.float32)
    result = quiet(kit.execute(body, fill, threads=128, shared=len(memory), shared_bytes=memory))
    np.testing.assert_array_equal(result_of(result, d_kind, 32)[0], a @ b + c)


def c_registers(c, dtype):
    """Accumulators [64, N] in registers of a warp group."""
    each = 4 // np.dtype(dtype).itemsize
    held = np.zeros((c.shape[1] // 2 // each, 128, each), dtype)
    for thread in range(128):
        for i in range(c.shape[1] // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            held[i // each, thread, i % each] = c[row, 8 * (i // 4) + thread % 4 * 2 + i % 2]
    return dict(zip(names(len(held)), held.view(np.uint32)[..., 0], strict=True))


def simple(seed=10):
    """(a, b, shared memory, descriptors) of one m64n8k16."""
    a, b = integers(seed, 64, 16), integers(seed + 1, 16, 8)
    placed = Placement(0, 32, 0, 256), Placement(2048, 32, 0, 256)
    memory = np.zeros(4096, np.uint8)
    place(memory, a, "f16", placed[0])
    place(memory, b.T, "f16", placed[1])
    return a, b, memory, {"%rd1": np.uint64([placed[0].descriptor()]), "%rd2": np.uint64([placed[1].descriptor()])}


@pytest.mark.parametrize(("signs", "sign"), [((1, 1), 1), ((-1, 1), -1), ((1, -1), -1), ((-1, -1), 1)])
@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_operands_may_be_negated_and_results_halves(kind, dtype, signs, sign):
    a, b, memory, fill = simple()
    c = integers(12, 64, 8, least=-90, most=90)
    body = issue("m64n8k16", (kind, "f16", "f16"), [*signs, 0, 0]) + AFTER
    result = quiet(kit.execute(body, fill | c_registers(c, dtype), threads=128, shared=4096, shared_bytes=memory))
    np.testing.assert_array_equal(result_of(result, kind, 8)[0], c + sign * (a @ b))


def test_halves_of_many_columns():
    a, b, c = integers(16, 64, 16), integers(17, 16, 24), integers(18, 64, 24, least=-90, most=90)
    placed = Placement(0, 32, 0, 256), Placement(2048, 32, 0, 256)
    memory = np.zeros(4096, np.uint8)
    place(memory, a, "f16", placed[0])
    place(memory, b.T, "f16", placed[1])
    fill = {f"%rd{1 + k}": np.uint64([p.descriptor()]) for k, p in enumerate(placed)} | c_registers(c, np.float16)
    body = issue("m64n24k16", ("f16", "f16", "f16"), [1, 1, 0, 0]) + AFTER
    result = quiet(kit.execute(body, fill, threads=128, shared=4096, shared_bytes=memory))
    np.testing.assert_array_equal(result_of(result, "f16", 24)[0], c + a @ b)


@pytest.mark.parametrize("scale", ["0", "1", "%p1", "%p2"])
def test_without_its_scale_an_accumulator_is_not_even_read(scale):
    a, b, memory, fill = simple()
    kept = scale in ("1", "%p1")
    fill |= {"%p1": np.array([True]), "%p2": np.array([False])}
    c = integers(13, 64, 8)
    accumulators = c_registers(c, np.float32) if kept else {}
    body = issue("m64n8k16", ("f32", "f16", "f16"), [1, 1, 0, 0], scale=scale) + AFTER
    result = quiet(kit.execute(body, fill | accumulators, threads=128, shared=4096, shared_bytes=memory))
    np.testing.assert_array_equal(result_of(result, "f32", 8)[0], a @ b + (c if kept else 0))


def test_a_scale_may_differ_between_warp_groups():
    a, b, memory, fill = simple()
    fill |= {"%p1": np.arange(256) >= 128} | {name: np.full(256, np.nan, np.float32) for name in names(4)}
    body = issue("m64n8k16", ("f32", "f16", "f16"), [1, 1, 0, 0], scale="%p1") + AFTER
    result = quiet(kit.execute(body, fill, threads=256, shared=4096, shared_bytes=memory))
    d = result_of(result, "f32", 8)
    np.testing.assert_array_equal(d[0], a @ b)
    assert np.isnan(d[1]).all()


@pytest.mark.parametrize(
    ("kind", "small", "kept"),
    [("bf16", 2.0**-25, 2.0**-21), ("bf16", 2.0**-26, 0), ("e5m2", 2.0**-13, 2.0**-8), ("e5m2", 2.0**-14, 0)],
)
def test_a_wgmma_sums_as_the_h100_does(kind, small, kept):
    """Small products beside 1: of 16-bit floats 25 bits are kept, of 8-bit floats 13."""
    depth = 16 if kind == "bf16" else 32
    memory = np.zeros(4096, np.uint8)
    placed = Placement(0, 32, 0, 256), Placement(2048, 32, 0, 256)
    place(memory, np.ones((64, depth)), kind, placed[0])
    place(memory, np.full((8, depth), small), kind, placed[1])
    fill = {f"%rd{1 + k}": np.uint64([p.descriptor()]) for k, p in enumerate(placed)}
    fill |= c_registers(np.ones((64, 8)), np.float32)
    body = issue(f"m64n8k{depth}", ("f32", kind, kind), [1, 1, *([0, 0] if depth == 16 else [])]) + AFTER
    numerics = Numerics("tensor core")
    result = kit.execute(body, fill, threads=128, shared=4096, shared_bytes=memory, numerics=numerics)
    assert (result_of(quiet(result), "f32", 8) == 1 + kept).all()


# ---------------------------------------------------------------- what is wrong with a kernel


ONE = issue("m64n8k16", ("f32", "f16", "f16"), [1, 1, 0, 0])
COMMIT = "\twgmma.commit_group.sync.aligned;\n"


def wait(left):
    return f"\twgmma.wait_group.sync.aligned {left};\n"


def run_simple(body, more=None, *, threads=128, shared=4096, mask=None, stored=None):
    _, _, memory, fill = simple()
    fill |= zeros(4) | {"%r1": np.arange(threads, dtype=np.uint32) * 4} | (more or {})
    memory = memory if stored is None else memory[:stored]
    return kit.execute(body, fill, threads=threads, shared=shared, shared_bytes=memory, mask=mask)


def test_a_matrix_outside_of_shared_memory_is_found():
    assert run_simple(ONE + COMMIT + wait(0), shared=2048 + 240, stored=2304).kinds == {"out of bounds"}
    assert run_simple(ONE + COMMIT + wait(0), shared=2048 + 256, stored=2304).kinds == set()


def test_a_matrix_that_nothing_wrote_is_found():
    assert run_simple(ONE + COMMIT + wait(0), stored=2048 + 240).kinds == {"uninitialised"}


def test_a_base_offset_is_not_known():
    with pytest.raises(UnknownInstruction, match="base offset"):
        run_simple(ONE, {"%rd1": np.uint64([1 << 49])})


def test_threads_that_give_different_descriptors_are_found():
    _, _, _, fill = simple()
    differing = np.repeat(fill["%rd1"], 128)
    differing[77] += np.uint64(1)
    assert run_simple(ONE + COMMIT + wait(0), {"%rd1": differing}).kinds == {"differing descriptor"}


@pytest.mark.parametrize("threads", [96, 256])
def test_part_of_a_warp_group_is_found(threads):
    mask = np.arange(threads) != 200
    result = run_simple(ONE + COMMIT + wait(0), threads=threads, mask=mask)
    assert "divergent warp" in result.kinds
    if threads == 256:
        # The other warp group multiplied, and has waited.
        assert not result.threads.products
        d = np.broadcast_to(result.register("%r100", np.float32), (256,))
        assert (d[:128] != 0).any()
        assert not d[128:].any()


def test_a_wgmma_is_on_its_way_until_it_is_awaited():
    for body, count in ((ONE, 1), (ONE + COMMIT, 1), (ONE + wait(0), 1), (ONE + COMMIT + wait(0), 0)):
        assert len(run_simple(body).threads.products) == count


@pytest.mark.parametrize(
    "body",
    [
        issue("m64n8k16", ("f32", "f16", "bf16"), [1, 1, 0, 0]),
        issue("m64n8k16", ("f32", "f16", "f16"), [1, 1]),
        issue("m64n8k16", ("f32", "f16", "f16"), [1, 1, 0, 0], a="{%r1,%r2,%r3,%r4}"),
        issue("m64n8k8", ("f32", "tf32", "tf32"), [1, 1, 0, 0]),
        issue("m64n8k16", ("f32", "tf32", "tf32"), [1, 1]),
        issue("m64n8k32", ("s32", "s8", "s8"), [1, 1]),
        issue("m64n8k16", ("f16", "bf16", "bf16"), [1, 1, 0, 0]),
        issue("m64n8k32", ("f32", "f16", "f16"), [0, 1, 1, 1, 0, 0]).replace("async.", "async.sp."),
    ],
)
def test_other_forms_are_told_by_name(body):
    with pytest.raises(UnknownInstruction, match=r"wgmma\.mma_async"):
        code_of(kit.ptx(body + "\n\tret;"))


# ---------------------------------------------------------------- in flight

STORE = "\tst.shared.b32 [%r1+{}], %r2;\n"
FENCE = "\tfence.proxy.async.shared::cta;\n"
BARRIER = "\tbar.sync 0;\n"
TOUCH = "\tadd.s32 %r50, %r101, %r101;\n"
OVERWRITE = "\tadd.s32 %r101, %r1, %r1;\n"
NEXT = ONE.replace("%r100,%r101,%r102,%r103", "%r110,%r111,%r112,%r113")
MORE = {"%r2": np.zeros(1, np.uint32)} | dict.fromkeys(names(4, 110), np.zeros(1, np.uint32))


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        # Registers.
        (ONE + COMMIT + wait(0) + TOUCH, set()),
        (ONE + COMMIT + TOUCH + wait(0), {"matmul not awaited"}),
        (ONE + COMMIT + OVERWRITE + wait(0), {"matmul not awaited"}),
        (ONE + TOUCH + COMMIT + wait(0), {"matmul not awaited"}),
        # Not committed before the wait: not awaited by it.
        (ONE + wait(0) + TOUCH + COMMIT + wait(0), {"matmul not awaited"}),
        # One group may be left: the first is finished, the second is not.
        (ONE + COMMIT + NEXT + COMMIT + wait(1) + TOUCH + wait(0), set()),
        (NEXT + COMMIT + ONE + COMMIT + wait(1) + TOUCH + wait(0), {"matmul not awaited"}),
        (ONE + COMMIT + NEXT + COMMIT + wait(2) + TOUCH + wait(0), {"matmul not awaited"}),
        # Two of one group.
        (NEXT + ONE + COMMIT + wait(0) + TOUCH, set()),
        # A second wgmma holds the register still; another wgmma may use it.
        (ONE + COMMIT + ONE + COMMIT + wait(1) + TOUCH + wait(0), {"matmul not awaited"}),
        (ONE + COMMIT + ONE + COMMIT + wait(0) + TOUCH, set()),
        # Shared memory that is read: 0 to 2047 of A, 2048 to 2303 of B.
        (ONE + COMMIT + BARRIER + STORE.format(0) + wait(0), {"matmul not awaited"}),
        (ONE + COMMIT + BARRIER + STORE.format(1600) + wait(0), {"matmul not awaited"}),
        (ONE + COMMIT + BARRIER + STORE.format(2064) + wait(0), {"matmul not awaited"}),
        (ONE + COMMIT + BARRIER + STORE.format(2304) + wait(0), set()),
        (ONE + COMMIT + wait(0) + BARRIER + STORE.format(0), set()),
        # Awaited by this thread, but the other warps' quarter may still be read.
        (ONE + COMMIT + BARRIER + wait(0) + STORE.format(0), {"race"}),
        (ONE + COMMIT + wait(0) + STORE.format(0), {"race"}),
        # Two that read the same: until both are awaited.
        (ONE + COMMIT + NEXT + COMMIT + wait(1) + BARRIER + STORE.format(0) + wait(0), {"matmul not awaited"}),
        # What is stored before: a fence of each thread, and a barrier.
        (STORE.format(0) + BARRIER + ONE + COMMIT + wait(0), {"missing fence"}),
        (STORE.format(0) + FENCE + BARRIER + ONE + COMMIT + wait(0), set()),
        (STORE.format(0) + BARRIER + FENCE + ONE + COMMIT + wait(0), set()),
        (STORE.format(0) + FENCE + ONE + COMMIT + wait(0), {"race"}),
        (STORE.format(2304) + BARRIER + ONE + COMMIT + wait(0), set()),
    ],
)
def test_what_is_in_flight_is_watched(body, kinds):
    found = run_simple(body, MORE)
    assert found.kinds == kinds, list(map(str, found.findings))


def test_registers_of_an_operand_are_held_too():
    _, _, memory, fill = simple()
    fill |= zeros(4) | {f"%r{k}": np.zeros(1, np.uint32) for k in range(1, 5)}
    multiply = issue("m64n8k16", ("f32", "f16", "f16"), [1, 1, 0], a="{%r1,%r2,%r3,%r4}") + COMMIT
    for order, kinds in (("mw", set()), ("wm", {"matmul not awaited"})):
        after = {"m": wait(0), "w": "\tadd.s32 %r3, %r4, %r4;\n"}
        body = multiply + "".join(after[step] for step in order) + wait(0)
        assert kit.execute(body, fill, threads=128, shared=4096, shared_bytes=memory).kinds == kinds


def test_one_warp_alone_may_not_touch_them():
    body = ONE + COMMIT + "\t@%p1 bra $DONE;\n" + TOUCH + "$DONE:\n" + wait(0)
    for skipping in (np.arange(128) < 32, np.arange(128) >= 32):
        assert run_simple(body, {"%p1": skipping}).kinds == {"matmul not awaited"}


def test_threads_that_a_guard_keeps_away_do_not_touch_them():
    body = ONE + COMMIT + "\t@%p1 " + TOUCH.lstrip() + wait(0)
    for passing, kinds in ((np.zeros(128, bool), set()), (np.arange(128) == 77, {"matmul not awaited"})):
        assert run_simple(body, {"%p1": passing}).kinds == kinds


def test_part_of_a_warp_group_awaits_nothing():
    body = ONE + COMMIT + "\t@%p1 wgmma.wait_group.sync.aligned 0;\n"
    result = run_simple(body, {"%p1": np.arange(128) < 32})
    assert result.kinds == {"divergent warp"}
    assert len(result.threads.products) == 1


def test_what_is_awaited_may_be_overwritten_while_another_is_in_flight():
    """The second multiplies the same rows further on: A from 4096, B from 6144."""
    _, _, memory, fill = simple()
    ahead = np.uint64(4096 >> 4)
    fill |= zeros(4) | MORE | {"%rd3": fill["%rd1"] + ahead, "%rd4": fill["%rd2"] + ahead}
    fill["%r1"] = np.arange(128, dtype=np.uint32) * 4
    second = NEXT.replace("%rd1", "%rd3").replace("%rd2", "%rd4")
    for at, kinds in ((0, set()), (2048, set()), (4096, {"matmul not awaited"}), (6144, {"matmul not awaited"})):
        store = STORE.format(at).replace("st.", "@%p1 st.")
        body = ONE + COMMIT + second + COMMIT + wait(1) + BARRIER + store + wait(0)
        fill["%p1"] = np.arange(128) < 64
        both = np.concatenate([memory, memory])
        assert kit.execute(body, fill, threads=128, shared=8192, shared_bytes=both).kinds == kinds


def test_a_warp_group_that_waited_may_overwrite_its_own_matrix():
    """Each group has an A of its own, from 0 and from 4096, and both have B. Only the first waits."""
    _, _, memory, fill = simple()
    fill |= zeros(4) | {"%r2": np.zeros(1, np.uint32), "%p1": np.arange(256) < 128}
    fill["%rd1"] = np.repeat(fill["%rd1"] + np.uint64([0, 4096 >> 4]), 128)
    # A group stores 256 bytes: as much as B has.
    fill["%r1"] = np.tile(np.arange(64, dtype=np.uint32) * 4, 4)
    for at, kinds in ((0, set()), (4096, {"matmul not awaited"}), (2048, {"matmul not awaited"})):
        store = STORE.format(at).replace("st.", "@%p1 st.")
        body = ONE + COMMIT + "\t@%p1 wgmma.wait_group.sync.aligned 0;\n" + BARRIER + store + wait(0)
        both = np.concatenate([memory, memory])
        assert kit.execute(body, fill, threads=256, shared=8192, shared_bytes=both).kinds == kinds


# ---------------------------------------------------------------- as Triton lays them out


@triton.jit
def _dots(a_ptr, b_ptr, c_ptr, stride_am, stride_ak, stride_bk, stride_bn,
          M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, OUT: tl.constexpr):  # fmt: skip
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.zeros([M, N], OUT)
    for step in range(STEPS):
        a = tl.load(a_ptr + m * stride_am + (step * K + k[None, :]) * stride_ak)
        b = tl.load(b_ptr + (step * K + k[:, None]) * stride_bk + n * stride_bn)
        acc = tl.dot(a, b, acc, out_dtype=OUT, input_precision="tf32")
    tl.store(c_ptr + m * N + n, acc)


@pytest.mark.parametrize(("a_turned", "b_turned"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "warps"), [(64, 16, 128, 4), (128, 64, 32, 8)])
def test_tritons_layouts_for_the_h100_give_the_product(dtype, a_turned, b_turned, m, n, k, warps):
    steps = 2
    a, b = torch.from_numpy(integers(14, m, k * steps)), torch.from_numpy(integers(15, k * steps, n))
    a_given, b_given = a.to(dtype), b.to(dtype)
    if a_turned:
        a_given = a_given.T.contiguous().T
    if b_turned:
        b_given = b_given.T.contiguous().T
    c = torch.empty(m, n)
    with emulated("sm_90", strict=True):
        _dots[(1,)](
            a_given, b_given, c, *a_given.stride(), *b_given.stride(), m, n, k, steps, tl.float32, num_warps=warps
        )
    assert (c == a @ b).all()
