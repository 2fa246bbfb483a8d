"""One denoising step, recorded: ours, and diffusers' in eager mode (guided, of one image)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldmperf.model import AUTO, Choices, UNet, UNetConfig
from ldmperf.samplers import NoiseSchedule, Step, make_plan, sample

from ..peer import SCHEDULER_CONFIG, diffusers_scheduler, diffusers_unet
from .call import GUIDANCE_SCALE
from .meta_inputs import added_on_meta
from .recording import RecordedCall, Recorder

SAMPLER = "ddim"


@torch.no_grad()
def our_step(
    config: UNetConfig,
    dtype: torch.dtype,
    latents: int | tuple[int, int] = 64,
    tokens: int = 77,
    *,
    batch: int = 1,
    is_guided: bool = True,
    choices: Choices = AUTO,
) -> tuple[RecordedCall, ...]:
    """`UNet.denoise`, and the update by `sample` that makes the next model input.

    `latents`: height and width, or the side of a square. `batch` counts images, each of which is two of the
    network's samples with guidance. `choices`: what is merged. Operators of ours are recorded whole. Channels that
    the network reads beyond those it returns (super-resolution, inpainting) are concatenated at each step.
    """
    height, width = (latents, latents) if isinstance(latents, int) else latents
    beside = config.in_channels - config.out_channels
    if beside < 0:
        raise NotImplementedError(
            f"a network from {config.in_channels} to {config.out_channels} channels has no step here: it returns "
            "more than it reads"
        )
    plan = make_plan(SAMPLER, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), 2)
    samples = 2 * batch if is_guided else batch
    with torch.device("meta"):
        unet = UNet(config, **choices._asdict()).to(dtype)
        context = torch.empty(samples, tokens, config.context_dim, dtype=dtype)
        timesteps = [step.timestep for step in plan.steps]
        conditioning = unet.condition(timesteps, context, **added_on_meta(config, samples))
        noise = torch.empty(batch, config.out_channels, height, width)
        image = torch.empty(samples, beside, height, width, dtype=dtype)
        image = image.to(memory_format=torch.channels_last)
    recorder = Recorder()
    starts: list[int] = []

    def denoise(model_input: Tensor, step: Step) -> Tensor:
        starts.append(len(recorder.calls))
        if beside:
            model_input = torch.cat([model_input, image], dim=1)
        with recorder.network():
            return unet.denoise(model_input, conditioning, step.index)

    with recorder:
        scale = GUIDANCE_SCALE if is_guided else 1.0
        sample(denoise, plan, noise, guidance_scale=scale, input_dtype=dtype, backend="torch")
    return tuple(recorder.calls[starts[0] : starts[1]])


@torch.no_grad()
def diffusers_step(
    config: UNetConfig, dtype: torch.dtype, latents: int = 64, tokens: int = 77
) -> tuple[RecordedCall, ...]:
    """A step as in the loop of diffusers' pipeline, with channels-last weights.

    The second step is recorded, as the first one's latents may have another layout. Raises `Unsupported` without
    diffusers.
    """
    unet = diffusers_network(config, dtype)
    scheduler = diffusers_scheduler(SAMPLER)
    scheduler.set_timesteps(50, device="meta")
    timestep = scheduler.timesteps[1]
    context = torch.empty(2, tokens, config.context_dim, dtype=dtype, device="meta")
    x = torch.empty(1, config.in_channels, latents, latents, dtype=dtype, device="meta")
    for recorder in (Recorder(), Recorder()):
        with recorder, FusedAttention():
            model_input = scheduler.scale_model_input(torch.cat([x] * 2), timestep)
            with recorder.network():
                output = unet(model_input, timestep, encoder_hidden_states=context, return_dict=False)[0]
            uncond, cond = output.chunk(2)
            output = uncond + GUIDANCE_SCALE * (cond - uncond)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return tuple(recorder.calls)


def diffusers_network(config: UNetConfig, dtype: torch.dtype) -> Any:
    """diffusers' network on the meta device, its weights channels-last. Raises `Unsupported` without diffusers."""
    with torch.device("meta"):
        unet = diffusers_unet(UNet(config, backend="torch").to(dtype))
    # Of 1x1 weights too, whose shape alone does not tell cuDNN the layout.
    return unet.to(memory_format=torch.channels_last)


@torch.no_grad()
def record_evaluation(recorder: Recorder, unet: Any, config: UNetConfig, latents: int, tokens: int = 77) -> None:
    """A guided evaluation of a network by `diffusers_network`, of one image and without the sampler."""
    added = added_on_meta(config, 2, unet.dtype)
    own = {name: added.pop(name, None) for name in ("class_labels", "timestep_cond")}
    x = torch.empty(2, config.in_channels, latents, latents, dtype=unet.dtype, device="meta")
    context = torch.empty(2, tokens, config.context_dim, dtype=unet.dtype, device="meta")
    timestep = torch.empty((), dtype=torch.int64, device="meta")
    with recorder, FusedAttention(), recorder.network():
        unet(x, timestep, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False, **own)


class FusedAttention(TorchFunctionMode):
    """torch's attention as the one operator that it is on a GPU; on meta it would fall apart into matmuls."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _flash(*args, **kwargs)
        return func(*args, **kwargs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    if attn_mask is not None or dropout_p or query.shape[-1] % 8:
        raise NotImplementedError(
            "attention with a mask, dropout or a head dimension that is no multiple of 8 (torch pads it with "
            f"further launches) is not in the inventory; got head dimension {query.shape[-1]}"
        )
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = operator(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return out
