"""Process-wide switches while measuring, the same for all that is measured, and the ptxas that triton keeps to."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from .heap import kept_heap

# Names the ptxas that triton takes instead of its own.
PTXAS_VARIABLE = "TRITON_PTXAS_PATH"


@contextmanager
def measuring_settings() -> Iterator[None]:
    """Process-wide switches of torch and triton while measuring, the same for all backends; put back afterwards.

    float32 means float32: no TF32 in matmuls or convolutions. cuDNN chooses its algorithms by trying them, in the
    first call. triton keeps to one ptxas, whatever a compiled peer does. The heap is kept; afterwards it has the
    thresholds that glibc adapts itself to (heap.py).
    """
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            pinned_ptxas(),
            kept_heap(),
            torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes on so many threads of the CPU; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextmanager
def pinned_ptxas() -> Iterator[None]:
    """Inside, triton assembles by its own ptxas, unless TRITON_PTXAS_PATH names another.

    torch brings a second ptxas, and the first torch.compile of a process switches all of triton to it, by setting
    that variable. The keys in triton's cache stay those of the first, so that a cache would hold code of both.
    """
    if os.environ.get(PTXAS_VARIABLE) is not None or (path := _own_ptxas()) is None:
        yield
        return
    os.environ[PTXAS_VARIABLE] = path
    try:
        yield
    finally:
        os.environ.pop(PTXAS_VARIABLE, None)


def _tritons_ptxas() -> str:
    from triton import knobs

    return str(knobs.nvidia.ptxas.path)


def ptxas_version() -> str:
    """The version of the ptxas that triton uses: "12.8.93". Raises whatever goes wrong with asking it."""
    answer = subprocess.run(
        [_tritons_ptxas(), "--version"], capture_output=True, text=True, timeout=20, check=True
    )
    found = re.search(r"\bV(\d+(?:\.\d+)+)", answer.stdout)
    if found is None:
        raise ValueError(f"ptxas tells no version: {answer.stdout!r}")
    return found[1]


def _own_ptxas() -> str | None:
    try:
        return _tritons_ptxas()
    except Exception:
        # No triton, or one that has no ptxas: there is nothing to pin.
        return None
