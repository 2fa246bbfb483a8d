"""Every backend by its name: the rungs of the ladder, and what stands beside it."""

from __future__ import annotations

from .backend import Backend
from .ours import Float8, GraphBackend, OurBackend
from .theirs import DiffusersBackend


def all_backends() -> dict[str, Backend]:
    """Every backend by its name, in the order of the ladder: each of ours does more than the one before.

    Behind them the batch-invariant ones, and those in float8.
    """
    return {
        "diffusers": DiffusersBackend(),
        "diffusers-accelerated": DiffusersBackend(is_accelerated=True),
        "diffusers-compile": DiffusersBackend("reduce-overhead"),
        "diffusers-accelerated-compile": DiffusersBackend("reduce-overhead", is_accelerated=True),
        "diffusers-compile-max": DiffusersBackend("max-autotune"),
        "torch": OurBackend("torch"),
        "triton": OurBackend("triton", is_hoisted=False),
        "triton+hoist": OurBackend("triton"),
        "triton+hoist+merge": OurBackend("triton", products="auto"),
        "graph+separate": GraphBackend(products="torch"),
        "graph": GraphBackend(),
        "torch-invariant": OurBackend("torch", batch_invariant=True),
        "triton-invariant": OurBackend("triton", products="auto", batch_invariant=True),
        "graph-invariant": GraphBackend(batch_invariant=True),
        "triton+fp8": OurBackend("triton", products="auto", float8=Float8()),
        "graph+fp8": GraphBackend(float8=Float8()),
    }
