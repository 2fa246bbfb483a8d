"""`TextPart`: one text encoder of a folder with its tokenizer, checked by configuration and headers, then loaded.

The network is built from the sizes in config.json alone, and its tensors are read here: transformers' own loader
would follow other files of the folder (adapters, quantization, kernels, code), some of them to the network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..fields import shown
from ..files import CheckpointError, Source, find, open_all, read_json, some
from ..kinds import NetworkKind
from ..loading import DTYPES, mismatch

# Every field that changes the result, with its largest value; absent fields take transformers' defaults.
_SIZES = {
    "vocab_size": 2**20,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "projection_dim": 2**16,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**16,
    "max_position_embeddings": 2**16,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
# Tensors of one layer: two norms, four projections and two of the MLP, each with its bias.
_TENSORS_OF_A_LAYER = 16
# Whatever a tokenizer's files hold, they are read whole.
_LARGEST_TOKENIZER = 1 << 26
_PREFIX = "text_model."
TEXT_ENCODER = NetworkKind("text encoder", "text_encoder", "CLIPTextModel", frozenset({"vocab_size"}))


@dataclass(frozen=True)
class TextPart:
    """A tokenizer and the text encoder for it, whose weights are still in their files.

    config: the fields of CLIPTextConfig. length: tokens of a prompt, begin and end included. is_projected: the
    encoder has a projection of the pooled state. weights: the path that stands for its files.
    """

    tokenizer: Any = field(repr=False)
    config: Mapping[str, Any]
    length: int
    is_projected: bool
    uses_mask: bool
    weights: Path

    @property
    def width(self) -> int:
        """Of a token's state."""
        return int(_clip_config(self.config).hidden_size)

    @property
    def pooled_width(self) -> int:
        """Of the projection."""
        return int(_clip_config(self.config).projection_dim)

    @property
    def layers(self) -> int:
        return int(_clip_config(self.config).num_hidden_layers)

    def load(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The encoder in eval mode, its weights read once into memory of that dtype and device."""
        with ExitStack() as stack, torch.device("cpu"), torch.inference_mode(False):
            encoder, stored = _opened(self.weights, self.config, self.is_projected, stack)
            state = {}
            for name, tensor in stored.items():
                state[name] = torch.empty(tuple(tensor.get_shape()), dtype=dtype, device=device)
                state[name].copy_(tensor[:])
            encoder.load_state_dict(state, assign=True)
        for module in encoder.modules():
            # The only buffer, which is in no file.
            numbers = getattr(module, "position_ids", None)
            if isinstance(numbers, Tensor):
                module.position_ids = torch.arange(numbers.shape[-1], device=device).expand(1, -1)
        return encoder.eval().requires_grad_(False)


def read_text_part(folder: Path, suffix: str, tokenizer_class: str) -> TextPart:
    """The tokenizer and the text encoder of a pipeline's folder; suffix is "" or "_2", the encoder's place.

    Raises CheckpointError, in one line, for what cannot be read or does not fit together.
    """
    place = folder / f"text_encoder{suffix}"
    raw = read_json(place / "config.json")
    config = _config(raw, place / "config.json")
    clip = _clip_config(config)
    is_projected = bool(suffix)
    weights = _weights(place)
    with ExitStack() as stack:
        _opened(weights, config, is_projected, stack)
    tokenizer, length = _tokenizer(folder / f"tokenizer{suffix}", tokenizer_class, clip)
    return TextPart(tokenizer, config, length, is_projected, raw.get("use_attention_mask") is True, weights)


def _config(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    config = {key: raw[key] for key in (*_SIZES, *_TOKENS, "hidden_act", "layer_norm_eps") if key in raw}
    for key, most in _SIZES.items():
        value = config.get(key, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"{file}: {key} = {shown(value)} is not a whole number from 1 to {most}; download the file again"
            )
    for key in _TOKENS:
        value = config.get(key, 0)
        if type(value) is not int or abs(value) > _SIZES["vocab_size"]:
            raise CheckpointError(
                f"{file}: {key} = {shown(value)} is not a token's number; download the file again"
            )
    if config.get("hidden_act", "gelu") not in _ACTIVATIONS:
        raise CheckpointError(
            f"{file}: hidden_act = {shown(config['hidden_act'])} is not supported; only {', '.join(_ACTIVATIONS)}"
        )
    eps = config.get("layer_norm_eps", 1e-5)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise CheckpointError(
            f"{file}: layer_norm_eps = {shown(eps)} is not a small positive number; download it again"
        )
    usual = transformers.CLIPTextConfig()
    size, heads = (config.get(key, getattr(usual, key)) for key in ("hidden_size", "num_attention_heads"))
    if size % heads:
        raise CheckpointError(f"{file}: {heads} heads do not divide hidden_size = {size}; download the file again")
    return config


def _clip_config(config: Mapping[str, Any]) -> Any:
    return transformers.CLIPTextConfig(**config)


def _weights(place: Path) -> Path:
    """The path that stands for the encoder's weights: of `model`, or of its only variant."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if os.path.isfile(place / name):
            return place / name
    try:
        names = sorted(os.listdir(place))
    except OSError as error:
        raise CheckpointError(f"{place}: not readable: {error.strerror}; check its permissions") from error
    variants = [n for n in names if n.startswith("model.") and n.endswith((".safetensors", ".index.json"))]
    variants = [n for n in variants if n.endswith(".safetensors.index.json")] or [
        n for n in variants if n.endswith(".safetensors")
    ]
    if len(variants) > 1:
        raise CheckpointError(f"{place}: several sets of weights, {some(variants)}; keep one")
    if not variants:
        pickled = next((name for name in names if name.endswith((".bin", ".pt", ".ckpt"))), None)
        found = "no weights in it" if pickled is None else f"{pickled} is a pickle, which is not opened"
        raise CheckpointError(
            f"{place}: {found}; save them as .safetensors with "
            "transformers.CLIPTextModel.from_pretrained(folder).save_pretrained(folder), where you trust the file"
        )
    return place / variants[0]


def _opened(
    weights: Path, config: Mapping[str, Any], is_projected: bool, stack: ExitStack
) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder without memory, and the slice of a file for each of its tensors."""
    source: Source = find(weights, TEXT_ENCODER)
    tensors, _ = open_all(source, stack)
    clip = _clip_config(config)
    if clip.num_hidden_layers * _TENSORS_OF_A_LAYER > len(tensors):
        raise CheckpointError(
            f"{weights}: {len(tensors)} tensors, too few for the {clip.num_hidden_layers} layers that config.json "
            "tells; download both again"
        )
    kind = transformers.CLIPTextModelWithProjection if is_projected else transformers.CLIPTextModel
    with torch.device("meta"):
        encoder: nn.Module = kind(clip)
    wanted = encoder.state_dict()
    # Old files keep a buffer. Releases of transformers name CLIPTextModel's tensors with the prefix or without.
    found = {key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}
    if not is_projected:
        prefix = _PREFIX if next(iter(wanted)).startswith(_PREFIX) else ""
        found = {prefix + key.removeprefix(_PREFIX): tensor for key, tensor in found.items()}
        found.pop("text_projection.weight", None)
    problem = mismatch(
        {key: tuple(tensor.shape) for key, tensor in wanted.items()},
        {key: tuple(tensor.get_shape()) for key, tensor in found.items()},
    )
    odd = [key for key, tensor in found.items() if tensor.get_dtype() not in DTYPES]
    problems = [problem, f"{len(odd)} not of a float dtype: {some(odd)}" if odd else ""]
    if told := "; ".join(filter(None, problems)):
        raise CheckpointError(f"{weights}: the tensors are not those of config.json: {told}; download both again")
    return encoder, found


def _tokenizer(place: Path, class_name: str, clip: Any) -> tuple[Any, int]:
    """The tokenizer and how many tokens it makes of a prompt."""
    raw = read_json(place / "tokenizer_config.json")
    length = raw.get("model_max_length", clip.max_position_embeddings)
    if type(length) is not int or not 3 <= length <= clip.max_position_embeddings:
        raise CheckpointError(
            f"{place / 'tokenizer_config.json'}: model_max_length = {shown(length)} does not fit the "
            f"{clip.max_position_embeddings} positions of the text encoder; set it to that number"
        )
    _check_files(place)
    # What a tokenizer's file may name: a place outside the folder.
    for key in ("vocab_file", "merges_file", "tokenizer_file"):
        if raw.get(key) not in (None, *_NAMES[key]):
            raise CheckpointError(
                f"{place / 'tokenizer_config.json'}: {key} names another file, {shown(raw[key])}; remove the line"
            )
    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(str(place), local_files_only=True)
        ids = tokenizer([_TRIAL, ""], padding="max_length", max_length=length, truncation=True).input_ids
        tokens = [token for row in ids for token in row]
        largest = max(tokenizer.get_vocab().values())
    # The tokenizers library panics with a BaseException of its own.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{place}: transformers cannot read the tokenizer ({why}); download it again"
        ) from error
    if any(len(row) != length for row in ids):
        raise CheckpointError(f"{place}: the tokenizer does not pad to {length} tokens; download it again")
    if not all(type(token) is int and token >= 0 for token in tokens) or largest >= clip.vocab_size:
        raise CheckpointError(
            f"{place}: its tokens run to {largest}, beyond the {clip.vocab_size} that the text encoder knows; "
            "take both from one checkpoint"
        )
    return tokenizer, length


_TRIAL = "a lighthouse at night, in heavy rain"
_NAMES = {
    "vocab_file": ("vocab.json",),
    "merges_file": ("merges.txt",),
    "tokenizer_file": ("tokenizer.json",),
}


def _check_files(place: Path) -> None:
    there = [name for (name,) in _NAMES.values() if os.path.isfile(place / name)]
    if "tokenizer.json" not in there and len(there) < 2:
        raise CheckpointError(
            f"{place}: neither tokenizer.json nor vocab.json and merges.txt; download the folder again"
        )
    others = ("special_tokens_map.json", "added_tokens.json")
    for name in (*there, *(other for other in others if os.path.isfile(place / other))):
        if name.endswith(".json"):
            read_json(place / name, _LARGEST_TOKENIZER)
        elif os.path.getsize(place / name) > _LARGEST_TOKENIZER:
            raise CheckpointError(f"{place / name}: more than {_LARGEST_TOKENIZER >> 20} MB; download it again")


def tokens_of(part: TextPart, texts: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
    """Token numbers [B, length] int64, their attention mask, and of each text the words that did not fit."""
    padded = part.tokenizer(
        list(texts), padding="max_length", max_length=part.length, truncation=True, return_tensors="pt"
    )
    left_out = []
    for whole in part.tokenizer(list(texts), verbose=False).input_ids:
        # Begin and end are tokens too.
        rest = whole[part.length - 1 : -1]
        left_out.append(part.tokenizer.decode(rest).strip() if rest else "")
    return padded.input_ids, padded.attention_mask, left_out
