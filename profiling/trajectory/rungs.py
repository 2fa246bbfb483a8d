"""Every backend by its name: the rungs of the ladder, and what stands beside it."""

from __future__ import annotations

from ldmperf.model import AUTO, SEPARATE, Choices

from .backend import Backend
from .case import IDEAS
from .ours import Float8, GraphBackend, OurBackend
from .theirs import DiffusersBackend


def all_backends() -> dict[str, Backend]:
    """Every backend by its name, in the order of the ladder: each of ours does more than the one before, but for
    IDEAS.

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
        "triton+hoist+merge": OurBackend("triton", choices=AUTO),
        "graph+separate": GraphBackend(choices=SEPARATE),
        **{name: GraphBackend(choices=_alone(name)) for name in IDEAS},
        "graph": GraphBackend(),
        "graph+pdl": GraphBackend(dependent=True),
        "torch-invariant": OurBackend("torch", batch_invariant=True),
        "triton-invariant": OurBackend("triton", choices=AUTO, batch_invariant=True),
        "graph-invariant": GraphBackend(batch_invariant=True),
        "triton+fp8": OurBackend("triton", choices=AUTO, float8=Float8()),
        "graph+fp8": GraphBackend(float8=Float8()),
    }


def _alone(name: str) -> Choices:
    """The choices of one of IDEAS: the one in its name is merged wherever our kernel can serve."""
    return SEPARATE._replace(**{name.removeprefix("graph+"): "triton"})
