"""Floats: float32, float64, and bfloat16 and float16 alone or in pairs (PTX ISA 9.7.3, 9.7.4, 9.7.6, 9.7.7).

Each instruction is computed as written, rounded to nearest. ptxas may fuse a `mul` and an `add` without a rounding
modifier; nothing does here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .instruction_set import Action, Array, computes, executes, form, sources
from .move_instructions import sets_predicate
from .numerics import (
    HALVES,
    flushed,
    fused_float32,
    fused_float64,
    fused_half,
    greatest,
    least,
    odd_float32,
    perturbed,
    saturated,
)
from .program import DTYPES, PtxInstruction
from .threads import Threads

Function = Callable[..., Array]
_ZERO = np.zeros((), np.float32)
_HALF = r"f16|f16x2|bf16|bf16x2"


def _values(words: Array, kind: str) -> Array:
    """float32 of 16-bit floats: [lanes], or [lanes, 2] of pairs."""
    values, _ = HALVES[kind.removesuffix("x2")]
    return values(words.reshape(-1, 1).view(np.uint16) if kind.endswith("x2") else words)


def _words(values: Array, kind: str) -> Array:
    """What `_values` read, of float32 that are rounded."""
    _, bits = HALVES[kind.removesuffix("x2")]
    return bits(values).view(DTYPES[kind]).ravel() if kind.endswith("x2") else bits(values)


def _computes(
    i: PtxInstruction, function: Function, count: int, *, ftz: str | None = None, sat: str | None = None
) -> Action:
    """A function of `count` floats of the instruction's kind, which its modifiers flush and saturate."""
    kind = i.kind

    def of_halves(*words: Array) -> Array:
        return _words(function(*(_values(word, kind) for word in words)), kind)

    def of_flushed(*values: Array) -> Array:
        return flushed(function(*map(flushed, values)))

    whole = of_halves if kind not in ("f32", "f64") else of_flushed if ftz else function
    if not sat:
        return computes(i, whole, *[kind] * count)
    return computes(i, lambda *values: saturated(whole(*values)), *[kind] * count)


# ---------------------------------------------------------------- arithmetic


@executes("add", "sub", "mul")
def _arithmetic(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(rn\.)?(?:(?P<ftz>ftz\.)?(?P<sat>sat\.)?f32|f64|{_HALF})")
    if found is None:
        return None
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[i.opcode]
    return _computes(i, function, 2, ftz=found["ftz"], sat=found["sat"])


@executes("fma", "mad")
def _fused(i: PtxInstruction) -> Action | None:
    found = form(i, rf"rn\.(?:(?P<ftz>ftz\.)?(?P<sat>sat\.)?f32|f64|(?P<relu>relu\.)?(?P<half>{_HALF}))")
    if found is None or (i.opcode == "mad" and found["half"]):
        return None
    function = {"f32": fused_float32, "f64": fused_float64}.get(i.kind, fused_half)
    if found["relu"]:
        return _computes(i, lambda x, y, z: greatest(fused_half(x, y, z), _ZERO, nan=True), 3)
    return _computes(i, function, 3, ftz=found["ftz"], sat=found["sat"])


@executes("min", "max")
def _extreme(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(?P<ftz>ftz\.)?(?P<nan>NaN\.)?f32|f64|(?P<half_nan>NaN\.)?(?:{_HALF})")
    if found is None:
        return None
    pick, nan = (least if i.opcode == "min" else greatest), bool(found["nan"] or found["half_nan"])
    return _computes(i, lambda x, y: pick(x, y, nan=nan), 2, ftz=found["ftz"])


@executes("abs", "neg")
def _sign(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(?P<ftz>ftz\.)?f32|f64|(?P<half>{_HALF})")
    if found is None:
        return None
    if not found["half"]:
        return _computes(i, np.absolute if i.opcode == "abs" else np.negative, 1, ftz=found["ftz"])
    sign = np.array(0x80008000 if i.kind.endswith("x2") else 0x8000, DTYPES[i.kind])
    return computes(i, (lambda x: x & ~sign) if i.opcode == "abs" else (lambda x: x ^ sign), i.kind)


@executes("copysign")
def _copy_sign(i: PtxInstruction) -> Action | None:
    """The sign of a, the rest of b."""
    return _computes(i, lambda x, y: np.copysign(y, x), 2) if form(i, "f32|f64") else None


@executes("testp")
def _test(i: PtxInstruction) -> Action | None:
    found = form(i, r"(?P<test>finite|infinite|number|notanumber|normal|subnormal)\.(?P<kind>f32|f64)")
    if found is None:
        return None
    tiny = 2.0**-126 if found["kind"] == "f32" else 2.0**-1022
    tests: Mapping[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        # Zeros count as normal.
        "normal": lambda x: np.isfinite(x) & ((np.abs(x) >= tiny) | (x == 0)),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }
    return _computes(i, tests[found["test"]], 1)


# ---------------------------------------------------------------- divisions, roots, transcendentals


@executes("div", "rcp", "sqrt")
def _rounded(i: PtxInstruction) -> Action | None:
    found = form(i, r"rn\.(?:(?P<ftz>ftz\.)?f32|f64)")
    if found is None:
        return None
    function = {"div": np.divide, "rcp": np.reciprocal, "sqrt": np.sqrt}[i.opcode]
    return _computes(i, function, 2 if i.opcode == "div" else 1, ftz=found["ftz"])


def _by_reciprocal(x: Array, y: Array) -> Array:
    """div.approx multiplies by 1 / y, which is 0 past 2^126."""
    past = (np.abs(y) > 2.0**126) & np.isfinite(y)
    return np.where(past, x * np.copysign(0.0, y), x / y)


_APPROXIMATE: Mapping[str, Function] = {
    "div.full": np.divide,
    "div.approx": _by_reciprocal,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    **{"ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh},
}


@executes("div", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _approximate(i: PtxInstruction) -> Action | None:
    """Computed in float64 and rounded; with an error before, where the run wants one."""
    found = form(i, r"(?P<mode>approx|full)\.(?P<ftz>ftz\.)?f32")
    if found is None or (found["mode"] == "full" and i.opcode != "div") or (found["ftz"] and i.opcode == "tanh"):
        return None
    ftz = bool(found["ftz"])
    name = f"{i.opcode}.{found['mode']}" if i.opcode == "div" else i.opcode
    function, result = _APPROXIMATE[name], i.operand(0)
    operands = sources(i, *["f32"] * (2 if i.opcode == "div" else 1))

    def approximate(threads: Threads) -> None:
        values = [operand(threads) for operand in operands]
        if ftz:
            values = [flushed(value) for value in values]
        exact = function(*(value.astype(np.float64) for value in values))
        if threads.numerics.perturb is not None:
            exact = perturbed(name, exact, values, threads.numerics.perturb)
        value = exact.astype(np.float32)
        threads.write(result, flushed(value) if ftz else value)

    return approximate


@executes("ex2", "tanh")
def _approximate_half(i: PtxInstruction) -> Action | None:
    """ex2 of bfloat16 is always flushed, that of float16 never."""
    known = {
        "ex2": r"approx\.(?:f16|f16x2|(?P<ftz>ftz\.)(?:bf16|bf16x2))",
        "tanh": rf"approx\.(?P<ftz>)(?:{_HALF})",
    }
    found = form(i, known[i.opcode])
    if found is None:
        return None
    function, result, kind, ftz = _APPROXIMATE[i.opcode], i.operand(0), i.kind, bool(found["ftz"])
    name = f"{i.opcode}.{kind.removesuffix('x2')}"
    (operand,) = sources(i, kind)

    def approximate(threads: Threads) -> None:
        values = _values(operand(threads), kind)
        if ftz:
            values = flushed(values)
        exact = function(values.astype(np.float64))
        if threads.numerics.perturb is not None:
            exact = perturbed(name, exact, [values], threads.numerics.perturb)
        value = odd_float32(exact)
        threads.write(result, _words(flushed(value) if ftz else value, kind))

    return approximate


# ---------------------------------------------------------------- comparisons


_COMPARISONS: Mapping[str, Function] = {
    **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    # False for NaN, unlike numpy's.
    "ne": lambda x, y: (x < y) | (x > y),
    # True for NaN: the opposite of what is False.
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: (x == x) & (y == y),
    "nan": lambda x, y: (x != x) | (y != y),
}


@executes("setp")
def _compare(i: PtxInstruction) -> Action | None:
    tests = "|".join(_COMPARISONS)
    found = form(i, rf"(?P<test>{tests})\.(?:(?P<join>and|or|xor)\.)?(?:(?P<ftz>ftz\.)?f32|f64|{_HALF})")
    if found is None:
        return None
    test, kind, join = _COMPARISONS[found["test"]], i.kind, found["join"]
    if kind.endswith("x2"):
        return None if join else _compare_pairs(i, test, kind)
    if kind in HALVES:
        values, _ = HALVES[kind]
        return sets_predicate(i, lambda x, y: test(values(x), values(y)), kind, join)
    if found["ftz"]:
        return sets_predicate(i, lambda x, y: test(flushed(x), flushed(y)), kind, join)
    return sets_predicate(i, test, kind, join)


def _compare_pairs(i: PtxInstruction, test: Function, kind: str) -> Action:
    """p of `p|q` is the test of the lower halves, q of the upper."""
    names = i.operand(0).split("|")
    a, b = sources(i, kind, kind)

    def compare(threads: Threads) -> None:
        found = test(_values(a(threads), kind), _values(b(threads), kind))
        for name, half in zip(names, found.T, strict=False):
            threads.write(name, np.ascontiguousarray(half))

    return compare
