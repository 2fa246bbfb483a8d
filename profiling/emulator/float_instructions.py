"""Floats: float32, float64, and bfloat16 and float16 alone or in pairs (PTX ISA 9.7.3, 9.7.4, 9.7.6).

16-bit floats are computed in float32, or float64 where that would round twice, and rounded to nearest once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .instruction_set import Action, Array, computes, executes, form, sources
from .integer_instructions import sets_predicate
from .numerics import HALVES, approximated, flushed, fused_float32, fused_float64, fused_half, greatest, least
from .program import PtxInstruction
from .threads import Threads

Function = Callable[..., Array]
_FLUSHED_F32 = r"(?P<ftz>ftz\.)?f32"
_HALF = r"f16|f16x2|bf16|bf16x2"


def on_halves(function: Function, kind: str, *, boolean: bool = False) -> Function:
    """A function of 16-bit floats, alone or in pairs, from one of float32; its result is rounded, if a float."""
    values, bits = HALVES[kind.removesuffix("x2")]
    if not kind.endswith("x2"):
        return lambda *words: bits(function(*(values(word) for word in words)))

    def pairs(*words: Array) -> Array:
        parts = [values(np.atleast_1d(word).view(np.uint16).reshape(-1, 2)) for word in words]
        return np.ascontiguousarray(bits(function(*parts))).view(np.uint32).ravel()

    return pairs


def _float(
    i: PtxInstruction, function: Function, kind: str, count: int, *, ftz: bool, sat: bool = False
) -> Action:
    """A function of `count` floats, with what its modifiers do to operands and results."""
    kinds = [kind] * count
    if kind not in ("f32", "f64"):
        function = on_halves(function, kind)
    if ftz:
        exact = function
        function = lambda *values: flushed(exact(*map(flushed, values)))  # noqa: E731
    if sat:
        wide = function
        # NaN becomes 0.
        function = lambda *values: np.fmin(np.fmax(wide(*values), np.float32(0)), np.float32(1))  # noqa: E731
    return computes(i, function, *kinds)


# ---------------------------------------------------------------- arithmetic


@executes("add", "sub", "mul")
def _arithmetic(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(rn\.)?(?P<ftz>ftz\.)?(?P<sat>sat\.)?f32|(rn\.)?f64|(rn\.)?({_HALF})")
    if found is None:
        return None
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[i.opcode]
    return _float(i, function, i.kind, 2, ftz=bool(found["ftz"]), sat=bool(found["sat"]))


@executes("fma", "mad")
def _fused(i: PtxInstruction) -> Action | None:
    halves = rf"|rn\.(?P<relu>relu\.)?({_HALF})" if i.opcode == "fma" else r"(?P<relu>)"
    found = form(i, rf"rn\.(?P<ftz>ftz\.)?(?P<sat>sat\.)?f32|rn\.f64{halves}")
    if found is None:
        return None
    if i.kind == "f32":
        function: Function = fused_float32
    elif i.kind == "f64":
        function = fused_float64
    else:
        function = fused_half
        if found["relu"]:
            function = lambda x, y, z: greatest(fused_half(x, y, z), np.float32(0), nan=True)  # noqa: E731
    return _float(i, function, i.kind, 3, ftz=bool(found["ftz"]), sat=bool(found["sat"]))


@executes("min", "max")
def _extreme(i: PtxInstruction) -> Action | None:
    found = form(i, rf"(?P<ftz>ftz\.)?(?P<nan>NaN\.)?f32|f64|(?P<half_nan>NaN\.)?({_HALF})")
    if found is None:
        return None
    pick, nan = (least if i.opcode == "min" else greatest), bool(found["nan"] or found["half_nan"])
    return _float(i, lambda x, y: pick(x, y, nan=nan), i.kind, 2, ftz=bool(found["ftz"]))


@executes("abs", "neg")
def _sign(i: PtxInstruction) -> Action | None:
    found = form(i, rf"{_FLUSHED_F32}|f64|{_HALF}")
    if found is None:
        return None
    function = np.absolute if i.opcode == "abs" else np.negative
    return _float(i, function, i.kind, 1, ftz=bool(found["ftz"]))


@executes("copysign")
def _copy_sign(i: PtxInstruction) -> Action | None:
    """The sign of a, the rest of b."""
    return computes(i, lambda x, y: np.copysign(y, x), i.kind, i.kind) if form(i, "f32|f64") else None


@executes("testp")
def _test(i: PtxInstruction) -> Action | None:
    found = form(i, r"(?P<test>finite|infinite|number|notanumber|normal|subnormal)\.(f32|f64)")
    if found is None:
        return None
    tiny = np.finfo(np.float32 if i.kind == "f32" else np.float64).tiny
    tests: Mapping[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }
    return computes(i, tests[found["test"]], i.kind)


# ---------------------------------------------------------------- divisions, roots, transcendentals


@executes("div")
def _divide(i: PtxInstruction) -> Action | None:
    found = form(i, r"(?P<mode>rn|full|approx)\.(?P<ftz>ftz\.)?f32|rn\.f64")
    if found is None:
        return None
    if i.kind == "f64" or found["mode"] == "rn":
        return _float(i, np.divide, i.kind, 2, ftz=bool(found["ftz"]))
    return _approximate(i, f"div.{found['mode']}", lambda x, y: x / y, 2, ftz=bool(found["ftz"]))


@executes("rcp", "sqrt")
def _exact_root(i: PtxInstruction) -> Action | None:
    found = form(i, r"rn\.(?P<ftz>ftz\.)?(f32|f64)")
    if found is None or (found["ftz"] and i.kind == "f64"):
        return None
    one = np.array(1, np.float32 if i.kind == "f32" else np.float64)
    function: Function = np.sqrt if i.opcode == "sqrt" else lambda x: np.divide(one, x)
    return _float(i, function, i.kind, 1, ftz=bool(found["ftz"]))


_APPROXIMATE: Mapping[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@executes(*_APPROXIMATE)
def _approximate_function(i: PtxInstruction) -> Action | None:
    found = form(i, r"approx\.(?P<ftz>ftz\.)?f32")
    if found is None or (i.opcode == "tanh" and found["ftz"]):
        return None
    return _approximate(i, i.opcode, _APPROXIMATE[i.opcode], 1, ftz=bool(found["ftz"]))


@executes("ex2", "tanh")
def _approximate_half(i: PtxInstruction) -> Action | None:
    """Of ex2, bfloat16 alone must flush subnormals, and float16 cannot."""
    known = {"ex2": r"approx\.(f16|f16x2|ftz\.bf16|ftz\.bf16x2)", "tanh": rf"approx\.({_HALF})"}
    if not form(i, known[i.opcode]):
        return None
    function = _APPROXIMATE[i.opcode]
    exact = on_halves(lambda x: function(x.astype(np.float64)).astype(np.float32), i.kind)
    return computes(i, exact, i.kind)


def _approximate(i: PtxInstruction, name: str, function: Function, count: int, *, ftz: bool) -> Action:
    """A function computed in float64, rounded, and made to err where the run wants that."""
    result = i.operand(0)
    operands = sources(i, *["f32"] * count)

    def approximate(threads: Threads) -> None:
        values = [operand(threads) for operand in operands]
        if ftz:
            values = [flushed(value) for value in values]
        exact = function(*(value.astype(np.float64) for value in values))
        value = approximated(name, exact, threads.numerics.perturb)
        threads.write(result, flushed(value) if ftz else value)

    return approximate


# ---------------------------------------------------------------- comparisons


def _unordered(test: Function) -> Function:
    return lambda x, y: ~test(x, y)


_COMPARISONS: Mapping[str, Function] = {
    **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    # False for NaN, unlike numpy's.
    "ne": lambda x, y: (x < y) | (x > y),
    # True for NaN: the opposite of a test that is False.
    **{"equ": lambda x, y: ~((x < y) | (x > y)), "neu": np.not_equal},
    **{"ltu": _unordered(np.greater_equal), "leu": _unordered(np.greater)},
    **{"gtu": _unordered(np.less_equal), "geu": _unordered(np.less)},
    "num": lambda x, y: (x == x) & (y == y),
    "nan": lambda x, y: (x != x) | (y != y),
}


@executes("setp")
def _compare(i: PtxInstruction) -> Action | None:
    tests = "|".join(_COMPARISONS)
    found = form(i, rf"(?P<test>{tests})\.(?:(?P<join>and|or|xor)\.)?(?P<ftz>ftz\.)?(?P<kind>f32|f64|{_HALF})")
    if found is None or (found["ftz"] and found["kind"] != "f32"):
        return None
    test, kind = _COMPARISONS[found["test"]], found["kind"]
    if found["ftz"]:
        return sets_predicate(i, lambda x, y: test(flushed(x), flushed(y)), kind, found["join"])
    if kind.endswith("x2"):
        return None if found["join"] else _compare_pairs(i, test, kind)
    if kind in HALVES:
        values, _ = HALVES[kind]
        return sets_predicate(i, lambda x, y: test(values(x), values(y)), kind, found["join"])
    return sets_predicate(i, test, kind, found["join"])


def _compare_pairs(i: PtxInstruction, test: Function, kind: str) -> Action:
    """p of `p|q` is the test of the lower halves, q of the upper."""
    values, _ = HALVES[kind.removesuffix("x2")]
    names = i.operand(0).split("|")
    operands = sources(i, kind, kind)

    def compare(threads: Threads) -> None:
        x, y = (np.atleast_1d(operand(threads)).view(np.uint16).reshape(-1, 2) for operand in operands)
        found = test(values(x), values(y))
        for k, name in enumerate(names):
            threads.write(name, np.ascontiguousarray(found[:, k]))

    return compare
