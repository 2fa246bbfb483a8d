"""An emulated GPU: inside `emulated("sm_90")`, Triton kernels launched on CPU tensors run in the emulator.

Anybody's kernels do, compiled by Triton as for the chip. ldmperf's operators plan for the chip and take the CPU's
tensors. `torch.empty` gives memory that is told to be uninitialised (poison.py).
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from numpy.typing import NDArray
from torch import Tensor

from ldmperf.kernels import Chip, planned_for

from ..machines import MACHINES, Machine
from ..options import CaseError
from .emulated_driver import EmulatedDriver, LoadedKernel, run_once, scalar_bits
from .execution import Code, code_of, run
from .findings import KINDS, Findings
from .global_memory import GlobalMemory
from .numerics import Numerics
from .poison import poison, poisoned, poisoned_allocations
from .program import UnknownInstruction
from .tallies import Tallies
from .threads import LaunchGrid

ARCHITECTURES = tuple(arch for arch, machine in MACHINES.items() if machine.backend == "cuda")


class FindingsError(AssertionError):
    """A launch had findings; the message has a line for each."""


@dataclass
class Emulation:
    """What ran since `emulated` began, and how.

    strict     a launch that has findings raises FindingsError
    edit       changes a kernel's PTX before it runs: for tests of the checks
    findings   of all launches, or since `raise_findings`; `raised` how many it has raised
    tallies    what each launch counted, where `tallied`
    kernels    the names of those that ran, in `launches` launches of `seconds`; `instructions` of single threads
    """

    machine: Machine
    numerics: Numerics = field(default_factory=Numerics)
    strict: bool = False
    tallied: bool = False
    edit: Callable[[str], str] | None = None
    findings: Findings = field(default_factory=Findings)
    raised: int = 0
    tallies: list[Tallies] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    launches: int = 0
    instructions: int = 0
    seconds: float = 0.0

    @property
    def chip(self) -> Chip:
        return Chip(self.machine.chip, self.machine.multiprocessors, self.machine.arch)

    def uninitialised(self, *tensors: Tensor) -> None:
        """Says that nothing has written these tensors, as torch.empty does: reading them is a finding."""
        for tensor in tensors:
            poison(tensor)

    def check_written(self, *tensors: Tensor) -> None:
        """Reports elements of tensors that were uninitialised and that nothing has written since."""
        __tracebackhide__ = True
        for tensor in tensors:
            missing = int(poisoned(tensor).sum())
            if missing:
                self.findings.add("unwritten result", None, missing, f"elements of {tensor.numel()}")
        if self.strict:
            self.raise_findings()

    def raise_findings(self) -> None:
        """FindingsError with all findings since the last call, if there are any."""
        __tracebackhide__ = True
        found, self.findings = self.findings, Findings(self.findings.kernel, self.findings.files)
        if found:
            self.raised += len(found)
            raise FindingsError("\n".join(map(str, found)))

    @contextlib.contextmanager
    def expecting(self, *kinds: str) -> Iterator[Findings]:
        """Inside, launches have findings of these kinds, each at least once, and of no others; yields them.

        Raises FindingsError at the end where that is not so, ValueError for what is no kind of finding.
        """
        __tracebackhide__ = True
        if unknown := sorted(set(kinds) - KINDS.keys()):
            raise ValueError(f"no kind of finding: {', '.join(unknown)}; there are {', '.join(KINDS)}")
        outer = self.findings, self.strict
        found = self.findings = Findings(self.findings.kernel, self.findings.files)
        self.strict = False
        try:
            yield found
        finally:
            self.findings, self.strict = outer
        lines = [str(finding) for finding in found if finding.kind not in kinds]
        lines += [f"{kind}: expected, and not found" for kind in kinds if kind not in found.kinds]
        if lines:
            self.raised += len(lines)
            raise FindingsError("\n".join(lines))

    def launch(self, kernel: LoadedKernel, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        """Runs a kernel with the arguments of its signature on CPU tensors."""
        __tracebackhide__ = True
        begun = time.perf_counter()
        self.findings.kernel = kernel.name
        passed = [
            (name, kind, _unwrapped(value))
            for (name, kind), value in zip(kernel.signature, arguments, strict=True)
        ]
        _check_pointers(kernel, passed)
        tensors = {name: value for name, kind, value in passed if kind.startswith("*")}
        try:
            code = _code(kernel.ptx if self.edit is None else self.edit(kernel.ptx))
            self.findings.files.update(code.program.files)
            memory = GlobalMemory(
                list(tensors.values()),
                [name in kernel.stored for name in tensors],
                code.program.granules["global"],
                list(tensors),
            )
            values = [
                scalar_bits("u64", memory.address(value)) if name in tensors else scalar_bits(kind, value)
                for name, kind, value in passed
            ]
            tallies = Tallies(code.program, detailed=self.tallied, programs=grid[0] * grid[1] * grid[2])
            run(
                code,
                LaunchGrid(grid, _parameters(code, values), kernel.shared, kernel.dependent),
                memory,
                self.findings,
                tallies,
                self.numerics,
            )
        except UnknownInstruction as unknown:
            raise UnknownInstruction(f"{kernel.name} has what is not emulated: {unknown}") from None
        memory.copy_back()
        self.launches += 1
        self.kernels.add(kernel.name)
        self.instructions += tallies.instructions
        if self.tallied:
            self.tallies.append(tallies)
        self.seconds += time.perf_counter() - begun
        if self.strict:
            self.raise_findings()


# Kernels are few, and decoding one takes as long as running it on a small tensor.
_code = functools.lru_cache(maxsize=64)(code_of)


def _unwrapped(value: Any) -> Any:
    """The tensor that `triton.reinterpret` wrapped, any other value as it is."""
    base = None if isinstance(value, Tensor) else getattr(value, "base", None)
    return base if isinstance(base, Tensor) else value


def _check_pointers(kernel: LoadedKernel, passed: Sequence[tuple[str, str, Any]]) -> None:
    for name, kind, value in passed:
        if kind.startswith("*"):
            if not isinstance(value, Tensor):
                raise CaseError(f"{kernel.name} is emulated: {name} takes a CPU tensor; it was passed {value!r}")
            if value.device.type != "cpu":
                raise CaseError(f"{kernel.name} is emulated: {name} takes a CPU tensor; it is on {value.device}")


def _parameters(code: Code, values: Sequence[NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """The bits of each parameter by name. Two more than the values are Triton's scratch memory, not there."""
    names = [name for _, name in code.program.parameters]
    if not len(values) <= len(names) <= len(values) + 2:
        raise UnknownInstruction(f"{len(names)} parameters for {len(values)} arguments")
    scratch = [scalar_bits("u64", 0)] * (len(names) - len(values))
    return dict(zip(names, [*values, *scratch], strict=True))


@contextlib.contextmanager
def emulated(
    arch: str = "sm_90",
    *,
    numerics: Numerics | None = None,
    strict: bool = False,
    tallied: bool = False,
    edit: Callable[[str], str] | None = None,
) -> Iterator[Emulation]:
    """Inside, Triton kernels launched on CPU tensors run in the emulator as compiled for `arch`.

    strict: a launch that has findings raises FindingsError. The other options are an `Emulation`'s.

    Raises CaseError for an architecture that it has no machine for, and where kernels are interpreted.
    """
    from ..static.compile import require_compiler

    if arch not in ARCHITECTURES:
        raise CaseError(f"{arch} is not emulated; there are {', '.join(ARCHITECTURES)}")
    require_compiler()
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    from ldmperf.kernels import _triton

    emulation = Emulation(MACHINES[arch], numerics or Numerics(), strict, tallied, edit)
    with contextlib.ExitStack() as stack:
        # Asking for the active driver fails where there is no GPU.
        stack.enter_context(
            mock.patch.object(driver, "_active", EmulatedDriver(emulation.machine, emulation.launch))
        )
        stack.enter_context(mock.patch.object(_triton, "DEVICES", (*_triton.DEVICES, "cpu")))
        stack.enter_context(planned_for(emulation.chip))
        stack.enter_context(poisoned_allocations())
        stack.enter_context(mock.patch.object(Autotuner, "run", _tuning_anew(Autotuner.run)))
        yield emulation


def _tuning_anew(run: Callable[..., Any]) -> Callable[..., Any]:
    """An autotuner's `run` that times nothing: all configurations run once, those are checked; the first is taken.

    What was chosen before holds again after, and nothing is kept on disk.
    """
    chosen: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    @functools.wraps(run)
    def tune(tuner: Any, *arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        here = {"cache": chosen.setdefault(tuner, {}), "do_bench": run_once, "cache_results": False}
        with mock.patch.dict(vars(tuner), here):
            return run(tuner, *arguments, **options)

    return tune
