"""The one line, and its undo."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from .rebuild import OURS, give_back_component
from .report import BACKENDS, Left, Report
from .stand_ins import HOSTS, give_back, take_over, take_over_pair
from .survey import MODELS, places

logger = logging.getLogger(__name__)

_OTHER = "neither UNet2DConditionModel nor AutoencoderKL"
_OURS = "ours already, by rebuild or by parts"


def accelerate(
    target: Any, *, attention: bool = True, norms: bool = True, geglu: bool = True, backend: str = "auto"
) -> Report:
    """Puts the kernels into a diffusers model, instance by instance, and tells what it did and what it left.

    target     a UNet2DConditionModel or AutoencoderKL, compiled by torch.compile or not, or a pipeline with such
               components
    attention  every Attention, for the processors that torch's attention serves
    norms      every ResnetBlock2D and BasicTransformerBlock, and the group norms beside them
    geglu      every GEGLU
    backend    "auto", "torch" or "triton", as of the operators (ldmperf.kernels)

    Outputs are those of before, to rounding. The classes of the instances are set, nothing else: parameters, hooks
    and the state dict stay, and `Report.undo` or `undo` give the classes back. Again on the same target it takes
    what is not taken yet, and `backend` counts for all until that report's undo. Not while another thread runs the
    model. Raises ValueError for another target, option or backend; warns where there is nothing to take.
    """
    if backend not in BACKENDS:
        raise ValueError(f"accelerate: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    options = {"attention": attention, "norms": norms, "geglu": geglu}
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"accelerate: {name} must be True or False; got {value!r}")
    models, others = _models("accelerate", target)
    before: dict[nn.Module, str | None] = {}
    for model in models.values():
        for place in places(model):
            module: Any = place.module
            if place.stands:
                before.setdefault(module, module.ldmperf_backend)
                module.ldmperf_backend = backend
            elif place.can_be_taken and place.kind is not None and options[place.kind.option]:
                before[module] = None
                if place.network is not None:
                    before[place.network.conv_act] = None
                    take_over_pair(place.network, backend)
                else:
                    take_over(module, place.kind.stand_in, backend)
    if not before:
        logger.warning("accelerate: nothing of this %s was taken over; the report says why", type(target).__name__)
    return Report(models, others, options, backend, before)


def undo(target: Any) -> None:
    """Undoes `accelerate` and `rebuild`; target as of theirs.

    A pipeline gets diffusers' components back for ours; then every module that `accelerate` took over has its
    class back. Raises ValueError, and changes nothing, where one of ours was made from nothing of diffusers'.
    """
    if isinstance(target, DiffusionPipeline):
        rebuilt = [name for name, part in target.components.items() if isinstance(part, OURS)]
        for name in rebuilt:
            if (ours := getattr(target, name)).source is None:
                kind = ours.host.__name__
                raise ValueError(f"undo: {name} was not made from diffusers' {kind}: set pipe.{name} to one")
        for name in rebuilt:
            give_back_component(target, name)
        if rebuilt and not any(isinstance(_unwrapped(part), MODELS) for part in target.components.values()):
            return
    models, _ = _models("undo", target)
    for model in models.values():
        for module in model.modules():
            if type(module) in HOSTS:
                give_back(module)


def _models(call: str, target: Any) -> tuple[Mapping[str, nn.Module], list[Left]]:
    """The models of a target by path, and those components of a pipeline that are none."""
    if isinstance(target, DiffusionPipeline):
        components = {name: _unwrapped(part) for name, part in target.components.items()}
        models = {name: part for name, part in components.items() if isinstance(part, MODELS)}
        if not models and any(isinstance(part, OURS) for part in components.values()):
            raise ValueError(
                f"{call}: the networks of this {type(target).__name__} are ours already: undo(pipe) first, where "
                "rebuild(pipe) put them in"
            )
        if not models:
            raise ValueError(f"{call}: {type(target).__name__} has no UNet2DConditionModel and no AutoencoderKL")
        others = [
            Left(name, type(part).__name__, _OURS if isinstance(part, OURS) else _OTHER)
            for name, part in components.items()
            if isinstance(part, nn.Module) and name not in models
        ]
        return models, others
    model = _unwrapped(target)
    if not isinstance(model, MODELS):
        got = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
        raise ValueError(
            f"{call}: target must be a loaded UNet2DConditionModel, AutoencoderKL or pipeline of diffusers; "
            f"got {got}"
        )
    return {"": model}, []


def _unwrapped(model: Any) -> Any:
    """The model inside of torch.compile's."""
    return getattr(model, "_orig_mod", model) if isinstance(model, nn.Module) else model
