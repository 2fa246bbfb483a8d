"""`GraphedSampler`: `sample` with the step captured once as a CUDA graph and replayed for every step of every run.

A captured step reads fixed device memory: registers, table, guidance, seeds, conditioning, and the step's number,
which the step itself increments. Another plan, prompt, seed or guidance is a copy into that memory. What changes
the launches needs a capture of its own: shapes, dtypes, guidance or none, generated or injected noise, and more
steps or registers than a capture has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .captures import Capturable, Captured, Captures, Graphed
from .cuda_graphs import CudaGraphs, Graphs
from .plan import SamplingPlan
from .state import Guidance, SamplerState, check_input_dtype, check_start, guidance_scales
from .step import Step
from .tree import buffer, check, leaves, map_tensors, padded, room, structure

C = TypeVar("C")

# Every capture has room for so many registers, at least.
MIN_REGISTERS = 4


@dataclass(eq=False)
class _Memory:
    """What a captured step reads and writes, outside the captures' pool."""

    state: SamplerState
    conditioning: Any
    step: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.state.tensors(), *leaves(self.conditioning), self.step]


class GraphedSampler(Graphed[_Memory], Generic[C]):
    """Runs plans like `sample`, with the same bits, by replaying captured steps.

    denoise       called as denoise(model_input, conditioning, step), like `UNet.denoise`, only while a step is
                  warmed up and captured: it must do the same launches for any values and never wait for the
                  device. `step` is an int64 tensor [1] there. Values other than tensors stay those of the capture.
    modules       the modules whose parameters denoise reads; each run checks them for changes. Unless given, they
                  are found where denoise is a module or a method of one, where its object has one as an attribute,
                  and where it is a function that reads one from outside.
    max_captures  how many captures are kept; one more drops the least recently used
    input_dtype   of model_input: the network's float dtype, so that it need not cast; noise's unless given
    backend       of `ldmperf.kernels.sampler_update`: "auto", "torch" or "triton"
    graphs        how to capture; several samplers that are given one `CudaGraphs` share its pool of memory

    Weights: a run reads what was written into parameters in place. Parameters, buffers or submodules that were
    replaced or moved (`load_state_dict(assign=True)`, `.to()`, an adapter loaded) lead to new captures, as do
    added forward hooks, and Python values and classes of modules that changed (an adapter's scale, an attention
    processor); the old captures keep their memory until then. Any other tensor that denoise closes over is kept
    alive and read in place.

    A run inside `ldmperf.kernels.dependent_launches()` replays a capture of its own, whose launches of ldmperf's
    operators begin before those before them have ended.

    Streams: a run waits, on the device, for the run before, on whatever streams both are.

    cuDNN selects algorithms at the warm-up, under the switches set then (torch.backends.cudnn); an eager loop has
    the same bits under the same switches. Not for two threads at once.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor, C, Tensor], Tensor],
        *,
        modules: nn.Module | Sequence[nn.Module] | None = None,
        max_captures: int = 4,
        input_dtype: torch.dtype | None = None,
        backend: str = "auto",
        graphs: Graphs | None = None,
    ) -> None:
        check_input_dtype(input_dtype)
        self._denoise = denoise
        self._input_dtype = input_dtype
        self._backend = backend
        self._graphs = graphs or CudaGraphs()
        self._captures = Captures(
            type(self).__name__, denoise, modules, max_captures=max_captures, graphs=self._graphs
        )

    def __call__(
        self,
        conditioning: C,
        plan: SamplingPlan,
        noise: Tensor,
        *,
        guidance_scale: Guidance = 1.0,
        seeds: Sequence[int] | Tensor | None = None,
        step_noise: Callable[[int], Tensor] | None = None,
        callback: Callable[[Step, Tensor], None] | None = None,
    ) -> Tensor:
        """The latents [B, ...] that `plan` makes of `noise`; arguments and errors as of `sample`.

        conditioning: tensors, in tuples, lists, dicts and dataclasses; each call copies their values. A part's
        method padded(steps), if any, returns the part with room for so many steps, as `ldmperf.model.Conditioning`
        does; a part's method check() may raise. Dataclass fields with metadata {"tensors": False} are not copied.

        Raises CaptureError, in one line, where a step cannot be captured; later calls work. Raises ValueError
        where denoise reads parameters of modules that it does not show.
        """
        check_start(plan, noise, seeds, step_noise)
        self._graphs.check(noise.device)
        scales = guidance_scales(guidance_scale, len(plan.steps), noise.dtype)
        injects = plan.stochastic and step_noise is not None
        check(conditioning)
        # A later call outside inference mode uses the same tensors.
        with torch.inference_mode(False), torch.no_grad(), self._graphs.turn(noise.device):
            captured = self._captured(conditioning, plan, noise, scales is not None, injects)
            state = captured.memory.state
            state.load(plan, noise, scales, seeds)
            captured.memory.step.zero_()
            for step in plan.steps:
                if state.injected is not None and step_noise is not None and step.adds_noise:
                    state.load_noise(step_noise(step.index), at=step.index)
                captured.replay()
                if callback is not None:
                    callback(step, state.snapshot())
            return state.result(noise)

    def _captured(
        self, conditioning: C, plan: SamplingPlan, noise: Tensor, is_guided: bool, is_injected: bool
    ) -> Captured[_Memory]:
        """The capture for such a call, kept or new, with the conditioning's values in its memory."""
        form = _Form(
            is_guided,
            is_injected,
            num_steps=room(len(plan.steps)),
            num_registers=max(MIN_REGISTERS, plan.num_registers),
        )
        roomy = padded(conditioning, form.num_steps)
        tensors = leaves(roomy)
        for leaf in tensors:
            if leaf.device != noise.device:
                raise ValueError(
                    f"conditioning must be on {noise.device} as the noise is; a tensor is on {leaf.device}"
                )
        key = (noise.device, noise.shape, noise.dtype, form, structure(roomy))
        captured = self._captures.find(
            key, noise.device, form.described(noise), lambda: self._work(roomy, noise, form)
        )
        assert captured is not None
        if tensors:
            torch._foreach_copy_(leaves(captured.memory.conditioning), tensors)
        return captured

    def _work(self, conditioning: Any, noise: Tensor, form: _Form) -> Capturable[_Memory]:
        state = SamplerState(
            noise,
            self._input_dtype or noise.dtype,
            num_registers=form.num_registers,
            num_steps=form.num_steps,
            is_guided=form.is_guided,
            is_injected=form.is_injected,
        )
        state.fill()
        memory = _Memory(
            state, map_tensors(conditioning, buffer), torch.zeros(1, dtype=torch.int64, device=noise.device)
        )

        def call() -> None:
            output = self._denoise(state.model_input, memory.conditioning, memory.step)
            # In a deterministic plan the coefficients of the noise are zero: it needs no capture of its own.
            state.update(output, memory.step, True, state.injected, self._backend, at="in the capture")
            memory.step.add_(1)

        return Capturable(memory, memory.tensors, call)


@dataclass(frozen=True)
class _Form:
    """What the launches of a step depend on besides its tensors."""

    is_guided: bool
    is_injected: bool
    num_steps: int
    num_registers: int

    def described(self, noise: Tensor) -> str:
        return (
            f"the step for noise {list(noise.shape)} {str(noise.dtype).removeprefix('torch.')}"
            f"{' with guidance' if self.is_guided else ''}{' and injected noise' if self.is_injected else ''}"
        )
