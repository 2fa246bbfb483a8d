"""What a node meets in ComfyUI, as a small stand-in, and a real ComfyUI behind the same handle.

The stand-in follows the behaviour, not the text, of ComfyUI at commits 05080f6 (attention), 08d0e51 (ModelPatcher)
and 0271a46 (ops) of November 2026, and of release 0.3.75: the override of the attention and its arguments; the
clone's own model_options and shared model; weight patches put in by key when a model is loaded, or added at every
call where the module stays offloaded; casts by comfy.ops; injections in and out around loading.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, CONTEXT, GROUPS, HEADS = 32, 16, 32, 4


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


# The stand-in. Its classes and functions say that they are of ComfyUI's modules, by which a node knows them.


def _of(module: str) -> Any:
    def mark(thing: Any) -> Any:
        thing.__module__ = module
        for value in vars(thing).values() if isinstance(thing, type) else ():
            if isinstance(value, types.FunctionType):
                value.__module__ = module
        return thing

    return mark


def cast_bias_weight(layer: Any, x: torch.Tensor, offloadable: bool = False) -> tuple[Any, ...]:
    """(weight, bias, stream) in the dtype of x, with what LoRA adds at every call."""
    found = []
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None:
            value = value.to(x.dtype)
            for function in getattr(layer, f"{name}_function"):
                value = function(value)
        found.append(value)
    return (*found, "stream") if offloadable else tuple(found)


def uncast_bias_weight(layer: Any, weight: Any, bias: Any, stream: Any) -> None:
    """Ends the use of what `cast_bias_weight` gave."""
    assert stream == "stream"


class _Layer:
    comfy_cast_weights = False
    weight_function: tuple[Any, ...] = ()
    bias_function: tuple[Any, ...] = ()


def _layer(base: type, operation: Any) -> type:
    def forward_comfy_cast_weights(self: Any, x: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = cast_bias_weight(self, x, offloadable=True)
        try:
            return operation(self, x, weight, bias)
        finally:
            uncast_bias_weight(self, weight, bias, stream)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            return self.forward_comfy_cast_weights(x)
        return base.forward(self, x)

    body = {"forward": forward, "forward_comfy_cast_weights": forward_comfy_cast_weights}
    return _of("comfy.ops")(type(base.__name__, (base, _Layer), body))


class _Ops:
    GroupNorm = _layer(nn.GroupNorm, lambda m, x, w, b: F.group_norm(x, m.num_groups, w, b, m.eps))
    LayerNorm = _layer(nn.LayerNorm, lambda m, x, w, b: F.layer_norm(x, m.normalized_shape, w, b, m.eps))
    Linear = _layer(nn.Linear, lambda m, x, w, b: F.linear(x, w, b))
    Conv2d = _layer(nn.Conv2d, lambda m, x, w, b: m._conv_forward(x, w, b))


_CastOps = type(
    "_CastOps",
    (),
    {
        name: _of("comfy.ops")(type(name, (getattr(_Ops, name),), {"comfy_cast_weights": True}))
        for name in ("GroupNorm", "LayerNorm", "Linear", "Conv2d")
    },
)


def wrap_attn(function: Any) -> Any:
    """The outermost attention of a call asks the override in transformer_options, which gets `function`."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> torch.Tensor:
        override = (named.get("transformer_options") or {}).get("optimized_attention_override")
        named.pop("preferred_attention", None)
        if named.get("_inside_attn_wrapper") or override is None:
            return function(*arguments, **named)
        return override(function, *arguments, **named, _inside_attn_wrapper=True)

    return wrapper


@wrap_attn
def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **named
):
    """torch's attention in ComfyUI's layouts."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    extra = {name: named[name] for name in ("scale", "enable_gqa") if name in named}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **extra)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class _CrossAttention(nn.Module):
    def __init__(self, width, context, operations, dtype):
        super().__init__()
        self.to_q = operations.Linear(width, width, bias=False, dtype=dtype)
        self.to_k = operations.Linear(context, width, bias=False, dtype=dtype)
        self.to_v = operations.Linear(context, width, bias=False, dtype=dtype)
        self.to_out = nn.Sequential(operations.Linear(width, width, dtype=dtype), nn.Dropout(0.0))

    def forward(self, x, context, options):
        out = attention_pytorch(
            *(self.to_q(x), self.to_k(context), self.to_v(context), HEADS),
            attn_precision=None,
            transformer_options=options,
        )
        return self.to_out(out)


@_of("comfy.ldm.modules.attention")
class GEGLU(nn.Module):
    """ComfyUI's gate: the first half times the GELU of the second."""

    def __init__(self, width, inner, operations, dtype):
        super().__init__()
        self.proj = operations.Linear(width, 2 * inner, dtype=dtype)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class _Transformer(nn.Module):
    def __init__(self, width, operations, dtype):
        super().__init__()
        self.norm = operations.GroupNorm(GROUPS, width, eps=1e-6, dtype=dtype)
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(width, dtype=dtype) for _ in range(3))
        self.attn1 = _CrossAttention(width, width, operations, dtype)
        self.attn2 = _CrossAttention(width, CONTEXT, operations, dtype)
        gate = GEGLU(width, 4 * width, operations, dtype)
        self.ff = nn.Sequential(gate, nn.Dropout(0.0), operations.Linear(4 * width, width, dtype=dtype))

    def forward(self, image, context, options):
        x = self.norm(image).flatten(2).transpose(1, 2)
        n = self.norm1(x)
        x = x + self.attn1(n, n, options)
        x = x + self.attn2(self.norm2(x), context, options)
        x = x + self.ff(self.norm3(x))
        return image + x.transpose(1, 2).unflatten(2, image.shape[2:])


class _ResBlock(nn.Module):
    def __init__(self, width, out, operations, dtype):
        super().__init__()
        conv = functools.partial(operations.Conv2d, kernel_size=3, padding=1, dtype=dtype)
        self.in_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, width, dtype=dtype), nn.SiLU(), conv(width, out)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(CHANNELS, out, dtype=dtype))
        norm = operations.GroupNorm(GROUPS, out, dtype=dtype)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Dropout(0.0), conv(out, out))
        self.skip_connection = nn.Identity() if width == out else operations.Conv2d(width, out, 1, dtype=dtype)

    def forward(self, x, embedding):
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class _UNet(nn.Module):
    def __init__(self, *, operations, dtype, **_):
        super().__init__()
        conv = functools.partial(operations.Conv2d, kernel_size=3, padding=1, dtype=dtype)
        self.time_embed = operations.Linear(1, CHANNELS, dtype=dtype)
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([conv(4, CHANNELS)]),
                nn.ModuleList(
                    [
                        _ResBlock(CHANNELS, CHANNELS, operations, dtype),
                        _Transformer(CHANNELS, operations, dtype),
                        _ResBlock(CHANNELS, 2 * CHANNELS, operations, dtype),
                    ]
                ),
            ]
        )
        self.out = nn.Sequential(
            operations.GroupNorm(GROUPS, 2 * CHANNELS, dtype=dtype), nn.SiLU(), conv(2 * CHANNELS, 4)
        )

    def forward(self, x, timesteps, context, transformer_options):
        embedding = self.time_embed(timesteps[:, None].to(x.dtype) / 1000)
        for layer in (layer for block in self.input_blocks for layer in block):
            if isinstance(layer, _ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, _Transformer):
                x = layer(x, context, transformer_options)
            else:
                x = layer(x)
        return self.out(x)


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
            if isinstance(layer, _Layer):
                layer.comfy_cast_weights = True
        self.inject_model()

    def unpatch_model(self, device_to=None):
        self.eject_model()
        for key, weight in self.backup.items():
            path, _, name = key.rpartition(".")
            setattr(self.model.get_submodule(path), name, weight)
        self.backup.clear()
        for layer in self.model.modules():
            if isinstance(layer, _Layer):
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
    return Host("stand-in", _Patcher, attention, _Ops, _CastOps, _UNet, _Manager()), modules


def real(folder: str) -> Host:
    """The ComfyUI of a checkout, on the CPU, in this process."""
    sys.path.insert(0, folder)
    if "torchvision" not in sys.modules:
        # Models that no UNet of SD's needs import it.
        for name in ("torchvision", "torchvision.transforms"):
            sys.modules[name] = types.ModuleType(name)
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
