"""The C library's heap while something is measured: kept, as torch's allocator for a GPU keeps its memory.

glibc maps each block of more than 32 MiB anew and gives it back when it is freed, and the kernel clears every page
that is touched first. A VAE's decoder spends a third of its time on that, or nothing, depending on what the
process has allocated before: malloc's thresholds adapt themselves. With a kept heap a time is that of the network.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# mallopt(3): parameters, and the values that glibc adapts itself to at most (malloc.c). Whoever sets one ends the
# adaptation, and what MALLOC_* variables say.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
_USUAL = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))
_inside = 0


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc by its name; None where malloc is not glibc's (another C library or allocator)."""
    try:
        everywhere, glibc = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
        found: Callable[..., int] = getattr(glibc, name)
        addresses = [ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (everywhere, glibc)]
    except (AttributeError, OSError, TypeError):
        return None
    return found if addresses[0] == addresses[1] else None


def can_be_kept() -> bool:
    """Whether the C library can be told to keep its heap."""
    return _function("mallopt") is not None


@contextmanager
def kept_heap() -> Iterator[None]:
    """Inside, what is freed stays with the process until `trim_heap`; changes nothing where that cannot be."""
    global _inside
    mallopt = _function("mallopt")
    if mallopt is None:
        yield
        return
    _inside += 1
    try:
        if _inside == 1:
            for parameter, value in _KEPT:
                mallopt(parameter, value)
        yield
    finally:
        _inside -= 1
        if _inside == 0:
            for parameter, value in _USUAL:
                mallopt(parameter, value)
            trim_heap()


def trim_heap() -> None:
    """Gives the pages of freed memory back to the system."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)
