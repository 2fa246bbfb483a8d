"""What `accelerate` can take over in a model, what it cannot, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import AutoencoderKL, Transformer2DModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ldmperf.kernels import layers

from . import stand_ins
from .stand_ins import runs_its_class, wraps_its_class

MODELS = (UNet2DConditionModel, AutoencoderKL)
_WITH_PAIR = (UNet2DConditionModel, Encoder, Decoder)
# Nothing to compute, or nothing at inference.
_IDLE = (
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict),
    *(nn.Dropout, nn.Identity),
)

_NORMS_OF_BLOCK = {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm, "norm3": nn.LayerNorm}
_CONVOLUTIONS = {"conv1": nn.Conv2d, "conv2": nn.Conv2d, "conv_shortcut": nn.Conv2d}


@dataclass(frozen=True)
class Kind:
    """What takes over a host's class.

    parts: the submodules that the stand-in computes where they are plain, with the class that they then have.
    """

    name: str
    option: str
    stand_in: type[stand_ins.StandIn]
    what: str
    parts: Mapping[str, type[nn.Module]]


_RESNET = Kind(
    "resnet",
    "norms",
    stand_ins.ResnetBlock2D,
    "norm + SiLU, biases and time in the norm and in the residual add",
    {"norm1": nn.GroupNorm, "norm2": nn.GroupNorm, "nonlinearity": nn.SiLU, **_CONVOLUTIONS},
)
_BLOCK = Kind(
    "transformer block", "norms", stand_ins.BasicTransformerBlock, "residual add + layer norm", _NORMS_OF_BLOCK
)
_GEGLU = Kind(
    "geglu", "geglu", stand_ins.GEGLU, "gate, with its linear layer where that pays", {"proj": nn.Linear}
)
_ATTENTION = Kind("attention", "attention", stand_ins.Attention, "softmax(q k^T) v", {"group_norm": nn.GroupNorm})
_NORM = Kind("norm", "norms", stand_ins.GroupNorm, "group norm", {})
_OUT_NORM = Kind("norm", "norms", stand_ins.OutGroupNorm, "group norm + SiLU", {})
_OUT_SILU = Kind("norm", "norms", stand_ins.OutSiLU, "a SiLU, done by the norm before it", {})
KINDS = {kind.stand_in: kind for kind in (_RESNET, _BLOCK, _GEGLU, _ATTENTION, _NORM, _OUT_NORM, _OUT_SILU)}
_BY_HOST = {ResnetBlock2D: _RESNET, BasicTransformerBlock: _BLOCK, GEGLU: _GEGLU, Attention: _ATTENTION}


@dataclass(frozen=True)
class Place:
    """A module of a model: what takes it over or has, or the reason why it runs as it did.

    network the one whose last norm it is, with the SiLU after it
    passes  whether the reason may pass: an unknown processor is left alone for as long as an Attention holds it
    """

    path: str
    module: nn.Module
    kind: Kind | None
    reason: str | None
    network: Any = None
    passes: bool = False

    @property
    def can_be_taken(self) -> bool:
        """Whether a stand-in may be set, if only for when the reason has passed."""
        return self.kind is not None and (self.reason is None or self.passes)

    @property
    def stands(self) -> bool:
        """Whether the module is one of a stand-in's."""
        return type(self.module) in KINDS


def places(model: nn.Module) -> list[Place]:
    """The modules of a model that compute something, except those that a stand-in computes with its own."""
    norms = _norms(model)
    found: list[Place] = []
    # The submodules that stand-ins compute, and what is inside of others' wrappers.
    parts: dict[nn.Module, type[nn.Module]] = {}
    wrapped: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(wrapped)):
            continue
        kind = KINDS.get(type(module)) or _BY_HOST.get(type(module))
        if kind is None and module in norms:
            kind = _NORM if norms[module] is None else _OUT_NORM
        elif isinstance(module, stand_ins.OutGroupNorm | stand_ins.OutSiLU) and not module.ldmperf_pair.is_fused():
            kind = _NORM if kind is _OUT_NORM else None
        reason = _reason(module, kind)
        if kind is not None and reason is None:
            parts |= {part: needed for name, needed in kind.parts.items() if (part := getattr(module, name, None))}
        if _is_foreign(module):
            wrapped.append(f"{path}.")
        if kind is not None or module in parts or _computes(module):
            passes = kind is _ATTENTION and reason == stand_ins.processor_reason(module.processor)
            found.append(Place(path, module, kind, reason, norms.get(module), passes))
    halves = {network.conv_act for network in norms.values() if network is not None}
    return [p for one in found if one.module not in halves and (p := _as_part(one, parts.get(one.module)))]


def _computes(module: nn.Module) -> bool:
    """Whether a module that nothing takes over is worth a line: no container, and no part of a larger one."""
    if isinstance(module, tuple(_BY_HOST)) or _is_foreign(module):
        return True
    return not isinstance(module, _IDLE) and not list(module.children())


def _is_foreign(module: nn.Module) -> bool:
    """Whether the class is neither torch's nor diffusers' nor ours: a wrapper, as of peft."""
    return _package(module) not in {"torch", "diffusers", "ldmperf"}


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _as_part(place: Place, needed: type[nn.Module] | None) -> Place | None:
    """The place, None where a stand-in computes the module with its own."""
    if needed is None:
        return place
    if not layers.is_plain(place.module, needed):
        return replace(place, reason=f"called as it is: {_why_not_plain(place.module, needed)}")
    # The convolution itself is torch's.
    return place if needed is nn.Conv2d else None


def _norms(model: nn.Module) -> dict[nn.Module, Any]:
    """The group norms that stand alone, and those before a network's last SiLU, with the network."""
    found: dict[nn.Module, Any] = {}
    calls = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        if isinstance(module, _WITH_PAIR):
            norm: Any = getattr(module, "conv_norm_out", None)
            silu: Any = getattr(module, "conv_act", None)
            are_plain = layers.is_plain(norm, nn.GroupNorm) and layers.is_plain(silu, nn.SiLU)
            # A SiLU that others call too stays one.
            if are_plain and calls[silu] == 1:
                found[norm] = module
            elif type(norm) is nn.GroupNorm:
                found[norm] = None
        elif isinstance(module, Transformer2DModel) and type(getattr(module, "norm", None)) is nn.GroupNorm:
            found[module.norm] = None
    return found


def _reason(module: Any, kind: Kind | None) -> str | None:
    """Why nothing takes the module over; None where `kind` does."""
    if kind is None:
        host = next((host for host in _BY_HOST if isinstance(module, host)), None)
        if host is not None:
            return f"a subclass of {host.__name__}, whose forward is its own"
        if _is_foreign(module):
            return f"called as it is: {_package(module)}'s {type(module).__name__}"
        return _OTHERS.get(type(module), NO_KERNEL)
    if not runs_its_class(module) and not (type(module) in KINDS and wraps_its_class(module)):
        return "its forward is set on the instance, as offloading and caching hooks do"
    if kind is _BLOCK and module.norm_type != "layer_norm":
        return f"norm_type {module.norm_type!r}"
    if kind is _ATTENTION:
        return _attention_reason(module)
    return None


NO_KERNEL = "no kernel for this class"
_OTHERS: dict[type[nn.Module], str] = {nn.Conv2d: "torch's convolution", nn.Linear: "torch's matmul"}
# What is left of every model.
USUAL = {NO_KERNEL, *_OTHERS.values()}


def _attention_reason(attn: Any) -> str | None:
    if attn.added_kv_proj_dim is not None:
        return "it adds keys and values of its own"
    if attn.to_out is None or attn.inner_kv_dim != attn.inner_dim:
        return "its keys or its result have other heads than its queries"
    return stand_ins.processor_reason(attn.processor)


def _why_not_plain(module: Any, needed: type[nn.Module]) -> str:
    if type(module) is not needed:
        return f"{_package(module)}'s {type(module).__name__}, not {needed.__name__}"
    subclasses = {type(p).__name__ for p in module.parameters(recurse=False)} - {"Parameter", "Tensor"}
    if subclasses:
        return f"parameters of class {', '.join(sorted(subclasses))}"
    return "it has hooks" if "forward" not in vars(module) else "its forward is set on the instance"
