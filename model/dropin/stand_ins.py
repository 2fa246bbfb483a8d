"""The classes that stand in for the hosts': each is its host with another forward.

`accelerate` sets the class of an instance to one of these. Parameters, buffers, hooks, the state dict, optimizers
that hold the parameters and whoever holds the module see the same object as before; copies and pickles keep the
class. Names are the hosts', by which diffusers and accelerate look classes up (`_repeated_blocks`,
`_no_split_modules`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models import attention as host_blocks
from diffusers.models import attention_processor as host_attention
from diffusers.models.activations import GEGLU as HostGEGLU  # noqa: N811
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D as HostResnetBlock2D
from torch import Tensor, nn

from ldmperf.kernels import group_norm_silu, layers

from .processed import KNOWN_PROCESSORS, attend

logger = logging.getLogger(__name__)
Forward = TypeVar("Forward", bound=Callable[..., Any])


class StandIn(nn.Module):
    """What stands in for a host's class."""

    ldmperf_backend: str
    ldmperf_pair: Pair


# They call conv_act on the result of conv_norm_out, and neither elsewhere.
_CALL_A_PAIR = (UNet2DConditionModel.forward, Encoder.forward, Decoder.forward)


class Pair:
    """The norm of a network's output, the SiLU after it, and the network, which a pair does not keep alive."""

    def __init__(self, norm: nn.Module, silu: nn.Module, network: nn.Module | None) -> None:
        self.norm, self.silu = norm, silu
        self._network = None if network is None else weakref.ref(network)

    def __reduce__(self) -> tuple[type[Pair], tuple[Any, ...]]:
        return Pair, (self.norm, self.silu, self._network and self._network())

    def is_fused(self) -> bool:
        """Whether the norm does both: the network still calls these two, and nobody looks between them."""
        network: Any = self._network and self._network()
        return (
            network is not None
            and type(network).forward in _CALL_A_PAIR
            and "forward" not in network.__dict__
            and network.conv_norm_out is self.norm
            and network.conv_act is self.silu
            and layers.is_plain(self.norm, OutGroupNorm)
            and layers.is_plain(self.silu, OutSiLU)
        )


def while_standing(forward: Forward, host: type[nn.Module]) -> Forward:
    """`forward`, and after the undo the host's: a hook that was set meanwhile may hold the method still."""

    @functools.wraps(forward)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (forward if isinstance(self, StandIn) else host.forward)(self, *args, **kwargs)

    return either  # type: ignore[return-value]


class ResnetBlock2D(StandIn, HostResnetBlock2D):  # type: ignore[misc]
    forward = while_standing(layers.ResnetBlock2D.forward, HostResnetBlock2D)


class BasicTransformerBlock(StandIn, host_blocks.BasicTransformerBlock):  # type: ignore[misc]
    forward = while_standing(layers.BasicTransformerBlock.forward, host_blocks.BasicTransformerBlock)


class GEGLU(StandIn, HostGEGLU):  # type: ignore[misc]
    forward = while_standing(layers.GEGLU.forward, HostGEGLU)


class GroupNorm(StandIn, nn.GroupNorm):
    forward = while_standing(layers.GroupNorm.forward, nn.GroupNorm)


class OutGroupNorm(StandIn, nn.GroupNorm):
    """The norm of a network's output, with the SiLU that follows, for which `OutSiLU` then has nothing to do."""

    def forward(self, input: Tensor) -> Tensor:
        if not _is_fused(self):
            return GroupNorm.forward(self, input)
        return group_norm_silu(
            input, self.num_groups, self.weight, self.bias, self.eps, backend=self.ldmperf_backend
        )


class OutSiLU(StandIn, nn.SiLU):
    """The SiLU after an `OutGroupNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return input if _is_fused(self) else F.silu(input)


def _is_fused(half: nn.Module) -> bool:
    return isinstance(half, StandIn) and half.ldmperf_pair.is_fused()


class Attention(StandIn, host_attention.Attention):  # type: ignore[misc]
    """diffusers' Attention, which computes by itself what a processor of KNOWN_PROCESSORS would."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        if not isinstance(self, StandIn) or processor_reason(self.processor) is not None:
            out: Tensor = host_attention.Attention.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
            return out
        temb = cross_attention_kwargs.pop("temb", None)
        unknown = sorted(cross_attention_kwargs.keys() - _QUIET)
        if unknown and not torch.compiler.is_compiling():
            logger.warning("attention: the cross_attention_kwargs %s are of no effect here", unknown)
        return attend(self, hidden_states, encoder_hidden_states, attention_mask, temb, self.ldmperf_backend)


# Those that diffusers' Attention drops without a word: for IP-Adapter processors, which other modules may have.
_QUIET = {"ip_adapter_masks", "ip_hidden_states"}


def processor_reason(processor: Any) -> str | None:
    """Why `attend` cannot compute what this processor does; None where it can."""
    if type(processor) not in KNOWN_PROCESSORS:
        return f"its processor is {type(processor).__name__}"
    if getattr(processor, "attention_op", None) is not None:
        return "its processor asks for an operator of xformers by name"
    return None


HOSTS: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock2D: HostResnetBlock2D,
    BasicTransformerBlock: host_blocks.BasicTransformerBlock,
    GEGLU: HostGEGLU,
    GroupNorm: nn.GroupNorm,
    OutGroupNorm: nn.GroupNorm,
    OutSiLU: nn.SiLU,
    Attention: host_attention.Attention,
}


def take_over(module: Any, stand_in: type[StandIn], backend: str) -> None:
    """Makes `module`, an instance of `HOSTS[stand_in]`, one of `stand_in`."""
    _drop_bound_forward(module)
    module.__class__ = stand_in
    module.ldmperf_backend = backend


def take_over_pair(network: Any, backend: str) -> None:
    """The same for the last norm of a network and the SiLU after it."""
    norm, silu = network.conv_norm_out, network.conv_act
    _drop_bound_forward(network)
    take_over(norm, OutGroupNorm, backend)
    take_over(silu, OutSiLU, backend)
    norm.ldmperf_pair = silu.ldmperf_pair = Pair(norm, silu, network)


def give_back(module: nn.Module) -> None:
    """Makes an instance of a stand-in one of its host again."""
    _drop_bound_forward(module)
    module.__class__ = HOSTS[type(module)]
    for name in ("ldmperf_backend", "ldmperf_pair"):
        module.__dict__.pop(name, None)


def runs_its_class(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class.

    That is, none is set on the instance, except this very method, as removed hooks leave it.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return True
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def wraps_its_class(module: nn.Module) -> bool:
    """Whether the forward of the instance says that it wraps the one of its class, as those of hooks do."""
    forward = inspect.unwrap(module.forward)
    return getattr(forward, "__func__", forward) is inspect.unwrap(type(module).forward)


def _drop_bound_forward(module: nn.Module) -> None:
    if "forward" in module.__dict__ and runs_its_class(module):
        del module.forward
