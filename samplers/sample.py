"""`sample`: run a plan with any network, and the noise it starts from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldmperf.kernels import philox_normal, sampler_update, seed_tensor

from .plan import SamplingPlan
from .step import Step

Denoiser = Callable[[Tensor, Step], Tensor]


def initial_noise(
    seeds: Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [B, *shape] from one seed per image; `shape` is that of one image, [C, H, W].

    Generated in float32 and cast to `dtype`. A seed gives the same noise on every device, alone or in any batch.
    Not scaled: `sample` multiplies by the plan's `init_noise_sigma`. Seeds are taken modulo 2^64.
    """
    return philox_normal(seed_tensor(seeds, device), tuple(shape)).to(dtype)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    plan: SamplingPlan,
    noise: Tensor,
    *,
    guidance_scale: float | Sequence[float] = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    callback: Callable[[Step, Tensor], None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The latents [B, ...] that `plan` makes of `noise` [B, ...], in noise's dtype and memory format.

    denoise         called as denoise(model_input, step) once per step; returns the network's output, of the same
                    shape, in any float dtype. model_input is c_in * x in noise's dtype, channels-last if 4-D, and
                    is overwritten by the next step. With guidance it is [2B, ...], unconditional half first.
    noise           standard normal, float32 or float64: the dtype that the sampler runs in. Left unchanged.
    guidance_scale  w in uncond + w (cond - uncond), or one w per step. 1.0 everywhere is no guidance: [B, ...].
    seeds           one per image, for the noise of a stochastic plan (generated in float32)
    step_noise      step_noise(k) returns the [B, ...] noise of step k instead; called for the steps that add any
    callback        called as callback(step, x) after each step, with a copy of the latents
    backend         of `ldmperf.kernels.sampler_update`: "auto", "torch" or "triton"

    The host never waits for the device. An exception of denoise or callback, KeyboardInterrupt among them, passes
    through and leaves no state behind. Raises ValueError for a dtype, shape or count that does not fit.
    """
    if noise.dtype not in (torch.float32, torch.float64) or noise.dim() < 2:
        raise ValueError(
            f"noise must be float32 or float64 [B, ...], not {noise.dtype} {list(noise.shape)}; sample() keeps "
            "its state in that dtype, whatever denoise computes in"
        )
    if plan.stochastic and seeds is None and step_noise is None:
        raise ValueError(f"plan {plan.name} adds noise at its steps: give seeds, one per image, or step_noise")
    device, dtype, batch = noise.device, noise.dtype, noise.shape[0]
    scales = _guidance_scales(guidance_scale, len(plan.steps))
    guidance = None if scales is None else torch.tensor(scales, dtype=dtype).to(device)
    copies = 1 if scales is None else 2
    keys = _keys(seeds, batch, device) if plan.stochastic and step_noise is None else None

    table = torch.tensor(plan.table, dtype=dtype).contiguous().to(device)
    c_in = torch.tensor(plan.input_scales, dtype=dtype)
    # Each update scales the input of the evaluation after it; the last one's input is never read.
    next_c_in = torch.cat([c_in[1:], torch.ones(1, dtype=dtype)]).to(device)
    rows = torch.arange(len(plan.steps), device=device)

    registers = _empty((plan.num_registers, batch), noise).zero_()
    registers[0] = noise * plan.init_noise_sigma
    model_input = _empty((copies * batch,), noise)
    for part in model_input.chunk(copies):
        part.copy_(registers[0] * plan.steps[0].c_in)

    for step in plan.steps:
        output = denoise(model_input, step)
        _check(f"denoise's output at step {step.index}", output, model_input)
        injected = None
        if step.adds_noise and step_noise is not None:
            injected = step_noise(step.index)
            _check(f"step_noise({step.index})", injected, noise)
        sampler_update(
            registers,
            output,
            table,
            rows[step.index : step.index + 1],
            guidance_scale=guidance,
            seeds=keys if step.adds_noise else None,
            noise=injected,
            model_input=model_input,
            input_scale=next_c_in,
            backend=backend,
        )
        if callback is not None:
            callback(step, registers[0].clone())
    return torch.empty_like(noise).copy_(registers[0])


def _guidance_scales(guidance_scale: float | Sequence[float], num_steps: int) -> list[float] | None:
    """One weight per step, or None when all are 1 and the unconditional half would be multiplied by zero."""
    if isinstance(guidance_scale, int | float):
        scales = [float(guidance_scale)] * num_steps
    else:
        scales = [float(scale) for scale in guidance_scale]
    if len(scales) != num_steps:
        raise ValueError(
            f"guidance_scale must be a number or {num_steps} numbers, one per step, not {len(scales)}"
        )
    return scales if any(scale != 1.0 for scale in scales) else None


def _keys(seeds: Sequence[int] | Tensor | None, batch: int, device: torch.device) -> Tensor:
    keys = seed_tensor([] if seeds is None else seeds, device)
    if keys.shape[0] != batch:
        raise ValueError(f"seeds must be one per image: {batch} images, {keys.shape[0]} seeds")
    return keys


def _empty(leading: tuple[int, ...], noise: Tensor) -> Tensor:
    """[*leading, *image] like `noise` [B, *image]; channels-last for images, the layout the network reads."""
    image = list(noise.shape[1:])
    if noise.dim() != 4:
        return noise.new_empty(*leading, *image)
    channels, height, width = image
    return noise.new_empty(*leading, height, width, channels).movedim(-1, -3)


def _check(name: str, tensor: object, like: Tensor) -> None:
    """ValueError unless `tensor` is a float tensor of the shape and on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {list(like.shape)}, not {type(tensor).__name__}")
    if tensor.shape != like.shape or tensor.device != like.device or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a float tensor {list(like.shape)} on {like.device}, not {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
