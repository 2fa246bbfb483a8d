"""The arguments of the network's calls: checks, and timesteps and steps as tensors.

Every refusal is a ValueError of one line that says what to pass.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .conditioning import Conditioning
from .config import UNetConfig
from .fields import shown

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BACKENDS = ("auto", "torch", "triton")


def check_backend(option: str, value: str) -> None:
    """Raises ValueError for the value of an option that is not one of `BACKENDS`."""
    if value not in BACKENDS:
        raise ValueError(f"unknown {option} {value!r}: choose one of {', '.join(BACKENDS)}")


def check_sample(config: UNetConfig, sample: Tensor) -> None:
    """sample: [B, Cin, H, W] with pixels."""
    fits = isinstance(sample, Tensor) and sample.ndim == 4 and sample.shape[1] == config.in_channels
    if not fits or 0 in sample.shape[2:]:
        raise ValueError(
            f"sample must be [B, {config.in_channels}, H, W], not empty in H or W; got {_shape(sample)}: "
            "pass latents, with what the UNet was trained to see beside them"
        )


def check_context(config: UNetConfig, context: Tensor) -> None:
    """context: [B, T, Dctx]."""
    if not isinstance(context, Tensor) or context.ndim != 3 or context.shape[-1] != config.context_dim:
        raise ValueError(
            f"context must be [B, T, {config.context_dim}]; got {_shape(context)}: "
            "pass the hidden states of the text encoder that the UNet was trained with"
        )


def check_constants(length: int, values: Tensor) -> None:
    """values: [length]."""
    if values.shape != (length,):
        raise ValueError(
            f"constants must be [{length}], those of this network; got {list(values.shape)}: "
            "make them with its constants()"
        )


class Added(NamedTuple):
    """What some networks take besides, as of `UNet.condition`; None for the others."""

    text_embeds: Tensor | None
    time_ids: Tensor | None
    class_labels: Sequence[int] | Tensor | None
    timestep_cond: Tensor | None


def check_added(config: UNetConfig, batch: int, given: Added) -> None:
    """given: what the added_dim, num_class_embeds and time_cond_proj_dim of the config ask for, and no more."""
    _check_pooled(config, batch, given.text_embeds, given.time_ids)
    if config.num_class_embeds is None and given.class_labels is not None:
        raise ValueError(
            f"this network has no classes; got class_labels {_shape(given.class_labels)}: leave them out"
        )
    if config.num_class_embeds is not None and given.class_labels is None:
        raise ValueError(
            f"class_labels must be [{batch}], integers from 0 to {config.num_class_embeds - 1}; got None: pass "
            "one per sample, for the x4 upscaler its noise level"
        )
    cond, width = given.timestep_cond, config.time_cond_proj_dim
    if width is None and cond is not None:
        raise ValueError(f"this network takes no timestep_cond; got {_shape(cond)}: leave it out")
    if cond is not None and (not isinstance(cond, Tensor) or cond.shape != (batch, width) or cond.is_complex()):
        raise ValueError(
            f"timestep_cond must be [{batch}, {width}]; got {_shape(cond)}: pass one embedded guidance scale per "
            "sample, or leave it out"
        )


def _check_pooled(config: UNetConfig, batch: int, text_embeds: Tensor | None, time_ids: Tensor | None) -> None:
    """text_embeds [B, P] and time_ids [B, N] where the config has `added_dim`, else None for both."""
    got = [_shape(given) for given in (text_embeds, time_ids)]
    if config.added_dim is None or config.added_time_dim is None:
        if text_embeds is not None or time_ids is not None:
            raise ValueError(
                f"this network adds nothing to its time embedding; got text_embeds {got[0]} and time_ids "
                f"{got[1]}: leave both out"
            )
    elif (
        not isinstance(text_embeds, Tensor)
        or not isinstance(time_ids, Tensor)
        or text_embeds.ndim != 2
        or time_ids.ndim != 2
        or not text_embeds.shape[0] == time_ids.shape[0] == batch
        or text_embeds.shape[1] + time_ids.shape[1] * config.added_time_dim != config.added_dim
    ):
        raise ValueError(
            f"text_embeds must be [{batch}, P] and time_ids [{batch}, N] with P + {config.added_time_dim} N = "
            f"{config.added_dim}; got {got[0]} and {got[1]}: pass the pooled text embedding, and sizes and "
            "crops of each image"
        )


def check_batch(conditioning: Conditioning, batch: int) -> None:
    """conditioning: of the sample's batch, or shifts of a batch of one."""
    if conditioning.shifts.shape[1] not in (1, batch) or any(
        packed.shape[1] != batch for packed in conditioning.context
    ):
        raise ValueError(
            f"the conditioning's batch is not the sample's {batch}: pass one context per sample, "
            "with guidance both halves"
        )


def on_device(device: torch.device, timesteps: float | Sequence[float] | Tensor) -> Tensor:
    """Timesteps in float32 on the device; the host does not wait for the device."""
    try:
        if isinstance(timesteps, int | float):
            return torch.full((1,), timesteps, dtype=torch.float32, device=device)
        if not isinstance(timesteps, Tensor):
            # Neither the default dtype nor the default device has a say.
            timesteps = torch.as_tensor(timesteps, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"timesteps must be numbers; got {shown(timesteps)}: pass a number, a sequence or a tensor of them"
        ) from error
    if timesteps.device.type != "cpu":
        return timesteps.to(device, torch.float32)
    # The copy is ours and pageable: CUDA reads it before the call returns, so that it may go.
    return timesteps.to(torch.float32, copy=True).to(device, non_blocking=True)


def labels_on_device(device: torch.device, classes: int, batch: int, labels: Sequence[int] | Tensor) -> Tensor:
    """Labels [B] int64 on the device; the host does not wait for the device, and so reads none that is there."""
    elsewhere = isinstance(labels, Tensor) and labels.device.type != "cpu"
    try:
        found = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = None
    if found is None or found.shape != (batch,) or found.dtype not in _INTEGERS:
        got = shown(labels) if found is None else f"{found.dtype} {list(found.shape)}"
        raise _wrong_labels(classes, batch, got)
    if elsewhere or torch.compiler.is_compiling():
        return found.to(device, torch.int64)
    if outside := [label for label in found.tolist() if not 0 <= label < classes]:
        raise _wrong_labels(classes, batch, shown(outside[0]))
    return found.to(torch.int64, copy=True).to(device, non_blocking=True)


def _wrong_labels(classes: int, batch: int, got: str) -> ValueError:
    return ValueError(
        f"class_labels must be [{batch}], integers from 0 to {classes - 1}; got {got}: pass one per sample"
    )


def in_rows(t: Tensor, batch: int) -> Tensor:
    """Timesteps [K] or [K, B] as [K, 1] or [K, B], one row per step."""
    if t.ndim < 2:
        t = t.reshape(-1, 1)
    if t.ndim != 2 or t.shape[1] not in (1, batch):
        raise ValueError(
            f"timesteps must be [K] or [K, {batch}] as the context's batch; got {list(t.shape)}: "
            "pass one row per step"
        )
    return t


def of_step(shifts: Tensor, step: int | Tensor) -> Tensor:
    """The row [B, S] of `shifts` [K, B, S] of a step."""
    steps = shifts.shape[0]
    if isinstance(step, Tensor) and (step.ndim or step.device == shifts.device):
        if step.numel() == 1 and step.dtype in (torch.int64, torch.int32):
            return shifts.index_select(0, step).squeeze(0)
    elif not isinstance(step, bool):
        try:
            number = operator.index(step)
        except TypeError:
            number = -1
        if 0 <= number < steps:
            return shifts[number]
    got = f"{step.dtype} {list(step.shape)}" if isinstance(step, Tensor) else shown(step)
    raise ValueError(
        f"step must be a whole number from 0 to {steps - 1}, or an int64 tensor [1] of it; got {got}: "
        "make a conditioning of as many timesteps as there are steps"
    )


def _shape(value: object) -> object:
    """A tensor's shape for an error message, or the type of another object."""
    if value is None:
        return None
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
