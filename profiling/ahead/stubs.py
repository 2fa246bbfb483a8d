"""The C modules through which triton launches kernels: compiled by the C compiler at a first launch, or ahead.

Up to triton 3.6 there is one for each signature of a kernel, from 3.7 on one for all.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..static.compile import cache_folder

DRIVER = "cuda_utils"
LAUNCHER = "__triton_launcher"


@dataclass(frozen=True)
class Stub:
    """One module; `source` in C, None for the driver's own, which triton finds itself."""

    name: str
    digest: str
    source: str | None = field(default=None, compare=False, repr=False)


def reason_against(backend: str) -> str | None:
    """Why stubs cannot be compiled here, None if they can: they link to the GPU's driver."""
    if backend != "cuda":
        return f"{backend} has stubs of its own"
    try:
        from triton.backends.nvidia import driver

        driver.library_dirs()
    except (Exception, AssertionError):
        return "libcuda.so.1 is not here"
    return None


def driver_stub() -> Stub:
    """The module that loads kernels and, from triton 3.7 on, launches them."""
    return Stub(DRIVER, DRIVER)


def launcher_stub(kernel: Any, signature: dict[str, Any], constants: dict[Any, Any]) -> Stub | None:
    """The module that launches kernels of this signature; None where triton has no such modules."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import platform_key

    if not hasattr(driver, "make_launcher"):
        return None
    source = driver.make_launcher(dict(constants), dict(signature), None)
    return Stub(LAUNCHER, hashlib.sha256((source + platform_key()).encode()).hexdigest(), source)


def is_there(stub: Stub) -> bool:
    """Whether triton's cache has it; of the driver's own module, one of this name, maybe another triton's."""
    if stub.source is None:
        return any(Path(cache_folder()).glob(f"*/{stub.name}*"))
    cache = cache_of(stub.digest)
    return cache is not None and cache.get_file(stub.name + sysconfig.get_config_var("EXT_SUFFIX")) is not None


def cache_of(digest: str) -> Any:
    """What triton's cache has by this key, None where it has nothing; nothing is made."""
    from triton.runtime.cache import _base32, get_cache_manager

    return get_cache_manager(digest) if (Path(cache_folder()) / _base32(digest)).is_dir() else None


def build(stub: Stub) -> None:
    """Compiles it into triton's cache unless it is there. Raises what triton and the C compiler raise."""
    from triton.backends.nvidia import driver

    if stub.source is not None and is_there(stub):
        return
    try:
        if stub.source is None:
            driver.CudaUtils()
            return
        from triton.runtime.build import compile_module_from_src

        compile_module_from_src(
            src=stub.source,
            name=stub.name,
            library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )
    except ImportError:
        # It is in the cache by then; that it is loaded here too nobody needs, and without a driver it cannot be.
        pass
