"""What our networks need to stand where a diffusers pipeline expects a model of its own."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

_OFFLOADED = (
    "weights are on the meta device, as sequential offload leaves them, and layers here read each other's weights: "
    "use pipe.enable_model_cpu_offload()"
)


class PipelineModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One of our networks with the configuration of a diffusers model, and its weights under diffusers' keys.

    `source` is the model of diffusers that the network's weights were copied from, or None. It is no submodule: it
    stays where it is when this is moved or cast.
    """

    config_name = "config.json"
    _supports_group_offloading = False
    # diffusers' class of such a model.
    host: ClassVar[Any]

    def _set_up(self, config: Mapping[str, Any]) -> None:
        self._internal_dict = FrozenDict(config)

    @classmethod
    @abstractmethod
    def of(cls, source: Any, *, backend: str = "auto") -> Self:
        """Ours with the weights and the configuration of diffusers' model. Raises ValueError, in one line."""

    @property
    @abstractmethod
    def source(self) -> Any: ...

    @abstractmethod
    def _views(self) -> dict[str, Tensor]:
        """The weights under diffusers' keys, on the network's own memory."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Ours from a folder of diffusers; arguments as of diffusers' own class."""
        return cls.of(cls.host.from_pretrained(*args, **kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the folder that diffusers' own class writes; arguments as there."""
        with torch.device("meta"):
            host = self.host.from_config(dict(self.config))
        # Parts of one parameter share its memory, which a file does not.
        state = {
            name: view.detach().clone(memory_format=torch.contiguous_format)
            for name, view in self._views().items()
        }
        host.load_state_dict(state, assign=True)
        host.save_pretrained(save_directory, **kwargs)

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """The weights that the network computes with, under diffusers' keys, on the network's own memory."""
        if args or kwargs:
            raise ValueError(f"{type(self).__name__}.state_dict takes prefix and keep_vars alone")
        views = self._views()
        return {f"{prefix}{name}": view if keep_vars else view.detach() for name, view in views.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Writes weights under diffusers' keys in place: captured graphs read them."""
        if assign:
            raise ValueError(
                f"{type(self).__name__}: weights are written in place, for graphs to read them: leave assign out"
            )
        views = self._views()
        missing, unexpected = list(views.keys() - state_dict.keys()), list(state_dict.keys() - views.keys())
        wrong = [name for name in views.keys() & state_dict.keys() if views[name].shape != state_dict[name].shape]
        if wrong or (strict and (missing or unexpected)):
            raise RuntimeError(
                f"{type(self).__name__}: the weights do not fit: {len(missing)} missing, {len(unexpected)} "
                f"unexpected, {len(wrong)} of another shape, such as {(missing + unexpected + wrong)[0]}"
            )
        with torch.no_grad():
            for name in views.keys() & state_dict.keys():
                views[name].copy_(state_dict[name])
        return _IncompatibleKeys(missing, unexpected)

    def _check_is_here(self, weight: nn.Parameter) -> None:
        if weight.is_meta:
            raise ValueError(f"{type(self).__name__}: {_OFFLOADED}")
