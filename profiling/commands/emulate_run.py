"""`ldmperf emulate`: an operator's call, or somebody's kernel, run in the emulator and told of."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ldmperf.kernels import OPERATORS, Launch

from ..emulator.emulated_calls import EXAMPLE, EmulatedCall, checked_call, configured, error_of, run_operator
from ..emulator.emulation import Emulation, emulated
from ..emulator.numerics import Numerics
from ..emulator.operator_inputs import EXTREMES, KINDS_OF_INPUTS, EmulatedInputs, given_inputs, made_inputs
from ..emulator.program import UnknownInstruction
from ..options import CaseError, DType
from ..terminal.visible import console
from .emulate_display import EmulationReport, print_report, report_of
from .operator_shapes import (
    check_known,
    head_dim_of,
    known_operators,
    last_line,
    option,
    refusals_in_one_line,
    shape_of,
)
from .shared import print_json, stop

# Small, so that a call takes seconds.
_SMALL = {"batch": 1, "height": 16, "width": 16}
# Options beside a file of tensors: what is not in it.
_BESIDE_A_FILE = ("groups",)


def emulate_operator(
    operator: str,
    sizes: dict[str, Any],
    *,
    arch: str,
    dtype: DType | None,
    config: str | None,
    inputs: str,
    numbers: Mapping[str, Any],
    numerics: Numerics,
    as_json: bool,
) -> bool:
    """Prints what is told of an operator's call, and returns whether something was found.

    numbers: mean, scale and seed of random ones, None where not told.
    """
    if Path(operator).suffix == ".py":
        raise CaseError(f"{operator} is a file: name a kernel or a function of it, as in {operator}:NAME")
    check_known("kernel", operator, known_operators(), " and FILE.py:NAME")
    if "head_dim" in sizes:
        sizes["head_dim"] = head_dim_of(sizes["head_dim"])
    told = {name: value for name, value in numbers.items() if value is not None}
    if Path(inputs).suffix == ".safetensors":
        made = [_from_file(operator, Path(inputs), sizes, told | ({} if dtype is None else {"dtype": dtype}))]
    else:
        kinds = _kinds(inputs)
        shape = shape_of(operator, dtype or "bfloat16", _SMALL | sizes)[1]
        made = [made_inputs(operator, shape, kind, **told) for kind in kinds]
    with (
        _unknown_in_one_line(),
        refusals_in_one_line(operator, arch),
        emulated(arch, numerics=numerics, tallied=True) as emulation,
    ):
        chosen = None
        if config is not None:
            call = checked_call(OPERATORS[operator], made[0].arguments)
            chosen = configured(OPERATORS[operator], call, config)
        with _configuration_in_one_line(config):
            calls = [run_operator(emulation, one, chosen) for one in made]
        report = report_of(operator, emulation, calls, configuration=chosen)
    return _tell(report, as_json=as_json)


def _kinds(inputs: str) -> tuple[str, ...]:
    if inputs == "extreme":
        return EXTREMES
    if inputs not in KINDS_OF_INPUTS:
        kinds = ", ".join(("random", "extreme", *EXTREMES))
        raise CaseError(f"--inputs: no kind {inputs!r}; choose from {kinds}, or give a .safetensors file")
    return (inputs,)


def _from_file(operator: str, path: Path, sizes: Mapping[str, int], others: Mapping[str, Any]) -> EmulatedInputs:
    for name in [*(name for name in sizes if name not in _BESIDE_A_FILE), *others]:
        raise CaseError(f"--inputs {path} has its own numbers: leave {option(name)} out")
    groups = sizes.get("groups")
    # The other arguments' defaults are of no shape: any that divides will do.
    build, shape = shape_of(operator, "float32", {} if groups is None else {"groups": groups, "channels": groups})
    arguments = {name: value for name, value in build(shape).items() if not isinstance(value, Tensor)}
    return given_inputs(operator, path, {name: value for name, value in arguments.items() if value is not None})


def _tell(report: EmulationReport, *, as_json: bool) -> bool:
    if as_json:
        print_json(report.as_json())
    else:
        print_report(report, console())
    return bool(report.findings)


@contextmanager
def _unknown_in_one_line() -> Iterator[None]:
    try:
        yield
    except UnknownInstruction as unknown:
        reason = str(unknown)
    else:
        return
    stop(f"not emulated: {reason}", 1)


@contextmanager
def _configuration_in_one_line(config: str | None) -> Iterator[None]:
    """CaseError where numbers of --config cannot be: a block of 7 or of none, three warps."""
    from triton.errors import TritonError

    try:
        yield
    except (TritonError, AssertionError, ArithmeticError) as refused:
        if config is None:
            raise
        raise CaseError(f"--config {config} cannot be launched: {last_line(refused)}") from None


# ---------------------------------------------------------------- anybody's kernel


def emulate_module(named: str, arch: str, numerics: Numerics, *, seed: int, as_json: bool) -> bool:
    """The same of FILE.py:NAME. An exception of its own is told in the last line, and ends with exit code 1."""
    path, _, name = named.rpartition(":")
    failure, calls = "", []
    with (
        _unknown_in_one_line(),
        emulated(arch, numerics=numerics, tallied=True) as emulation,
        _module(Path(path)) as module,
    ):
        torch.manual_seed(seed)
        run = _runner(module, path, name, emulation)
        try:
            calls = run()
        except (CaseError, UnknownInstruction):
            raise
        # Of the file's own code, which may raise anything.
        except Exception as raised:
            failure = f"{named} raised {type(raised).__name__}{_place(raised, path)}: {last_line(raised)}"
        if not emulation.launches and not failure:
            raise CaseError(f"{named} launched no Triton kernel")
        report = report_of(named, emulation, calls)
    found = _tell(report, as_json=as_json) if emulation.launches else False
    if failure:
        stop(failure, 1)
    return found


def _place(raised: Exception, path: str) -> str:
    """The last line of the file that the exception passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(raised.__traceback__) if frame.filename == path]
    return f" in line {lines[-1]}" if lines else ""


@contextmanager
def _module(path: Path) -> Iterator[ModuleType]:
    """The file as a module. As with a script, files beside it can be imported."""
    if path.suffix != ".py" or not path.is_file():
        raise CaseError(f"no Python file at {path}; give FILE.py:NAME")
    # A name that no other module has: the file's own may be that of one.
    specification = importlib.util.spec_from_file_location(f"emulated_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    sys.modules[module.__name__] = module
    try:
        try:
            specification.loader.exec_module(module)
        # Of the file's own code, which may raise anything.
        except Exception as raised:
            stop(f"{path} cannot be imported ({type(raised).__name__}: {last_line(raised)})", 1)
        yield module
    finally:
        sys.path.remove(folder)
        del sys.modules[module.__name__]


def _runner(module: ModuleType, path: str, name: str, emulation: Emulation) -> Callable[[], list[EmulatedCall]]:
    """What runs the function, or the kernel of that name."""
    from triton.runtime.jit import KernelInterface

    found = getattr(module, name, None)
    if isinstance(found, KernelInterface):
        example = getattr(module, f"example_{name}", None)
        if example is None:
            raise CaseError(
                f"{path} has no example_{name}(), which tells how to launch {name}: let it return "
                "(grid, {argument: value}), with CPU tensors"
            )
        return lambda: [_run_example(found, name, example, emulation)]
    if not callable(found):
        kernels = [key for key, value in vars(module).items() if isinstance(value, KernelInterface)]
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not key.startswith("example_")
            and not _required(value)
        ]
        there = f"its kernels are {', '.join(kernels) or 'none'}"
        if functions:
            there += f"; its functions without arguments are {', '.join(functions)}"
        raise CaseError(f"{path} has no {name!r}; {there}")
    if required := _required(found):
        raise CaseError(f"{path}:{name} takes {', '.join(required)}; give a function without arguments")

    def run() -> list[EmulatedCall]:
        found()
        return []

    return run


def _required(function: Callable[..., Any]) -> list[str]:
    """The arguments that it cannot be called without."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _run_example(kernel: Any, name: str, example: Callable[[], Any], emulation: Emulation) -> EmulatedCall:
    told = example()
    if not isinstance(told, tuple) or len(told) not in (2, 3) or not isinstance(told[1], dict):
        raise CaseError(
            f"example_{name}() returns no (grid, {{argument: value}}), nor with a third of what is expected"
        )
    grid, arguments, expected = told if len(told) == 3 else (*told, {})
    grid = (grid,) if isinstance(grid, int) else grid
    for wanted in expected:
        if not isinstance(arguments.get(wanted), Tensor):
            raise CaseError(f"example_{name}() expects numbers of {wanted}, which is none of its tensors")
    # Before the launch, which may update what it is computed from.
    exact = {wanted: value.to(torch.float64, copy=True) for wanted, value in expected.items()}
    kernel[grid](**arguments)
    emulation.check_written(*(arguments[wanted] for wanted in exact))
    errors = [error_of(wanted, arguments[wanted], value) for wanted, value in exact.items()]
    return EmulatedCall(EXAMPLE, tuple(errors), _as_launches(kernel, grid, arguments))


def _as_launches(kernel: Any, grid: Any, arguments: Mapping[str, Any]) -> tuple[Launch, ...]:
    """The launch as a value, which can be inspected; none of an autotuned kernel, which is launched often."""
    from triton import JITFunction

    if not isinstance(kernel, JITFunction) or callable(grid):
        return ()
    passed = {parameter.name: parameter.default for parameter in kernel.params if parameter.has_default}
    passed |= {key: value for key, value in arguments.items() if key in kernel.arg_names}
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
    warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    return () if options else (Launch(kernel, math.prod(grid), passed, warps, stages),)
