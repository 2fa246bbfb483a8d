"""`GraphedSampler`: `sample` with the step captured once as a CUDA graph and replayed for every step of every run.

All that a run may change lies in device memory that the captured step reads where it is: registers, table,
guidance, seeds, the conditioning, and the number of the step, which the step itself counts on. Another plan,
prompt, seed or guidance is a copy into that memory. What would change the launches themselves is a capture of its
own: shapes, dtypes, whether there is guidance, where the noise comes from, and room for more steps or registers.
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

# Room for any plan of so many evaluations and registers is made at once: it costs kilobytes, a capture seconds.
MIN_STEPS = 128
MIN_REGISTERS = 4
# cuDNN tries its algorithms and Triton compiles at the first call; the second finds all that done.
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Capture:
    """A capture that is kept: what it is for, and what making it took on the host's clock."""

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
    # A graph does not keep what it reads.
    memory: list[torch.UntypedStorage]
    report: Capture


class GraphedSampler(Generic[C]):
    """Runs plans like `sample`, with the same bits, by replaying captured steps.

    denoise       called as denoise(model_input, conditioning, step), like `UNet.denoise`, only while a step is
                  warmed up and captured: it must do the same launches for any values and never wait for the
                  device. `step` is an int64 tensor [1] there. What is no tensor is as it was at the capture.
    modules       those whose parameters denoise reads: looked at before each run. Found, unless given, where
                  denoise is a module or a method of one, has one as an attribute of its object, or is a function
                  that reads one from outside.
    max_captures  how many captures are kept; one more drops the one that was used longest ago
    input_dtype   of model_input: the network's, so that it need not cast; noise's dtype unless given
    backend       of `ldmperf.kernels.sampler_update`: "auto", "torch" or "triton"
    graphs        how to capture

    Weights: a run sees what was written into parameters in place. Parameters, buffers or submodules that were
    replaced or moved (`load_state_dict(assign=True)`, `.to()`, an adapter swapped in) lead to new captures, as do
    forward hooks that were added; the memory of the old ones stays until then. Any other tensor that denoise
    closes over is kept, and read where it was.

    Streams: a run waits, on the device, for the run before, whatever the streams of both.

    cuDNN chooses its algorithms at the warm-up under the switches that are set then (torch.backends.cudnn): set
    the same for an eager loop whose bits are to be the same. Not for two threads at once.
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
        """Those that are kept, the one used last at the end."""
        return tuple(captured.report for captured in self._kept.values())

    def clear(self) -> None:
        """Drops all captures, once the device is done with them, and gives their memory back."""
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

        conditioning: tensors, in tuples, lists, dicts and dataclasses; their values are copied at each call. One
        with a method padded(steps), like `ldmperf.model.Conditioning`, is asked for room for that many steps; one
        with a method check() may refuse to be used. A dataclass's field with metadata {"tensors": False} is left
        alone.

        Raises CaptureError, in one line, where a step cannot be captured; later calls work. Raises ValueError
        where denoise reads parameters of modules that it does not show.
        """
        check_start(plan, noise, seeds, step_noise)
        self._graphs.check(noise.device)
        scales = guidance_scales(guidance_scale, len(plan.steps), noise.dtype)
        injects = plan.stochastic and step_noise is not None
        check(conditioning)
        # What is kept must serve calls outside inference mode too.
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
        """The capture for such a call, made if there is none, with the conditioning's values in its memory."""
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
            # The captures that are kept hold memory: this one is wanted now.
            self.clear()
            captured = self._capture(roomy, noise, is_guided, is_injected, room)
        self._kept[key] = captured
        # Taken once: what this capture's own run of denoise replaced makes those before it stale.
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
            # A deterministic plan has zeros for the noise's coefficients: it needs no capture of its own.
            state.update(output, step, True, state.injected, self._backend, at="in the capture")
            step.add_(1)

        reads = Reads()

        def noted() -> None:
            with reads:
                work()

        start = time.perf_counter()
        for call in range(WARM_UP_CALLS):
            # The last: what torch.compile made runs uncompiled where operators are noted.
            self._graphs.warm_up(noted if call == WARM_UP_CALLS - 1 else work, noise.device)
        warm = time.perf_counter()
        shown = {id(parameter) for module in self._modules() for parameter in module.parameters()}
        if unseen := sum(
            id(parameter) not in shown for parameter in {id(p): p for p in reads.parameters}.values()
        ):
            raise ValueError(
                f"denoise reads {unseen} parameters of modules that it does not show: pass these to "
                "GraphedSampler as modules=, so that it notices weights that were replaced"
            )
        try:
            replay = self._graphs.capture(work, noise.device)
        except Exception as error:
            # Ending the capture fails too, and its error, which tells of the capture alone, would hide the cause.
            chain = _chain(error)
            cause = next((one for one in chain if "captur" not in str(one)), chain[-1])
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
            out_of_memory = isinstance(cause, torch.OutOfMemoryError)
            # What the failed capture allocated goes with its frames.
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
    """A capture that ran out of memory: both errors."""


@dataclass(frozen=True)
class _Room:
    num_steps: int
    num_registers: int


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and those in whose handling it was raised, back to the first."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return chain
