"""diffusers' UNet that a `PipelineUNet` has its weights from: whether ours computes the same, and what changed."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch import Tensor, nn

from ldmperf.samplers import Watch

from ..config import UNetConfig
from ..fields import UnsupportedConfig
from ..loading import allocate
from ..unet import UNet
from .merged_adapters import adapted_layers, write_weights
from .processed import KNOWN_PROCESSORS
from .stand_ins import HOSTS, runs_its_class

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FREEU = ("s1", "s2", "b1", "b2")


def reason_left(source: Any) -> str | None:
    """Why our UNet does not compute what this UNet of diffusers does; None where it does."""
    if type(source) is not UNet2DConditionModel:
        return f"a {type(source).__name__}, not UNet2DConditionModel"
    if source.encoder_hid_proj is not None:
        return "an IP-Adapter or another projection of the context (encoder_hid_proj)"
    try:
        config_of(source)
    except UnsupportedConfig as error:
        return str(error)
    if any(all(getattr(block, name, None) for name in _FREEU) for block in source.up_blocks):
        return "FreeU is enabled"
    processors = {type(p) for p in source.attn_processors.values()} - {*KNOWN_PROCESSORS, SlicedAttnProcessor}
    if processors:
        return f"attention by {', '.join(sorted(kind.__name__ for kind in processors))}"
    return weights_reason(source) or changed_module(source)


def weights_reason(source: nn.Module) -> str | None:
    """Why the weights of a model of diffusers cannot be copied; None where they can. Adapters do not count."""
    kinds = {(p.dtype, p.device) for name, p in source.named_parameters() if "lora_" not in name}
    if any(device.type == "meta" for _, device in kinds):
        return "its weights are offloaded: on the meta device until a hook brings them"
    if len(kinds) != 1 or not {dtype for dtype, _ in kinds} <= set(_FLOATS):
        shown = sorted({f"{str(dtype).removeprefix('torch.')} on {device}" for dtype, device in kinds})
        return f"its weights are {', '.join(shown)}"
    return None


def changed_module(source: nn.Module) -> str | None:
    """The first module whose call is not that of its class, or whose class nobody knows; None for none."""
    adapters = tuple(f"{path}." for path in adapted_layers(source))
    for path, module in source.named_modules():
        if f"{path}.".startswith(adapters):
            continue
        at = path or "the UNet"
        if type(module).__module__.partition(".")[0] not in ("torch", "diffusers") and type(module) not in HOSTS:
            return f"{at} is a {type(module).__module__.partition('.')[0]}.{type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{at} has forward hooks"
        if not runs_its_class(module):
            return f"{at} has a forward set on the instance, as offloading hooks do"
    return None


def config_of(source: Any) -> UNetConfig:
    """Our configuration of a UNet of diffusers. Raises UnsupportedConfig."""
    fields = {name: value for name, value in source.config.items() if not name.startswith("_")}
    return UNetConfig.from_diffusers(fields)


def unet_of(source: Any, backend: str) -> UNet:
    """Our UNet with the weights of diffusers', from memory: its dtype, device and mode.

    Raises ValueError, in one line, where ours does not compute the same.
    """
    if (reason := reason_left(source)) is not None:
        raise ValueError(f"this UNet stays diffusers': {reason}")
    parameter = next(source.parameters())
    with torch.inference_mode(False):
        with torch.device("meta"):
            unet = UNet(config_of(source), backend=backend)
        allocate(unet, parameter.dtype, parameter.device)
        write_weights(source, unet)
    return unet.train(source.training).requires_grad_(False)


class Followed:
    """diffusers' UNet as it was when its weights were last written into ours."""

    def __init__(self, source: Any, unet: UNet) -> None:
        self.source, self._unet = source, unet
        # Set where somebody was handed a method of the source, which may write in ways that nothing counts.
        self.is_touched = False
        self._scale = 1.0
        self._note()

    def _note(self) -> None:
        self._watch = Watch([self.source])
        # enable_lora_hotswap keeps scales in tensors.
        scalings = [getattr(layer, "scaling", {}) for layer in adapted_layers(self.source).values()]
        scales = (scale for scaling in scalings for scale in scaling.values())
        tensors = (*self.source.parameters(), *(scale for scale in scales if isinstance(scale, Tensor)))
        self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = list(map(_version, self._tensors))
        self._written = _versions(self._unet)
        self.is_touched = False

    def moved(self) -> None:
        """To be called where our weights were moved or cast, not written."""
        self._written = _versions(self._unet)

    def update(self, scale: float) -> bool:
        """Brings our weights up to the source's, with adapters at `scale`; whether they were written.

        Raises ValueError where ours does not compute the same any more, and where our weights were written since
        by someone else.
        """
        if scale != self._scale and not adapted_layers(self.source):
            scale = self._scale
        if scale == self._scale and not self.is_touched and not self._is_changed():
            return False
        if (reason := reason_left(self.source)) is not None:
            raise ValueError(
                f"PipelineUNet: diffusers' UNet has changed so that ours does not compute the same: {reason}; "
                "take that back, or call undo(pipe)"
            )
        if config_of(self.source) != self._unet.config:
            raise ValueError(
                "PipelineUNet: the configuration of diffusers' UNet has changed: undo(pipe) and rebuild(pipe)"
            )
        if _versions(self._unet) != self._written:
            raise ValueError(
                "PipelineUNet: weights of ours were written since they were copied, and those of diffusers' UNet "
                "have changed too: write into pipe.unet.source alone, or call undo(pipe) first"
            )
        if self._unet.time_projection.weight.is_cuda:
            # Replays on other streams may read the weights still.
            torch.cuda.synchronize(self._unet.time_projection.weight.device)
        write_weights(self.source, self._unet, scale)
        self._scale = scale
        self._note()
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "_unet": self._unet, "_scale": self._scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's memory is its own.
        self.__dict__ |= state
        self._note()
        self.is_touched = True

    def _is_changed(self) -> bool:
        # Below a millisecond for 700 modules, while the device is at work.
        return list(map(_version, self._tensors)) != self._versions or not self._watch.is_same([self.source])


_version = attrgetter("_version")


def _versions(network: nn.Module) -> list[int]:
    return [p._version for p in network.parameters() if not p.is_inference()]
