"""A `Launch` compiled for an architecture that need not be there, specialized as its launch would be.

Triton specializes a kernel by its arguments: 1 and None become constants, integers divisible by 16 and aligned
pointers are marked so, integers past 32 bits are passed in 64. That is asked of Triton's own binder.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

from ldmperf.kernels import Launch

from ..machines import Machine
from ..options import CaseError


def require_compiler() -> None:
    """Raises CaseError where triton is not there to compile."""
    try:
        import triton
    except ImportError:
        raise CaseError("this compiles with triton, which is not installed: pip install triton") from None
    if triton.knobs.runtime.interpret:
        raise CaseError("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")


def cache_folder() -> str:
    """Where triton keeps what it compiled: TRITON_CACHE_DIR, or a folder below home."""
    from triton import knobs

    return str(knobs.cache.dir)


def cache_refused(failure: OSError) -> str:
    """One line on a folder that cannot be written to."""
    return f"cannot write to {cache_folder()} ({failure.strerror}); set TRITON_CACHE_DIR to another folder"


@dataclass(frozen=True)
class Specialization:
    """What a launch is compiled by; equal ones give the same code. Fields in the order of the kernel's parameters.

    signature    (parameter, its type: "*bf16", "i32", "i64", "fp32", "constexpr")
    constants    (parameter, value) of constexprs, of None and of ones
    attributes   (parameter, "D" where divisible by 16, "S" where an AMD buffer addresses it)
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[str, str], ...]
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        """A short name that differs between specializations: the kernel and a digest of the rest."""
        text = repr((self.signature, self.constants, self.attributes, self.num_warps, self.num_stages))
        return f"{self.kernel}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Compiled:
    """The code of one specialization. `asm` holds ttir, ttgir, llir and ptx, cubin or amdgcn, hsaco."""

    specialization: Specialization
    machine: Machine
    shared: int
    asm: dict[str, Any] = field(repr=False)


# What a launch takes from triton's settings besides TRITON_DEBUG: all of them are in a kernel's key. Versions of
# triton differ in which there are.
_RUN_TIME_SETTINGS = ("instrumentation_mode", "fpsan_homomorphic_casts")


def bind(launch: Launch, machine: Machine) -> tuple[Any, Any, Any, Any]:
    """(options, signature, constants by path, attributes by path), as a launch on that device makes them."""
    from triton import knobs

    kernel = launch.kernel
    backend, binder = _binder(kernel, target(machine))
    options: dict[str, Any] = {**launch.options}
    options["debug"] = kernel.debug or knobs.runtime.debug
    for name in _RUN_TIME_SETTINGS:
        if hasattr(knobs.compilation, name):
            options[name] = getattr(knobs.compilation, name)
    bound, specialization, options = binder(**launch.arguments, **options)
    packed: tuple[Any, Any, Any, Any] = kernel._pack_args(backend, options, bound, specialization, options)
    return packed


@functools.cache
def _binder(kernel: Any, gpu: Any) -> tuple[Any, Any]:
    """(triton's backend, the function that specializes a kernel's arguments for it)."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(gpu)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def target(machine: Machine) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(machine.backend, machine.capability, machine.warp_size)


def specialization_of(launch: Launch, machine: Machine) -> Specialization:
    """By what `launch` would be compiled for this machine."""
    _, signature, constants, attributes = bind(launch, machine)
    names = [parameter.name for parameter in launch.kernel.params]
    marks = {("tt.divisibility", 16): "D", ("tt.pointer_range", 32): "S"}
    return Specialization(
        launch.name,
        tuple(signature.items()),
        tuple((names[path[0]], value) for path, value in sorted(constants.items())),
        tuple(
            (names[path[0]], "".join(marks.get(tuple(mark), "?") for mark in values))
            for path, values in sorted(attributes.items())
            if values
        ),
        launch.num_warps,
        launch.num_stages,
    )


def compile_launch(launch: Launch, machine: Machine, *, anew: bool = False) -> Compiled:
    """Compile through Triton's cache (TRITON_CACHE_DIR); `anew` replaces what is there. Raises what the compiler
    raises."""
    import triton
    from triton.compiler import ASTSource

    options, signature, constants, attributes = bind(launch, machine)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile |= anew
        kernel = triton.compile(source, target=target(machine), options=options.__dict__)
    return Compiled(specialization_of(launch, machine), machine, int(kernel.metadata.shared), {**kernel.asm})
