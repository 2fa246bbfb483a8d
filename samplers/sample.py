"""`sample`, which runs a plan with any network, and `initial_noise`, from which a run starts."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldmperf.kernels import philox_normal, seed_tensor

from .plan import SamplingPlan
from .state import Guidance, SamplerState, check_input_dtype, check_start, guidance_scales
from .step import Step
from .values import plain, shown

Denoiser = Callable[[Tensor, Step], Tensor]


# A tensor made in inference mode can be neither written to nor used in autograd outside it.
@torch.inference_mode(False)
@torch.no_grad()
def initial_noise(
    seeds: Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [B, *shape] from one seed per image; `shape` is that of one image, [C, H, W].

    Generated in float32 and cast to `dtype`. A seed gives the same noise on every device, alone or in any batch.
    Not scaled: `sample` multiplies by the plan's `init_noise_sigma`. Seeds are integers of Python, numpy or torch,
    modulo 2^64. Raises ValueError for other seeds, for a shape with other values than sizes, and for a dtype that
    is not a float dtype.
    """
    sizes = plain(shape)
    counts = isinstance(sizes, tuple) and all(type(size) is int and 0 <= size < 2**63 for size in sizes)
    if not counts or math.prod(sizes) >= 2**63:
        raise ValueError(f"shape must be that of one image, such as (4, 64, 64), not {shown(shape)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a float dtype such as torch.float32, not {shown(dtype)}")
    return philox_normal(seed_tensor(seeds, device), sizes).to(dtype)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    plan: SamplingPlan,
    noise: Tensor,
    *,
    guidance_scale: Guidance = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    callback: Callable[[Step, Tensor], None] | None = None,
    input_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The latents [B, ...] that `plan` makes of `noise` [B, ...], in noise's dtype and memory format.

    denoise         called as denoise(model_input, step) once per step; returns the network's output, of the same
                    shape, in any float dtype. model_input is c_in * x in input_dtype, channels-last if 4-D; the
                    next step overwrites it. With guidance model_input is [2B, ...], unconditional half first.
    noise           standard normal, float32 or float64: the dtype that the sampler runs in. Left unchanged.
    guidance_scale  w in uncond + w (cond - uncond), or one w per step; of Python, numpy or torch. Without guidance
                    (None, or 1.0 at every step) model_input is [B, ...]. 0.0 gives the unconditional image; in
                    diffusers it switches guidance off, so a single number below 1 warns.
    seeds           one integer per image, for the noise of a stochastic plan (generated in float32)
    step_noise      step_noise(k) returns the [B, ...] noise of step k instead; called for the steps that add any
    callback        called as callback(step, x) after each step, with a copy of the latents
    input_dtype     of model_input: the network's float dtype, so that it need not cast; noise's unless given
    backend         of `ldmperf.kernels.sampler_update`: "auto", "torch" or "triton"

    The host does not wait for the device, with two exceptions: a guidance_scale on the device is read, and the
    driver may wait while it copies a plan above 64 KB (some hundreds of steps). denoise and callback run without
    gradients, otherwise in the caller's modes. The result is an ordinary tensor, in inference mode too. Exceptions
    of denoise and callback, KeyboardInterrupt included, reach the caller; the next run starts afresh.

    Raises ValueError for a dtype, shape or count that does not fit, whether the plan uses the argument or not, and
    for a weight so large that the latents would not be finite.
    """
    check_start(plan, noise, seeds, step_noise)
    check_input_dtype(input_dtype)
    scales = guidance_scales(guidance_scale, len(plan.steps), noise.dtype)
    state = SamplerState(
        noise,
        input_dtype or noise.dtype,
        num_registers=plan.num_registers,
        num_steps=len(plan.steps),
        is_guided=scales is not None,
    )
    state.load(plan, noise, scales, seeds)
    # Each number (int64) twice, so that a view starts every 16 bytes: Triton compiles a kernel anew for a pointer
    # that is not divisible by 16.
    numbers = (torch.arange(2 * len(plan.steps), device=noise.device) // 2).view(-1, 2)[:, :1].unbind()
    for step, number in zip(plan.steps, numbers, strict=True):
        output = denoise(state.model_input, step)
        injected = None
        if step.adds_noise and step_noise is not None:
            injected = step_noise(step.index)
        state.update(output, number, step.adds_noise, injected, backend, at=step.index)
        if callback is not None:
            callback(step, state.snapshot())
    return state.result(noise)
