"""An emulated GPU: inside `emulated("sm_90")`, Triton kernels launched on CPU tensors run in the emulator.

It is a driver of Triton's, so that all else is Triton's own: binding arguments, compiling, caching, autotuning,
heuristics, hooks. ldmperf's operators plan for the chip and take the CPU's tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldmperf.kernels import Chip
from ldmperf.kernels._launch import planned_for

from ..machines import MACHINES, Machine
from ..options import CaseError
from ..static.compile import target
from ..static.ptx import global_accesses
from .execution import Code, code_of, run
from .findings import Findings
from .global_memory import GlobalMemory
from .numerics import Numerics
from .poison import poison, poisoned, poisoned_allocations
from .program import DTYPES, UnknownInstruction
from .tallies import Tallies
from .threads import Grid

ARCHITECTURES = tuple(arch for arch, machine in MACHINES.items() if machine.backend == "cuda")


class FindingsError(AssertionError):
    """A launch had findings; the message has a line for each."""


@dataclass(frozen=True)
class _Kernel:
    """What Triton loads: a kernel's name, its code, and the types of the parameters that are passed to it."""

    name: str
    ptx: str
    shared: int
    signature: tuple[tuple[str, str], ...]


@dataclass
class Emulation:
    """What ran since `emulated` began, and how.

    findings   of all launches; `tallies` their counts, in order, where `tallied`
    edit       changes a kernel's PTX before it runs: for tests of the checks
    launched   called after each launch
    """

    machine: Machine
    numerics: Numerics = field(default_factory=Numerics)
    tallied: bool = False
    edit: Callable[[str], str] | None = None
    launched: Callable[[Emulation], None] | None = None
    findings: Findings = field(default_factory=Findings)
    tallies: list[Tallies] = field(default_factory=list)
    launches: int = 0

    @property
    def chip(self) -> Chip:
        return Chip(self.machine.chip, self.machine.multiprocessors, self.machine.arch)

    def uninitialised(self, *tensors: Tensor) -> None:
        """Says that nothing has written these tensors, as torch.empty does: reading them is a finding."""
        for tensor in tensors:
            poison(tensor)

    def check_written(self, *tensors: Tensor) -> None:
        """Reports elements of tensors that were uninitialised and that nothing has written since."""
        for tensor in tensors:
            missing = int(poisoned(tensor).sum())
            if missing:
                self.findings.add("unwritten result", None, missing, f"elements of {tensor.numel()}")

    def raise_findings(self) -> None:
        """FindingsError with all findings since the last call, if there are any."""
        found, self.findings = self.findings, Findings()
        if found:
            raise FindingsError("\n".join(map(str, found)))

    def launch(self, kernel: _Kernel, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Runs a kernel with the arguments of its signature on CPU tensors."""
        self.findings.kernel = kernel.name
        passed = [
            (kind, getattr(value, "base", value))
            for (_, kind), value in zip(kernel.signature, arguments, strict=True)
        ]
        tensors = [value for _, value in passed if isinstance(value, Tensor)]
        _check_tensors(kernel, passed)
        code = _code(kernel.ptx if self.edit is None else self.edit(kernel.ptx))
        accesses = global_accesses(kernel.ptx, kernel.signature)
        stored = {access.argument for access in accesses if access.store}
        names = [name for (name, _), (_, v) in zip(kernel.signature, passed, strict=True) if isinstance(v, Tensor)]
        memory = GlobalMemory(
            tensors,
            [name in stored or "?" in stored for name in names],
            code.program.granules["global"],
        )
        values = [memory.address(value) if isinstance(value, Tensor) else value for _, value in passed]
        tallies = Tallies(code.program, detailed=self.tallied)
        launched = Grid((grid[0], grid[1], grid[2]), _parameters(code, values), kernel.shared)
        run(code, launched, memory, self.findings, tallies, self.numerics)
        memory.copy_back()
        self.launches += 1
        if self.tallied:
            self.tallies.append(tallies)
        if self.launched is not None:
            self.launched(self)


# Kernels are few, and decoding one takes as long as running it on a small tensor.
_code = functools.lru_cache(maxsize=256)(code_of)


def _check_tensors(kernel: _Kernel, passed: Sequence[tuple[str, Any]]) -> None:
    for kind, value in passed:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise CaseError(f"{kernel.name} is emulated: its tensors must be on the CPU, one is on {value.device}")
        if kind.startswith("*") and not isinstance(value, Tensor):
            raise CaseError(
                f"{kernel.name} is emulated: {value!r} is passed for a pointer, which takes a CPU tensor"
            )


def _parameters(code: Code, values: Sequence[Any]) -> Mapping[str, NDArray[Any]]:
    """By name: [1] of the parameter's type. Two more than the arguments are Triton's scratch memory, not there."""
    parameters = code.program.parameters
    if not len(values) <= len(parameters) <= len(values) + 2:
        raise UnknownInstruction(f"{len(parameters)} parameters for {len(values)} arguments")
    padded = [*values, *[0] * (len(parameters) - len(values))]
    made = {}
    for (kind, name), value in zip(parameters, padded, strict=True):
        dtype = DTYPES[kind]
        if dtype.kind in "ui":
            bits = int(value) & ((1 << 8 * dtype.itemsize) - 1)
            made[name] = np.array([bits], f"u{dtype.itemsize}").view(dtype)
        else:
            made[name] = np.array([value], dtype)
    return made


class _Launcher:
    """What Triton calls to launch a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.runtime.cache import get_cache_manager

        path = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.ptx")
        if path is None:
            raise CaseError(f"triton kept no PTX of {source.name}; unset TRITON_STORE_BINARY_ONLY")
        with open(path) as file:
            text = file.read()
        signature = tuple(_flat(source.signature.items()))
        descriptors = [name for name, kind in signature if "desc" in kind.lower()]
        if descriptors:
            raise UnknownInstruction(f"{source.name}: tensor descriptors (TMA) are not emulated: {descriptors[0]}")
        if getattr(metadata, "num_ctas", 1) != 1:
            raise UnknownInstruction(f"{source.name}: clusters of {metadata.num_ctas} programs are not emulated")
        self._kernel = _Kernel(source.name, text, metadata.shared, signature)
        self._passed = [kind != "constexpr" for kind in _kinds(source.signature.values())]

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        """rest: stream, function, metadata, launch metadata, two hooks, and the arguments, constants too."""
        from triton import runtime

        enter, leave, *arguments = rest[4:]
        metadata = rest[3]
        if enter is not None:
            enter(metadata)
        if x * y * z > 0:
            flat = list(_values(arguments))
            passed = [value for value, is_passed in zip(flat, self._passed, strict=True) if is_passed]
            runtime.driver.active.emulation.launch(self._kernel, (x, y, z), passed)
        if leave is not None:
            leave(metadata)


def _flat(signature: Any) -> Iterator[tuple[str, str]]:
    """(name, type) of what is passed; tuples are passed value by value."""
    for name, kind in signature:
        if isinstance(kind, tuple):
            yield from _flat((f"{name}.{number}", inner) for number, inner in enumerate(kind))
        elif kind != "constexpr":
            yield name, kind


def _kinds(kinds: Any) -> Iterator[str]:
    for kind in kinds:
        if isinstance(kind, tuple):
            yield from _kinds(kind)
        else:
            yield kind


def _values(arguments: Any) -> Iterator[Any]:
    for value in arguments:
        if isinstance(value, tuple):
            yield from _values(value)
        else:
            yield value


class _Driver:
    """Triton's view of the emulated GPU."""

    launcher_cls = _Launcher

    def __init__(self, emulation: Emulation) -> None:
        self.emulation = emulation
        machine = emulation.machine
        properties = {
            "max_shared_mem": machine.shared_per_block,
            "max_num_regs": machine.registers_per_multiprocessor,
            "multiprocessor_count": machine.multiprocessors,
            "warpSize": machine.warp_size,
            "sm_clock_rate": int(machine.clock_ghz * 1e6),
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }
        threads = 32 * machine.max_warps // 2
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # (module, function, registers, spills, threads at most): nothing is loaded.
            load_binary=lambda name, binary, shared, device: (name, name, 0, 0, threads),
        )

    def get_current_device(self) -> str:
        # Kernels are kept by device: those of one architecture are not another's.
        return f"emulated {self.emulation.machine.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target(self.emulation.machine)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def assemble_tensormap_to_arg(self, info: Any, arguments: Any) -> Any:
        return arguments

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """An autotuned kernel runs once in each configuration, all of which are checked; the first is taken."""

        def bench(call: Callable[[], Any], *, quantiles: Sequence[float] | None = None, **options: Any) -> Any:
            call()
            return [0.0] * len(quantiles) if quantiles else 0.0

        return bench


@contextlib.contextmanager
def emulated(
    arch: str = "sm_90",
    *,
    numerics: Numerics | None = None,
    tallied: bool = False,
    edit: Callable[[str], str] | None = None,
) -> Iterator[Emulation]:
    """Inside, Triton kernels launched on CPU tensors run in the emulator as compiled for `arch`.

    Raises CaseError for an architecture that it has no machine for, and where kernels are interpreted.
    """
    from triton.runtime import driver

    from ldmperf.kernels import _triton

    from ..static.compile import require_compiler

    if arch not in ARCHITECTURES:
        raise CaseError(f"{arch} is not emulated; there are {', '.join(ARCHITECTURES)}")
    require_compiler()
    emulation = Emulation(MACHINES[arch], numerics or Numerics(), tallied, edit)
    active, devices = driver._active, _triton.DEVICES
    driver.set_active(_Driver(emulation))
    _triton.DEVICES = (*devices, "cpu")
    try:
        with planned_for(emulation.chip), poisoned_allocations():
            yield emulation
    finally:
        driver._active, _triton.DEVICES = active, devices
