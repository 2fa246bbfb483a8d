"""What ptxas remarks about a compiled launch. Triton hides these lines.

C7510 to C7519: "wgmma.mma_async instructions are serialized due to ...". Each matrix instruction then waits for
the one before it. No count of instructions shows that.
"""

from __future__ import annotations

import contextlib
import io
import re

from .compile import Compiled, target

_SERIALIZED = re.compile(r"\((C75\d\d)\)")


def serializations(compiled: Compiled) -> tuple[str, ...]:
    """The codes C75xx for this launch, sorted; empty where its matmuls are not serialized.

    Runs ptxas again on the PTX (about 0.2 s), by the command that Triton runs: only where the PTX has wgmma.
    """
    if "wgmma" not in compiled.asm.get("ptx", ""):
        return ()
    return tuple(sorted(set(_SERIALIZED.findall(_log(compiled)))))


def _log(compiled: Compiled) -> str:
    """ptxas's log for a kernel."""
    from triton import knobs
    from triton.compiler import make_backend

    backend = make_backend(target(compiled.machine))
    launch = compiled.specialization
    options = backend.parse_options({"num_warps": launch.num_warps, "num_stages": launch.num_stages})
    printed = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(compiled.asm["ptx"], {}, options, compiled.machine.capability)
    log = printed.getvalue()
    if "ptxas" not in log:
        raise RuntimeError("triton did not print the log of ptxas; did its option dump_ptxas_log change?")
    return log
