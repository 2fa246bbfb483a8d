"""`SamplerState`: the device memory of a run and the update of a step, for `sample` and for captured graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ldmperf.kernels import sampler_update, seed_tensor

from .plan import SamplingPlan
from .values import is_number, plain, shown, warn

# A number, one per step, or None for no guidance; numpy's and torch's numbers and arrays too.
Guidance = float | Sequence[float] | npt.NDArray[Any] | Tensor | None


class SamplerState:
    """Registers, table, scales, seeds and the next model input, for images like `noise` [B, ...].

    The state has room for `num_registers` and `num_steps`; what a smaller plan leaves zero changes no result.
    `load` copies a plan and its noise into this memory, where a captured step reads them.

    model_input  [B, ...], or [2B, ...] where `is_guided`, of `input_dtype`; channels-last for images
    injected     [B, ...] like noise, where `is_injected`: a step's noise from the caller, not generated
    """

    # A tensor made in inference mode can be neither written to nor used in autograd outside it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        noise: Tensor,
        input_dtype: torch.dtype,
        *,
        num_registers: int,
        num_steps: int,
        is_guided: bool,
        is_injected: bool = False,
    ) -> None:
        batch = noise.shape[0]
        self._copies = 2 if is_guided else 1
        self._registers = _empty((num_registers, batch), noise, noise.dtype)
        self._table = noise.new_zeros((num_steps, num_registers, num_registers + 2))
        self._next_c_in = noise.new_ones((num_steps,))
        self._guidance = noise.new_ones((num_steps,)) if is_guided else None
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=noise.device)
        self.model_input = _empty((self._copies * batch,), noise, input_dtype)
        self.injected = _empty((batch,), noise, noise.dtype).zero_() if is_injected else None

    @property
    def latents(self) -> Tensor:
        """[B, ...], overwritten by the next step."""
        return self._registers[0]

    def tensors(self) -> list[Tensor]:
        """The memory of this state."""
        held = (self._registers, self._table, self._next_c_in, self._seeds, self.model_input)
        return [*held, *(given for given in (self._guidance, self.injected) if given is not None)]

    def load(
        self,
        plan: SamplingPlan,
        noise: Tensor,
        scales: Sequence[float] | None,
        seeds: Sequence[int] | Tensor | None,
    ) -> None:
        """Starts a plan from `noise`; `scales` as from `guidance_scales`, None exactly where this is not guided.

        Raises ValueError for seeds that are not one integer per image; a plan that needs none ignores them.
        """
        dtype, device = noise.dtype, noise.device
        count, steps = plan.num_registers, len(plan.steps)
        if seeds is not None:
            keys = seed_tensor(seeds, device)
            if keys.shape != self._seeds.shape:
                raise ValueError(f"seeds must be one per image: {len(self._seeds)} images, {keys.shape[0]} seeds")
            self._seeds.copy_(keys)
        # Copies do not wait: the driver has read pageable memory when the call returns, up to 64 KB without a stop
        # (CUDA programming guide, "Concurrent Execution between Host and Device").
        # The columns of the output and the noise are the last, behind the registers that this plan does not use.
        table = torch.zeros((steps, *self._table.shape[1:]), dtype=dtype, device="cpu")
        exact = torch.tensor(plan.table, dtype=dtype, device="cpu")
        table[:, :count, :count] = exact[..., :count]
        table[:, :count, -2:] = exact[..., count:]
        self._table[:steps].copy_(table, non_blocking=True)
        next_c_in = torch.tensor(plan.next_input_scales, dtype=dtype, device="cpu")
        self._next_c_in[:steps].copy_(next_c_in, non_blocking=True)
        if self._guidance is not None and scales is not None:
            weights = torch.tensor(scales, dtype=dtype, device="cpu")
            self._guidance[:steps].copy_(weights, non_blocking=True)
        self._registers.zero_()
        self.latents.copy_(noise * plan.init_noise_sigma)
        scaled = self.latents * plan.steps[0].c_in
        for part in self.model_input.chunk(self._copies):
            part.copy_(scaled)

    def fill(self) -> None:
        """Zeros in place of a run's values, for the steps of a warm-up."""
        self._registers.zero_()
        self.model_input.zero_()

    def load_noise(self, noise: Tensor, *, at: int) -> None:
        """Copies the caller's noise of step `at` into `injected`."""
        check_fits(f"step_noise({at})", noise, self.latents)
        assert self.injected is not None
        self.injected.copy_(noise)

    def update(
        self,
        output: Tensor,
        step: Tensor,
        adds_noise: bool,
        injected: Tensor | None,
        backend: str,
        *,
        at: int | str,
    ) -> None:
        """Applies the table's row `step` [1] int64 to the network's output, with `injected` or generated noise.

        Raises ValueError for tensors that do not fit, naming the step as `at`.
        """
        check_fits(f"denoise's output at step {at}", output, self.model_input)
        if injected is not None:
            check_fits(f"step_noise({at})", injected, self.latents)
        sampler_update(
            self._registers,
            output,
            self._table,
            step,
            guidance_scale=self._guidance,
            seeds=self._seeds if adds_noise and injected is None else None,
            noise=injected,
            model_input=self.model_input,
            input_scale=self._next_c_in,
            backend=backend,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def snapshot(self) -> Tensor:
        """A copy of the latents."""
        return self.latents.clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def result(self, noise: Tensor) -> Tensor:
        """A copy of the latents in the memory format of `noise`."""
        return torch.empty_like(noise).copy_(self.latents)


def check_start(
    plan: SamplingPlan,
    noise: Tensor,
    seeds: Sequence[int] | Tensor | None,
    step_noise: Callable[[int], Tensor] | None,
) -> None:
    """ValueError unless there is a plan, noise of its form, and, for a stochastic plan, seeds or step noise."""
    if not isinstance(plan, SamplingPlan):
        raise ValueError(f"plan must be a SamplingPlan, not {shown(plan)}; make_plan makes one")
    if not isinstance(noise, Tensor):
        raise ValueError(f"noise must be a tensor [B, ...], not {shown(noise)}; initial_noise makes one")
    if noise.dtype not in (torch.float32, torch.float64) or noise.dim() < 2:
        raise ValueError(
            f"noise must be float32 or float64 [B, ...], not {noise.dtype} {list(noise.shape)}: the sampler's "
            "state is kept in that dtype; set input_dtype to the network's, if it is another"
        )
    if plan.stochastic and seeds is None and step_noise is None:
        raise ValueError(f"plan {plan.name} adds noise at its steps: give seeds, one per image, or step_noise")


def check_input_dtype(input_dtype: object) -> None:
    """ValueError unless it is a float dtype or None."""
    if input_dtype is not None and not (isinstance(input_dtype, torch.dtype) and input_dtype.is_floating_point):
        raise ValueError(f"input_dtype must be a float dtype such as torch.bfloat16, not {shown(input_dtype)}")


def guidance_scales(guidance_scale: Guidance, num_steps: int, dtype: torch.dtype) -> list[float] | None:
    """One weight w per step, or None where all are 1: 1 - w, the unconditional half's factor, is zero.

    Raises ValueError for a weight above the root of the largest number of `dtype`, the sampler's: a weight times
    the network's output must be finite. Warns of a single number below 1, which is no guidance in diffusers.
    """
    given = 1.0 if guidance_scale is None else plain(guidance_scale)
    scales = given if isinstance(given, tuple) else (given,) * num_steps
    largest = math.sqrt(torch.finfo(dtype).max)
    wrong = [scale for scale in scales if not is_number(scale) or not abs(scale) <= largest]
    if wrong or len(scales) != num_steps:
        raise ValueError(
            f"guidance_scale must be a number or {num_steps} numbers, one per step, or None for no guidance, not "
            f"{shown(wrong[0]) if wrong else f'{len(scales)} numbers'}; the largest in {dtype} is {largest:.1e}"
        )
    if not isinstance(given, tuple) and given < 1.0:
        warn(
            f"guidance_scale={given:g} is guidance here: 0 gives the unconditional image, below 1 the prompt is "
            "weaker. Give None for no guidance, which any number up to 1 is in diffusers, or a list of one "
            "number per step, which is taken without this warning"
        )
    return list(map(float, scales)) if any(scale != 1.0 for scale in scales) else None


def check_fits(name: str, tensor: object, like: Tensor) -> None:
    """ValueError unless `tensor` is a float tensor of the shape and on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {list(like.shape)}, not {type(tensor).__name__}")
    if tensor.shape != like.shape or tensor.device != like.device or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a float tensor {list(like.shape)} on {like.device}, not {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )


def _empty(leading: tuple[int, ...], noise: Tensor, dtype: torch.dtype) -> Tensor:
    """[*leading, *image] like `noise` [B, *image]; channels-last for images, the layout the network reads."""
    image = list(noise.shape[1:])
    if noise.dim() != 4:
        return noise.new_empty((*leading, *image), dtype=dtype)
    channels, height, width = image
    return noise.new_empty((*leading, height, width, channels), dtype=dtype).movedim(-1, -3)
