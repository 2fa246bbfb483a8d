"""Our networks and sampler in the place of a diffusers pipeline's own, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from ldmperf.samplers import Capture, Graphs

from .evaluation import check_graphs
from .pipeline_autoencoder import PipelineAutoencoder
from .pipeline_model import PipelineModel
from .pipeline_unet import PipelineUNet
from .plan_scheduler import PlanScheduler
from .report import BACKENDS, Left, Replaced, serving

logger = logging.getLogger(__name__)

_WHAT = {"unet": "UNet", "vae": "autoencoder", "scheduler": "sampler"}
_TEXT = "not one of unet, vae and scheduler"
_SINCE = "undone, or put in since: call rebuild again for ours"
# What these components compute goes into the middle of the UNet.
_INTO_THE_UNET = ("controlnet", "adapter", "t2i_adapter", "unified_controlnet")
# Pipelines that change the UNet's attention during a call, by what diffusers' classes of them have.
_CHANGES_ATTENTION = ("_set_pag_attn_processor", "sag_masking", "get_indices")


class Rebuilt:
    """What `rebuild` did to a pipeline, as it is now; a context manager that undoes it at its exit.

    str() is a table.
    """

    def __init__(self, pipe: Any, mine: dict[str, Any], reasons: dict[str, str], backend: str) -> None:
        """mine: those of ours that the call put in; reasons: why other components were left."""
        self._pipe, self._mine, self._reasons, self._backend = pipe, mine, reasons, backend

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """The components that are ours now, whichever call put them there."""
        return tuple(
            Replaced(name, part.host.__name__, _kind(part).__qualname__, _WHAT[name])
            for name, part in self._pipe.components.items()
            if isinstance(part, OURS)
        )

    @property
    def left(self) -> tuple[Left, ...]:
        """The components that are as they were, and why."""
        return tuple(
            Left(name, type(part).__name__, self._reasons.get(name, _SINCE))
            for name, part in self._pipe.components.items()
            if isinstance(part, nn.Module | SchedulerMixin) and not isinstance(part, OURS)
        )

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The UNet's captured evaluations that are kept: their times, memory and uses, and when they pay."""
        unet = self._pipe.components.get("unet")
        return unet.captures if isinstance(unet, PipelineUNet) else ()

    def undo(self) -> None:
        """Gives the pipeline back the very components that the call replaced, where it has ours still."""
        for name, ours in self._mine.items():
            if getattr(self._pipe, name, None) is ours:
                give_back_component(self._pipe, name)
        self._mine = {}

    def __enter__(self) -> Rebuilt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return (
            f"<Rebuilt: {len(self.replaced)} components replaced, {len(self.left)} left; print it for the table>"
        )

    def __str__(self) -> str:
        rows = [("replaced", "")]
        rows += [(f"  {one.path}", f"{one.kind}: {self._runs(one.path)}") for one in self.replaced]
        rows += [("left", "")]
        rows += [(f"  {one.path}", f"{one.class_name}: {one.reason}") for one in self.left]
        unet = self._pipe.components.get("unet")
        if isinstance(unet, PipelineUNet):
            rows += [("graphs", unet.graphs_in_words)]
            rows += [("  capture", str(capture)) for capture in unet.captures]
            rows += [("  decision", line) for line in unet.decisions]
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{wide}}  {text}".rstrip() for name, text in rows)

    def _runs(self, name: str) -> str:
        """Where a component of ours runs, in words."""
        part = getattr(self._pipe, name)
        if isinstance(part, PlanScheduler):
            is_auto, on_gpu = self._backend == "auto", self._pipe.device.type == "cuda"
            has_kernel = self._backend == "triton" or (is_auto and on_gpu)
            how = "launch of sampler_update" if has_kernel else "call of sampler_update's reference in torch"
            return f"{type(part).__name__}'s steps, each one {how}"
        return f"{part.device}, {str(part.dtype).removeprefix('torch.')}, {serving(part.device, self._backend)}"


OURS = (PipelineUNet, PipelineAutoencoder, PlanScheduler)


def rebuild(
    pipe: Any,
    *,
    unet: bool = True,
    vae: bool = True,
    scheduler: bool = True,
    backend: str = "auto",
    graphs: bool | str | Graphs = "auto",
) -> Rebuilt:
    """Puts our UNet, autoencoder and sampler into a diffusers pipeline, with the weights that it has in memory.

    unet, vae, scheduler   which of its components
    backend                of our operators: "auto", "torch" or "triton" (ldmperf.kernels)
    graphs                 whether the UNet's evaluations are captured as CUDA graphs: see `PipelineUNet`

    The pipeline's own loop is kept, so that its arguments mean what they did. What is not implemented stays
    diffusers' and is listed with the reason. dtype and device are kept; the replaced components are kept too, for
    `undo`, and adapters load into them. Raises ValueError for what is no pipeline, and for other options.
    """
    if not isinstance(pipe, DiffusionPipeline):
        got = f"the class {pipe.__name__}" if isinstance(pipe, type) else type(pipe).__name__
        raise ValueError(f"rebuild: pipe must be a loaded pipeline of diffusers; got {got}")
    if backend not in BACKENDS:
        raise ValueError(f"rebuild: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    wanted = {"unet": unet, "vae": vae, "scheduler": scheduler}
    for name, value in wanted.items():
        if not isinstance(value, bool):
            raise ValueError(f"rebuild: {name} must be True or False; got {value!r}")
    check_graphs("rebuild", graphs)
    makers: dict[str, Callable[[Any], Any]] = {
        "unet": lambda part: PipelineUNet.of(part, backend=backend, graphs=graphs),
        "vae": lambda part: PipelineAutoencoder.of(part, backend=backend),
        "scheduler": lambda part: PlanScheduler.from_scheduler(part, backend=backend),
    }
    mine: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, part in pipe.components.items():
        if part is None or isinstance(part, OURS):
            continue
        reason = _TEXT if name not in makers else None if wanted[name] else f"{name}=False"
        reason = reason or (_into_the_unet(pipe) if name == "unet" else None)
        if reason is None:
            try:
                mine[name] = makers[name](part)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            reasons[name] = reason
    for name, ours in mine.items():
        setattr(pipe, name, ours)
    rebuilt = Rebuilt(pipe, mine, reasons, backend)
    if not rebuilt.replaced:
        logger.warning("rebuild: nothing of this %s was replaced; the result says why", type(pipe).__name__)
    return rebuilt


def _into_the_unet(pipe: Any) -> str | None:
    for name in _INTO_THE_UNET:
        if pipe.components.get(name) is not None:
            return f"{name} adds residuals to the UNet's blocks, which ours does not take"
    if any(hasattr(pipe, name) for name in _CHANGES_ATTENTION):
        return f"{type(pipe).__name__} changes the UNet's attention during a call, which ours does not follow"
    return None


def give_back_component(pipe: Any, name: str) -> None:
    """Sets what our component was made from, on the device and in the dtype of ours."""
    ours = getattr(pipe, name)
    source = ours.source
    # Where sequential offload has taken ours apart, the source stays as it is.
    if isinstance(ours, PipelineModel) and ours.device.type != "meta":
        # Not diffusers' own method, which warns of every dtype.
        nn.Module.to(source, device=ours.device, dtype=ours.dtype)
    setattr(pipe, name, source)


def _kind(ours: Any) -> type:
    return next(kind for kind in OURS if isinstance(ours, kind))
