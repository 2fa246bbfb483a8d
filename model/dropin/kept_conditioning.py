"""A run's conditioning: computed once, kept for as long as nothing that it was computed from has changed.

Compared without waiting for the device: the very tensors, which are held so that no other takes their identity,
and torch's counters of writes. A tensor made in inference mode has no counter, so what comes of it is computed
anew each time. Writes through `.data` or by a kernel that torch does not know are seen by no counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmperf.model import Conditioning, UNet

# A run of more steps, or a timestep from some larger tensor, is conditioned step by step.
MAX_STEPS = 1024


class Inputs:
    """Tensors, and values beside them, as they are now."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._versions = _versions(self._values)

    def are(self, values: Mapping[str, Any]) -> bool:
        """Whether `values` are the very same, and no tensor was written since."""
        return (
            self._versions is not None
            and values.keys() == self._values.keys()
            and all(_is_same(value, self._values[name]) for name, value in values.items())
            and _versions(self._values) == self._versions
        )


def _is_same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return False
    return type(value) is type(other) and bool(value == other)


def _versions(values: Mapping[str, Any]) -> list[int] | None:
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    return None if any(map(Tensor.is_inference, tensors)) else [tensor._version for tensor in tensors]


@dataclass
class _Kept:
    inputs: Inputs
    conditioning: Conditioning


def place(timestep: Any) -> tuple[Any, int]:
    """The timesteps to condition for, and which of them this one is.

    diffusers' loops pass elements of `scheduler.timesteps`: views [] of a tensor [K], whose number is their offset
    in its memory. Any other timestep stands alone.
    """
    base = timestep._base if isinstance(timestep, Tensor) and timestep.ndim == 0 else None
    if base is None or base.ndim != 1 or not 0 < base.numel() <= MAX_STEPS or base.dtype != timestep.dtype:
        return timestep, 0
    step, rest = divmod(timestep.storage_offset() - base.storage_offset(), base.stride(0) or 1)
    return (base, step) if rest == 0 and 0 <= step < base.numel() else (timestep, 0)


class KeptConditioning:
    """The conditioning of the last call, for the calls after it."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def find(self, values: Mapping[str, Any]) -> Conditioning | None:
        """The kept conditioning, where it was made of these very values and of the weights as they are."""
        if self._kept is None or not self._kept.inputs.are(values):
            return None
        try:
            self._kept.conditioning.check()
        except ValueError:
            return None
        return self._kept.conditioning

    def make(self, unet: UNet, values: Mapping[str, Any]) -> Conditioning:
        """Computes the conditioning of `values` and keeps it.

        timesteps: [K], a number, or one per sample [B]; context, text_embeds, time_ids, class_labels as of
        `UNet.condition`; the others are compared only.
        """
        inputs = Inputs(values)
        timesteps, context = values["timesteps"], values["context"]
        given = {name: values[name] for name in ("text_embeds", "time_ids", "class_labels") if name in values}
        if isinstance(timesteps, Tensor) and values["is_alone"]:
            timesteps = timesteps.reshape(1, -1)
        self._kept = None
        with torch.inference_mode(False), torch.no_grad():
            conditioning = unet.condition(timesteps, context, **given)
        # Weights made in inference mode have no counter either.
        if not any(map(Tensor.is_inference, unet.parameters())):
            self._kept = _Kept(inputs, conditioning)
        return conditioning
