"""Triton's view of an emulated GPU: the driver that it asks for the chip, and what it launches kernels with.

All else stays Triton's own: binding arguments, compiling, caching, autotuning, heuristics, hooks. Written against
triton 3.6 to 3.9.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from ..machines import Machine
from ..options import CaseError
from ..static.compile import target
from ..static.ptx import global_accesses
from ..static.sass import resource_usage, resources
from .program import UnknownInstruction

# Programs of a launch along x, y and z: CUDA C++ Programming Guide, "Technical Specifications".
LARGEST_GRID = (2**31 - 1, 65535, 65535)
_THREADS_OF_A_BLOCK = 1024
# call.uni (retval0), function, ...
_CALL = re.compile(r"^\s*(?:@!?%p\d+\s+)?call(?:\.uni)?\s+(?:\([^)]*\),\s*)?([\w$.%]+)", re.MULTILINE)
# What a scalar is packed as, by Triton's name of its type. bfloat16 is cut off, as Triton's launcher does.
_PACKED = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"},
    **{"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"},
    **{"fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"},
}


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that Triton has compiled.

    signature  (parameter, type) of what is passed to it: "*bf16", "i32", "fp32"; members of tuples as "pair.0"
    dependent  whether it is launched while launches before it run (Triton's option launch_pdl)
    """

    name: str
    ptx: str
    shared: int
    signature: tuple[tuple[str, str], ...]
    dependent: bool = False

    @functools.cached_property
    def stored(self) -> frozenset[str]:
        """The pointers that it stores to, all of them where one is not told."""
        names = {access.argument for access in global_accesses(self.ptx, self.signature) if access.store}
        return frozenset(name for name, _ in self.signature) if "?" in names else frozenset(names)


# (kernel, programs along x, y and z, what is passed for its signature)
Launch = Callable[[LoadedKernel, tuple[int, int, int], Sequence[Any]], None]


def scalar_bits(kind: str, value: Any) -> NDArray[Any]:
    """[1]: the bits of a number as a parameter of Triton's type `kind`. CaseError where it does not fit."""
    try:
        if kind == "bf16":
            raw = struct.pack("<f", value)[2:]
        else:
            raw = struct.pack("<" + _PACKED[kind], value if kind[0] in "fb" else int(value))
    except KeyError:
        raise UnknownInstruction(f"a parameter of type {kind}") from None
    except (struct.error, OverflowError, TypeError, ValueError):
        raise CaseError(f"{value!r} is no {kind}, the type of the parameter that it is passed for") from None
    return np.frombuffer(raw, f"<u{len(raw)}")


class EmulatedDriver:
    """What `triton.runtime.driver.active` is while kernels are emulated."""

    def __init__(self, machine: Machine, launch: Launch) -> None:
        self.machine, self.launch = machine, launch
        self.launcher_cls = _Launcher
        properties = {
            "max_shared_mem": machine.shared_per_block,
            "max_num_regs": machine.registers_per_multiprocessor,
            "multiprocessor_count": machine.multiprocessors,
            "warpSize": machine.warp_size,
            "sm_clock_rate": int(machine.clock_ghz * 1e6),
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=_load,
            unload_module=lambda module: None,
            set_printf_fifo_size=lambda size: None,
        )

    def get_current_device(self) -> str:
        # Triton keeps kernels by device: those of one architecture are not another's, nor a GPU's.
        return f"emulated {self.machine.arch}"

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        capability = int(self.machine.capability)
        return capability // 10, capability % 10

    def get_current_target(self) -> Any:
        return target(self.machine)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        raise CaseError("an emulated GPU tells no time: triton.testing.do_bench needs a real one")

    def get_empty_cache_for_benchmark(self) -> Any:
        return self.get_device_interface()

    def get_benchmarker(self) -> Callable[..., Any]:
        return run_once

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise CaseError("an emulated GPU launches nothing from C++")

    def assemble_tensormap_to_arg(self, info: Any, arguments: Any) -> Any:
        return arguments


def run_once(call: Callable[[], Any], *_: Any, quantiles: Sequence[float] | None = None, **options: Any) -> Any:
    """In place of timing: 0 ms."""
    call()
    return 0.0 if quantiles is None else [0.0] * len(quantiles)


def _load(name: str, binary: bytes, shared: int, device: Any) -> tuple[None, str, int, int, int]:
    """(module, function, registers, spilled words, threads at most). There is no module, so none is unloaded."""
    registers, stack = _registers(binary)
    return None, name, registers, stack // 4, _THREADS_OF_A_BLOCK


# Without a module Triton asks again for each launch.
@functools.lru_cache(maxsize=256)
def _registers(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    used = resources(resource_usage(binary), [])
    return used.registers, used.stack


# By what was compiled and its key. Triton makes a launcher anew where no module was loaded, and by then its cache
# may be another folder.
_LOADED: WeakKeyDictionary[Any, dict[str, LoadedKernel]] = WeakKeyDictionary()


class _Launcher:
    """What Triton calls to launch one kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._source = source
        self._kinds = tuple(source.signature.values())
        loaded = _LOADED.setdefault(source, {})
        if metadata.hash not in loaded:
            loaded[metadata.hash] = _loaded(source, metadata)
        self._kernel = loaded[metadata.hash]

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Any,
        packed_metadata: Any,
        metadata: Any,
        enter: Callable[[Any], None] | None,
        leave: Callable[[Any], None] | None,
        *arguments: Any,
    ) -> None:
        __tracebackhide__ = True
        from triton import runtime

        driver = runtime.driver.active
        name = self._source.name
        if not isinstance(driver, EmulatedDriver):
            raise CaseError(f"{name} was compiled for an emulated GPU, and is launched where none is")
        if enter is not None:
            enter(metadata)
        grid = (int(x), int(y), int(z))
        if any(size > largest for size, largest in zip(grid, LARGEST_GRID, strict=True)):
            raise CaseError(f"{name}: a grid of {grid} is larger than a GPU launches, {LARGEST_GRID}")
        if min(grid) > 0:
            driver.launch(self._kernel, grid, list(_passed(name, self._kinds, arguments)))
        if leave is not None:
            leave(metadata)


def _loaded(source: Any, metadata: Any) -> LoadedKernel:
    """UnknownInstruction names what the emulator does not have."""
    from triton.runtime.cache import get_cache_manager

    name = source.name
    signature = tuple(_flat(source.signature.items()))
    for parameter, kind in signature:
        if "desc" in kind.lower():
            raise UnknownInstruction(f"{name}: {parameter} is a tensor descriptor (TMA), which is not emulated")
    if getattr(metadata, "num_ctas", 1) != 1:
        raise UnknownInstruction(f"{name}: clusters of {metadata.num_ctas} programs are not emulated")
    for memory in ("global_scratch", "profile_scratch"):
        if getattr(metadata, f"{memory}_size", 0):
            raise UnknownInstruction(f"{name}: {memory} memory is not emulated")
    # Triton's own name of it, which it cuts off.
    path = get_cache_manager(metadata.hash).get_file(f"{name[:150]}.ptx")
    if path is None:
        raise CaseError(f"triton kept no PTX of {name}; unset TRITON_STORE_BINARY_ONLY and compile anew")
    with open(path) as file:
        text = file.read()
    if called := _CALL.search(text):
        raise UnknownInstruction(
            f"{name} calls {called[1]}, and functions are not emulated: noinline=True, tl.device_print and "
            "tl.device_assert make calls"
        )
    return LoadedKernel(name, text, metadata.shared, signature, bool(getattr(metadata, "launch_pdl", False)))


def _flat(signature: Any) -> Iterator[tuple[str, str]]:
    """(name, type) of what is passed; tuples are passed value by value, constants are not."""
    for name, kind in signature:
        if isinstance(kind, tuple):
            yield from _flat((f"{name}.{number}", inner) for number, inner in enumerate(kind))
        elif kind != "constexpr":
            yield name, kind


def _passed(name: str, kinds: Sequence[Any], values: Sequence[Any]) -> Iterator[Any]:
    if len(kinds) != len(values):
        raise CaseError(f"{name} takes {len(kinds)} arguments, constants too; {len(values)} were passed")
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _passed(name, kind, value)
        elif kind != "constexpr":
            yield value
