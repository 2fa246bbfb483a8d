"""One call of an operator, or of anybody's kernel, run in the emulator and judged against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldmperf.kernels import OPERATORS, KernelUnsupported, Launch, Operator

from ..options import CaseError, whole
from .emulation import Emulation
from .operator_inputs import EmulatedInputs
from .tallies import Tallies

# The inputs of a call that a kernel's own example made.
EXAMPLE = "example"


@dataclass(frozen=True)
class ResultError:
    """How far a result is from what is exact, where that is finite in the result's dtype.

    largest     of the absolute differences, `rms` of all relative to the RMS of what is exact; both infinite where
                elements are `not_finite`, or finite, otherwise than what is exact and rounded
    rounding    the relative RMS of what is exact rounded to the dtype: nothing in that dtype is nearer
    """

    name: str
    dtype: str
    elements: int
    largest: float
    rms: float
    rounding: float
    not_finite: int

    @property
    def ratio(self) -> float:
        """rms / rounding: 1 is correctly rounded. Infinite where what is exact needs no rounding and differs."""
        if self.rounding:
            return self.rms / self.rounding
        return math.inf if self.rms else 1.0


def error_of(name: str, result: Tensor, exact: Tensor) -> ResultError:
    """exact: in float64, of the result's shape."""
    if result.shape != exact.shape:
        raise CaseError(f"{name} is of shape {list(result.shape)}, and what is expected of {list(exact.shape)}")
    rounded = exact.to(result.dtype)
    found, exact = result.double(), exact.double()
    judged = rounded.isfinite()
    same = (found == rounded.double()) | (found.isnan() & rounded.isnan())
    not_finite = int((~same & ~(judged & found.isfinite())).sum())
    exact, found, rounded = exact[judged], found[judged], rounded[judged]
    scale = float(exact.square().mean().sqrt()) if len(exact) else 0.0
    off = math.inf if not_finite else float((found - exact).abs().max()) if len(exact) else 0.0
    return ResultError(
        name,
        str(result.dtype).removeprefix("torch."),
        result.numel(),
        off,
        math.inf if not_finite else _relative(found - exact, scale),
        _relative(rounded.double() - exact, scale),
        not_finite,
    )


def _relative(off: Tensor, scale: float) -> float:
    """RMS of differences over `scale`; of one without numbers or differences 0."""
    rms = float(off.square().mean().sqrt()) if len(off) else 0.0
    return rms / scale if scale else (math.inf if rms else 0.0)


@dataclass(frozen=True)
class EmulatedCall:
    """A call that ran: its inputs, its configuration where one was chosen, how far its results are off."""

    inputs: str
    errors: tuple[ResultError, ...]
    launches: tuple[Launch, ...]


def run_operator(emulation: Emulation, inputs: EmulatedInputs, config: Any = None) -> EmulatedCall:
    """Runs the launches of a call inside `emulated`; its findings and tallies are the emulation's.

    Raises CaseError for a call that its operator refuses.
    """
    operator = OPERATORS[inputs.operator]
    call = checked_call(operator, inputs.arguments)
    exact = inputs.exact()
    emulation.uninitialised(*inputs.written)
    try:
        returned, launches = operator.plan(call, config=config)
    except ValueError as refused:
        raise CaseError(str(refused)) from None
    for launch in launches:
        launch.run()
    results = inputs.results(returned)
    emulation.check_written(*results.values())
    errors = [error_of(name, result, exact[name]) for name, result in results.items()]
    return EmulatedCall(inputs.kind, tuple(errors), tuple(launch for launch in launches if launch.programs))


def checked_call(operator: Operator, arguments: Mapping[str, Any]) -> Any:
    """The operator's call of these arguments. CaseError where the operator, or its kernels, refuse it."""
    try:
        call = operator.bind(**arguments)
        operator.check(call)
        if reasons := operator.unsupported_reasons(call):
            raise KernelUnsupported(operator.name, reasons)
    # Of a missing argument, of one that is no tensor, of shapes that do not fit.
    except (TypeError, ValueError, AttributeError, KernelUnsupported) as refused:
        raise CaseError(f"{operator.name} refuses these inputs: {refused}") from None
    return call


# ---------------------------------------------------------------- configurations


def configured(operator: Operator, call: Any, text: str) -> Any:
    """The configuration that "block_m=64,num_warps=4" gives. CaseError for a field that there is not.

    Other fields are those of `default_config`.
    """
    base = default_config(operator, call)
    fields = {field.name: field for field in dataclasses.fields(base)}
    values = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in fields:
            raise CaseError(f"--config: {operator.name} has no {name!r}; its fields are {', '.join(fields)}")
        values[name] = _value(name, value, isinstance(getattr(base, name), bool))
    return dataclasses.replace(base, **values)


def _value(name: str, text: str, is_flag: bool) -> int | bool:
    if is_flag and text.lower() in ("true", "false"):
        return text.lower() == "true"
    value = whole(text)
    if value is None or (is_flag and value > 1):
        kind = "true or false" if is_flag else "a whole number"
        raise CaseError(f"--config: {name}={text} is not {kind}; give it as in {name}={'true' if is_flag else 4}")
    return bool(value) if is_flag else value


def default_config(operator: Operator, call: Any) -> Any:
    """The configuration that a call is launched with, which its launches tell.

    Kernels have their configuration's fields among their constants. Where some are not, as in a kernel of another
    kind, they are those of the candidate of bench/tune.py whose launches agree most.
    """
    launches = operator.plan(call)[1]
    default = _constants(launches)

    def agreement(config: Any) -> int:
        try:
            return len(default & _constants(operator.plan(call, config=config)[1]))
        # A combination that the operator refuses.
        except ValueError:
            return -1

    nearest = max(operator.candidates(call), key=agreement)
    named = {name.lower(): value for launch in launches for name, value in launch.arguments.items()}
    named |= {"num_warps": launches[-1].num_warps, "num_stages": launches[-1].num_stages}
    fields = {field.name: named[field.name] for field in dataclasses.fields(nearest) if field.name in named}
    return max(nearest, dataclasses.replace(nearest, **fields), key=agreement)


def _constants(launches: Iterable[Launch]) -> set[tuple[Any, ...]]:
    """What a configuration decides of launches."""
    found: set[tuple[Any, ...]] = set()
    for number, launch in enumerate(launches):
        numbers = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
        numbers |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "programs": launch.programs}
        found |= {(number, launch.name, *item) for item in numbers.items()}
    return found


# ---------------------------------------------------------------- launches


def by_code(tallies: Iterable[Tallies]) -> list[Tallies]:
    """Launches of one code added together, in the order of the first of each."""
    found: dict[int, Tallies] = {}
    for one in tallies:
        if id(one.program) in found:
            found[id(one.program)].add(one)
        else:
            found[id(one.program)] = one
    return list(found.values())
