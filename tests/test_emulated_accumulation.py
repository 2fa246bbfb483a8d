"""How the emulator sums the products of a matmul: against Python's integers, and what was measured on an A100."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.profiling.emulator.accumulation import integer_matmul, matmul
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.program import UnknownInstruction

CHIP = Numerics(accumulate="tensor core")

# ---------------------------------------------------------------- one element, in integers

# Of a type: bits of exponent and of mantissa.
FORMATS = {"f32": (8, 23), "bf16": (8, 7), "f16": (5, 10), "tf32": (8, 10), "e4m3": (4, 3), "e5m2": (5, 2)}
# Products at once and fractional bits: of the A100 16 bytes of a row of A, of the H100 32.
STEPS = {
    **{("sm_80", "bf16"): (8, 24), ("sm_80", "f16"): (8, 24), ("sm_80", "tf32"): (4, 24)},
    **{("sm_90", "bf16"): (16, 25), ("sm_90", "f16"): (16, 25), ("sm_90", "tf32"): (8, 25)},
    **{("sm_90", "e4m3"): (32, 13), ("sm_90", "e5m2"): (32, 13)},
}
# The exponent that a zero counts as, by the bits and the result's type.
OF_ZERO = {
    (24, "f32"): -132,
    (25, "f32"): -133,
    (13, "f32"): -133,
    (24, "f16"): -20,
    (25, "f16"): -21,
    (13, "f16"): -21,
}


def parts(value, kind):
    """(signed integer mantissa, exponent of its top bit's place, mantissa bits): value = m 2^(e - bits)."""
    exponent_bits, bits = FORMATS[kind]
    least = 2 - 2 ** (exponent_bits - 1)
    if value == 0:
        return 0, least, bits
    exponent = max(math.frexp(value)[1] - 1, least)
    mantissa = math.ldexp(value, bits - exponent)
    assert mantissa == int(mantissa), (value, kind)
    return int(mantissa), exponent, bits


def shifted(number, by):
    """number 2^by, cut off towards zero."""
    size = abs(number) << by if by >= 0 else abs(number) >> -by
    return -size if number < 0 else size


def bits_of(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def rounded_toward_zero(number, exponent, fraction):
    """number 2^exponent as a float of 8 bits of exponent and so many of fraction; infinite from 2^128 on."""
    size = abs(number)
    top = max(size.bit_length() - 1 + exponent, -126)
    cut = shifted(size, exponent - (top - fraction))
    value = math.inf if top > 127 else math.ldexp(cut, top - fraction)
    return (-value if number < 0 else value) if value else 0.0


def expected(a, b, c, kind, arch, result="f32"):
    """One element: a and b [K] numbers, c a number, each of its type."""
    step, bits = STEPS[arch, kind]
    for start in range(0, len(a), step):
        if math.isinf(c):
            break
        terms = []
        for x, y in zip(a[start : start + step], b[start : start + step], strict=True):
            (m, e, n), (m2, e2, n2) = parts(x, kind), parts(y, kind)
            terms.append((m * m2, e + e2, n + n2))
        terms.append(parts(c, result))
        largest = max(e if m else OF_ZERO[bits, result] for m, e, _ in terms)
        total = sum(shifted(m, e - n + bits - largest) for m, e, n in terms)
        if result == "f16":
            # Python's struct rounds to nearest, ties to even.
            value = math.ldexp(total, largest - bits)
            try:
                c = struct.unpack("<e", struct.pack("<e", value))[0] or 0.0
            except OverflowError:
                c = math.copysign(math.inf, value)
        else:
            c = rounded_toward_zero(total, largest - bits, 13 if bits == 13 else 23)
    return c


def numbers(generator, kind, count, middle, spread):
    """Finite numbers of a type, their exponents within `spread` of `middle` where it has those, and zeros."""
    exponent_bits, bits = FORMATS[kind]
    bias = 2 ** (exponent_bits - 1) - 1
    # 1.875 2^8 is none of e4m3's.
    least, top = 1 - bias, 7 if kind == "e4m3" else bias
    exponents = np.clip(middle + generator.integers(-spread, spread + 1, count), least - bits, top)
    found = []
    for exponent, mantissa in zip(exponents.tolist(), generator.random(count).tolist(), strict=True):
        place = max(exponent, least) - bits
        whole = int(math.ldexp(1 + mantissa, exponent - place))
        found.append(math.ldexp(whole * generator.choice([-1, 1, 1, 0]), place))
    return found


HALVES = [("sm_80", "f16", "f16"), ("sm_90", "f16", "f16"), ("sm_90", "e5m2", "f16")]


@pytest.mark.parametrize(("arch", "kind", "result"), [(*case, "f32") for case in STEPS] + HALVES)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    middle=st.sampled_from([0, -3, -7, -14, -64, -130, 8, 62, 126]),
    spread=st.sampled_from([0, 2, 5, 13, 30, 300]),
)
def test_sums_are_cut_off_as_the_chip_cuts_them(arch, kind, result, seed, middle, spread):
    generator = np.random.default_rng(seed)
    depth = {"tf32": 8, "e4m3": 32, "e5m2": 32}.get(kind, 16)
    a, b = (numbers(generator, kind, 4 * depth, middle, spread) for _ in range(2))
    c_kind, c_type = ("f16", np.float16) if result == "f16" else ("f32", np.float32)
    c = numbers(generator, c_kind, 4, 2 * middle, spread)
    with np.errstate(over="ignore"):
        d = matmul(
            np.float32(a).reshape(4, 1, depth),
            np.float32(b).reshape(4, depth, 1),
            np.array(c, c_type).reshape(4, 1, 1),
            kind,
            CHIP,
            arch,
            result=result,
            warp_group=kind in ("e4m3", "e5m2"),
        )
    assert d.dtype == c_type
    for k in range(4):
        row = slice(k * depth, (k + 1) * depth)
        want = expected(a[row], b[row], c[k], kind, arch, result)
        assert bits_of(float(d[k, 0, 0])) == bits_of(want), (float(d[k, 0, 0]), want)


@pytest.mark.parametrize(("arch", "kind"), [("sm_80", "bf16"), ("sm_90", "tf32")])
def test_each_element_of_many_matrices_is_summed_so(arch, kind):
    generator = np.random.default_rng(1)
    scale = 2.0 ** generator.integers(-12, 12, (2, 3, 5, 16))
    a = (generator.integers(-127, 128, (2, 3, 5, 16)) * scale).astype(np.float32)
    b = generator.integers(-127, 128, (2, 3, 16, 4)).astype(np.float32)
    c = generator.standard_normal((2, 3, 5, 4)).astype(np.float32)
    for summand in (c, None):
        d = matmul(a, b, summand, kind, CHIP, arch)
        for place in np.ndindex(d.shape):
            row, column = a[place[:3]], b[place[0], place[1], :, place[3]]
            start = 0.0 if summand is None else float(summand[place])
            assert float(d[place]) == expected(row.tolist(), column.tolist(), start, kind, arch)


# ---------------------------------------------------------------- what was measured

# (a, b, c, d) in bfloat16 as M. Fasi, N. Higham, M. Mikaitis and S. Pranesh found them: "Numerical behavior of
# NVIDIA tensor cores", PeerJ Computer Science 7 (2021) e330. At most four of the products are not zero.
MEASURED_ON_A100 = [
    # Subnormals are neither flushed in a and b, nor in c, nor in d.
    ([2.0**-133], [2.0**7], 0, 2.0**-126),
    ([0], [0], 2.0**-149, 2.0**-149),
    ([2.0**-126], [2.0**-1], 0, 2.0**-127),
    ([2.0**-126], [1], -(2.0**-127), 2.0**-127),
    # Products are exact.
    ([1 - 2.0**-8] * 4, [1 - 2.0**-8] * 4, 0, 4 * (1 - 2.0**-7 + 2.0**-16)),
    # Each is cut off beside the largest term, wherever that stands.
    ([0.5] * 4, [2.0**-24] * 4, 1, 1),
    ([1, 0.5, 0.5, 0.5], [1, 2.0**-24, 2.0**-24, 2.0**-24], 2.0**-25, 1),
    ([0.5, 0.5, 0.5, 1], [2.0**-24, 2.0**-24, 2.0**-24, 1], 2.0**-25, 1),
    # The result is rounded towards zero.
    ([1, 1], [2, 2.0**-23 + 2.0**-24], 0, 2),
    ([1, 1], [-2, -(2.0**-23) - 2.0**-24], 0, -2),
    # There is one bit more than float32 has.
    ([1], [1], -(1 - 2.0**-24), 2.0**-24),
    # Sums are normalized once, at the end.
    ([1] * 4, [2.0**-24] * 4, 1 - 2.0**-24, 1 + 2.0**-23),
    # Bits for carries.
    ([1] * 4, [1, 1.5, 1.75, 1.875], 1.875, 8),
    ([1] * 4, [1] * 4, 1 + 2.0**-22 + 2.0**-23, 5),
    ([1] * 4, [-1] * 4, -1 - 2.0**-22 - 2.0**-23, -5),
]


def element(a, b, c, arch, kind="bf16"):
    """d of one element, the rest of 16 products zero."""
    filled = [np.array(x + [0] * (16 - len(x)), np.float32) for x in (a, b)]
    return float(matmul(filled[0][None], filled[1][:, None], np.float32([[c]]), kind, CHIP, arch)[0, 0])


@pytest.mark.parametrize(("a", "b", "c", "d"), MEASURED_ON_A100)
def test_what_was_measured_on_an_a100(a, b, c, d):
    assert element(a, b, c, "sm_80") == d


def test_a_larger_c_may_make_a_smaller_sum_as_was_measured():
    """ "Monotonicity of dot product" of the same paper: terms that count beside 1 - 2^-24 are cut off beside 1."""
    a, b = [0.5] * 4, [2.0**-24, 2.0**-24, 2.0**-24, 2.0**-23 + 2.0**-24]
    assert element(a, b, 1 - 2.0**-24, "sm_80") > element(a, b, 1, "sm_80")


def test_the_h100_has_a_bit_more_and_takes_sixteen_products_at_once():
    """As arXiv:2512.07004 and arXiv:2511.10909 say. The A100 sums eight at once."""
    assert element([0.5] * 4, [2.0**-24] * 4, 1, "sm_80") == 1
    assert element([0.5] * 4, [2.0**-24] * 4, 1, "sm_90") == 1 + 2.0**-23
    assert element([0.5] * 4, [2.0**-25] * 4, 1, "sm_90") == 1
    # The ninth product cancels the first; by then the A100 has lost the second to the rounding of its first step.
    a, b = [1, 1, *[0] * 6, -1, 0], [2.0**24, 1, *[0] * 6, 2.0**24, 0]
    assert element(a, b, 0, "sm_90") == 1
    assert element(a, b, 0, "sm_80") == 0


# (architecture, how many products, s, t, d): their exact sum is 2^-149. Two of them are 2^-s (1 + 2^-t) and
# 2^-s (1 - 2^-t), the others 2^-s. They are cut off 24 bits below 2^-132, or 25 below 2^-133.
SMALLEST = [
    ("sm_80", 8, 152, 4, 2.0**-149),
    ("sm_90", 16, 153, 5, 2.0**-149),
    ("sm_80", 8, 152, 5, 0),
    ("sm_90", 16, 153, 6, 0),
]


@pytest.mark.parametrize(("arch", "count", "s", "t", "d"), SMALLEST)
def test_smallest_sums_have_a_common_exponent(arch, count, s, t, d):
    a = [1 + 2.0**-t, 1 - 2.0**-t, *[1] * (count - 2)]
    assert element([x * 2.0**-76 for x in a], [2.0 ** (76 - s)] * count, 0, arch) == d


@pytest.mark.parametrize(("arch", "kept", "lost"), [("sm_80", -44, -45), ("sm_90", -46, -47)])
def test_smallest_sums_of_halves_have_a_common_exponent(arch, kept, lost):
    """Beside 2^-25, a tie between 0 and 2^-24: what is kept rounds it up, what is cut off leaves it even."""
    for exponent, d in ((kept, 2.0**-24), (lost, 0)):
        a, b = np.float32([[2.0**-12, 2.0**-23]]), np.float32([[2.0**-13], [2.0 ** (exponent + 23)]])
        assert float(matmul(a, b, None, "f16", CHIP, arch, result="f16")[0, 0]) == d


# ---------------------------------------------------------------- infinities, NaN, overflow


INFINITE, NAN, LARGEST = math.inf, math.nan, 2.0**127 * (2 - 2.0**-7)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [
        ([INFINITE], [1], 0, INFINITE),
        ([INFINITE], [-1], 5, -INFINITE),
        ([INFINITE, 1], [1, 2.0**100], -3, INFINITE),
        ([INFINITE], [0], 0, NAN),
        ([INFINITE, -INFINITE], [1, 1], 0, NAN),
        ([1], [1], -INFINITE, -INFINITE),
        ([INFINITE], [1], -INFINITE, NAN),
        ([NAN], [0], 0, NAN),
        ([1], [1], NAN, NAN),
        ([LARGEST], [2], 0, INFINITE),
        ([LARGEST], [-2], 0, -INFINITE),
        ([LARGEST], [LARGEST], 0, INFINITE),
        # An overflow that the next product takes back, within one step.
        ([LARGEST, LARGEST], [2, -1], 0, LARGEST),
        # Cut off, not rounded up to infinity.
        ([LARGEST, 2.0**119, 1], [1, 2 - 2.0**-7, 1], 0, LARGEST + 2.0**119 * (2 - 2.0**-7)),
    ],
)
def test_infinities_and_nan(a, b, c, d, arch):
    with np.errstate(all="ignore"):
        got = element(a, b, c, arch)
        if math.isnan(d):
            filled = [np.array(x + [0] * (16 - len(x)), np.float32) for x in (a, b)]
            raw = matmul(filled[0][None], filled[1][:, None], np.float32([[c]]), "bf16", CHIP, arch)
            assert raw.view(np.uint32)[0, 0] == 0x7FFFFFFF
        else:
            assert got == d


def test_a_half_is_infinite_past_its_largest():
    """The sum of the products is 65535: past 65520, and of 5535 the nearest half is 5536."""
    a, b = np.float32([[255, 255]]), np.float32([[255], [2]])
    for c, d in ((0, INFINITE), (-60000, 5536)):
        with np.errstate(over="ignore"):
            got = matmul(a, b, np.float16([[c]]), "f16", CHIP, "sm_80", result="f16")
        assert float(got[0, 0]) == d


# ---------------------------------------------------------------- the rest


def test_in_float32_products_are_summed_by_numpy_and_then_added():
    generator = np.random.default_rng(2)
    a, b, c = (
        generator.standard_normal(shape).astype(np.float32) for shape in ((3, 8, 16), (3, 16, 4), (3, 8, 4))
    )
    np.testing.assert_array_equal(matmul(a, b, c, "bf16", Numerics(), "sm_80"), np.matmul(a, b) + c)
    np.testing.assert_array_equal(matmul(a, b, None, "bf16", Numerics(), ""), np.matmul(a, b))
    halves = matmul(a, b, c.astype(np.float16), "f16", Numerics(), "sm_90", result="f16")
    np.testing.assert_array_equal(halves, (np.matmul(a, b) + c.astype(np.float16)).astype(np.float16))


@pytest.mark.parametrize(("arch", "kind"), [("sm_100", "bf16"), ("sm_80", "e5m2"), ("sm_90", "e4m3"), ("", "f16")])
def test_what_was_not_measured_is_told(arch, kind):
    one = np.ones((1, 1), np.float32)
    with pytest.raises(UnknownInstruction, match=kind):
        matmul(one, one, one, kind, CHIP, arch)


@given(
    a=st.lists(st.integers(-128, 127), min_size=32, max_size=32),
    b=st.lists(st.integers(0, 255), min_size=32, max_size=32),
    c=st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-(2**31), 2**31 - 1]),
)
def test_integers_are_summed_exactly_and_wrap_or_saturate(a, b, c):
    total = sum(x * y for x, y in zip(a, b, strict=True)) + c
    operands = np.float32(a)[None], np.float32(b)[:, None], np.array([[c]], np.int32)
    assert integer_matmul(*operands, saturates=False)[0, 0] == (total + 2**31) % 2**32 - 2**31
    assert integer_matmul(*operands, saturates=True)[0, 0] == min(max(total, -(2**31)), 2**31 - 1)
