"""`PipelineUNet`: our UNet where a diffusers pipeline expects its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from ldmperf.samplers import Capture, Graphs

from ..config import diffusers_config
from ..unet import UNet
from ..weights import diffusers_state_dict
from .evaluation import Evaluation, check_graphs
from .kept_conditioning import KeptConditioning, condition, place
from .merged_adapters import adapted_layers
from .pipeline_model import PipelineModel
from .unet_source import Followed, unet_of

_LACKS = (
    "attention_mask",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
)


class PipelineUNet(PipelineModel):
    """Our UNet with the signature, the outputs and the configuration of diffusers' UNet2DConditionModel.

        pipe = StableDiffusionPipeline.from_pretrained(folder, unet=PipelineUNet(load_unet(folder)))

    unet     a `ldmperf.model.UNet`
    config   the fields of a diffusers config.json; those of the network's configuration unless given
    graphs   whether evaluations are captured as CUDA graphs and replayed: "auto" on a CUDA device, each shape
             where that pays; True for every shape, or CaptureError; False never; or how to capture, wherever it
             is, as "auto". `captures` and `decisions` tell what was captured, and why what was not.
    source   diffusers' UNet with the same weights, where there is one: adapters load into it, and attributes that
             this class lacks are its own. Its weights with the active adapters are written into ours, in place, at
             the next call. It is no submodule: it is neither moved nor saved.

    A call computes the conditioning of a whole run once, and keeps it for as long as the very same tensors come
    and neither they nor the weights were written. Not for two threads at once.
    """

    host = UNet2DConditionModel

    def __init__(
        self,
        unet: UNet,
        *,
        config: Mapping[str, Any] | None = None,
        graphs: bool | str | Graphs = "auto",
        source: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(unet, UNet):
            raise ValueError(
                f"PipelineUNet: unet must be a ldmperf.model.UNet, not {type(unet).__name__}: load_unet(folder) "
                "makes one, rebuild(pipe) takes the pipeline's"
            )
        self.unet = unet
        self._set_up(_full_config(unet) if config is None else config)
        self._followed = None if source is None else Followed(source, unet)
        check_graphs("PipelineUNet", graphs)
        self._graphs = graphs
        self._kept_run: _Run | None = None
        self.train(unet.training)

    @classmethod
    def of(cls, source: Any, *, backend: str = "auto", graphs: bool | str | Graphs = "auto") -> PipelineUNet:
        """Ours with the weights and the configuration of diffusers' UNet. Raises ValueError, in one line."""
        check_graphs("PipelineUNet", graphs)
        return cls(unet_of(source, backend), config=source.config, graphs=graphs, source=source)

    @property
    def source(self) -> Any:
        """diffusers' UNet that has the same weights; None where there is none."""
        return None if self._followed is None else self._followed.source

    def _views(self) -> dict[str, Tensor]:
        return diffusers_state_dict(self.unet)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Writes weights under diffusers' keys: into the source where there is one, from which ours follow."""
        if self._followed is None:
            return super().load_state_dict(state_dict, strict, assign)
        self._followed.is_touched = True
        return self.source.load_state_dict(state_dict, strict, assign)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the folder that diffusers' own class writes. Raises ValueError while adapters are loaded."""
        if self._followed is not None and adapted_layers(self.source):
            raise ValueError(
                "PipelineUNet: adapters are loaded, which diffusers does not load back from a UNet's folder: "
                "unload them (pipe.unload_lora_weights()), or call undo(pipe)"
            )
        self._follow()
        super().save_pretrained(save_directory, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.unet.dtype

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captured evaluations that are kept; the last used is at the end."""
        return self._run.evaluate.captures

    @property
    def decisions(self) -> tuple[str, ...]:
        """In words: what was captured or dropped, what runs eagerly, and why."""
        return self._run.evaluate.decisions

    @property
    def graphs_in_words(self) -> str:
        """Whether evaluations are captured where the network is now."""
        return self._run.evaluate.in_words(self.unet.time_projection.weight.device)

    @property
    def add_embedding(self) -> nn.Module | None:
        """The network's, for pipelines that read how long a vector its linear_1 takes."""
        return self.unet.add_embedding

    # Compiled, it would keep what it compares from call to call; captures do what compiling would.
    @torch.compiler.disable(reason="PipelineUNet captures and replays its evaluations itself")
    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The noise, or what else it predicts, [B, Cout, H, W] in a tuple, or in a UNet2DConditionOutput.

        sample [B, Cin, H, W]; timestep a number, [] or [B]; encoder_hidden_states [B, T, Dctx]; class_labels [B].
        added_cond_kwargs: text_embeds [B, P] and time_ids [B, N] of Stable Diffusion XL. cross_attention_kwargs:
        {"scale": number} multiplies the adapters.

        Raises ValueError, in one line, for all else that this network does not compute.
        """
        given = locals()
        self._check_is_here(self.unet.time_projection.weight)
        for name in _LACKS:
            if given[name] is not None:
                raise ValueError(f"PipelineUNet does not compute {name}: undo(pipe) gives diffusers' UNet back")
        scale = _scale(cross_attention_kwargs)
        beside = {"class_labels": class_labels, "timestep_cond": timestep_cond}
        values, step = self._values(timestep, encoder_hidden_states, beside, added_cond_kwargs)
        run = self._run
        conditioning = run.kept.find(values)
        if self._follow(scale):
            conditioning = None
        if torch.is_grad_enabled() and _needs_grad(self.unet, sample, *values.values()):
            # A conditioning of this call alone, through which gradients flow.
            out = self.unet.denoise(sample, condition(self.unet, values), step)
        else:
            if conditioning is None:
                conditioning = run.kept.make(self.unet, values)
            out = run.evaluate(sample, conditioning, step)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def _follow(self, scale: float = 1.0) -> bool:
        """Writes the source's weights into ours where they have changed; whether they had."""
        return self._followed is not None and self._followed.update(scale)

    def _values(
        self, timestep: Any, context: Tensor, beside: Mapping[str, Any], added: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], int]:
        """All that a conditioning is computed from, except the weights, and the number of the step."""
        timesteps, step = place(timestep)
        device = self.unet.time_projection.weight.device.type
        values = {
            "timesteps": timesteps,
            "context": context,
            "is_alone": timesteps is timestep,
            "autocast": torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            **{name: value for name, value in beside.items() if value is not None},
        }
        if self.unet.config.added_dim is not None:
            missing = {"text_embeds", "time_ids"} - set(added or {})
            if added is None or missing:
                raise ValueError(f"added_cond_kwargs must hold text_embeds and time_ids; lacks {sorted(missing)}")
            values |= {"text_embeds": added["text_embeds"], "time_ids": added["time_ids"]}
        return values, step

    def modules(self) -> Iterator[nn.Module]:
        """Its modules, and the source's layers with adapters, which pipelines look for here."""
        yield from super().modules()
        if self._followed is not None and (layers := adapted_layers(self.source)):
            self._followed.is_touched = True
            yield from layers.values()

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            followed = self.__dict__.get("_followed")
            is_public = not name.startswith("_") or name == "_hf_peft_config_loaded"
            if followed is None or not is_public or not hasattr(followed.source, name):
                remedy = "load that and set pipe.unet" if followed is None else "undo(pipe) gives it back"
                raise AttributeError(
                    f"PipelineUNet has no {name!r}; where diffusers' UNet has it, {remedy}"
                ) from None
            value = getattr(followed.source, name)
            # What a method writes may be counted nowhere.
            followed.is_touched = followed.is_touched or callable(value)
            return value

    def _apply(self, fn: Any, recurse: bool = True) -> PipelineUNet:
        super()._apply(fn, recurse)
        if self._followed is not None:
            self._followed.moved()
        return self

    @property
    def _run(self) -> _Run:
        if self._kept_run is None or self._kept_run.unet is not self.unet:
            self._kept_run = _Run(self.unet, self._graphs)
        return self._kept_run

    def __getstate__(self) -> dict[str, Any]:
        # A copy's captures are its own.
        return {**self.__dict__, "_kept_run": None}


class _Run:
    """What is kept from call to call."""

    def __init__(self, unet: UNet, graphs: bool | str | Graphs) -> None:
        self.unet = unet
        self.kept = KeptConditioning()
        self.evaluate = Evaluation(unet, graphs)


def _full_config(unet: UNet) -> dict[str, Any]:
    """The configuration as diffusers' own class writes it, with its defaults."""
    with torch.device("meta"):
        return dict(UNet2DConditionModel(**diffusers_config(unet.config)).config)


def _scale(kwargs: Mapping[str, Any] | None) -> float:
    """The number that adapters are multiplied with."""
    unknown = set(kwargs or {}) - {"scale"}
    if unknown:
        raise ValueError(
            f"PipelineUNet does not compute cross_attention_kwargs[{', '.join(map(repr, sorted(unknown)))}]: "
            "undo(pipe) gives diffusers' UNet back"
        )
    return float((kwargs or {}).get("scale", 1.0))


def _needs_grad(unet: UNet, *values: Any) -> bool:
    tensors = (value for value in values if isinstance(value, Tensor))
    return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in unet.parameters())
