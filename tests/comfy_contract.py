"""What a node meets in ComfyUI, as a small stand-in, and a real ComfyUI behind the same handle.

The stand-in follows the behaviour, not the text, of ComfyUI at commits 05080f6 (attention), 08d0e51 (ModelPatcher)
and 0271a46 (ops) of November 2026, and of release 0.3.75: the override of the attention and its arguments; the
clone's own model_options and shared model; weight patches put in by key when a model is loaded, or added at every
call where the module stays offloaded; casts by comfy.ops; injections in and out around loading.
"""

from __future__ import annotations

import copy
import functools
import importlib.machinery
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
from comfy_layers import (
    CHANNELS,
    CONTEXT,
    GEGLU,
    HEADS,
    CastOps,
    Layer,
    Ops,
    UNet,
    attention_pytorch,
    cast_bias_weight,
    uncast_bias_weight,
)
from torch import nn


@dataclass(frozen=True)
class Host:
    """A ComfyUI.

    attention      its module comfy.ldm.modules.attention
    ops, cast_ops  layers that take weights as they are, and that cast them to the dtype of their input
    manager        loads a patcher in place of the clone that is loaded, and unloads
    """

    version: str
    patcher_class: Any
    attention: Any
    ops: Any
    cast_ops: Any
    unet_class: Any
    manager: Any

    def patcher(self, *, cast: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        """A MODEL around a tiny UNet of SD1.x's kind with random weights."""
        torch.manual_seed(0)
        unet = self.unet_class(
            image_size=8,
            in_channels=4,
            out_channels=4,
            model_channels=CHANNELS,
            num_res_blocks=1,
            channel_mult=(1, 2),
            num_heads=HEADS,
            use_spatial_transformer=True,
            transformer_depth=[1, 0],
            transformer_depth_output=[1, 0, 0, 0],
            transformer_depth_middle=1,
            context_dim=CONTEXT,
            dtype=dtype,
            operations=self.cast_ops if cast else self.ops,
        )
        with torch.no_grad():
            for name, weight in unet.named_parameters():
                one = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
                weight.copy_(one + 0.2 * torch.randn(weight.shape))
        model = nn.Module()
        model.diffusion_model = unet.eval().requires_grad_(False)
        device = torch.device("cpu")
        return self.patcher_class(model, device, device)


def call(patcher: Any, x: torch.Tensor, context: torch.Tensor, **options: Any) -> torch.Tensor:
    """The UNet's prediction under the options of a loaded patcher, as a sampler asks for it."""
    transformer_options = copy.copy(patcher.model_options["transformer_options"]) | options
    timesteps = torch.full((len(x),), 500)
    with torch.inference_mode():
        return patcher.model.diffusion_model(
            x, timesteps=timesteps, context=context, transformer_options=transformer_options
        )


class _Injection:
    def __init__(self, inject, eject):
        self.inject, self.eject = inject, eject


class _Patcher:
    """A MODEL. Clones share the model and the backup of what was patched in it."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches, self.backup, self.injections = {}, {}, {}
        self.object_patches, self.object_patches_backup = {}, {}
        self.model_options = {"transformer_options": {}}
        self.is_injected = False

    def clone(self):
        other = type(self)(self.model, self.load_device, self.offload_device)
        other.patches = {key: list(value) for key, value in self.patches.items()}
        other.injections = {key: list(value) for key, value in self.injections.items()}
        other.model_options = copy.deepcopy(self.model_options)
        other.backup, other.is_injected = self.backup, self.is_injected
        other.object_patches = dict(self.object_patches)
        other.object_patches_backup = self.object_patches_backup
        return other

    def add_patches(self, patches, strength=1.0):
        for key, (kind, (difference,)) in patches.items():
            assert kind == "diff"
            assert key in self.model.state_dict()
            self.patches.setdefault(key, []).append((strength, difference))

    def add_object_patch(self, path, thing):
        self.object_patches[path] = thing

    def _exchange(self, path, thing):
        where, _, name = path.rpartition(".")
        owner = self.model.get_submodule(where)
        before = getattr(owner, name)
        setattr(owner, name, thing)
        return before

    def set_injections(self, key, injections):
        self.injections[key] = injections

    def remove_injections(self, key):
        self.injections.pop(key, None)

    def eject_model(self):
        if self.is_injected:
            for injection in (one for many in self.injections.values() for one in many):
                injection.eject(self)
            self.is_injected = False

    def inject_model(self):
        for injection in (one for many in self.injections.values() for one in many if not self.is_injected):
            injection.inject(self)
        self.is_injected = bool(self.injections)

    def _patched(self, key, weight):
        for strength, difference in self.patches[key]:
            weight = weight + strength * difference.to(weight.dtype)
        return weight

    def patch_model(self, device_to=None, lowvram_model_memory=0):
        self.eject_model()
        for path, thing in self.object_patches.items():
            self.object_patches_backup.setdefault(path, self._exchange(path, thing))
        for key in self.patches:
            path, _, name = key.rpartition(".")
            layer = self.model.get_submodule(path)
            if lowvram_model_memory:
                setattr(layer, f"{name}_function", [functools.partial(self._patched, key)])
            elif key not in self.backup:
                self.backup[key] = getattr(layer, name)
                setattr(layer, name, nn.Parameter(self._patched(key, self.backup[key]), requires_grad=False))
        for layer in self.model.modules() if lowvram_model_memory else ():
            if isinstance(layer, Layer):
                layer.comfy_cast_weights = True
        self.inject_model()

    def unpatch_model(self, device_to=None):
        self.eject_model()
        for key, weight in self.backup.items():
            path, _, name = key.rpartition(".")
            setattr(self.model.get_submodule(path), name, weight)
        self.backup.clear()
        for layer in self.model.modules():
            if isinstance(layer, Layer):
                for name in ("comfy_cast_weights", "weight_function", "bias_function"):
                    vars(layer).pop(name, None)
        for path, thing in self.object_patches_backup.items():
            self._exchange(path, thing)
        self.object_patches_backup.clear()


class _Manager:
    """One clone of a model is loaded at a time."""

    loaded = None

    def load(self, patcher, offload=False):
        if self.loaded is not None and self.loaded.model is patcher.model:
            self.unload()
        patcher.patch_model(patcher.load_device, lowvram_model_memory=int(offload))
        self.loaded = patcher

    def unload(self):
        self.loaded.unpatch_model(self.loaded.offload_device)
        self.loaded = None


class _RealManager:
    """comfy.model_management."""

    def __init__(self, management):
        self.management, self.offloaded = management, None

    def load(self, patcher, offload=False):
        # No manager offloads on a CPU: by hand.
        self.offloaded = patcher if offload else None
        if offload:
            self.management.unload_all_models()
            patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
        else:
            self.management.load_models_gpu([patcher])

    def unload(self):
        if self.offloaded is not None:
            self.offloaded.detach()
        self.management.unload_all_models()


def stand_in() -> tuple[Host, dict[str, types.ModuleType]]:
    """The stand-in, and the modules that a node may import, to be put into sys.modules."""
    names = ("comfy", "comfy.ops", "comfy.patcher_extension")
    modules = {name: types.ModuleType(name) for name in names}
    modules["comfy"].ops = modules["comfy.ops"]
    modules["comfy.ops"].cast_bias_weight = cast_bias_weight
    modules["comfy.ops"].uncast_bias_weight = uncast_bias_weight
    modules["comfy.patcher_extension"].PatcherInjection = _Injection
    attention = types.SimpleNamespace(attention_pytorch=attention_pytorch, GEGLU=GEGLU)
    return Host("stand-in", _Patcher, attention, Ops, CastOps, UNet, _Manager()), modules


def real(folder: str) -> Host:
    """The ComfyUI of a checkout, on the CPU, in this process."""
    sys.path.insert(0, folder)
    if "torchvision" not in sys.modules:
        # Models that no UNet of SD's needs import it.
        for name in ("torchvision", "torchvision.transforms"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    from comfy.cli_args import args

    args.cpu = True
    import comfyui_version
    from comfy import model_management, ops
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.model_patcher import ModelPatcher

    return Host(
        comfyui_version.__version__,
        ModelPatcher,
        attention,
        ops.disable_weight_init,
        ops.manual_cast,
        UNetModel,
        _RealManager(model_management),
    )
