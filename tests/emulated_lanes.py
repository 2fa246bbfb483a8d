"""Runs one PTX instruction in the emulator on arrays of operands, and rounds exact numbers as IEEE 754 does."""

import math
from fractions import Fraction

import numpy as np
from emulator_kit import execute

_PREFIX = {1: "%p", 2: "%rs", 4: "%r", 8: "%rd"}


def register(number, dtype):
    """The name of a register that holds a dtype."""
    return f"{_PREFIX[np.dtype(dtype).itemsize]}{number}"


def evaluate(operation, dtype, *operands, **options):
    """[lanes] of `dtype`: what `operation` makes of arrays [lanes] or [1], and of literals given as text."""
    return run(operation, dtype, *operands, **options)[0]


def run(operation, dtype, *operands, **options):
    """(result, what the run left)."""
    arrays = [np.atleast_1d(operand) for operand in operands if not isinstance(operand, str)]
    lanes = max(map(len, arrays), default=1)
    threads = -(-lanes // 32) * 32
    names, registers = [], dict(options.pop("registers", {}))
    for number, operand in enumerate(operands, start=1):
        if isinstance(operand, str):
            names.append(operand)
            continue
        array = np.atleast_1d(operand)
        names.append(register(number, array.dtype))
        registers[names[-1]] = array if len(array) == 1 else np.pad(array, (0, threads - len(array)), "edge")
    result = register(0, dtype)
    left = execute(f"\t{operation} {result}, {', '.join(names)};", registers, threads=threads, **options)
    return left.register(result, dtype)[:lanes], left


# (bits of the mantissa with the leading one, exponent of the least subnormal, exponent past the greatest)
FORMATS = {"f16": (11, -24, 16), "bf16": (8, -133, 128), "f32": (24, -149, 128), "f64": (53, -1074, 1024)}


def nearest(exact, kind):
    """The float of a format that is nearest to a Fraction, ties to even; 0.0 for 0."""
    precision, least, top = FORMATS[kind]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** max(exponent - precision + 1, least)
    rounded = round(size / quantum) * quantum
    value = math.inf if rounded >= Fraction(2) ** top else float(rounded)
    return value if exact > 0 else -value


def encode(values, kind):
    """Bits of Python floats that the format holds; a NaN as numpy's or as 0x7FFF."""
    if kind in ("f32", "f64"):
        dtype = np.float32 if kind == "f32" else np.float64
        return np.array(values, dtype)
    if kind == "f16":
        return np.array(
            [0x7FFF if math.isnan(v) else int(np.float16(v).view(np.uint16)) for v in values], np.uint16
        )
    return np.array(
        [0x7FFF if math.isnan(v) else int(np.float32(v).view(np.uint32)) >> 16 for v in values], np.uint16
    )


def decode(array, kind):
    """Python floats of an array of bits or floats."""
    if kind == "f16":
        return [float(v) for v in array.view(np.float16)]
    if kind == "bf16":
        return [float(v) for v in (array.astype(np.uint32) << np.uint32(16)).view(np.float32)]
    return [float(v) for v in array]


def same(found, wanted):
    """Whether Python floats are equal, zeros with their sign and NaN to NaN."""

    def key(value):
        return "nan" if math.isnan(value) else (value, math.copysign(1, value))

    assert len(found) == len(wanted)
    differ = [(n, f, w) for n, (f, w) in enumerate(zip(found, wanted, strict=True)) if key(f) != key(w)]
    assert not differ, f"{len(differ)} differ: (lane, found, wanted) {differ[:4]}"


_COMMON = [0.0, 1.0, 0.5, 2.0, 3.0, 1.5, 1 / 3, 7.0, 100.0]


def special(kind):
    """Values where arithmetic goes wrong: zeros, subnormals, the greatest, infinities, NaN, neighbours of 1."""
    precision, least, top = FORMATS[kind]
    ulp = 2.0 ** (1 - precision)
    edges = [
        2.0**least,
        3 * 2.0**least,
        2.0 ** (least + precision - 1) - 2.0**least,
        2.0 ** (least + precision - 1),
    ]
    edges += [2.0 ** (top - 1) * (2 - ulp), 2.0 ** (top - 1), 1 + ulp, 1 - ulp / 2, math.inf]
    values = [*edges, *(nearest(Fraction(v), kind) for v in _COMMON)]
    return [*values, *(-v for v in values), math.nan]
