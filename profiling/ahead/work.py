"""The kernels that launches need compiled, planned and named as triton's cache names them.

A launch is planned on "meta" tensors for a chip that need not be there and specialized by triton's own binder, so
that its key in the cache is the one that it has at run time. The key holds the kernel's source, specialization and
options, triton's build and ptxas' version. Nothing here initializes CUDA: processes are forked.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldmperf.kernels import Chip, Launch, planned_for, tuned_table

from ..machines import Machine
from ..measure.settings import pinned_ptxas
from ..static.compile import bind, target
from ..static.forked import Lost, map_forked, usable_cores
from ..static.planned import chip_of
from .stubs import Stub, cache_of, driver_stub, is_there, launcher_stub, reason_against

# Plans launches on "meta" tensors, with whether each is a candidate, which may not compile. Called for each chip.
Part = Callable[[], Iterable[tuple[Launch, bool]]]
# What takes longest to compile comes first, so that the last process does not end long after the others.
_SLOWEST = ("attention", "linear", "group_norm_apply", "group_norm", "sampler_update", "layer_norm")


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: what triton's key of a launch is made of, in a form that can be sent.

    digest     the key in triton's cache; equal ones are the same kernel
    path       the function: "module:name"
    candidate  of a tuner's choices: it may be one that does not compile, or that no chip has room for
    there      whether the cache had it when it was planned
    """

    digest: str
    path: str = field(compare=False)
    signature: dict[str, Any] = field(compare=False, repr=False)
    constants: dict[Any, Any] = field(compare=False, repr=False)
    attributes: dict[Any, Any] = field(compare=False, repr=False)
    options: dict[str, Any] = field(compare=False, repr=False)
    candidate: bool = field(default=False, compare=False)
    there: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.path.partition(":")[2]

    @property
    def label(self) -> str:
        """The name with the constants that tell it from others."""
        names = list(self.signature)
        told = (f"{names[path[0]]}={value}" for path, value in self.constants.items() if names[path[0]].isupper())
        return f"{self.name}[{', '.join(told)}, num_warps={self.options['num_warps']}]"

    @property
    def source(self) -> Any:
        """What triton.compile takes."""
        from triton.compiler import ASTSource

        function = getattr(importlib.import_module(self.path.partition(":")[0]), self.name)
        return ASTSource(function, self.signature, self.constants, self.attributes)


@dataclass(frozen=True)
class Work:
    """What is to be compiled for `machine`; `no_stubs` says why no stubs are, None where they are."""

    machine: Machine
    launches: tuple[Kernel, ...]
    stubs: tuple[Stub, ...]
    no_stubs: str | None = None

    @property
    def missing(self) -> int:
        """How many kernels and stubs triton's cache does not have."""
        return sum(not kernel.there for kernel in self.launches) + sum(not is_there(stub) for stub in self.stubs)


def chips_of(machine: Machine) -> tuple[Chip, ...]:
    """The chips that launches are planned for: the GPU that is here, if it is of that architecture.

    Else one that nothing was measured on, and those of the architecture that have a tuned table.
    """
    here = chip_here()
    if here is not None and here.arch == machine.arch:
        return (here,)
    unmeasured = chip_of(machine)
    paths = sorted(tuned_table(unmeasured).parent.glob("*.json"))
    tuned = (json.loads(path.read_text()).get("chip", {}) for path in paths)
    return unmeasured, *(Chip(**chip) for chip in tuned if chip.get("arch") == machine.arch)


@functools.cache
def chip_here() -> Chip | None:
    """The first CUDA device's, None without one. Asked by a process of its own: this one stays without CUDA."""
    script = Path(__file__).with_name("ask_gpu.py")
    answer = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    told = json.loads(answer.stdout) if answer.returncode == 0 else None
    return None if told is None else Chip(**told)


def plan(
    parts: Sequence[Part],
    machine: Machine,
    *,
    processes: int | None = None,
    chips: Sequence[Chip] | None = None,
    in_order: bool = False,
) -> Work:
    """The distinct kernels and stubs of all launches of `parts`, what takes longest to compile first.

    `in_order`: in the order of the launches, for one part.
    """
    no_stubs = reason_against(machine.backend)
    items = [(part, chip) for part in parts for chip in (chips_of(machine) if chips is None else chips)]
    with pinned_ptxas(), about_to_fork(machine):
        kernels: dict[str, Kernel] = {}
        stubs: dict[str, Stub] = {}
        work = functools.partial(_plan_part, machine, no_stubs is None)
        for _, found in map_forked(work, items, processes or usable_cores()):
            if isinstance(found, Lost):
                raise RuntimeError(f"launches could not be planned: {found.reason}")
            for kernel in found[0]:
                known = kernels.setdefault(kernel.digest, kernel)
                if known.candidate and not kernel.candidate:
                    kernels[kernel.digest] = kernel
            stubs |= found[1]
    launches = list(kernels.values())
    if not in_order:
        launches.sort(key=_slowness)
    if no_stubs is None and launches:
        stubs = {driver_stub().digest: driver_stub()} | stubs
    return Work(machine, tuple(launches), tuple(stubs.values()), no_stubs)


def _slowness(kernel: Kernel) -> int:
    return next((i for i, name in enumerate(_SLOWEST) if name in kernel.name), len(_SLOWEST))


@contextmanager
def about_to_fork(machine: Machine) -> Iterator[None]:
    """Computes once, before there are several processes, what all need: triton's own hash takes a second.

    Inside, torch has one thread, as each of the processes then has.
    """
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    triton_key()
    make_backend(target(machine)).hash()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _plan_part(
    machine: Machine, with_stubs: bool, item: tuple[Part, Chip]
) -> tuple[list[Kernel], dict[str, Stub]]:
    part, chip = item
    kernels: dict[str, Kernel] = {}
    stubs: dict[str, Stub] = {}
    with planned_for(chip):
        for launch, candidate in part():
            bound = bind(launch, machine)
            # A digest takes longer than this.
            key = f"{launch.name} {bound}"
            if key not in kernels:
                kernels[key] = replace(kernel_of(launch, machine, bound), candidate=candidate)
                stub = launcher_stub(launch.kernel, bound[1], bound[2]) if with_stubs else None
                if stub is not None:
                    stubs.setdefault(stub.digest, stub)
            elif kernels[key].candidate and not candidate:
                kernels[key] = replace(kernels[key], candidate=False)
    return list(kernels.values()), stubs


def kernel_of(launch: Launch, machine: Machine, bound: tuple[Any, Any, Any, Any] | None = None) -> Kernel:
    """What a launch, `bound` as by `bind`, needs compiled, with its key in triton's cache."""
    options, signature, constants, attributes = bind(launch, machine) if bound is None else bound
    path = f"{launch.kernel.__module__}:{launch.name}"
    kernel = Kernel("", path, signature, constants, attributes, dict(options.__dict__))
    digest = _digest(kernel, machine)
    return replace(kernel, digest=digest, there=in_cache(digest, launch.name))


def _digest(kernel: Kernel, machine: Machine) -> str:
    """As triton.compile makes it."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(target(machine))
    key = get_cache_key(
        kernel.source, backend, backend.parse_options(kernel.options), get_cache_invalidating_env_vars()
    )
    return hashlib.sha256(key.encode()).hexdigest()


def in_cache(digest: str, name: str) -> bool:
    """Whether triton's cache holds this kernel."""
    cache, group = cache_of(digest), f"{name[:150]}.json"
    return cache is not None and group in (cache.get_group(group) or {})
