"""`GraphedSampler`: `sample` with the step captured once as a CUDA graph and replayed for every step of every run.

A captured step reads fixed device memory: registers, table, guidance, seeds, conditioning, and the step's number,
which the step itself increments. Another plan, prompt, seed or guidance is a copy into that memory. What changes
the launches needs a capture of its own: shapes, dtypes, guidance or none, generated or injected noise, and more
steps or registers than a capture has room for.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .cuda_graphs import CaptureError, CudaGraphs, Graphs
from .plan import SamplingPlan
from .reads import Reads, Watch, modules_of
from .state import Guidance, SamplerState, check_input_dtype, check_start, guidance_scales
from .step import Step
from .tree import buffer, check, leaves, map_tensors, padded, structure
from .values import plain, shown

C = TypeVar("C")

# Every capture has room for plans of this size, at least: room costs kilobytes, another capture seconds.
MIN_STEPS = 128
MIN_REGISTERS = 4
# The first call tunes cuDNN and compiles Triton's kernels; the second runs as the capture will.
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Capture:
    """A capture that is kept: its description, and the host times of its warm-up and of the capture itself."""

    description: str
    warm_up_ms: float
    capture_ms: float


@dataclass
class _Captured:
    """A captured step and the memory that it works on."""

    state: SamplerState
    conditioning: list[Tensor]
    step: Tensor
    replay: Callable[[], None]
    # What the graph reads: a graph itself keeps none of it alive.
    memory: list[torch.UntypedStorage]
    report: Capture


class GraphedSampler(Generic[C]):
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
    graphs        how to capture

    Weights: a run reads what was written into parameters in place. Parameters, buffers or submodules that were
    replaced or moved (`load_state_dict(assign=True)`, `.to()`, an adapter loaded) lead to new captures, as do
    added forward hooks, and Python values and classes of modules that changed (an adapter's scale, an attention
    processor); the old captures keep their memory until then. Any other tensor that denoise closes over is kept
    alive and read in place.

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
        max_captures = plain(max_captures)
        if type(max_captures) is not int or max_captures < 1:
            raise ValueError(f"max_captures must be at least 1, an integer, not {shown(max_captures)}")
        check_input_dtype(input_dtype)
        self._denoise = denoise
        self._given_modules = [modules] if isinstance(modules, nn.Module) else modules
        self._watch: Watch | None = None
        self._max_captures = max_captures
        self._input_dtype = input_dtype
        self._backend = backend
        self._graphs = graphs or CudaGraphs()
        self._kept: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()

    def __reduce__(self) -> str:
        raise TypeError(
            "a GraphedSampler cannot be copied or pickled, because its captures work on its own memory: make "
            "another with GraphedSampler(denoise)"
        )

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures that are kept; the last used is at the end."""
        return tuple(captured.report for captured in self._kept.values())

    def clear(self) -> None:
        """Waits until the device is done with all captures, drops them and releases their memory."""
        self._graphs.settle()
        self._kept.clear()
        self._watch = None
        _release_memory()

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
            state = captured.state
            state.load(plan, noise, scales, seeds)
            captured.step.zero_()
            for step in plan.steps:
                if state.injected is not None and step_noise is not None and step.adds_noise:
                    state.load_noise(step_noise(step.index), at=step.index)
                captured.replay()
                if callback is not None:
                    callback(step, state.snapshot())
            return state.result(noise)

    def _captured(
        self, conditioning: C, plan: SamplingPlan, noise: Tensor, is_guided: bool, is_injected: bool
    ) -> _Captured:
        """The capture for such a call, kept or new, with the conditioning's values in its memory."""
        room = _Room(
            num_steps=max(MIN_STEPS, 1 << (len(plan.steps) - 1).bit_length()),
            num_registers=max(MIN_REGISTERS, plan.num_registers),
        )
        roomy = padded(conditioning, room.num_steps)
        tensors = leaves(roomy)
        for leaf in tensors:
            if leaf.device != noise.device:
                raise ValueError(
                    f"conditioning must be on {noise.device} as the noise is; a tensor is on {leaf.device}"
                )
        if self._watch is not None and not self._watch.is_same(self._modules()):
            self.clear()
        key = (noise.device, noise.shape, noise.dtype, is_guided, is_injected, room, structure(roomy))
        captured = self._kept.get(key)
        if captured is not None:
            self._kept.move_to_end(key)
            if tensors:
                torch._foreach_copy_(captured.conditioning, tensors)
            return captured
        if len(self._kept) >= self._max_captures:
            self._graphs.settle()
        while len(self._kept) >= self._max_captures:
            self._kept.popitem(last=False)
        try:
            captured = self._capture(roomy, noise, is_guided, is_injected, room)
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        if captured is None:
            # Out of memory beside the captures that are kept: drop them for this one.
            self.clear()
            captured = self._capture(roomy, noise, is_guided, is_injected, room)
        self._kept[key] = captured
        # Not renewed: parameters that denoise itself replaced in this capture make the earlier captures stale.
        self._watch = self._watch or Watch(self._modules())
        return captured

    def _modules(self) -> Sequence[nn.Module]:
        return modules_of(self._denoise) if self._given_modules is None else self._given_modules

    def _capture(
        self, conditioning: Any, noise: Tensor, is_guided: bool, is_injected: bool, room: _Room
    ) -> _Captured:
        what = (
            f"the step for noise {list(noise.shape)} {str(noise.dtype).removeprefix('torch.')}"
            f"{' with guidance' if is_guided else ''}{' and injected noise' if is_injected else ''}"
        )
        state = SamplerState(
            noise,
            self._input_dtype or noise.dtype,
            num_registers=room.num_registers,
            num_steps=room.num_steps,
            is_guided=is_guided,
            is_injected=is_injected,
        )
        state.fill()
        kept = map_tensors(conditioning, buffer)
        step = torch.zeros(1, dtype=torch.int64, device=noise.device)

        def work() -> None:
            output = self._denoise(state.model_input, kept, step)
            # In a deterministic plan the coefficients of the noise are zero: it needs no capture of its own.
            state.update(output, step, True, state.injected, self._backend, at="in the capture")
            step.add_(1)

        reads = Reads()

        def noted() -> None:
            with reads:
                work()

        start = time.perf_counter()
        for call in range(WARM_UP_CALLS):
            # Reads are noted in the last call: under a dispatch mode, compiled functions run uncompiled.
            self._graphs.warm_up(noted if call == WARM_UP_CALLS - 1 else work, noise.device)
        warm = time.perf_counter()
        found = {parameter for module in self._modules() for parameter in module.parameters()}
        if unseen := len({*reads.parameters} - found):
            raise ValueError(
                f"denoise reads {unseen} parameters of modules that it does not show: pass these to "
                "GraphedSampler as modules=, so that it notices weights that were replaced"
            )
        try:
            replay = self._graphs.capture(work, noise.device)
        except Exception as error:
            # Ending the capture fails too; its error would hide the cause, which is in the chain before it.
            chain = _chain(error)
            cause = next((one for one in chain if "captur" not in str(one)), chain[-1])
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
            out_of_memory = isinstance(cause, torch.OutOfMemoryError)
            # The frames of the failed capture hold what it allocated.
            for one in chain:
                one.__traceback__ = None
            del error, chain, cause, one
            _release_memory()
            kind: type[RuntimeError] = _CaptureOutOfMemory if out_of_memory else CaptureError
            raise kind(f"{what} could not be captured: {reason}") from None
        captured_ms = 1e3 * (time.perf_counter() - warm)
        report = Capture(what, 1e3 * (warm - start), captured_ms)
        return _Captured(state, leaves(kept), step, replay, list(reads.memory.values()), report)


class _CaptureOutOfMemory(CaptureError, torch.OutOfMemoryError):
    """A capture that ran out of memory, which is both errors."""


@dataclass(frozen=True)
class _Room:
    num_steps: int
    num_registers: int


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its contexts, back to the first."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return chain
