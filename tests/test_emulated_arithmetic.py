"""Arithmetic, bits, comparisons and moves of the emulator, beside Python's integers and exact fractions."""

import math
import random
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from emulated_lanes import FORMATS, decode, encode, evaluate, nearest, run, same, special
from emulator_kit import execute, ptx
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.emulator.execution import code_of
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.program import UnknownInstruction

LANES = 32
FAST = settings(max_examples=12, deadline=None, database=None)


# ---------------------------------------------------------------- integers


def dtype_of(kind):
    return np.dtype({"s": "i", "u": "u", "b": "u"}[kind[0]] + str(int(kind[1:]) // 8))


def edges(kind):
    info = np.iinfo(dtype_of(kind))
    near = [info.min, info.min + 1, info.max, info.max - 1, info.max // 2, 0, 1, 2, 3, 7, 255, 256]
    return st.sampled_from([*near, *([-1, -2, -7] if kind[0] == "s" else [])]) | st.integers(info.min, info.max)


def columns(*kinds):
    """[LANES] values for each kind."""
    return st.tuples(*(st.lists(edges(kind), min_size=LANES, max_size=LANES) for kind in kinds))


def wrapped(value, kind):
    """A Python integer cut off to the bits of a type."""
    bits = int(kind[1:])
    low = value & (1 << bits) - 1
    return low - (1 << bits) if kind[0] == "s" and low >> bits - 1 else low


def array(values, kind):
    return np.array(values, dtype_of(kind))


def check_integers(operation, result, kinds, function, lists):
    found = evaluate(operation, dtype_of(result), *(array(v, k) for v, k in zip(lists, kinds, strict=True)))
    wanted = [wrapped(function(*values), result) for values in zip(*lists, strict=True)]
    assert found.tolist() == wanted


def truncated(x, y):
    """A quotient that is rounded to zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
WORDS = ("s16", "u16", "s32", "u32")
TWO_INTEGERS = {
    "add": (INTEGERS, lambda x, y: x + y),
    "sub": (INTEGERS, lambda x, y: x - y),
    "mul.lo": (INTEGERS, lambda x, y: x * y),
    "min": (INTEGERS, min),
    "max": (INTEGERS, max),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (kinds, _) in TWO_INTEGERS.items() for kind in kinds]
)
@FAST
@given(data=st.data())
def test_integer_arithmetic(name, kind, data):
    function = TWO_INTEGERS[name][1]
    check_integers(f"{name}.{kind}", kind, (kind, kind), function, data.draw(columns(kind, kind)))


@pytest.mark.parametrize("kind", INTEGERS)
@FAST
@given(data=st.data())
def test_upper_half_of_a_product(kind, data):
    bits = int(kind[1:])
    check_integers(
        f"mul.hi.{kind}", kind, (kind, kind), lambda x, y: x * y >> bits, data.draw(columns(kind, kind))
    )


@pytest.mark.parametrize("kind", WORDS)
@FAST
@given(data=st.data())
def test_whole_product(kind, data):
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    x, y, z = data.draw(columns(kind, kind, wide))
    check_integers(f"mul.wide.{kind}", wide, (kind, kind), lambda x, y: x * y, (x, y))
    check_integers(f"mad.wide.{kind}", wide, (kind, kind, wide), lambda x, y, z: x * y + z, (x, y, z))


@pytest.mark.parametrize("kind", INTEGERS)
@FAST
@given(data=st.data())
def test_integer_multiply_add(kind, data):
    bits = int(kind[1:])
    lists = data.draw(columns(kind, kind, kind))
    check_integers(f"mad.lo.{kind}", kind, (kind,) * 3, lambda x, y, z: x * y + z, lists)
    check_integers(f"mad.hi.{kind}", kind, (kind,) * 3, lambda x, y, z: (x * y >> bits) + z, lists)
    check_integers(f"sad.{kind}", kind, (kind,) * 3, lambda x, y, z: abs(x - y) + z, lists)


@pytest.mark.parametrize("kind", INTEGERS)
@FAST
@given(data=st.data())
def test_division_rounds_to_zero(kind, data):
    x, y = data.draw(columns(kind, kind))
    y = [v or 1 for v in y]
    check_integers(f"div.{kind}", kind, (kind, kind), truncated, (x, y))
    check_integers(f"rem.{kind}", kind, (kind, kind), lambda x, y: x - truncated(x, y) * y, (x, y))


@pytest.mark.parametrize("operation", ["div.s32", "rem.s32", "div.u64", "rem.u16"])
def test_division_by_zero_is_reported_of_lanes_that_are_here(operation):
    dtype = dtype_of(operation[4:])
    x, y = np.full(32, 100, dtype), np.full(32, 7, dtype)
    y[3] = y[5] = 0
    found, left = run(operation, dtype, x, y)
    assert left.kinds == {"division by zero"}
    assert [finding.count for finding in left.findings] == [2]
    assert np.delete(found, [3, 5]).tolist() == [14 if operation.startswith("div") else 2] * 30
    mask = np.ones(32, bool)
    mask[[3, 5]] = False
    _, left = run(operation, dtype, x, y, mask=mask, registers={"%r0": x, "%rd0": x, "%rs0": x})
    assert not left.kinds
    _, left = run(operation, dtype, x, "0", mask=mask)
    assert [finding.count for finding in left.findings] == [30]


@FAST
@given(lists=columns("s32", "s32"))
def test_relu_of_integer_extremes(lists):
    check_integers("min.relu.s32", "s32", ("s32", "s32"), lambda x, y: max(min(x, y), 0), lists)
    check_integers("max.relu.s32", "s32", ("s32", "s32"), lambda x, y: max(x, y, 0), lists)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
@FAST
@given(data=st.data())
def test_sign_of_integers(kind, data):
    lists = data.draw(columns(kind))
    check_integers(f"neg.{kind}", kind, (kind,), lambda x: -x, lists)
    check_integers(f"abs.{kind}", kind, (kind,), abs, lists)


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
@FAST
@given(data=st.data())
def test_bitwise(kind, data):
    x, y = data.draw(columns(kind, kind))
    check_integers(f"and.{kind}", kind, (kind, kind), lambda x, y: x & y, (x, y))
    check_integers(f"or.{kind}", kind, (kind, kind), lambda x, y: x | y, (x, y))
    check_integers(f"xor.{kind}", kind, (kind, kind), lambda x, y: x ^ y, (x, y))
    check_integers(f"not.{kind}", kind, (kind,), lambda x: ~x, (x,))
    check_integers(f"cnot.{kind}", kind, (kind,), lambda x: int(x == 0), (x,))


def test_predicates():
    p, q = (np.array(v * 8, bool) for v in ([0, 0, 1, 1], [0, 1, 0, 1]))
    for name, wanted in {"and": p & q, "or": p | q, "xor": p ^ q}.items():
        assert (evaluate(f"{name}.pred", bool, p, q) == wanted).all()
    assert (evaluate("not.pred", bool, p) == ~p).all()
    assert (evaluate("mov.pred", bool, p) == p).all()
    assert evaluate("mov.pred", bool, "-1").all()
    assert not evaluate("mov.pred", bool, "0").any()


SHIFTS = [("shl", "b16"), ("shl", "b32"), ("shl", "b64"), *(("shr", kind) for kind in ("b16", "b32", *INTEGERS))]


@pytest.mark.parametrize(("name", "kind"), SHIFTS)
@FAST
@given(data=st.data())
def test_shifts_past_the_width(name, kind, data):
    bits = int(kind[1:])
    count = st.integers(0, bits + 2) | st.sampled_from([255, 256, 1 << 31, (1 << 32) - 1])
    (x,), n = data.draw(columns(kind)), data.draw(st.lists(count, min_size=LANES, max_size=LANES))
    function = (lambda v, k: v << min(k, 64)) if name == "shl" else (lambda v, k: v >> k)
    check_integers(f"{name}.{kind}", kind, (kind, "u32"), function, (x, n))
    literal = evaluate(f"{name}.{kind}", dtype_of(kind), array(x, kind), str(n[0]))
    assert literal.tolist() == [wrapped(function(v, n[0]), kind) for v in x]


@FAST
@given(lists=columns("u32", "u32", "u32"))
def test_funnel_shifts(lists):
    def both(low, high):
        return high << 32 | low

    check_integers("shf.l.wrap.b32", "u32", ("u32",) * 3, lambda a, b, n: both(a, b) << (n & 31) >> 32, lists)
    check_integers("shf.r.wrap.b32", "u32", ("u32",) * 3, lambda a, b, n: both(a, b) >> (n & 31), lists)
    check_integers("shf.l.clamp.b32", "u32", ("u32",) * 3, lambda a, b, n: both(a, b) << min(n, 32) >> 32, lists)
    check_integers("shf.r.clamp.b32", "u32", ("u32",) * 3, lambda a, b, n: both(a, b) >> min(n, 32), lists)


def extracted(value, start, length, kind):
    """bfe as the ISA's loop says it (PTX ISA 9.7.1)."""
    bits = int(kind[1:])
    start, length = start & 255, length & 255
    sign = 0 if kind[0] == "u" or length == 0 else value >> min(start + length - 1, bits - 1) & 1
    taken = [value >> start + k & 1 if k < length and start + k < bits else sign for k in range(bits)]
    return sum(bit << k for k, bit in enumerate(taken))


def inserted(value, base, start, length, bits):
    start, length = start & 255, length & 255
    for k in range(length):
        if start + k < bits:
            base = base & ~(1 << start + k) | (value >> k & 1) << start + k
    return base


PLACES = st.lists(st.integers(0, 70) | st.sampled_from([255, 256, 300]), min_size=LANES, max_size=LANES)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@FAST
@given(data=st.data(), start=PLACES, length=PLACES)
def test_bit_fields(kind, data, start, length):
    x, y = data.draw(columns(kind, kind))
    check_integers(
        f"bfe.{kind}", kind, (kind, "u32", "u32"), lambda v, s, n: extracted(v, s, n, kind), (x, start, length)
    )
    literal = evaluate(f"bfe.{kind}", dtype_of(kind), array(x, kind), str(start[0]), str(length[0]))
    assert literal.tolist() == [wrapped(extracted(v, start[0], length[0], kind), kind) for v in x]
    bits = f"b{kind[1:]}"
    x, y = ([wrapped(v, bits) for v in values] for values in (x, y))
    check_integers(
        f"bfi.{bits}",
        bits,
        (bits, bits, "u32", "u32"),
        lambda a, b, s, n: inserted(a, b, s, n, int(bits[1:])),
        (x, y, start, length),
    )


@FAST
@given(lists=columns("b32", "b32", "b32"), table=st.integers(0, 255))
def test_three_way_logic(lists, table):
    def logic(x, y, z):
        return sum((table >> (x >> k & 1) * 4 + (y >> k & 1) * 2 + (z >> k & 1) & 1) << k for k in range(32))

    found = evaluate("lop3.b32", np.uint32, *(array(v, "b32") for v in lists), hex(table))
    assert found.tolist() == [logic(*values) for values in zip(*lists, strict=True)]


def permuted(x, y, selector):
    both = (y << 32 | x).to_bytes(8, "little")
    taken = []
    for k in range(4):
        digit = selector >> 4 * k & 15
        byte = both[digit & 7]
        taken.append((255 if byte >> 7 else 0) if digit & 8 else byte)
    return int.from_bytes(bytes(taken), "little")


@FAST
@given(lists=columns("b32", "b32", "b32"))
def test_permutes_bytes(lists):
    check_integers("prmt.b32", "b32", ("b32",) * 3, permuted, lists)
    x, y, (selector, *_) = lists
    found = evaluate("prmt.b32", np.uint32, array(x, "b32"), array(y, "b32"), f"0x{selector & 0xFFFF:X}U")
    assert found.tolist() == [permuted(a, b, selector & 0xFFFF) for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("kind", ["b32", "b64"])
@FAST
@given(data=st.data())
def test_counts_of_bits(kind, data):
    (x,) = data.draw(columns(kind))
    bits = int(kind[1:])
    check_integers(f"popc.{kind}", "u32", (kind,), lambda v: v.bit_count(), (x,))
    check_integers(f"clz.{kind}", "u32", (kind,), lambda v: bits - v.bit_length(), (x,))
    check_integers(f"brev.{kind}", kind, (kind,), lambda v: int(f"{v:0{bits}b}"[::-1], 2), (x,))


# ---------------------------------------------------------------- floats, each operation rounded once

EXACT = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y}


def rounded(function, values, kind):
    """A function of Python floats, rounded once to a format."""
    try:
        with np.errstate(all="ignore"):
            plain = float(function(*map(np.float64, values)))
    except OverflowError:
        plain = math.inf
    if not all(map(math.isfinite, values)):
        return plain
    exact = function(*map(Fraction, values))
    # The sign of an exact zero is that of float64, whose range is wide enough.
    return math.copysign(0.0, plain) if exact == 0 else nearest(exact, kind)


def check_floats(operation, kind, function, *lists):
    """A function of floats of one format, rounded once, by lane."""
    dtype = {"f32": np.float32, "f64": np.float64}.get(kind, np.uint16)
    found = evaluate(operation, dtype, *(encode(values, kind) for values in lists))
    same(decode(found, kind), [rounded(function, values, kind) for values in zip(*lists, strict=True)])


def floats(kind, count, seed):
    """Random floats of a format, of all exponents and of near ones."""
    rng = random.Random(seed)
    precision, least, top = FORMATS[kind]
    values = []
    for _ in range(count):
        near = rng.random() < 0.5
        exponent = rng.randint(-3, 3) if near else rng.randint(least + precision, top - 2)
        mantissa = rng.randrange(1 << precision - 1, 1 << precision)
        values.append(rng.choice([-1, 1]) * mantissa * 2.0 ** (exponent - precision + 1))
    return values


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", EXACT)
def test_float_arithmetic(name, kind):
    x, y = map(list, zip(*product(special(kind), repeat=2), strict=True))
    check_floats(f"{name}.{kind}", kind, EXACT[name], x + floats(kind, 500, 1), y + floats(kind, 500, 2))


def fused(x, y, z):
    return x * y + z


def halfway_cases(kind, seed, count=200):
    """x, y, z of which x * y + z lies next to the middle between two floats, nearer than float64 can tell."""
    rng = random.Random(seed)
    precision, least, _ = FORMATS[kind]
    ulp = 2.0 ** (1 - precision)
    cases = []
    for _ in range(count):
        # x * y = (1 - d^2) 2^power: a hair less than half a unit of z's last place.
        d, power = rng.randint(1, 3) * ulp, rng.randint(-8, 2)
        x, y, z = 1 + d, 1 - d, rng.randrange(1 << precision - 1, 1 << precision) * 2.0 ** (power + 1)
        if rng.random() < 0.3 and kind != "f16":
            # z is subnormal, and half of its unit 2^(least - 1).
            power, z = least - 1, rng.randrange(0, 1 << precision - 2) * 2.0**least
            y *= 2.0 ** (power // 2)
            power -= power // 2
        cases.append((x * 2.0**power, y, z))
        # x * y has one bit more than a float, and z is far less.
        bits = precision // 2
        x, y = (rng.randrange(1 << size - 1, 1 << size) | 1 for size in (bits, precision + 1 - bits))
        if (x * y).bit_length() == precision + 1:
            far = 2.0 ** (-20 if kind == "f16" else -60 if kind != "f64" else -120)
            cases.append((float(x), float(y), far * rng.randint(1, 3)))
    signs = ([rng.choice([-1, 1]) for _ in range(3)] for _ in cases)
    return [tuple(v * sign for v, sign in zip(*pair, strict=True)) for pair in zip(cases, signs, strict=True)]


@pytest.mark.parametrize("kind", FORMATS)
def test_fused_multiply_add_rounds_once(kind):
    cases = list(product(special(kind)[::3], repeat=3)) + halfway_cases(kind, 3)
    cases += zip(*(floats(kind, 300, seed) for seed in (4, 5, 6)), strict=True)
    check_floats(f"fma.rn.{kind}", kind, fused, *map(list, zip(*cases, strict=True)))


@pytest.mark.parametrize("kind", ["bf16", "f32", "f64"])
def test_the_halfway_cases_catch_rounding_twice(kind):
    """Summed in float64, and rounded to the format from there, many are wrong."""
    cases = halfway_cases(kind, 3)
    wrong = sum(
        nearest(Fraction(x * y + z), kind) != nearest(fused(*map(Fraction, (x, y, z))), kind) for x, y, z in cases
    )
    assert wrong > 50


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_mad_is_fma(kind):
    cases = halfway_cases(kind, 8)
    check_floats(f"mad.rn.{kind}", kind, fused, *map(list, zip(*cases, strict=True)))


def test_fused_float64_beyond_what_is_exact_there():
    """Products that are subnormal, underflow, or overflow before z takes them back."""
    rng = random.Random(9)
    cases = []
    for _ in range(300):
        x, y = (rng.choice([-1, 1]) * rng.uniform(1, 2) * 2.0 ** rng.randint(-600, 500) for _ in range(2))
        z = rng.choice([-1, 1]) * rng.uniform(1, 2) * 2.0 ** rng.randint(-1074, 1023)
        cases.append((x, y, z if rng.random() < 0.5 else float(np.float64(-x) * np.float64(y))))
    for _ in range(200):
        # What the product loses is partly below the least subnormal, or a factor is too great to be split.
        x, y = (rng.uniform(1, 2) * 2.0 ** rng.randint(-500, -495) for _ in range(2))
        cases.append((x, y, -float(np.float64(x) * np.float64(y))))
        cases.append(
            (rng.uniform(1, 2) * 2.0 ** rng.randint(990, 1022), rng.uniform(1, 2) * 2.0**-60, rng.uniform(1, 2))
        )
    cases += [(2.0**600, 2.0**600, -(2.0**1023)), (2.0**512, 2.0**512, -(2.0**1023)), (1e300, 1e300, -math.inf)]
    cases += [(2.0**-600, 2.0**-600, 0.0), (2.0**-600, -(2.0**-600), 0.0), (2.0**-537, 2.0**-538, 5e-324)]
    x, y, z = map(list, zip(*cases, strict=True))
    check_floats("fma.rn.f64", "f64", fused, x, y, z)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", [*EXACT, "fma.rn"])
def test_pairs_of_halves(name, kind):
    """A pair is two single ones."""
    count = 3 if name == "fma.rn" else 2
    low, high = ([encode(floats(kind, 64, 10 * half + k), kind) for k in range(count)] for half in range(2))
    words = [a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16) for a, b in zip(low, high, strict=True)]
    found = evaluate(f"{name}.{kind}x2", np.uint32, *words)
    assert (found & np.uint32(0xFFFF) == evaluate(f"{name}.{kind}", np.uint16, *low)).all()
    assert (found >> np.uint32(16) == evaluate(f"{name}.{kind}", np.uint16, *high)).all()


def test_flushing_takes_subnormals_of_operands_and_results():
    least = 2.0**-149
    cases = {
        ("add", 2.0**-126, least): 2.0**-126,
        ("add", -least, -least): -0.0,
        ("add", 2.0**-126, -(2.0**-127)): 2.0**-126,  # the operand is flushed, not the result
        ("sub", 2.0**-126, 1.5 * 2.0**-126): -0.0,  # the result is
        ("mul", 2.0**-100, -(2.0**-40)): -0.0,
        ("mul", least, 2.0**127): 0.0,
        ("max", -1.0, -least): -0.0,
        ("min", least, 1.0): 0.0,
    }
    for (name, x, y), wanted in cases.items():
        same(decode(evaluate(f"{name}.ftz.f32", np.float32, np.float32([x]), np.float32([y])), "f32"), [wanted])
        plain = float(evaluate(f"{name}.f32", np.float32, np.float32([x]), np.float32([y]))[0])
        assert plain != wanted or (name == "add" and y == least)
    x, y, z = (np.float32([v]) for v in (2.0**-100, 2.0**-40, 2.0**-149))
    same(decode(evaluate("fma.rn.ftz.f32", np.float32, x, y, z), "f32"), [0.0])
    same(decode(evaluate("fma.rn.ftz.f32", np.float32, -x, y, -z), "f32"), [-0.0])
    same(decode(evaluate("abs.ftz.f32", np.float32, -z), "f32"), [0.0])
    same(decode(evaluate("neg.ftz.f32", np.float32, z), "f32"), [-0.0])
    assert evaluate("setp.eq.ftz.f32", bool, z, "0f00000000").all()
    assert not evaluate("setp.eq.f32", bool, z, "0f00000000").any()


def test_saturation():
    x = np.float32([-1, -0.0, 0.25, 0.75, 2, np.inf, -np.inf, np.nan])
    wanted = [0.0, 0.0, 0.25, 0.75, 1.0, 1.0, 0.0, 0.0]
    same(decode(evaluate("mul.sat.f32", np.float32, x, "0f3F800000"), "f32"), wanted)
    same(decode(evaluate("add.rn.sat.f32", np.float32, x, "0f80000000"), "f32"), wanted)
    same(decode(evaluate("fma.rn.sat.f32", np.float32, x, "0f3F800000", "0f80000000"), "f32"), wanted)


def test_relu_of_fused_halves():
    x = encode([2.0, -2.0, math.nan, -0.0], "bf16")
    one, zero = encode([1.0], "bf16"), encode([0.0], "bf16")
    found = evaluate("fma.rn.relu.bf16", np.uint16, x, one, zero)
    same(decode(found, "bf16"), [2.0, 0.0, math.nan, 0.0])
    assert found[2] == 0x7FFF


def extreme(x, y, greatest, nan):
    """min and max as the ISA writes them (PTX ISA 9.7.3.11), -0 below +0."""
    if math.isnan(x) or math.isnan(y):
        if nan or (math.isnan(x) and math.isnan(y)):
            return math.nan
        return y if math.isnan(x) else x
    return (max if greatest else min)([x, y], key=lambda v: (v, math.copysign(1, v)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN"])
def test_extremes_order_zeros_and_pass_numbers(name, kind):
    if kind == "f64" and "NaN" in name:
        with pytest.raises(UnknownInstruction):
            evaluate(f"{name}.{kind}", np.float64, np.zeros(1), np.zeros(1))
        return
    x, y = map(list, zip(*product(special(kind), repeat=2), strict=True))
    dtype = {"f32": np.float32, "f64": np.float64}.get(kind, np.uint16)
    found = evaluate(f"{name}.{kind}", dtype, encode(x, kind), encode(y, kind))
    wanted = [extreme(a, b, "max" in name, "NaN" in name) for a, b in zip(x, y, strict=True)]
    same(decode(found, kind), wanted)
    if "NaN" in name:
        canonical = {"f32": 0x7FFFFFFF}.get(kind, 0x7FFF)
        bits = found.view(f"u{found.dtype.itemsize}")
        assert {int(b) for b, w in zip(bits, wanted, strict=True) if math.isnan(w)} == {canonical}


@pytest.mark.parametrize("kind", FORMATS)
def test_signs_of_floats(kind):
    x = special(kind)
    dtype = {"f32": np.float32, "f64": np.float64}.get(kind, np.uint16)
    same(decode(evaluate(f"neg.{kind}", dtype, encode(x, kind)), kind), [-v for v in x])
    same(decode(evaluate(f"abs.{kind}", dtype, encode(x, kind)), kind), [abs(v) for v in x])
    if kind in ("f32", "f64"):
        signs = [1.0, -1.0, 0.0, -0.0] * len(x)
        values = [v for v in x for _ in range(4)]
        found = evaluate(f"copysign.{kind}", dtype, encode(signs, kind), encode(values, kind))
        same(decode(found, kind), [math.copysign(v, s) for v, s in zip(values, signs, strict=True)])


def test_signs_of_pairs():
    word = np.array([0x80013C00], np.uint32)
    for kind in ("f16x2", "bf16x2"):
        assert evaluate(f"neg.{kind}", np.uint32, word).tolist() == [0x0001BC00]
        assert evaluate(f"abs.{kind}", np.uint32, word).tolist() == [0x00013C00]


def test_kinds_of_floats():
    values = np.float32([0, -0.0, 1, 2.0**-126, 2.0**-149, -(2.0**-127), np.inf, -np.inf, np.nan])
    wanted = {
        "finite": [1, 1, 1, 1, 1, 1, 0, 0, 0],
        "infinite": [0, 0, 0, 0, 0, 0, 1, 1, 0],
        "number": [1, 1, 1, 1, 1, 1, 1, 1, 0],
        "notanumber": [0, 0, 0, 0, 0, 0, 0, 0, 1],
        "normal": [1, 1, 1, 1, 0, 0, 0, 0, 0],
        "subnormal": [0, 0, 0, 0, 1, 1, 0, 0, 0],
    }
    for name, bits in wanted.items():
        assert evaluate(f"testp.{name}.f32", bool, values).tolist() == list(map(bool, bits)), name
    assert evaluate("testp.subnormal.f64", bool, np.array([2.0**-1030, 2.0**-1022])).tolist() == [True, False]


# ---------------------------------------------------------------- divisions, roots, transcendentals


@pytest.mark.parametrize("operation", ["div.rn.f32", "div.full.f32", "div.rn.f64"])
def test_divisions(operation):
    kind = operation[-3:]
    x, y = map(list, zip(*product(special(kind), repeat=2), strict=True))
    x, y = x + floats(kind, 300, 1), y + floats(kind, 300, 2)
    wanted = []
    for a, b in zip(x, y, strict=True):
        with np.errstate(all="ignore"):
            plain = float(np.float64(a) / np.float64(b))
        usual = math.isfinite(a) and math.isfinite(b) and a != 0 and b != 0
        wanted.append(nearest(Fraction(a) / Fraction(b), kind) if usual else plain)
    dtype = np.float32 if kind == "f32" else np.float64
    same(decode(evaluate(operation, dtype, encode(x, kind), encode(y, kind)), kind), wanted)


def test_approximate_division_by_the_greatest():
    """PTX ISA 9.7.3.8: past 2^126 the quotient is a zero of its sign, or NaN of an infinity."""
    y = np.float32([1.5 * 2.0**126, -(2.0**127), 2.0**126, np.inf])
    same(decode(evaluate("div.approx.f32", np.float32, "0f7F000000", y), "f32"), [0.0, -0.0, 2.0, 0.0])
    found = evaluate("div.approx.f32", np.float32, np.float32([-np.inf]), y)
    same(decode(found, "f32"), [math.nan, math.nan, -math.inf, math.nan])


def exact_root(value, kind):
    """The square root of a float, rounded once: by whole numbers, with 64 bits to spare."""
    exact = Fraction(value)
    shift = 2 * (FORMATS[kind][0] + 64) + 2200
    root = math.isqrt(exact.numerator * (1 << shift) // exact.denominator)
    if root * root * exact.denominator != exact.numerator << shift:
        root = root * 2 + 1  # never halfway
        return nearest(Fraction(root, 1 << shift // 2 + 1), kind)
    return nearest(Fraction(root, 1 << shift // 2), kind)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_exact_roots_and_reciprocals(kind):
    dtype = np.float32 if kind == "f32" else np.float64
    values = special(kind) + floats(kind, 500, 3)
    finite = [v for v in values if math.isfinite(v) and v > 0]
    found = evaluate(f"sqrt.rn.{kind}", dtype, encode(finite, kind))
    same(decode(found, kind), [exact_root(v, kind) for v in finite])
    found = evaluate(f"rcp.rn.{kind}", dtype, encode([v for v in values if v and math.isfinite(v)], kind))
    same(decode(found, kind), [nearest(1 / Fraction(v), kind) for v in values if v and math.isfinite(v)])
    edge = encode([math.inf, -math.inf, 0.0, -0.0, -1.0, math.nan], kind)
    same(decode(evaluate(f"rcp.rn.{kind}", dtype, edge), kind), [0.0, -0.0, math.inf, -math.inf, -1.0, math.nan])
    roots = [math.inf, math.nan, 0.0, -0.0, math.nan, math.nan]
    same(decode(evaluate(f"sqrt.rn.{kind}", dtype, edge), kind), roots)


APPROXIMATE = {
    "ex2": (math.exp2, (-140, 127)),
    "lg2": (math.log2, (2.0**-20, 2.0**20)),
    "rcp": (lambda x: 1 / x, (1e-3, 1e3)),
    "sqrt": (math.sqrt, (1e-3, 1e3)),
    "rsqrt": (lambda x: 1 / math.sqrt(x), (1e-3, 1e3)),
    "sin": (math.sin, (-6.28, 6.28)),
    "cos": (math.cos, (-6.28, 6.28)),
    "tanh": (math.tanh, (-4, 4)),
}


def spread(low, high, count=2048, seed=0):
    rng = np.random.default_rng(seed)
    if low > 0:
        return np.exp(rng.uniform(math.log(low), math.log(high), count)).astype(np.float32)
    return rng.uniform(low, high, count).astype(np.float32)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_are_rounded_correctly_unless_perturbed(name):
    function, (low, high) = APPROXIMATE[name]
    x = spread(low, high, 500)
    wanted = [nearest(Fraction(function(float(v))), "f32") for v in x]
    same(decode(evaluate(f"{name}.approx.f32", np.float32, x), "f32"), wanted)
    if name != "tanh":
        flushed = [v if abs(v) >= 2.0**-126 else math.copysign(0.0, v) for v in wanted]
        same(decode(evaluate(f"{name}.approx.ftz.f32", np.float32, x), "f32"), flushed)


# Of operands -inf, -normal, -0, +0, +inf, NaN: the tables of PTX ISA 9.7.3.13 to 9.7.3.22.
INF, NAN = math.inf, math.nan
TABLES = {
    "rcp": [-0.0, -0.5, -INF, INF, 0.0, NAN],
    "sqrt": [NAN, NAN, -0.0, 0.0, INF, NAN],
    "rsqrt": [NAN, NAN, -INF, INF, 0.0, NAN],
    "lg2": [NAN, NAN, -INF, -INF, INF, NAN],
    "ex2": [0.0, 0.25, 1.0, 1.0, INF, NAN],
    "sin": [NAN, None, -0.0, 0.0, NAN, NAN],
    "cos": [NAN, None, 1.0, 1.0, NAN, NAN],
    "tanh": [-1.0, None, -0.0, 0.0, 1.0, NAN],
}


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("name", TABLES)
def test_approximations_of_special_operands(name, seed):
    x = np.float32([-INF, -2, -0.0, 0.0, INF, NAN])
    found = decode(evaluate(f"{name}.approx.f32", np.float32, x, numerics=Numerics(perturb=seed)), "f32")
    wanted = TABLES[name]
    if wanted[1] is None or seed is not None:
        found, wanted = found[:1] + found[2:], wanted[:1] + wanted[2:]
    same(found, wanted)


def test_approximations_flush_what_they_take():
    x = np.float32([2.0**-127, -(2.0**-127)])
    cases = {
        "rcp": [INF, -INF],
        "rsqrt": [INF, -INF],
        "lg2": [-INF, -INF],
        "sqrt": [0.0, -0.0],
        "sin": [0.0, -0.0],
    }
    for name, wanted in cases.items():
        same(decode(evaluate(f"{name}.approx.ftz.f32", np.float32, x), "f32"), wanted)
    same(decode(evaluate("div.full.ftz.f32", np.float32, "0f3F800000", x), "f32"), [INF, -INF])
    same(decode(evaluate("div.full.ftz.f32", np.float32, x, "0f3F000000"), "f32"), [0.0, -0.0])
    same(decode(evaluate("rcp.approx.f32", np.float32, x), "f32"), [2.0**127, -(2.0**127)])
    same(decode(evaluate("div.full.f32", np.float32, "0f3F800000", x), "f32"), [2.0**127, -(2.0**127)])


def test_powers_of_two_are_exact_down_to_subnormals():
    x = np.arange(-150, 129).astype(np.float32)
    same(
        decode(evaluate("ex2.approx.f32", np.float32, x), "f32"),
        [nearest(Fraction(2) ** int(v), "f32") for v in x],
    )
    flushed = [0.0 if v < -126 else nearest(Fraction(2) ** int(v), "f32") for v in x]
    same(decode(evaluate("ex2.approx.ftz.f32", np.float32, x), "f32"), flushed)


def ulp(value):
    return 2.0 ** max(math.frexp(value)[1] - 24, -149)


# What PTX ISA 9.7.3 states for each of them, as the greatest error of an exact value.
BOUNDS = {
    "ex2": lambda v: 2 * ulp(v),
    "lg2": lambda v: 2.0**-22 * max(abs(v), 1),
    "rcp": ulp,
    "sqrt": lambda v: 2.0**-23 * v,
    "rsqrt": lambda v: 2.0**-22.9 * v,
    "sin": lambda v: 2.0**-20.5,
    "cos": lambda v: 2.0**-20.5,
    "tanh": lambda v: 2.0**-11 * abs(v),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_a_seed_makes_approximations_err_within_their_bounds(name):
    function, (low, high) = APPROXIMATE[name]
    x = spread(low, high)
    first, again, other = (
        evaluate(f"{name}.approx.f32", np.float32, x, numerics=Numerics(perturb=seed)) for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).mean() > 0.25
    parts = []
    for value, found in zip(x, first, strict=True):
        exact = function(float(value))
        parts.append((float(found) - exact) / BOUNDS[name](exact))
    assert max(map(abs, parts)) <= 1
    # Both ways, and most of what is allowed.
    assert max(parts) > 0.6
    assert min(parts) < -0.6
    assert abs(np.mean(parts)) < 0.1


def test_logarithms_near_one_err_absolutely():
    x = spread(0.9, 1.1)
    found = evaluate("lg2.approx.f32", np.float32, x, numerics=Numerics(perturb=1))
    errors = [float(f) - math.log2(float(v)) for f, v in zip(found, x, strict=True)]
    assert 0.9 * 2.0**-22 < max(map(abs, errors)) <= 2.0**-22


@pytest.mark.parametrize("name", ["div.full", "div.approx"])
def test_a_seed_makes_divisions_err_by_less_than_two_ulps(name):
    x, y = spread(1e-3, 1e3, seed=1), spread(1e-3, 1e3, seed=2)
    found = evaluate(f"{name}.f32", np.float32, x, y, numerics=Numerics(perturb=3))
    parts = [
        (float(f) - float(a) / float(b)) / ulp(float(a) / float(b)) for f, a, b in zip(found, x, y, strict=True)
    ]
    assert 1.5 < max(map(abs, parts)) <= 2
    exact = evaluate("div.rn.f32", np.float32, x, y, numerics=Numerics(perturb=3))
    same(
        decode(exact, "f32"),
        [nearest(Fraction(float(a)) / Fraction(float(b)), "f32") for a, b in zip(x, y, strict=True)],
    )


def test_equal_operands_err_equally():
    x = np.repeat(spread(-6, 6, 16), 16)
    found = evaluate("ex2.approx.f32", np.float32, x, numerics=Numerics(perturb=7)).reshape(16, 16)
    assert (found == found[:, :1]).all()
    one = evaluate("ex2.approx.f32", np.float32, x[:1], numerics=Numerics(perturb=7))
    assert one[0] == found[0, 0]


HALF_BOUNDS = {
    ("ex2", "f16"): lambda v: 2.0**-9.9 * v,
    ("ex2", "bf16"): lambda v: 2.0**-7 * v,
    ("tanh", "f16"): lambda v: 2.0**-10.987,
    ("tanh", "bf16"): lambda v: 2.0**-8,
}


@pytest.mark.parametrize(("name", "kind"), HALF_BOUNDS)
def test_approximations_of_halves(name, kind):
    """PTX ISA 9.7.4.9 and 9.7.4.10."""
    function, bound = {"ex2": math.exp2, "tanh": math.tanh}[name], HALF_BOUNDS[name, kind]
    operation = f"{name}.approx.{'ftz.' if (name, kind) == ('ex2', 'bf16') else ''}{kind}"
    values = [nearest(Fraction(float(v)), kind) for v in spread(-8, 8, 512)]
    exact = decode(evaluate(operation, np.uint16, encode(values, kind)), kind)
    same(exact, [nearest(Fraction(function(v)), kind) for v in values])
    found = decode(evaluate(operation, np.uint16, encode(values, kind), numerics=Numerics(perturb=4)), kind)
    parts = [(f - function(v)) / bound(function(v)) for f, v in zip(found, values, strict=True)]
    assert max(map(abs, parts)) <= 1
    assert found != exact
    bits = encode(values, kind)
    word = bits[::2].astype(np.uint32) | bits[1::2].astype(np.uint32) << np.uint32(16)
    pairs = evaluate(f"{operation}x2", np.uint32, word)
    same(decode(np.ascontiguousarray(pairs).view(np.uint16), kind), exact)


def test_a_half_is_rounded_once():
    """A power of two that float32 rounds to the middle of two float16."""
    x = np.array([0x11C5], np.uint16)
    wanted = nearest(Fraction(math.exp2(decode(x, "f16")[0])), "f16")
    same(decode(evaluate("ex2.approx.f16", np.uint16, x), "f16"), [wanted])


def test_the_exponential_of_bfloat16_is_flushed():
    x = encode([-126.0, -127.0, -130.0, 2.0**-130, -INF, INF], "bf16")
    found = evaluate("ex2.approx.ftz.bf16", np.uint16, x)
    same(decode(found, "bf16"), [2.0**-126, 0.0, 0.0, 1.0, 0.0, INF])


# ---------------------------------------------------------------- comparisons and selections

ORDERED = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("kind", INTEGERS)
@FAST
@given(data=st.data())
def test_integer_comparisons(kind, data):
    x, y = data.draw(columns(kind, kind))
    y = [a if n % 3 == 0 else b for n, (a, b) in enumerate(zip(x, y, strict=True))]
    names = dict(zip(ORDERED, ORDERED, strict=True)) | (UNSIGNED_NAMES if kind[0] == "u" else {})
    for name, meaning in names.items():
        found = evaluate(f"setp.{name}.{kind}", bool, array(x, kind), array(y, kind))
        assert found.tolist() == [ORDERED[meaning](a, b) for a, b in zip(x, y, strict=True)], name
    bits = f"b{kind[1:]}"
    found = evaluate(f"setp.ne.{bits}", bool, array(x, kind), array(y, kind))
    assert found.tolist() == [a != b for a, b in zip(x, y, strict=True)]


def compared(name, x, y):
    """PTX ISA 9.3.1.2: with a NaN an ordered comparison is False, an unordered one True."""
    nan = math.isnan(x) or math.isnan(y)
    if name in ("num", "nan"):
        return nan == (name == "nan")
    return name.endswith("u") if nan else ORDERED[name[:2]](x, y)


@pytest.mark.parametrize("kind", FORMATS)
def test_float_comparisons(kind):
    x, y = map(list, zip(*product(special(kind), repeat=2), strict=True))
    for name in [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"]:
        found = evaluate(f"setp.{name}.{kind}", bool, encode(x, kind), encode(y, kind))
        assert found.tolist() == [compared(name, a, b) for a, b in zip(x, y, strict=True)], name


@pytest.mark.parametrize("join", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", ["", "!"])
def test_comparisons_joined_with_a_predicate(join, negated):
    x, y = np.float32([1, 1, 2, 2] * 8), np.float32([1.5])
    c = np.array([0, 1, 0, 1] * 8, bool)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
    other = ~c if negated else c
    body = (
        f"\tsetp.lt.{join}.f32 %p1|%p2, %r1, %r2, {negated}%p3;\n\tsetp.lt.{join}.f32 %p4, %r1, %r2, {negated}%p3;"
    )
    left = execute(body, {"%r1": x, "%r2": y, "%p3": c})
    assert (left.register("%p1", bool) == combine(x < y, other)).all()
    assert (left.register("%p2", bool) == combine(~(x < y), other)).all()
    assert (left.register("%p4", bool) == combine(x < y, other)).all()


def test_a_comparison_and_its_opposite():
    x = np.float32([1, 2, np.nan] * 10 + [1, 1])
    left = execute("\tsetp.lt.f32 %p1|%p2, %r1, 0f3FC00000;", {"%r1": x})
    assert (left.register("%p1", bool) == (x < 1.5)).all()
    assert (left.register("%p2", bool) == ~(x < 1.5)).all()
    left = execute("\tsetp.ge.s32 _|%p2, %r1, 5;", {"%r1": np.arange(32, dtype=np.int32)})
    assert (left.register("%p2", bool) == (np.arange(32) < 5)).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_comparisons_of_pairs(kind):
    """The lower halves decide the first predicate, the upper the second."""
    values = encode(special(kind)[:16], kind)
    low, high = values[np.arange(32) % 16], values[np.arange(32) * 7 % 16]
    word, other = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16), values[5].astype(np.uint32)
    both = np.array([other | other << np.uint32(16)])
    left = execute(f"\tsetp.lt.{kind}x2 %p1|%p2, %r1, %r2;", {"%r1": word, "%r2": both})
    bound = decode(values[5:6], kind)[0]
    assert left.register("%p1", bool).tolist() == [v < bound for v in decode(low, kind)]
    assert left.register("%p2", bool).tolist() == [v < bound for v in decode(high, kind)]


@pytest.mark.parametrize("kind", ["b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"])
def test_selections(kind):
    dtype = np.dtype(f"u{int(kind[1:]) // 8}")
    x, y = (np.arange(32, dtype=dtype) + n for n in (0, 100))
    p = np.arange(32) % 3 == 0
    assert (evaluate(f"selp.{kind}", dtype, x, y, p) == np.where(p, x, y)).all()
    assert (evaluate(f"selp.{kind}", dtype, x, y, np.array([True])) == x).all()
    assert (evaluate(f"selp.{kind}", dtype, x, y, np.array([False])) == y).all()
    if kind[0] != "f":
        assert (
            evaluate(f"selp.{kind}", dtype, "1", "-1", p) == np.where(p, dtype.type(1), np.iinfo(dtype).max)
        ).all()


# ---------------------------------------------------------------- moves


def test_moves_of_literals():
    cases = {
        ("mov.b32", "0f3F800000", np.float32): 1.0,
        ("mov.f64", "0dBFF8000000000000", np.float64): -1.5,
        ("mov.u32", "-1", np.uint32): 0xFFFFFFFF,
        ("mov.b64", "-2", np.uint64): (1 << 64) - 2,
        ("mov.b16", "0x7FFF", np.uint16): 0x7FFF,
        ("mov.s32", "0x80000000", np.int32): -(1 << 31),
        ("mov.b32", "0xDEADBEEFU", np.uint32): 0xDEADBEEF,
    }
    for (operation, text, dtype), wanted in cases.items():
        assert evaluate(operation, dtype, text).tolist() == [wanted]


def test_moves_keep_bits():
    for kind, dtype in {
        "b16": np.uint16,
        "b32": np.uint32,
        "f32": np.uint32,
        "b64": np.uint64,
        "f64": np.uint64,
    }.items():
        x = np.arange(32, dtype=dtype) * dtype(0x7FF1) + dtype(0x7F01)
        assert (evaluate(f"mov.{kind}", dtype, x) == x).all()
    left = execute("\tmov.u32 %r1, %tid.x;\n\tmov.u32 %r2, %ctaid.x;", programs=2)
    assert left.register("%r1", np.uint32).tolist() == [*range(32)] * 2
    assert left.register("%r2", np.uint32).tolist() == [0] * 32 + [1] * 32


def test_packs_and_unpacks():
    low, high = np.arange(32, dtype=np.uint16), np.arange(32, dtype=np.uint16) + np.uint16(0xFF00)
    left = execute("\tmov.b32 %r1, {%rs1, %rs2};\n\tmov.b32 {_, %rs3}, %r1;", {"%rs1": low, "%rs2": high})
    assert (left.register("%r1", np.uint32) == low + high.astype(np.uint32) * 65536).all()
    assert (left.register("%rs3", np.uint16) == high).all()
    x = np.array([0x1122334455667788], np.uint64)
    body = "mov.b64 {%r1, %r2}, %rd1; mov.b64 {four}, %rd1; mov.b64 %rd2, {four};"
    left = execute(body.replace("four", "%rs1, %rs2, %rs3, %rs4"), {"%rd1": x})
    assert left.register("%r1", np.uint32)[0] == 0x55667788
    assert left.register("%r2", np.uint32)[0] == 0x11223344
    assert [int(left.register(f"%rs{k}", np.uint16)[0]) for k in (1, 2, 3, 4)] == [0x7788, 0x5566, 0x3344, 0x1122]
    assert left.register("%rd2", np.uint64)[5] == x[0]
    left = execute("\tmov.b32 %r1, {%rs1, %rs2};", {"%rs1": low, "%rs2": high[:1]})
    assert (left.register("%r1", np.uint32) == low + np.uint32(0xFF000000)).all()


def test_the_address_of_shared_memory():
    left = execute("\tmov.b32 %r1, global_smem;\n\tmov.u64 %rd1, global_smem;\n\tadd.s32 %r2, %r1, 64;")
    assert left.register("%r2", np.uint32).tolist() == [64] * 32
    assert left.register("%rd1", np.uint64).tolist() == [0] * 32
    with pytest.raises(UnknownInstruction, match="elsewhere"):
        execute("\tmov.b32 %r1, elsewhere;")
    with pytest.raises(UnknownInstruction, match="no array in shared memory"):
        execute("\tmov.b32 %r1, $place;\n$place:")


def test_addresses_of_spaces_stay():
    x = np.arange(32, dtype=np.uint64) + np.uint64(1 << 36)
    for operation in ("cvta.to.global.u64", "cvta.global.u64", "cvta.to.shared.u64", "cvta.shared.u64"):
        assert (evaluate(operation, np.uint64, x) == x).all()


# ---------------------------------------------------------------- all forms alike

# A result and operands: p predicate, h 16, w 32, d 64 bits.
FORMS = """
pp: not.pred mov.pred
ppp: and.pred or.pred xor.pred
hh: neg.s16 abs.s16 not.b16 cnot.b16 neg.bf16 abs.f16 mov.b16 tanh.approx.f16 tanh.approx.bf16 ex2.approx.f16
hh: ex2.approx.ftz.bf16
hhh: add.s16 sub.s16 mul.lo.s16 mul.hi.u16 div.u16 rem.s16 min.s16 max.u16 and.b16 or.b16 xor.b16 add.bf16 sub.f16
hhh: mul.rn.bf16 min.bf16 max.NaN.f16
hhhh: mad.lo.s16 fma.rn.bf16 fma.rn.relu.f16
hhw: shl.b16 shr.u16 shr.s16
hhhp: selp.b16
ww: neg.s32 abs.s32 not.b32 cnot.b32 neg.f32 abs.ftz.f32 mov.b32 brev.b32 popc.b32 clz.b32 sqrt.rn.f32
ww: rcp.rn.ftz.f32 ex2.approx.f32 ex2.approx.ftz.f32 lg2.approx.f32 rcp.approx.ftz.f32 sqrt.approx.f32
ww: rsqrt.approx.f32 sin.approx.f32 cos.approx.ftz.f32 tanh.approx.f32 neg.f16x2 abs.bf16x2 tanh.approx.bf16x2
www: add.s32 sub.u32 mul.lo.s32 mul.hi.s32 div.s32 rem.u32 min.s32 max.u32 min.relu.s32 and.b32 or.b32 xor.b32
www: shl.b32 shr.s32 add.f32 add.rn.ftz.f32 sub.sat.f32 mul.f32 min.ftz.f32 max.NaN.f32 div.rn.f32 div.full.f32
www: div.approx.ftz.f32 copysign.f32 add.f16x2 mul.bf16x2 min.bf16x2
wwww: mad.lo.u32 mad.hi.s32 sad.s32 fma.rn.f32 fma.rn.ftz.f32 fma.rn.sat.f32 prmt.b32 bfe.u32 bfe.s32 fma.rn.bf16x2
wwww: shf.l.wrap.b32 shf.r.clamp.b32 mad.rn.f32
wwwww: bfi.b32
wwwp: selp.f32 selp.b32
whh: mul.wide.u16
dww: mul.wide.s32
dwwd: mad.wide.s32
dd: neg.s64 abs.s64 not.b64 mov.b64 neg.f64 abs.f64 sqrt.rn.f64 rcp.rn.f64 cvta.to.global.u64
wd: popc.b64 clz.b64
ddd: add.s64 sub.s64 mul.lo.s64 mul.hi.u64 mul.hi.s64 div.s64 rem.u64 min.s64 max.s64 and.b64 or.b64 xor.b64
ddd: add.f64 mul.rn.f64 min.f64 div.rn.f64
dddd: mad.lo.s64 fma.rn.f64
ddw: shl.b64 shr.u64 shr.s64
dddp: selp.b64 selp.f64
phh: setp.lt.s16 setp.ne.b16 setp.lt.bf16 setp.gtu.f16
pww: setp.eq.b32 setp.lt.s32 setp.hi.u32 setp.lt.f32 setp.neu.ftz.f32 setp.nan.f32
pdd: setp.lt.u64 setp.eq.b64 setp.ge.f64
pwwp: setp.lt.and.f32 setp.ge.xor.s32
pw: testp.finite.f32
"""
SIZES = {"p": 1, "h": 2, "w": 4, "d": 8}
ALL_FORMS = [
    (o, shape) for line in FORMS.split("\n") if line for shape, ops in [line.split(":")] for o in ops.split()
]


def operand_of(letter, seed):
    rng = np.random.default_rng(seed)
    if letter == "p":
        return rng.random(32) < 0.5
    dtype = np.dtype(f"u{SIZES[letter]}")
    values = rng.integers(1, np.iinfo(dtype).max, 32, dtype=dtype)
    # Small numbers, too: counts of bits, exponents near 0.
    values[::4] = rng.integers(1, 40, 8)
    return values


def result_type(shape):
    return bool if shape[0] == "p" else np.dtype(f"u{SIZES[shape[0]]}")


@pytest.mark.parametrize(("operation", "shape"), ALL_FORMS)
def test_every_form_alike(operation, shape):
    """Operands that all lanes share, lanes that are elsewhere, modifiers that nobody knows, operands too many."""
    operands = [operand_of(letter, n) for n, letter in enumerate(shape[1:])]
    dtype = result_type(shape)
    whole = evaluate(operation, dtype, *operands)
    for n, operand in enumerate(operands):
        shared = [v[3:4] if k == n else v for k, v in enumerate(operands)]
        spread_out = [np.full(32, operand[3]) if k == n else v for k, v in enumerate(operands)]
        assert (evaluate(operation, dtype, *shared) == evaluate(operation, dtype, *spread_out)).all()
    assert evaluate(operation, dtype, *(v[3:4] for v in operands)).tolist() == whole[3:4].tolist()
    mask = np.arange(32) % 3 != 1
    old = ~whole
    name = {"p": "%p0", "h": "%rs0", "w": "%r0", "d": "%rd0"}[shape[0]]
    found = evaluate(operation, dtype, *operands, mask=mask, registers={name: old})
    assert (found == np.where(mask, whole, old)).all()
    opcode, *modifiers = operation.split(".")
    for place in range(len(modifiers) + 1):
        unknown = ".".join([opcode, *modifiers[:place], "strange", *modifiers[place:]])
        with pytest.raises(UnknownInstruction, match="strange"):
            evaluate(unknown, dtype, *operands)
    with pytest.raises(UnknownInstruction):
        evaluate(operation, dtype, *operands, operands[0])


UNKNOWN = """
add.sat.s32 %r1, %r2, %r3
add.rz.f32 %r1, %r2, %r3
mul.rm.f64 %rd1, %rd2, %rd3
add.ftz.f64 %rd1, %rd2, %rd3
add.f32x2 %rd1, %rd2, %rd3
add.s16x2 %r1, %r2, %r3
mul.wide.s64 %rd1, %rd2, %rd3
mul.lo.f32 %r1, %r2, %r3
fma.f32 %r1, %r2, %r3, %r4
fma.rz.f32 %r1, %r2, %r3, %r4
fma.rn.oob.bf16 %rs1, %rs2, %rs3, %rs4
fma.rn.ftz.f16 %rs1, %rs2, %rs3, %rs4
mad.rn.bf16 %rs1, %rs2, %rs3, %rs4
mad.f32 %r1, %r2, %r3, %r4
min.xorsign.abs.f32 %r1, %r2, %r3
min.NaN.s32 %r1, %r2, %r3
min.relu.u32 %r1, %r2, %r3
max.f32 %r1, %r2, %r3, %r4
div.f32 %r1, %r2, %r3
div.rz.f32 %r1, %r2, %r3
div.full.f64 %rd1, %rd2, %rd3
rcp.approx.ftz.f64 %rd1, %rd2
rsqrt.approx.f64 %rd1, %rd2
sqrt.full.f32 %r1, %r2
ex2.f32 %r1, %r2
ex2.approx.bf16 %rs1, %rs2
ex2.approx.ftz.f16 %rs1, %rs2
tanh.approx.ftz.f32 %r1, %r2
lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 0x3F, %p2
prmt.b32.f4e %r1, %r2, %r3, %r4
prmt.b4e.b32 %r1, %r2, %r3, %r4
shl.s32 %r1, %r2, %r3
setp.lt.b32 %p1, %r1, %r2
setp.lo.s32 %p1, %r1, %r2
setp.ltu.s32 %p1, %r1, %r2
setp.lt.ftz.f64 %p1, %rd1, %rd2
setp.lt.and.bf16x2 %p1|%p2, %r1, %r2, %p3
setp.lt.and.f32 %p1, %r1, %r2
selp.f16 %rs1, %rs2, %rs3, %p1
mov.v2.b32 {%r1, %r2}, {%r3, %r4}
mov.b128 %rd1, {%rd2, %rd3}
cvta.local.u64 %rd1, %rd2
dp4a.s32.s32 %r1, %r2, %r3, %r4
mul24.lo.s32 %r1, %r2, %r3
"""


@pytest.mark.parametrize("text", UNKNOWN.strip().split("\n"))
def test_what_is_not_executed_is_named(text):
    with pytest.raises(UnknownInstruction, match=text.split()[0]):
        code_of(ptx(f"\t{text};\n\tret;"))
