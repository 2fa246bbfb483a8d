"""Components of a pipeline with random weights: text encoder, UNet and autoencoder, made without a disk."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from ldmperf.model import RELEASED, Autoencoder, AutoencoderConfig, UNet, UNetConfig

from ..measure.outcomes import Unsupported
from ..peer import diffusers_autoencoder, diffusers_scheduler, diffusers_unet, import_diffusers
from ..trajectory.case import Case
from ..trajectory.network import randomize

# Of every CLIP tokenizer: it starts a text, ends it and fills it up.
_VOCABULARY = 49408


@dataclass(frozen=True)
class PipelineShape:
    """The components' configurations; `text` is of transformers' CLIPTextModel."""

    unet: UNetConfig
    text: Mapping[str, Any]
    autoencoder: AutoencoderConfig


# Stable Diffusion 1: text_encoder/config.json and vae/config.json of its releases.
PIPELINES: dict[str, PipelineShape] = {
    "SD1.5": PipelineShape(
        RELEASED["SD1.5"],
        {
            "vocab_size": _VOCABULARY,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
        AutoencoderConfig(),
    )
}


def shape_of(case: Case) -> PipelineShape:
    """The shape that the case names; `Unsupported` for a name that is none."""
    if case.unet not in PIPELINES:
        raise Unsupported(f"no pipeline of {case.label}; choose --size {', '.join(PIPELINES)}")
    return PIPELINES[case.unet]


class Components(nn.Module):
    """The networks of a pipeline, in one dtype on one device: every backend runs on these very weights.

    text: transformers' CLIPTextModel. unet, autoencoder: ours, with the reference operators.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        transformers = _transformers()
        shape = shape_of(case)
        end = shape.text["vocab_size"] - 1
        tokens = {"max_position_embeddings": case.context_tokens, "bos_token_id": end - 1, "eos_token_id": end}
        dtype: torch.dtype = getattr(torch, case.dtype)
        with torch.device(case.device):
            self.text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape.text, **tokens))
            self.unet = UNet(shape.unet, backend="torch")
            self.autoencoder = Autoencoder(shape.autoencoder, backend="torch")
        self.to(dtype)
        for place, network in enumerate((self.text, self.unet, self.autoencoder)):
            randomize(network, case.seed + place)
        self.eval().requires_grad_(False)

    def pipeline(self, sampler: str) -> Any:
        """diffusers' StableDiffusionPipeline on these weights: modules of its own, memory shared."""
        diffusers = import_diffusers()
        pipe = diffusers.StableDiffusionPipeline(
            vae=diffusers_autoencoder(self.autoencoder),
            text_encoder=sharing(self.text),
            tokenizer=NumberTokenizer(self.text.config),
            unet=diffusers_unet(self.unet),
            scheduler=diffusers_scheduler(sampler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def decoder_on(self, operators: str) -> Autoencoder:
        """The autoencoder with its operators on that backend, on the same memory."""
        with torch.device("meta"):
            other = Autoencoder(self.autoencoder.config, backend=operators)
        other.load_state_dict(self.autoencoder.state_dict(), assign=True)
        return other.eval().requires_grad_(False)


def sharing(network: nn.Module) -> Any:
    """A copy whose parameters and buffers are those of `network`: what is put into the one is not in the other."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


class NumberTokenizer:
    """In place of a tokenizer, whose vocabulary is a file: a text is the numbers of its tokens, as "320 1125"."""

    # Words that were added by a textual inversion.
    added_tokens_encoder: Mapping[str, int] = MappingProxyType({})

    def __init__(self, config: Any) -> None:
        self.model_max_length = config.max_position_embeddings
        self._end = config.eos_token_id

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, each a token."""
        return text.split()

    def __call__(self, texts: str | Sequence[str], *, padding: str = "longest", **options: Any) -> Any:
        """input_ids [len(texts), T] int64: start, the numbers, end, and ends up to the longest or to the limit."""
        numbers = [
            [int(number) for number in text.split()] for text in ([texts] if isinstance(texts, str) else texts)
        ]
        rows = [[self._end - 1, *row[: self.model_max_length - 2], self._end] for row in numbers]
        length = self.model_max_length if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [self._end] * (length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise Unsupported("transformers is not installed: pip install transformers") from None
