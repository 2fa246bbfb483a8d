"""The operators as people write them in torch: the eager peer, and what torch.compile is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmperf.kernels import TransformerTailCall, channel_statistics, tail_statistics_tile

from ..step.call import GUIDANCE_SCALE, PLAN_ROW, sampling_plan

Function = Callable[..., Any]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str | None = "silu",
    statistics: Tensor | None = None,
    skip_statistics: Tensor | None = None,
) -> Tensor:
    """Statistics are for ours: torch computes its own."""
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    if x_bias is not None:
        x = x + x_bias[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Any:
    if x_bias is not None:
        x = x + x_bias
    if residual is not None:
        x = x + residual
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, x)


def geglu(x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        x = x + bias
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    x_bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    if x_bias is not None:
        x = x + x_bias
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    y = F.linear(x, weight, bias)
    return y if activation is None else geglu(y)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    upsample: bool = False,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: bool = False,
) -> Any:
    if weight.dim() == 5:
        # Packed: the four phases' channels, each in its place.
        height, width = x.shape[2:]
        every = F.conv2d(x, weight.flatten(0, 1), padding=1).unflatten(1, (4, -1))
        y = x.new_empty(x.shape[0], weight.shape[1], 2 * height, 2 * width)
        for p in range(4):
            of_phase = every[:, p, :, p // 2 : p // 2 + height, p % 2 : p % 2 + width]
            y[:, :, p // 2 :: 2, p % 2 :: 2] = of_phase if bias is None else of_phase + bias[:, None, None]
    else:
        if upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding=1)
    if shortcut is not None and shortcut_weight is not None:
        image = shortcut if skip is None else torch.cat([shortcut, skip], dim=1)
        y = y + F.conv2d(image, shortcut_weight[:, :, None, None])
    if residual is not None:
        y = y + residual
    y = y.contiguous(memory_format=torch.channels_last)
    if not statistics:
        return y
    tiles = y.float().flatten(2).split(64 if y[0, 0].numel() > 256 else 16, dim=2)
    moments = [torch.stack([t.mean(2), t.var(2, unbiased=False) * t.shape[2]], dim=1) for t in tiles]
    return y, torch.stack(moments, dim=1)


def residual_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
    statistics: bool = False,
) -> Any:
    total = x + residual
    if bias is not None:
        total = total + bias[:, None, None]
    if statistics:
        return total, channel_statistics(total, 64)
    return total if size is None else F.interpolate(total, size=size, mode="nearest")


def transformer_front(
    image: Tensor,
    num_groups: int,
    group_weight: Tensor,
    group_bias: Tensor,
    proj_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    group_eps: float = 1e-6,
    norm_eps: float = 1e-5,
    *,
    statistics: Tensor | None = None,
    proj_bias: Tensor | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`statistics` are for ours."""
    if x_bias is not None:
        image = image + x_bias[:, None, None]
    h = F.group_norm(image, num_groups, group_weight, group_bias, group_eps)
    x = F.linear(h.permute(0, 2, 3, 1).flatten(1, 2), proj_weight, proj_bias)
    return x, F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps), qkv_weight)


def transformer_tail(
    attended: Tensor,
    x: Tensor,
    image: Tensor,
    context: Tensor,
    out_weight: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    q_weight: Tensor,
    cross_weight: Tensor,
    norm3_weight: Tensor,
    norm3_bias: Tensor,
    ff_in_weight: Tensor,
    ff_out_weight: Tensor,
    proj_weight: Tensor,
    eps: float = 1e-5,
    *,
    out_bias: Tensor | None = None,
    cross_bias: Tensor | None = None,
    ff_in_bias: Tensor | None = None,
    ff_out_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    statistics: bool = False,
) -> Any:
    batch, tokens, channels = x.shape
    x = x + F.linear(attended, out_weight, out_bias)
    q = F.linear(F.layer_norm(x, (channels,), norm2_weight, norm2_bias, eps), q_weight)
    k, v = context.unbind(2)
    h = attention(q.view(batch, tokens, *k.shape[2:]), k, v).reshape(x.shape)
    x = x + F.linear(h, cross_weight, cross_bias)
    h = F.linear(F.layer_norm(x, (channels,), norm3_weight, norm3_bias, eps), ff_in_weight, ff_in_bias)
    x = x + F.linear(geglu(h), ff_out_weight, ff_out_bias)
    h = F.linear(x, proj_weight, proj_bias)
    y = image + h.view(batch, *image.shape[2:], channels).permute(0, 3, 1, 2)
    if not statistics:
        return y
    # In tiles of as many pixels as ours has.
    call = TransformerTailCall(
        *(attended, x, image, context, out_weight, norm2_weight, norm2_bias, q_weight, cross_weight),
        *(norm3_weight, norm3_bias, ff_in_weight, ff_out_weight, proj_weight),
        statistics=True,
    )
    tiles = y.float().flatten(2).split(tail_statistics_tile(call), dim=2)
    moments = [torch.stack([t.mean(2), t.var(2, unbiased=False) * t.shape[2]], dim=1) for t in tiles]
    return y, torch.stack(moments, dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, tf32: bool = False) -> Tensor:
    """torch's own choice among its backends; `tf32` is for ours."""
    q, k, v = (tokens.transpose(1, 2) for tokens in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


# By operator; sampler_update depends on the plan: see `STEPS`.
PLAIN: Mapping[str, Function] = {
    "group_norm_silu": group_norm_silu,
    "layer_norm": layer_norm,
    "linear": linear,
    "conv3x3": conv3x3,
    "geglu": geglu,
    "residual_add": residual_add,
    "attention": attention,
    "transformer_front": transformer_front,
    "transformer_tail": transformer_tail,
}


def ddim_step() -> Function:
    """The formulas of diffusers' DDIMScheduler.step, its coefficients host numbers, between guidance and input."""
    plan = sampling_plan("ddim")
    level, level_next = (plan.schedule.level(int(plan.timesteps[row])) for row in (PLAN_ROW, PLAN_ROW + 1))
    alpha, sigma = math.sqrt(level), math.sqrt(1 - level)
    alpha_next, sigma_next = math.sqrt(level_next), math.sqrt(1 - level_next)

    def step(latents: Tensor, model_output: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor]:
        eps = guided(model_output, latents)
        x0 = (latents - sigma * eps) / alpha
        return with_input(alpha_next * x0 + sigma_next * eps, model_output)

    return step


def dpmpp_2m_step() -> Function:
    """The formulas of diffusers' DPMSolverMultistepScheduler.step, second order, in the same way."""
    plan = sampling_plan("dpmpp_2m")
    levels = [plan.schedule.level(int(plan.timesteps[row])) for row in range(PLAN_ROW - 1, PLAN_ROW + 2)]
    alphas, sigmas = [math.sqrt(a) for a in levels], [math.sqrt(1 - a) for a in levels]
    before, now, after = (math.log(a / s) for a, s in zip(alphas, sigmas, strict=True))
    h, h_0 = after - now, now - before
    first = -alphas[2] * math.expm1(-h)

    def step(latents: Tensor, model_output: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        eps = guided(model_output, latents)
        x0 = (latents - sigmas[1] * eps) / alphas[1]
        slope = (x0 - history) * (h / h_0)
        new = sigmas[2] / sigmas[1] * latents.float() + first * x0 + 0.5 * first * slope
        return with_input(new.to(latents.dtype), model_output)

    return step


def guided(model_output: Tensor, latents: Tensor) -> Tensor:
    """The guidance combine, where the output has two halves for each image."""
    if model_output.shape[0] == latents.shape[0]:
        return model_output
    uncond, cond = model_output.chunk(2)
    return uncond + GUIDANCE_SCALE * (cond - uncond)


def with_input(latents: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """The new latents, and the next model input: doubled for guidance, in the network's dtype."""
    doubled = model_output.shape[0] != latents.shape[0]
    model_input = torch.cat([latents] * 2) if doubled else latents
    return latents, model_input.to(model_output.dtype)


STEPS: Mapping[str, Callable[[], Function]] = {"ddim": ddim_step, "dpmpp_2m": dpmpp_2m_step}
