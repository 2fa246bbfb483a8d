"""Whether anything but the network can hold the activations that its modules pass on."""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, contains, itemgetter

import torch
from torch import nn
from torch.nn.modules import module as _torch
from torch.utils._device import DeviceContext

from ldmperf.kernels import GroupNormSiLU

from .autoencoder_blocks import Coder, HalvingConv, ImageAttention
from .blocks import Resample, ResBlock, Transformer, TransformerBlock
from .embeddings import EmbeddingMLP, LabelEmbedding, TimestepEmbedding
from .float8 import Float8Linear
from .route import Level
from .staleness import Structure

# Module classes that keep no activation; a subclass may.
_CLASSES = (
    *(Level, ResBlock, Transformer, TransformerBlock, Resample, GroupNormSiLU, EmbeddingMLP, TimestepEmbedding),
    *(Coder, HalvingConv, ImageAttention),
    *(LabelEmbedding, nn.ModuleList, nn.Conv2d, nn.Linear, nn.LayerNorm, Float8Linear),
)
# The methods that a call of a module runs.
_METHODS = attrgetter("__call__", "_call_impl", "forward")
_CODE = list(map(_METHODS, _CLASSES))
_KNOWN = frozenset(_CLASSES)
_hooks, _pre_hooks = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")


class Privacy:
    """A watch on the modules below a network: does anyone else see their activations?

    A forward hook does, of one module or of all; a `forward` set on an instance (accelerate, gradient
    checkpointing); a module of another class (a wrapper); a method replaced in a known class; an active
    TorchFunctionMode, except for `torch.device`, which keeps nothing.

    A TorchDispatchMode does not count: it sees `aten::addmm_` itself, and is to count the step as it runs alone.
    """

    def __init__(self, network: nn.Module) -> None:
        self._structure = Structure(network)
        # Without the network, which keeps this: its memory goes when it goes.
        self._modules = list(network.modules())[1:]
        self._attributes = [vars(module) for module in self._modules]

    def knows_all(self) -> bool:
        """Whether it watches the modules that the network has now."""
        return self._structure.is_kept()

    def holds(self) -> bool:
        """Whether nobody else sees the activations. Loops in C, because every eager step asks."""
        return not (
            any(map(_hooks, self._attributes))
            or any(map(_pre_hooks, self._attributes))
            or any(map(contains, self._attributes, repeat("forward")))
            or not _KNOWN.issuperset(map(type, self._modules))
            or list(map(_METHODS, _CLASSES)) != _CODE
            or _torch._global_forward_hooks
            or _torch._global_forward_pre_hooks
            or any(type(mode) is not DeviceContext for mode in _function_modes())
        )


class PrivacyKept:
    """A network's `Privacy`, made anew when its modules were replaced.

    It has slots and no `__dict__`, so it is no value of the network to whoever compares a module's values.
    """

    __slots__ = ("_privacy",)

    def __init__(self) -> None:
        self._privacy: Privacy | None = None

    def __reduce__(self) -> tuple[type[PrivacyKept], tuple[()]]:
        # A copy's modules are its own.
        return PrivacyKept, ()

    def holds(self, network: nn.Module) -> bool:
        """Whether only the network holds the activations between its modules, so that sums may overwrite them."""
        if torch.compiler.is_compiling():
            # A compiled graph plans its memory itself, and needs no in-place sums.
            return False
        if self._privacy is None or not self._privacy.knows_all():
            self._privacy = Privacy(network)
        return self._privacy.holds()


def _function_modes() -> list[object]:
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)]
