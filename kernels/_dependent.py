"""Dependent launches: a launch begins before the one before it has ended (programmatic dependent launch, PDL).

Between two launches of a stream a GPU idles for about a microsecond. A dependent launch is begun as soon as every
program of the launch before has called `launch_dependents` or ended. Its programs compute their indices, and stop
in `wait_for_primary` until that launch is complete and what it wrote can be read.

    every program waits   So a launch is complete only after all before it are: a kernel may read what any of them
                          wrote, and overwrite what any of them reads.
    none reads before     Not even weights, which a launch may have written too: a cast, an adapter. A prefetch
                          into the L2 cache, which all launches share, is allowed: transformer_front and
                          transformer_tail have one. In small kernels it costs more than it spares: on an H200
                          a layer norm took 2.0 us with one and 1.5 without in a graph of 40 calls, 2.1 and 1.9
                          in one of 200.

A launch of others, such as cuBLAS's, begins when all launches before it are complete, as ever.
Sources: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, griddepcontrol.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

from ._checks import flag
from ._launch import Chip, constant_to_a_compiler
from ._triton import dependent_launch_misfit, gdc_launch_dependents, gdc_wait, is_interpreted, jit, tl

# The first of NVIDIA's architectures that has them.
FIRST_ARCH = 90
_enabled: ContextVar[bool] = ContextVar("_enabled", default=False)


@contextlib.contextmanager
def dependent_launches(enabled: bool = True) -> Iterator[None]:
    """Inside, launches of ldmperf's operators are dependent where the chip has that (`dependent_launch_reasons`).

    The results have the same bits. Off by default. It holds for this thread, or this task of asyncio, and for what
    is captured as a CUDA graph inside. `enabled=False` turns it off inside another.
    """
    flag("dependent_launches", "enabled", enabled)
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


@constant_to_a_compiler
def dependent_launches_enabled() -> bool:
    """Whether launches are asked to be dependent here."""
    return _enabled.get()


def dependent_launch_reasons(chip: Chip) -> list[str]:
    """Every reason why launches on this chip cannot be dependent; empty where they can."""
    if not isinstance(chip, Chip):
        raise ValueError(f"dependent_launch_reasons: chip must be a Chip, chip_of(device); got {chip!r}")
    reasons = []
    arch = re.fullmatch(r"sm_(\d+)[a-z]*", chip.arch)
    if arch is None or int(arch[1]) < FIRST_ARCH:
        reasons.append(f"{chip.name} is {chip.arch}: dependent launches need NVIDIA's sm_{FIRST_ARCH} or newer")
    if (misfit := dependent_launch_misfit()) is not None:
        reasons.append(misfit)
    elif is_interpreted(wait_for_primary):
        reasons.append("triton's interpreter runs one launch after another: unset TRITON_INTERPRET")
    return reasons


def launches_dependently(chip: Chip) -> bool:
    """What a plan for this chip takes for PDL."""
    return _enabled.get() and not dependent_launch_reasons(chip)


@jit
def launch_dependents(PDL: tl.constexpr):
    """Lets the next launch begin, if it is a dependent one, once all programs of this one have come here."""
    if PDL:
        gdc_launch_dependents()


@jit
def wait_for_primary(PDL: tl.constexpr):
    """Waits until all earlier launches are complete: before the first load and before the first store."""
    if PDL:
        gdc_wait()
