"""ldmatrix, stmatrix, movmatrix and mma.sync in the emulator, by the fragments of the PTX ISA (9.7.14.5)."""

import re

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

WARPS = 3

# ---------------------------------------------------------------- the ISA's formulas, an element of a lane each


def a_element(shape, kind, lane, i):
    """(row, column) of A's element a_i."""
    group, t = lane >> 2, lane % 4
    match shape, kind:
        case "m16n8k4", _:
            return group + 8 * (i == 1), t
        case "m16n8k8", "tf32":
            return group + 8 * (i in (1, 3)), t + 4 * (i >= 2)
        case "m16n8k8", _:
            return group + 8 * (i >= 2), t * 2 + (i & 1)
        case "m16n8k16", "s8" | "u8":
            return group + 8 * (i >= 4), t * 4 + (i & 3)
        case "m16n8k16", _:
            return group + 8 * (not (0 <= i < 2 or 4 <= i < 6)), t * 2 + (i & 1) + 8 * (i >= 4)
        case "m16n8k32", _:
            return group + 8 * (not (0 <= i < 4 or 8 <= i < 12)), t * 4 + (i & 3) + 16 * (i >= 8)


def b_element(shape, kind, lane, i):
    """(row, column) of B's element b_i."""
    group, t = lane >> 2, lane % 4
    match shape, kind:
        case "m16n8k4", _:
            return t, group
        case "m16n8k8", "tf32":
            return t + 4 * i, group
        case "m16n8k8", _:
            return t * 2 + i, group
        case "m16n8k16", "s8" | "u8":
            return t * 4 + (i & 3), group
        case "m16n8k16", _:
            return t * 2 + (i & 1) + 8 * (i >= 2), group
        case "m16n8k32", _:
            return t * 4 + (i & 3) + 16 * (i >= 4), group


def c_element(lane, i):
    return (lane >> 2) + 8 * (i >= 2), (lane % 4) * 2 + (i & 1)


# ---------------------------------------------------------------- operands

TORCH = {
    **{"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "s8": torch.int8, "u8": torch.uint8},
    **{"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "f32": torch.float32, "s32": torch.int32},
}


def raw(values, kind):
    """[..., bytes] of integers in a type, by torch."""
    typed = torch.from_numpy(np.array(values)).to(TORCH[kind]).contiguous()
    return typed.view(torch.uint8).numpy().reshape(*values.shape, typed.element_size())


def packed(matrix, kind, count, element_of):
    """Registers [count, lanes] of uint32 that hold a matrix [warps, ., .]: element i of a lane follows i - 1."""
    data = raw(matrix, kind)
    size = data.shape[-1]
    registers = np.zeros((count, len(matrix) * 32, 4), np.uint8)
    for warp in range(len(matrix)):
        for lane in range(32):
            for i in range(count * 4 // size):
                row, column = element_of(lane, i)
                at = i * size
                registers[at // 4, warp * 32 + lane, at % 4 : at % 4 + size] = data[warp, row, column]
    return registers.view(np.uint32)[..., 0]


def names(first, count):
    return [f"%r{first + k}" for k in range(count)]


def braces(registers):
    return "{" + ",".join(registers) + "}"


def run_mma(shape, kinds, a, b, c, **options):
    """D [warps, 16, 8] as numbers. kinds: of D, A, B and C."""
    d_kind, a_kind, b_kind, c_kind = kinds
    depth = a.shape[2]
    bytes_of = raw(np.zeros((1, 1), int), a_kind).shape[-1]
    counts = depth * bytes_of // 8, depth * bytes_of // 16, 2 if c_kind == "f16" else 4
    fill = {}
    for first, count, matrix, kind, element in (
        (10, counts[0], a, a_kind, lambda lane, i: a_element(shape, a_kind, lane, i)),
        (20, counts[1], b, b_kind, lambda lane, i: b_element(shape, b_kind, lane, i)),
        (30, counts[2], c, c_kind, c_element),
    ):
        fill |= dict(zip(names(first, count), packed(matrix, kind, count, element), strict=True))
    body = (
        f"\tmma.sync.aligned.{shape}.row.col.{options.pop('saturates', '')}{'.'.join(kinds)} "
        f"{braces(names(40, counts[2]))}, {braces(names(10, counts[0]))}, {braces(names(20, counts[1]))}, "
        f"{braces(names(30, counts[2]))};"
    )
    result = kit.execute(body, fill, threads=32 * len(a), **options)
    assert not result.kinds
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[d_kind]
    each = 4 // np.dtype(dtype).itemsize
    registers = np.stack([result.register(name, dtype).reshape(-1, each) for name in names(40, counts[2])])
    d = np.empty((len(a), 16, 8))
    for warp in range(len(a)):
        for lane in range(32):
            for i in range(4):
                d[(warp, *c_element(lane, i))] = registers[i // each, warp * 32 + lane, i % each]
    return d


def integers(seed, *shape, least=-4, most=4):
    return np.random.default_rng(seed).integers(least, most + 1, shape)


MMA = [
    ("m16n8k16", ("f32", "bf16", "bf16", "f32")),
    ("m16n8k16", ("f32", "f16", "f16", "f32")),
    ("m16n8k16", ("f16", "f16", "f16", "f16")),
    ("m16n8k8", ("f32", "bf16", "bf16", "f32")),
    ("m16n8k8", ("f32", "f16", "f16", "f32")),
    ("m16n8k8", ("f16", "f16", "f16", "f16")),
    ("m16n8k8", ("f32", "tf32", "tf32", "f32")),
    ("m16n8k4", ("f32", "tf32", "tf32", "f32")),
    ("m16n8k32", ("f32", "e4m3", "e4m3", "f32")),
    ("m16n8k32", ("f16", "e5m2", "e5m2", "f16")),
    ("m16n8k32", ("s32", "s8", "s8", "s32")),
    ("m16n8k16", ("s32", "u8", "s8", "s32")),
]


@pytest.mark.parametrize(("shape", "kinds"), MMA, ids=[".".join((shape, *kinds)) for shape, kinds in MMA])
def test_mma_is_the_product_of_the_fragments_matrices(shape, kinds):
    depth = int(shape.split("k")[1])
    low = 0 if kinds[1] == "u8" else -4
    a, b = integers(1, WARPS, 16, depth, least=low), integers(2, WARPS, depth, 8)
    c = integers(3, WARPS, 16, 8, least=-9, most=9)
    np.testing.assert_array_equal(run_mma(shape, kinds, a, b, c), a @ b + c)


@pytest.mark.parametrize(
    ("saturates", "expected"),
    [("", -(2**31) + 2 * 127 * 127 - 1), ("satfinite.", 2**31 - 1)],
    ids=["", "satfinite"],
)
def test_an_integer_mma_wraps_or_saturates(saturates, expected):
    a, b = np.zeros((1, 16, 32), int), np.zeros((1, 32, 8), int)
    a[0, 5, :2], b[0, :2, 3] = 127, 127
    c = np.full((1, 16, 8), 2**31 - 1)
    d = run_mma("m16n8k32", ("s32", "s8", "s8", "s32"), a, b, c, saturates=saturates)
    assert d[0, 5, 3] == expected
    assert d[0, 5, 4] == 2**31 - 1


def test_a_tf32_operand_loses_thirteen_bits_or_is_rounded():
    # 1 + 3 2^-12 lies between 1 and 1 + 2^-10, nearer to the latter.
    bits = np.float32(1 + 3 * 2.0**-12).view(np.uint32)
    fill = {name: np.array([bits]) for name in names(10, 4)} | {name: np.float32([1]) for name in names(20, 2)}
    fill |= {name: np.float32([0]) for name in names(30, 4)}
    body = (
        "\tmma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r40,%r41,%r42,%r43}, {%r10,%r11,%r12,%r13}, "
        "{%r20,%r21}, {%r30,%r31,%r32,%r33};"
    )
    for tf32, one in (("truncate", 1), ("round", 1 + 2.0**-10)):
        result = kit.execute(body, fill, numerics=Numerics(tf32=tf32))
        assert (result.register("%r40", np.float32) == 8 * one).all()


@pytest.mark.parametrize(("arch", "kept"), [("sm_80", 0), ("sm_90", 2.0**-23)])
def test_an_mma_sums_as_its_chip_does(monkeypatch, arch, kept):
    """Four times 2^-25 beside 1: below the A100's 24 bits, within the H100's 25."""
    monkeypatch.setattr(kit, "HEADER", kit.HEADER.replace("sm_90a", arch))
    a, b = np.zeros((1, 16, 16)), np.zeros((1, 16, 8))
    a[0, :, :4], b[0, :4, :] = 0.5, 2.0**-24
    d = run_mma(
        "m16n8k16", ("f32", "bf16", "bf16", "f32"), a, b, np.ones((1, 16, 8)), numerics=Numerics("tensor core")
    )
    assert (d == 1 + kept).all()


def test_every_eight_bit_float_is_as_torch_reads_it():
    codes = np.arange(256, dtype=np.uint8)
    for kind in ("e4m3", "e5m2"):
        values = torch.from_numpy(codes.copy()).view(TORCH[kind]).float().numpy()
        # A lane's first element is A's column 4 t of row g; B is 1 in row 0 only, so lanes with t = 0 have it.
        for first in range(0, 256, 8):
            a = np.zeros(32, np.uint32)
            a[::4] = codes[first : first + 8]
            b = np.zeros(32, np.uint32)
            b[::4] = {"e4m3": 0x38, "e5m2": 0x3C}[kind]
            zero = np.zeros(1, np.uint32)
            fill = {"%r10": a, "%r11": zero, "%r12": zero, "%r13": zero, "%r20": b, "%r21": zero}
            fill |= dict.fromkeys(names(30, 4), zero)
            body = (
                f"\tmma.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 {{%r40,%r41,%r42,%r43}}, "
                "{%r10,%r11,%r12,%r13}, {%r20,%r21}, {%r30,%r31,%r32,%r33};"
            )
            got = kit.execute(body, fill).register("%r40", np.float32)[::4]
            np.testing.assert_array_equal(got, values[first : first + 8])


# ---------------------------------------------------------------- ldmatrix, stmatrix, movmatrix


def row_addresses(seed, count, size):
    """[lanes] addresses of different 16-byte rows, in no order, for the lanes that give one; others' are bad."""
    places = (np.random.default_rng(seed).permutation(size // 16 - 1)[: WARPS * 8 * count] + 1) * 16
    address = np.full(WARPS * 32, 0xFFFFFFF1, np.uint32)
    for k, place in enumerate(places):
        address[k // (8 * count) * 32 + k % (8 * count)] = place
    return address


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_a_lane_the_elements_of_the_isa(count, transposed):
    """Thread i gets of row i / 4 the elements 2 (i % 4) and the next; transposed, of column i / 4."""
    size = 2048
    elements = np.arange(size // 2, dtype=np.uint16) * 7 + 1
    address = row_addresses(5, count, size)
    body = (
        f"\tldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16 "
        f"{braces(names(10, count))}, [%r1+16];"
    )
    start = address - np.uint32(16)
    result = kit.execute(body, {"%r1": start}, threads=32 * WARPS, shared=size, shared_bytes=elements)
    assert not result.kinds
    for matrix in range(count):
        got = result.register(f"%r{10 + matrix}", np.uint16).reshape(-1, 2)
        for warp in range(WARPS):
            rows = [elements[address[warp * 32 + 8 * matrix + row] // 2 :][:8] for row in range(8)]
            for lane in range(32):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    expected = rows[column][row] if transposed else rows[row][column]
                    assert got[warp * 32 + lane, half] == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_stores_what_lanes_hold(count, transposed):
    size = 2048
    address = row_addresses(6, count, size)
    held = np.random.default_rng(7).integers(0, 2**16, (count, WARPS * 32, 2), np.uint16)
    body = (
        f"\tstmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16 "
        f"[%r1], {braces(names(10, count))};"
    )
    fill = {"%r1": address} | {f"%r{10 + k}": held[k].view(np.uint32)[:, 0] for k in range(count)}
    result = kit.execute(body, fill, threads=32 * WARPS, shared=size)
    assert not result.kinds
    stored = result.threads.shared.bytes[:size].view(np.uint16)
    expected = np.full(size // 2, 0xFFFF, np.uint16)
    for matrix in range(count):
        for warp in range(WARPS):
            for lane in range(32):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    if transposed:
                        row, column = column, row
                    place = address[warp * 32 + 8 * matrix + row] // 2 + column
                    expected[place] = held[matrix, warp * 32 + lane, half]
    np.testing.assert_array_equal(stored, expected)


def test_movmatrix_transposes():
    held = np.random.default_rng(8).integers(0, 2**16, (WARPS * 32, 2), np.uint16)
    body = "\tmovmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;"
    result = kit.execute(body, {"%r1": held.view(np.uint32)[:, 0]}, threads=32 * WARPS)
    got = result.register("%r2", np.uint16).reshape(WARPS, 8, 8)
    np.testing.assert_array_equal(got, held.reshape(WARPS, 8, 8).transpose(0, 2, 1))


# ---------------------------------------------------------------- what is wrong with a kernel


LOAD = "\tldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r1];"


STORE = "\tstmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r10};"


@pytest.mark.parametrize(
    ("body", "address", "kinds"),
    [
        (LOAD, 8, {"misaligned"}),
        (LOAD, 512, {"out of bounds"}),
        (STORE, 520, {"misaligned", "out of bounds"}),
    ],
)
def test_bad_rows_are_found(body, address, kinds):
    starts = np.arange(32, dtype=np.uint32) * 16
    starts[3] = address
    fill = {"%r1": starts, "%r10": np.zeros(1, np.uint32)}
    assert kit.execute(body, fill, shared=512, shared_bytes=bytes(512)).kinds == kinds


def test_unwritten_rows_are_found():
    starts = np.arange(32, dtype=np.uint32) * 16
    found = kit.execute(LOAD, {"%r1": starts}, shared=512, shared_bytes=bytes(96))
    assert found.kinds == {"uninitialised"}


def test_rows_that_two_lanes_store_differently_conflict():
    starts = np.zeros(32, np.uint32)
    held = np.arange(32, dtype=np.uint32)
    assert "conflicting stores" in kit.execute(STORE, {"%r1": starts, "%r10": held}, shared=512).kinds


def test_a_stored_matrix_needs_a_barrier_before_another_warp_loads_it():
    own = np.tile(np.arange(32, dtype=np.uint32) * 16, 2) + np.repeat(np.uint32([0, 128]), 32)
    fill = {"%r1": own, "%r2": np.roll(own, 32), "%r10": np.arange(64, dtype=np.uint32)}
    for barrier, kinds in (("", {"race"}), ("\tbar.sync 0;\n", set())):
        body = f"{STORE}\n{barrier}{LOAD.replace('%r1]', '%r2]')}"
        assert kit.execute(body, fill, threads=64, shared=512).kinds == kinds


@pytest.mark.parametrize("body", [LOAD, "\tmovmatrix.sync.aligned.m8n8.trans.b16 %r10, %r11;"])
def test_part_of_a_warp_is_reported_and_gets_nothing(body):
    fill = {"%r1": np.tile(np.arange(32, dtype=np.uint32) * 16, 2), "%r11": np.arange(64, dtype=np.uint32)}
    fill["%r10"] = np.full(64, 99, np.uint32)
    mask = np.arange(64) != 40
    result = kit.execute(body, fill, threads=64, shared=512, shared_bytes=bytes(512), mask=mask)
    assert result.kinds == {"divergent warp"}
    got = result.register("%r10", np.uint32)
    assert (got[:32] != 99).all()
    assert (got[32:] == 99).all()


FOUR, TWO, ONE = "{%r1,%r2,%r3,%r4}", "{%r1,%r2}", "{%r1}"


@pytest.mark.parametrize(
    "body",
    [
        "\tldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r10,%r11}, [%r1];",
        "\tldmatrix.sync.aligned.m8n8.x1.b16 {%r10}, [%rd1];",
        "\tmma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd1,%rd2}, {%rd3}, {%rd4}, {%rd1,%rd2};",
        f"\tmma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {FOUR}, {FOUR}, {TWO}, {FOUR};",
        f"\tmma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {FOUR}, {FOUR}, {TWO}, {FOUR};",
        f"\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16 {FOUR}, {FOUR}, {TWO}, {TWO};",
        f"\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {FOUR}, {TWO}, {ONE}, {FOUR};",
    ],
)
def test_other_forms_are_told_by_name(body):
    with pytest.raises(UnknownInstruction, match=re.escape(body.strip().rstrip(";"))):
        code_of(kit.ptx(body + "\n\tret;"))


# ---------------------------------------------------------------- as Triton lays them out


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, stride_am, stride_ak, stride_bk, stride_bn,
         M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):  # fmt: skip
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * stride_am + k[None, :] * stride_ak)
    b = tl.load(b_ptr + k[:, None] * stride_bk + n * stride_bn)
    tl.store(c_ptr + m * N + n, tl.dot(a, b, out_dtype=OUT, input_precision="tf32"))


@pytest.mark.parametrize(("a_turned", "b_turned"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_tritons_layouts_for_the_a100_give_the_product(dtype, a_turned, b_turned):
    m, n, k = 64, 32, 64
    a, b = torch.from_numpy(integers(9, m, k)), torch.from_numpy(integers(10, k, n))
    a_given, b_given = a.to(dtype), b.to(dtype)
    if a_turned:
        a_given = a_given.T.contiguous().T
    if b_turned:
        b_given = b_given.T.contiguous().T
    c = torch.empty(m, n, dtype=torch.float32 if dtype.is_floating_point else torch.int32)
    out = tl.float32 if dtype.is_floating_point else tl.int32
    with emulated("sm_80", strict=True):
        _dot[(1,)](a_given, b_given, c, *a_given.stride(), *b_given.stride(), m, n, k, out, num_warps=4)
    assert (c == a @ b).all()
