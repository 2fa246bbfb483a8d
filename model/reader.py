"""`Reader`: from a checkpoint's path to a network, in the same steps for every kind of network.

Headers are read and checked whole before any memory is taken.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .arguments import check_backend
from .autoencoder_config import AutoencoderConfig
from .config import UNetConfig
from .fields import UnsupportedConfig
from .files import CheckpointError, Source, UnsupportedCheckpoint, find, open_all, parse_json, read_json
from .keys import Slot
from .kinds import NetworkKind
from .loading import Network, check_device, check_dtype, check_path, filled, mismatch

Shape = tuple[int, ...]
Config = TypeVar("Config", UNetConfig, AutoencoderConfig)


@dataclass(frozen=True)
class Layout(ABC, Generic[Config]):
    """The tensors of a checkpoint that belong to one network: their shapes under the names that the file has."""

    shapes: Mapping[str, Shape]
    prefix: str
    compvis: bool

    @abstractmethod
    def stored(self, key: str, config: Config) -> str:
        """The file's name of a diffusers key."""

    @abstractmethod
    def told(self) -> tuple[Config | None, str]:
        """The configuration that the shapes tell, and whose it is; None where they tell none."""


@dataclass(frozen=True)
class Reader(Generic[Config, Network]):
    """What tells the checkpoints of one kind of network from those of another.

    metadata_key: of the configuration in a file that `saver` wrote. untold: why no configuration is told. find:
    the network's layout among all tensors. beyond: how far a configuration is beyond tensors of these shapes.
    acting: a configuration without fields that change no result. disputed: what a config.json and the shapes may
    tell differently although the tensors fit both; empty where the config.json is believed.
    """

    kind: NetworkKind
    config: type[Config]
    network: Callable[..., Network]
    metadata_key: str
    saver: str
    untold: str
    find: Callable[[str, Mapping[str, Shape]], Layout[Config]]
    beyond: Callable[[Config, Iterable[Shape]], str]
    slots: Callable[[Network], list[Slot]]
    acting: Callable[[Config], Config] = lambda config: config
    disputed: str = ""

    def load(
        self,
        path: str | Path,
        config: Config | None,
        dtype: torch.dtype | None,
        device: torch.device | str,
        **options: Any,
    ) -> Network:
        """The network in eval mode; options are its own, `backend` among them."""
        check_dtype(dtype)
        check_device(device)
        check_backend("backend", options["backend"])
        check_path(path)
        name = self.config.__name__
        if config is not None and not isinstance(config, self.config):
            raise ValueError(
                f"config must be {'an' if name[0] in 'AEIO' else 'a'} {name}; got a {type(config).__name__}: pass "
                f"{name}.from_diffusers(...) of the fields of a config.json"
            )
        path = Path(path)
        source = find(path, self.kind)
        # Neither the caller's default device nor its inference mode reaches the weights.
        with ExitStack() as stack, torch.device("cpu"), torch.inference_mode(False):
            tensors, metadata = open_all(source, stack)
            layout = self.find(str(path), {key: tuple(tensors[key].get_shape()) for key in tensors})
            stated, origin = self._stated(path, source, layout, metadata)
            if config is not None:
                stated, origin = config, "config="
            if stated is None:
                raise CheckpointError(
                    f"{path}: {self.untold}; put its config.json beside it, name the folder with both, write it "
                    f"with ldmperf.model.{self.saver}, or pass config={name}(...) in Python"
                )
            network, slots, problem = self._network(layout, stated, **options)
            if network is None or problem:
                raise CheckpointError(
                    f"{path}: the tensors are not those of the configuration ({origin}): {problem}; give the "
                    "whole checkpoint and the configuration that it was made with"
                )
            stored = [tensors[layout.stored(slot.key, stated)] for slot in slots]
            return filled(network, slots, stored, path, dtype, device)

    def _stated(
        self, path: Path, source: Source, layout: Layout[Config], metadata: Mapping[str, str]
    ) -> tuple[Config | None, str]:
        """The configuration that the checkpoint states, and where; None where nothing tells it."""
        within = beside = None
        if (inside := metadata.get(self.metadata_key)) is not None:
            place = f"{source.files[0]}: metadata {self.metadata_key}"
            within = self._checked(parse_json(inside.encode(), place), place)
            if not source.is_folder:
                return within, self.metadata_key
        if source.config_file is not None:
            raw = read_json(source.config_file)
            # Many files may lie beside a named one; a folder's config.json is its own.
            if source.is_folder or self.kind.is_config(raw):
                beside = self._checked(raw, str(source.config_file))
        told, whose = layout.told()
        if beside is None:
            return told, f"that of {whose}"
        at = str(source.config_file)
        if within is not None and self.acting(within) != self.acting(beside):
            raise CheckpointError(
                f"{source.files[0]}: its metadata and {at} differ; remove config.json, or write the file again "
                f"with {self.saver}"
            )
        if layout.compvis and not source.is_folder and told is not None:
            # Stable Diffusion's file often lies in a folder with other networks.
            if self._network(layout, beside)[2]:
                return told, f"that of {whose}"
            if self.disputed and self.acting(beside) != self.acting(told):
                raise CheckpointError(
                    f"{path}: has the shapes of {whose} and of {at}, which differ in {self.disputed}; move "
                    "the file or the config.json to a folder of its own"
                )
        return beside, at

    def _checked(self, raw: Mapping[str, Any], place: str) -> Config:
        try:
            return self.config.from_diffusers(raw)
        except UnsupportedConfig as error:
            raise UnsupportedCheckpoint(f"{place}: {error}") from error
        except RecursionError as error:
            raise CheckpointError(f"{place}: nested too deep for a configuration") from error

    def _network(
        self, layout: Layout[Config], config: Config, **options: Any
    ) -> tuple[Network | None, list[Slot], str]:
        """The network without memory, its tensors' places, and how the file's differ (empty: not at all)."""
        if problem := self.beyond(config, layout.shapes.values()):
            return None, [], problem
        with torch.device("meta"):
            network = self.network(config, **options)
        slots = self.slots(network)
        expected = {layout.stored(slot.key, config): slot.shape for slot in slots}
        return network, slots, mismatch(expected, layout.shapes)
