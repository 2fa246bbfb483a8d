"""Whether anything but the network itself can hold what passes between its modules."""

from __future__ import annotations

from collections.abc import Collection
from itertools import repeat
from operator import contains, itemgetter

from torch import nn
from torch.nn.modules import module as _torch

from .staleness import Structure

_hooks, _pre_hooks = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")


class Privacy:
    """Watches the modules below a network, which are of `own_classes`, for who sees what they pass on.

    Hooks keep what they see, and so may a `forward` that is set on an instance (accelerate, gradient
    checkpointing) or a module of a class that is not ours (a wrapper). Hooks of all modules count too.
    """

    def __init__(self, network: nn.Module, own_classes: Collection[type[nn.Module]]) -> None:
        self._structure = Structure(network)
        self._own_classes = frozenset(own_classes)
        # Without the network, which keeps this: its memory goes when it goes.
        self._modules = list(network.modules())[1:]
        self._attributes = [vars(module) for module in self._modules]

    def knows_all(self) -> bool:
        """Whether it watches the modules that the network has now."""
        return self._structure.is_kept()

    def holds(self) -> bool:
        """Whether nobody sees what the modules pass on. In C, as every eager step asks."""
        return not (
            any(map(_hooks, self._attributes))
            or any(map(_pre_hooks, self._attributes))
            or any(map(contains, self._attributes, repeat("forward")))
            or not self._own_classes.issuperset(map(type, self._modules))
            or _torch._global_forward_hooks
            or _torch._global_forward_pre_hooks
        )
