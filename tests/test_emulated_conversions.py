"""Conversions of the emulator, beside Python's integers and exact fractions."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from emulated_lanes import FORMATS, decode, encode, evaluate, nearest, register, same, special
from emulator_kit import execute, ptx
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.emulator.execution import code_of
from ldmperf.profiling.emulator.numerics import bf16_bits, bf16_values, f16_bits, f16_values, odd_float32
from ldmperf.profiling.emulator.program import UnknownInstruction

FAST = settings(max_examples=15, deadline=None, database=None)
INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
FLOAT_TYPES = {"f16": np.uint16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}


def dtype_of(kind):
    return np.dtype(("i" if kind[0] == "s" else "u") + str(int(kind[1:]) // 8))


def limits(kind):
    bits = int(kind[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def held(values, kind):
    """Integers as a register holds them: 8 bits in a register of 16."""
    size = max(int(kind[1:]), 16)
    return np.array([v & (1 << size) - 1 for v in values], f"u{size // 8}")


def extended(value, kind, bits):
    """A value of a type in a register of so many bits, as unsigned."""
    width = int(kind[1:])
    value &= (1 << width) - 1
    if kind[0] == "s" and value >> width - 1:
        value -= 1 << width
    return value & (1 << bits) - 1


def integers(kind):
    low, high = limits(kind)
    edge = st.sampled_from([low, low + 1, high, high - 1, 0, 1, 127, 128, 255, 256, 32767 % (high + 1)])
    return st.lists((edge | st.integers(low, high)).filter(lambda v: low <= v <= high), min_size=32, max_size=32)


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("source", INTEGERS)
@FAST
@given(data=st.data())
def test_integers_are_cut_off_or_extended(source, data):
    values = data.draw(integers(source))
    for to in INTEGERS:
        bits = max(int(to[1:]), 16)
        found = evaluate(f"cvt.{to}.{source}", f"u{bits // 8}", held(values, source))
        assert found.tolist() == [extended(v, to, bits) for v in values], to


@pytest.mark.parametrize("source", ["s16", "u32", "s32", "s64", "u64"])
@FAST
@given(data=st.data())
def test_integers_saturate(source, data):
    values = data.draw(integers(source))
    for to in INTEGERS:
        low, high = limits(to)
        bits = max(int(to[1:]), 16)
        found = evaluate(f"cvt.sat.{to}.{source}", f"u{bits // 8}", held(values, source))
        assert found.tolist() == [extended(min(max(v, low), high), to, bits) for v in values], to


def test_registers_wider_than_the_types():
    """PTX ISA 9.4.1: a source gives its low bits; a result is extended to its register."""
    x = np.array([0x1234_8081], np.uint32)
    cases = {
        ("s8", "s32", "%r0", np.uint32): 0xFFFFFF81,
        ("u8", "s32", "%r0", np.uint32): 0x81,
        ("s16", "u16", "%r0", np.uint32): 0xFFFF8081,
        ("u32", "s8", "%r0", np.uint32): 0xFFFFFF81,
        ("s32", "u8", "%rd0", np.uint64): 0x81,
        ("u64", "s16", "%rd0", np.uint64): 0xFFFFFFFFFFFF8081,
        ("s8", "u32", "%rs0", np.uint16): 0xFF81,
    }
    for (to, source, result, dtype), wanted in cases.items():
        left = execute(f"\tcvt.{to}.{source} {result}, %r1;", {"%r1": x})
        assert left.register(result, dtype)[0] == wanted, (to, source)


# ---------------------------------------------------------------- integers and floats


@pytest.mark.parametrize("source", INTEGERS)
@FAST
@given(data=st.data())
def test_integers_become_the_nearest_float(source, data):
    values = data.draw(integers(source))
    for to, dtype in FLOAT_TYPES.items():
        if to in ("f16", "bf16") and source.endswith("64"):
            continue
        found = evaluate(f"cvt.rn.{to}.{source}", dtype, held(values, source))
        same(decode(found, to), [nearest(Fraction(v), to) for v in values])


def test_integers_halfway_between_floats():
    """Of float32 and then bfloat16, each rounded, or of float64 and then float32."""
    for to, source, base in [
        ("bf16", "s32", 257 << 20),
        ("f16", "u32", 4097),
        ("f32", "s64", (1 << 62) + (1 << 38)),
    ]:
        values = [base + n for n in (-1, 0, 1)]
        if to == "f16":
            values = [4097, 4098, 4099, 65519, 65520, 65535]
        if (to, source) == ("f32", "s64"):
            values += [-v for v in values]
        found = evaluate(f"cvt.rn.{to}.{source}", FLOAT_TYPES[to], held(values, source))
        same(decode(found, to), [nearest(Fraction(v), to) for v in values])


ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
FRACTIONS = [
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    0.49999997,
    126.5,
    127.5,
    128.5,
    -128.5,
    255.5,
    32767.5,
    -32768.5,
    65535.5,
]
FRACTIONS += [
    2147483520.0,
    2147483648.0,
    -2147483648.0,
    4294967040.0,
    4294967296.0,
    9.2e18,
    2.0**63,
    2.0**64,
    -(2.0**63),
]


def from_nan(to, source):
    """PTX ISA 9.7.9.21, "Integer Notes"."""
    return 0 if source != "f64" and to not in ("s64", "u64") else 1 << int(to[1:]) - 1


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_floats_become_integers_of_their_range(rounding, source):
    values = special(source) + [nearest(Fraction(v), source) for v in FRACTIONS]
    for to in INTEGERS:
        low, high = limits(to)
        bits = max(int(to[1:]), 16)
        wanted = []
        for v in values:
            if math.isnan(v):
                integer = from_nan(to, source)
            elif math.isinf(v):
                integer = high if v > 0 else low
            else:
                integer = min(max(ROUNDINGS[rounding](Fraction(v)), low), high)
            wanted.append(extended(integer, to, bits))
        for saturating in ("", "sat."):
            operation = f"cvt.{rounding}.{saturating}{to}.{source}"
            assert evaluate(operation, f"u{bits // 8}", encode(values, source)).tolist() == wanted, operation


def test_subnormals_are_flushed_before_they_are_rounded():
    least = np.float32([2.0**-149, -(2.0**-149)])
    assert evaluate("cvt.rpi.s32.f32", np.int32, least).tolist() == [1, 0]
    assert evaluate("cvt.rpi.ftz.s32.f32", np.int32, least).tolist() == [0, 0]
    same(decode(evaluate("cvt.rpi.f32.f32", np.float32, least), "f32"), [1.0, -0.0])
    same(decode(evaluate("cvt.rpi.ftz.f32.f32", np.float32, least), "f32"), [0.0, -0.0])
    same(decode(evaluate("cvt.rmi.ftz.f32.f32", np.float32, least), "f32"), [0.0, -0.0])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_floats_become_whole(rounding, kind):
    values = special(kind) + [nearest(Fraction(v), kind) for v in FRACTIONS]
    wanted = []
    for v in values:
        whole = ROUNDINGS[rounding](Fraction(v)) if math.isfinite(v) else v
        wanted.append(math.copysign(float(whole), v))
    found = evaluate(f"cvt.{rounding}.{kind}.{kind}", FLOAT_TYPES[kind], encode(values, kind))
    same(decode(found, kind), wanted)


# ---------------------------------------------------------------- floats


def between(kind, count=400):
    """Values around the middles between floats of a 16-bit format, or anywhere in it."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 0x7F80 if kind == "bf16" else 0x7C00, count, dtype=np.uint16)
    low, high = (np.array(decode(b, kind)) for b in (bits, bits + np.uint16(1)))
    middle = np.where(np.isfinite(high), (low + np.where(np.isfinite(high), high, 0)) / 2, low)
    tiny = np.where(middle == 0, 0, middle * 2.0**-40)
    values = np.concatenate(
        [middle, middle + tiny, middle - tiny, middle * (1 + 2.0**-22), middle * (1 - 2.0**-22), low]
    )
    return [*map(float, values), *map(float, -values)]


def checked_conversion(to, source, values, modifiers=""):
    values = [v if not math.isfinite(v) else nearest(Fraction(v), source) for v in values]
    wanted = [v if not math.isfinite(v) or v == 0 else nearest(Fraction(v), to) for v in values]
    found = evaluate(f"cvt.{modifiers}{to}.{source}", FLOAT_TYPES[to], encode(values, source))
    same(decode(found, to), wanted)
    return found


NARROWER = [("f32", "f64"), ("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("bf16", "f64")]


@pytest.mark.parametrize(("to", "source"), [*NARROWER, ("bf16", "f16"), ("f16", "bf16")])
def test_floats_become_the_nearest_narrower_one(to, source):
    values = special(to) + special(source) + between("f16") + between("bf16")
    if to == "f32":
        values += [v * (1 + 2.0**-24) for v in special("f32")] + [
            v * (1 + 2.0**-24 + 2.0**-50) for v in special("f32")
        ]
    found = checked_conversion(to, source, values, "rn.")
    if to != "f32":
        assert {int(v) for v in found[[math.isnan(v) for v in decode(found, to)]]} == {0x7FFF}


@pytest.mark.parametrize(("source", "to"), NARROWER)
def test_floats_become_wider_exactly(source, to):
    if source in ("f16", "bf16"):
        bits = np.arange(1 << 16, dtype=np.uint16)
        values = decode(bits, source)
        with np.errstate(all="ignore"):
            found = evaluate(f"cvt.{to}.{source}", FLOAT_TYPES[to], bits[: 1 << 15])
            other = evaluate(f"cvt.{to}.{source}", FLOAT_TYPES[to], bits[1 << 15 :])
        same(decode(found, to) + decode(other, to), values)
    else:
        checked_conversion(to, source, special(source))


def test_float32_of_float32():
    x = np.float32([2.0**-130, -(2.0**-130), -2, 0.5, 3, np.inf, np.nan])
    same(decode(evaluate("cvt.f32.f32", np.float32, x), "f32"), [float(v) for v in x])
    flushed = [0.0, -0.0, -2.0, 0.5, 3.0, math.inf, math.nan]
    same(decode(evaluate("cvt.ftz.f32.f32", np.float32, x), "f32"), flushed)
    saturated = [2.0**-130, 0.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    same(decode(evaluate("cvt.sat.f32.f32", np.float32, x), "f32"), saturated)
    same(decode(evaluate("cvt.ftz.sat.f32.f32", np.float32, x), "f32"), [0.0, *saturated[1:]])


def test_flushing_in_conversions_takes_float32_alone():
    tiny, half = np.array([2.0**-140]), encode([2.0**-24, 2.0**-130], "f16")
    same(decode(evaluate("cvt.rn.f32.f64", np.float32, tiny), "f32"), [2.0**-140])
    same(decode(evaluate("cvt.rn.ftz.f32.f64", np.float32, tiny), "f32"), [0.0])
    same(decode(evaluate("cvt.ftz.f64.f32", np.float64, tiny.astype(np.float32)), "f64"), [0.0])
    same(decode(evaluate("cvt.ftz.f32.f16", np.float32, half), "f32"), [2.0**-24, 0.0])
    same(decode(evaluate("cvt.f32.bf16", np.float32, encode([2.0**-130], "bf16")), "f32"), [2.0**-130])
    same(decode(evaluate("cvt.ftz.f32.bf16", np.float32, encode([2.0**-130], "bf16")), "f32"), [0.0])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_relu_and_pairs(kind):
    """The first operand goes to the upper half."""
    values = [nearest(Fraction(v), "f32") for v in between(kind, 60)]
    high, low = np.float32([*values, *special("f32")]), np.float32([*special("f32"), *values])
    pair = evaluate(f"cvt.rn.{kind}x2.f32", np.uint32, high, low)
    one, other = (evaluate(f"cvt.rn.{kind}.f32", np.uint16, v) for v in (high, low))
    assert (pair == one.astype(np.uint32) << np.uint32(16) | other).all()
    single = decode(evaluate(f"cvt.rn.relu.{kind}.f32", np.uint16, high), kind)
    wanted = [v if math.isnan(v) else max(v, 0.0) + 0.0 for v in decode(one, kind)]
    same(single, wanted)
    pair = evaluate(f"cvt.rn.relu.{kind}x2.f32", np.uint32, high, low)
    same(decode((pair >> np.uint32(16)).astype(np.uint16), kind), wanted)
    lower = [v if math.isnan(v) else max(v, 0.0) + 0.0 for v in decode(other, kind)]
    same(decode(pair.astype(np.uint16), kind), lower)
    shared = evaluate(f"cvt.rn.{kind}x2.f32", np.uint32, high, "0f3F800000")
    assert (shared == one.astype(np.uint32) << np.uint32(16) | encode([1.0], kind)[0]).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_with_nan_in_either_half(kind):
    one = int(encode([1.0], kind)[0])
    for high, low, wanted in [
        (np.nan, 1, 0x7FFF << 16 | one),
        (1, np.nan, one << 16 | 0x7FFF),
        (np.nan, -np.nan, 0x7FFF7FFF),
    ]:
        found = evaluate(f"cvt.rn.{kind}x2.f32", np.uint32, np.float32([high]), np.float32([low]))
        assert found.tolist() == [wanted]


def float8_values(mantissa, bias, codes):
    """The finite numbers of an 8-bit float by code, from its definition: exact fractions."""
    found = []
    for code in range(codes):
        exponent, digits = code >> mantissa, Fraction(code & (1 << mantissa) - 1, 1 << mantissa)
        size = (1 + digits) * Fraction(2) ** exponent if exponent else digits * 2
        found.append(size / 2**bias)
    return found


# The codes up to the largest finite number: of e4m3 the last is NaN, of e5m2 the last four are not finite.
@pytest.mark.parametrize(("kind", "mantissa", "bias", "codes"), [("e4m3", 3, 7, 0x7F), ("e5m2", 2, 15, 0x7C)])
def test_pairs_of_8_bit_floats(kind, mantissa, bias, codes):
    """Every number and every tie between two, with their neighbours in float32, by the distance to all numbers."""
    numbers = float8_values(mantissa, bias, codes)
    ties = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    exact = np.float32([float(v) for v in [*numbers, *ties]])
    assert [Fraction(float(v)) for v in exact] == [*numbers, *ties]
    around = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))])
    past = np.float32([float(numbers[-1]) * by for by in (1.01, 1.04, 1.2, 3, 1e30)] + [np.inf, 1e-45])
    values = np.concatenate([around, past])
    wanted = []
    for value in values:
        size = min(Fraction(float(value)), numbers[-1]) if np.isfinite(value) else numbers[-1]
        # Of two that are as near, the one whose code is even.
        wanted.append(min(range(codes), key=lambda code: (abs(numbers[code] - size), code & 1)))
    wanted = np.array([*wanted, *(0x80 | code for code in wanted), 0x7F], np.uint16)
    values = np.concatenate([values, -values, np.float32([np.nan])])
    pair = evaluate(f"cvt.rn.satfinite.{kind}x2.f32", np.uint16, values, values[::-1].copy())
    assert (pair >> 8 == wanted).all()
    assert (pair & 0xFF == wanted[::-1]).all()
    pair = evaluate(f"cvt.rn.satfinite.relu.{kind}x2.f32", np.uint16, values, "0f3F800000")
    assert (pair >> 8 == np.where((wanted & 0x80) == 0, wanted, 0)).all()
    assert (pair & 0xFF == bias << mantissa).all()


def test_tensor_floats_round_ties_away_from_zero():
    bits = np.array(
        [0x3F800FFF, 0x3F801000, 0x3F801001, 0xBF801000, 0x3F803000, 0x7F7FFFFF, 0x00001000], np.uint32
    )
    wanted = [0x3F800000, 0x3F802000, 0x3F802000, 0xBF802000, 0x3F804000, 0x7F800000, 0x00002000]
    assert evaluate("cvt.rna.tf32.f32", np.uint32, bits).tolist() == wanted
    special_bits = np.float32([np.inf, -np.inf, 0.0, -0.0, np.nan, -np.nan])
    found = evaluate("cvt.rna.tf32.f32", np.uint32, special_bits)
    assert found.tolist() == [0x7F800000, 0xFF800000, 0, 0x80000000, 0x7FFFFFFF, 0x7FFFFFFF]


def test_saturated_floats():
    x = np.array([-1.0, -0.0, 0.25, 1.5, np.inf, np.nan])
    wanted = [0.0, 0.0, 0.25, 1.0, 1.0, 0.0]
    same(decode(evaluate("cvt.sat.f64.f32", np.float64, x.astype(np.float32)), "f64"), wanted)
    same(decode(evaluate("cvt.rn.sat.f32.f64", np.float32, x), "f32"), wanted)
    same(decode(evaluate("cvt.rn.sat.f16.f32", np.uint16, x.astype(np.float32)), "f16"), wanted)


# ---------------------------------------------------------------- formats


def test_all_halves_survive_their_conversion():
    bits = np.arange(1 << 16, dtype=np.uint16)
    for values, back, nan in [(bf16_values, bf16_bits, 0x7F80), (f16_values, f16_bits, 0x7C00)]:
        is_nan = (bits & 0x7FFF) > nan
        with np.errstate(all="ignore"):
            assert (back(values(bits)) == np.where(is_nan, 0x7FFF, bits)).all()


def test_rounding_to_odd_takes_the_neighbour_whose_last_bit_is_set():
    rng = np.random.default_rng(4)
    values = rng.uniform(-2, 2, 2000) * 2.0 ** rng.integers(-152, 127, 2000)
    values[::3] = values[::3].astype(np.float32)
    found = odd_float32(values)
    for value, odd in zip(values, found, strict=True):
        near = np.float32(value)
        away = np.inf if value > near else -np.inf
        neighbours = {int(v.view(np.uint32)) for v in (near, np.nextafter(near, np.float32(away)))}
        wanted = {int(near.view(np.uint32))} if near == value else {bits for bits in neighbours if bits & 1}
        assert wanted == {int(odd.view(np.uint32))}


def test_float16_as_numpy_has_it():
    bits = np.random.default_rng(3).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    # Many within the range of float16.
    bits[::2] = (bits[::2] & np.uint32(0x8FFFFFFF)) + np.uint32(0x30000000)
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        wanted = np.where(np.isnan(values), 0x7FFF, values.astype(np.float16).view(np.uint16))
        assert (f16_bits(values) == wanted).all()
    halves = np.arange(1 << 16, dtype=np.uint16)
    wanted = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(f16_values(halves), wanted, equal_nan=True)
    assert (np.signbit(f16_values(halves)) == np.signbit(wanted)).all()


def test_bfloat16_of_arrays_of_any_shape():
    x = np.float32([[1, np.nan], [-2, 3]])
    assert bf16_bits(x).tolist() == [[0x3F80, 0x7FFF], [0xC000, 0x4040]]
    assert f16_bits(x).tolist() == [[0x3C00, 0x7FFF], [0xC000, 0x4200]]


def test_infinities_do_not_hide_a_nan():
    x = np.float32([np.inf, -np.inf, 3e38, np.nan, -3e38])
    with np.errstate(all="ignore"):
        found = bf16_bits(x)
    assert found.tolist() == [0x7F80, 0xFF80, 0x7F62, 0x7FFF, 0xFF62]


# ---------------------------------------------------------------- all forms alike

FORMS = [
    ("cvt.f32.bf16", np.float32, np.uint16),
    ("cvt.f32.f16", np.float32, np.uint16),
    ("cvt.rn.bf16.f32", np.uint16, np.float32),
    ("cvt.rn.f16.f32", np.uint16, np.float32),
    ("cvt.rn.f32.s32", np.float32, np.uint32),
    ("cvt.rn.f32.u32", np.float32, np.uint32),
    ("cvt.rn.bf16.s32", np.uint16, np.uint32),
    ("cvt.rzi.s32.f32", np.uint32, np.float32),
    ("cvt.rmi.ftz.f32.f32", np.float32, np.float32),
    ("cvt.s64.s32", np.uint64, np.uint32),
    ("cvt.u64.u32", np.uint64, np.uint32),
    ("cvt.u32.u64", np.uint32, np.uint64),
    ("cvt.u32.u16", np.uint32, np.uint16),
    ("cvt.u16.u32", np.uint16, np.uint32),
    ("cvt.sat.s8.s32", np.uint16, np.uint32),
    ("cvt.rna.tf32.f32", np.uint32, np.float32),
    ("cvt.f64.f32", np.float64, np.float32),
    ("cvt.rn.f32.f64", np.float32, np.float64),
]


@pytest.mark.parametrize(("operation", "to", "source"), FORMS)
def test_every_conversion_alike(operation, to, source):
    """An operand that all lanes share, lanes that are elsewhere, modifiers that nobody knows."""
    x = (
        (np.arange(32) * 37 - 600).astype(source)
        if source != np.uint16
        else np.arange(32, dtype=np.uint16) * np.uint16(991)
    )
    whole = evaluate(operation, to, x)
    assert evaluate(operation, to, x[5:6]).tolist() == whole[5:6].tolist()
    mask = np.arange(32) % 3 != 1
    old = np.full(32, 77, to)
    found = evaluate(operation, to, x, mask=mask, registers={register(0, to): old})
    assert (found == np.where(mask, whole, old)).all()
    opcode, *modifiers = operation.split(".")
    for place in range(len(modifiers) + 1):
        unknown = ".".join([opcode, *modifiers[:place], "strange", *modifiers[place:]])
        with pytest.raises(UnknownInstruction, match="strange"):
            evaluate(unknown, to, x)
    with pytest.raises(UnknownInstruction):
        evaluate(operation, to, x, x)


UNKNOWN = """
cvt.bf16.f32 %rs1, %r1
cvt.f32.s32 %r1, %r2
cvt.s32.f32 %r1, %r2
cvt.rn.f32.f16 %r1, %rs1
cvt.rn.f32.f32 %r1, %r2
cvt.rz.bf16.f32 %rs1, %r1
cvt.rz.bf16x2.f32 %r1, %r2, %r3
cvt.rn.satfinite.bf16x2.f32 %r1, %r2, %r3
cvt.rs.f16x2.f32 %r1, %r2, %r3, %r4
cvt.rn.e4m3x2.f32 %rs1, %r1, %r2
cvt.rn.satfinite.e2m3x2.f32 %rs1, %r1, %r2
cvt.rn.satfinite.e4m3x2.f16x2 %rs1, %r1
cvt.rn.f16x2.e4m3x2 %r1, %rs1
cvt.rna.satfinite.tf32.f32 %r1, %r2
cvt.rz.f32.s32 %r1, %r2
cvt.rn.f16.s64 %rs1, %rd1
cvt.rn.ftz.f16.f64 %rs1, %rd1
cvt.rn.relu.f32.f64 %r1, %rd1
cvt.rn.sat.bf16.f32 %rs1, %r1
cvt.rzi.ftz.s32.f64 %r1, %rd1
cvt.rzi.f32.f64 %r1, %rd1
cvt.f16.f16 %rs1, %rs2
cvt.rni.s32.s32 %r1, %r2
cvt.pack.sat.s8.s32.b32 %r1, %r2, %r3, %r4
"""


@pytest.mark.parametrize("text", UNKNOWN.strip().split("\n"))
def test_what_is_not_converted_is_named(text):
    with pytest.raises(UnknownInstruction, match=text.split()[0]):
        code_of(ptx(f"\t{text};\n\tret;"))
