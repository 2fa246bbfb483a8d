"""The peers of an operator: our kernel, our reference, torch as people write it, and other libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldmperf.kernels import OPERATORS, Launch

from ..measure.outcomes import Unsupported
from ..peer import diffusers_scheduler, import_diffusers
from ..step.call import PLAN_ROW, PLAN_STEPS, OperatorCall
from . import attention_peers
from .implementation import Arguments, Implementation
from .plain import PLAIN, STEPS, guided, with_input


@dataclass(frozen=True)
class Peer:
    """One way to compute calls; `build` raises `Unsupported` where there is nothing to time.

    operators   those that the peer knows, None for all
    capturable  whether a CUDA graph of its calls is tried
    measures    those that the peer can compute, None for all; of the others that it knows, one record says why not
    gpu_only    why nothing of it can run on a CPU
    slow_on     devices where it compiles for tens of seconds a call, or much longer than what is measured
    """

    name: str
    implement: Callable[[OperatorCall, torch.device], Implementation]
    operators: frozenset[str] | None = None
    capturable: bool = True
    measures: frozenset[str] | None = None
    gpu_only: str | None = None
    slow_on: tuple[str, ...] = ()

    def build(self, call: OperatorCall, device: torch.device) -> Implementation:
        if self.gpu_only is not None and device.type != "cuda":
            raise Unsupported(self.gpu_only)
        return self.implement(call, device)

    def is_usual(self, device: torch.device) -> bool:
        """Whether it is measured where no peer is named: the device can run it, and without a long compilation."""
        return device.type not in self.slow_on and (self.gpu_only is None or device.type == "cuda")

    def serves(self, call: OperatorCall, first_of_operator: bool) -> bool:
        known = self.operators is None or call.operator in self.operators
        return known and (first_of_operator or self.measures is None or call.operator in self.measures)


def _ours(backend: str, call: OperatorCall, device: torch.device) -> Implementation:
    """Our operator by one of its backends; of the kernel, its launches too."""
    operator = OPERATORS[call.operator]

    def launches(**arguments: Any) -> Sequence[Launch]:
        return operator.plan(operator.bind(**arguments))[1]

    function = functools.partial(operator.call, backend=backend)
    return Implementation(function, launches=launches if backend == "triton" else None)


def _separate(call: OperatorCall, device: torch.device) -> Implementation:
    """torch's matmuls or convolution between our kernels of what stands beside them: what has to be beaten."""
    function = OPERATORS[call.operator].torchs_own
    assert function is not None
    return Implementation(functools.partial(function, backend="triton"))


def _eager(call: OperatorCall, device: torch.device) -> Implementation:
    if call.plan is not None:
        if call.plan not in STEPS:
            raise Unsupported(f"no plain version of a {call.plan} step; there are {', '.join(STEPS)}")
        return Implementation(STEPS[call.plan](), functools.partial(_sampler_inputs, call))
    if call.operator not in PLAIN:
        raise Unsupported(f"no plain version of {call.operator}")
    return Implementation(PLAIN[call.operator])


def _compiled(build: Callable[[OperatorCall, torch.device], Implementation]) -> Any:
    def compiled(call: OperatorCall, device: torch.device) -> Implementation:
        implementation = build(call, device)
        # Each call's own shapes and code: nothing of an earlier one may make these dynamic or hit a limit.
        torch.compiler.reset()
        return Implementation(torch.compile(implementation.call, dynamic=False), implementation.prepare)

    return compiled


def _xformers(call: OperatorCall, device: torch.device) -> Implementation:
    if call.operator == "attention":
        return attention_peers.xformers(call, device)
    raise Unsupported(f"xformers has no public operator that computes {call.operator}")


def _diffusers(call: OperatorCall, device: torch.device) -> Implementation:
    """diffusers' scheduler step between guidance combine and next model input, as in its pipelines.

    The timestep is a host number, the cheapest that the scheduler takes. The scheduler counts its own steps, so it
    is set back before each.
    """
    import_diffusers()
    if call.plan is None or call.plan not in STEPS:
        raise Unsupported(f"a single {call.plan} step of diffusers is not set up; there are {', '.join(STEPS)}")
    scheduler = diffusers_scheduler(call.plan)
    scheduler.set_timesteps(PLAN_STEPS)
    timestep, timestep_next = (int(scheduler.timesteps[row]) for row in (PLAN_ROW, PLAN_ROW + 1))
    multistep = hasattr(scheduler, "model_outputs")

    def step(latents: Any, model_output: Any, history: Any = None) -> tuple[Any, Any]:
        if multistep:
            scheduler._step_index = PLAN_ROW
            scheduler.model_outputs = [history, history]
            scheduler.lower_order_nums = scheduler.config.solver_order
        output = guided(model_output, latents)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        latents, model_input = with_input(latents, model_output)
        return latents, scheduler.scale_model_input(model_input, timestep_next)

    return Implementation(step, functools.partial(_sampler_inputs, call))


def _sampler_inputs(call: OperatorCall, arguments: Arguments) -> Arguments:
    """Latents and the previous prediction in the network's dtype, which pipelines keep them in."""
    registers, model_output = arguments["registers"], arguments["model_output"]
    kept = [register.to(model_output.dtype) for register in registers.unbind(0)]
    inputs = {"latents": kept[0], "model_output": model_output}
    return inputs | ({"history": kept[1]} if len(kept) > 1 else {})


_ATTENTION = frozenset({"attention"})
# Where "auto" weighs our kernel against the operators one after the other.
_MERGED = frozenset({"linear", "conv3x3", "transformer_front", "transformer_tail"})
_SAMPLER = frozenset({"sampler_update"})

# In the order in which they are measured and shown.
PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "triton",
            functools.partial(_ours, "triton"),
            gpu_only="the Triton kernel needs a GPU; its interpreter's time on a CPU says nothing",
        ),
        # Elsewhere the kernel serves whatever it can, so that "auto" is "triton".
        Peer(
            "auto",
            functools.partial(_ours, "auto"),
            operators=_ATTENTION | _MERGED,
            gpu_only="without a GPU, auto is the reference; name reference",
        ),
        Peer(
            "separate",
            _separate,
            operators=_MERGED,
            gpu_only="separate launches our kernels, which need a GPU; without one, name reference",
        ),
        # Of attention there is one operator: nothing to fuse.
        Peer("compile", _compiled(_eager), operators=frozenset(OPERATORS) - _ATTENTION, slow_on=("cpu",)),
        Peer("eager", _eager),
        Peer("reference", functools.partial(_ours, "torch")),
        *(
            Peer(
                name,
                functools.partial(attention_peers.sdpa, name),
                operators=_ATTENTION,
                # A CPU has this one of torch's SDPA backends.
                gpu_only=None if name == "sdpa-flash" else f"{name} needs a GPU",
            )
            for name in attention_peers.SDPA
        ),
        Peer("flex", attention_peers.flex, operators=_ATTENTION, slow_on=("cpu", "cuda")),
        # Its step runs host code that a capture would leave out of the time.
        Peer("diffusers", _diffusers, operators=_SAMPLER, capturable=False),
        Peer("diffusers-compile", _compiled(_diffusers), operators=_SAMPLER, slow_on=("cpu",)),
        Peer("xformers", _xformers, measures=_ATTENTION, gpu_only="xformers needs a GPU"),
    )
}


def usual_peers(device: str) -> tuple[str, ...]:
    """Those that are measured where none is named."""
    kind = torch.device(device)
    return tuple(name for name, peer in PEERS.items() if peer.is_usual(kind))
