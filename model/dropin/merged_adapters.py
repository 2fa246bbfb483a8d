"""The weights that a diffusers UNet computes with: its own, with the active adapters of peft merged into them.

    W + sum of scaling B A over the active adapters        (LoRA; others as their layers merge)

An adapter's layer is copied, merged and read, one at a time: the layer itself is never written.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ldmperf.model import UNet, diffusers_state_dict

# As peft's BaseTunerLayer has them; peft is imported only where somebody loads an adapter.
_OF_A_TUNER = ("base_layer", "active_adapters", "merged", "disable_adapters", "get_base_layer")


def is_adapted(module: nn.Module) -> bool:
    """Whether the module is a layer with adapters of peft."""
    return type(module).__module__.startswith("peft.") and all(hasattr(module, name) for name in _OF_A_TUNER)


def adapted_layers(network: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by path."""
    return {path: module for path, module in network.named_modules() if is_adapted(module)}


def write_weights(source: nn.Module, unet: UNet, scale: float = 1.0) -> None:
    """Writes the weights that diffusers' `source` computes with into `unet`, in place.

    scale multiplies all adapters that are not fused, as `cross_attention_kwargs={"scale": ...}` does. Captured
    graphs read the new values. Where the two differ in dtype or device, the values are merged in the source's.
    """
    layers = adapted_layers(source)
    parameters = dict(source.named_parameters())
    effective: dict[str, nn.Module] = {}
    with torch.no_grad():
        for key, target in diffusers_state_dict(unet).items():
            path, _, name = key.rpartition(".")
            if path not in layers:
                target.copy_(parameters[key])
                continue
            # The weight of a layer comes next to its bias: one copy at a time is alive.
            if path not in effective:
                effective = {path: _merged(layers[path], scale)}
            target.copy_(_parameter(effective[path], name))


def _parameter(module: Any, name: str) -> Tensor:
    parameter: Tensor = getattr(module, name)
    return parameter


def _merged(layer: Any, scale: float) -> nn.Module:
    """A layer without adapters that computes what `layer` does; the layer's own or a copy."""
    if layer.disable_adapters:
        if not layer.merged:
            return _plain(layer)
        layer = copy.deepcopy(layer)
        layer.unmerge()
        return _plain(layer)
    if layer.merged:
        return _plain(layer)
    layer = copy.deepcopy(layer)
    if next(layer.parameters()).dtype in (torch.float16, torch.bfloat16):
        # Rounded once, at the end.
        layer = layer.float()
    if scale != 1:
        layer.scale_layer(scale)
    layer.merge()
    return _plain(layer)


def _plain(layer: Any) -> nn.Module:
    module: nn.Module = layer.get_base_layer()
    return module
