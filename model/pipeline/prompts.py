"""`PromptEncoder`: prompts to what the UNet attends to, as diffusers' pipelines of Stable Diffusion do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .text_part import TextPart, tokens_of

# Characters of a prompt that a line quotes, at most.
_QUOTED = 200


@dataclass(frozen=True)
class Embedded:
    """Prompts as the UNet takes them: `states` [B, T, D]; `pooled` [B, P] of Stable Diffusion XL, else None."""

    states: Tensor
    pooled: Tensor | None

    @property
    def zeros(self) -> Embedded:
        """The same shapes, all zero."""
        return Embedded(
            torch.zeros_like(self.states), None if self.pooled is None else torch.zeros_like(self.pooled)
        )

    def __getitem__(self, rows: Sequence[int]) -> Embedded:
        index = torch.tensor(rows, device=self.states.device)
        return Embedded(self.states[index], None if self.pooled is None else self.pooled[index])

    def after(self, before: Embedded) -> Embedded:
        """Both in one batch, `before` first."""
        pooled = None
        if self.pooled is not None and before.pooled is not None:
            pooled = torch.cat([before.pooled, self.pooled])
        return Embedded(torch.cat([before.states, self.states]), pooled)


class PromptEncoder:
    """The text encoders of a folder, loaded.

    Stable Diffusion 1 and 2 take the last states of one encoder, XL those before the last layer of two, side by
    side, and the projected pooled state of the second.
    """

    def __init__(self, parts: Sequence[TextPart], dtype: torch.dtype, device: torch.device | str) -> None:
        self._parts = tuple(parts)
        self._encoders = [part.load(dtype, device) for part in parts]
        self._device = device

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, clip_skip: int = 0, told: Callable[[str], None] | None = None
    ) -> Embedded:
        """The embeddings of B texts, each different text computed once.

        clip_skip: how many of the last layers are left out. told: called with a line for a text that is longer
        than the encoder's positions, which quotes the words that are left out (their beginning, of many).
        """
        different = list(dict.fromkeys(texts))
        found = [
            self._encoded(part, encoder, different, clip_skip, told)
            for part, encoder in zip(self._parts, self._encoders, strict=True)
        ]
        states = torch.cat([states for states, _ in found], dim=-1)
        rows = [different.index(text) for text in texts]
        return Embedded(states, found[-1][1])[rows]

    def _encoded(
        self,
        part: TextPart,
        encoder: nn.Module,
        texts: Sequence[str],
        clip_skip: int,
        told: Callable[[str], None] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] states, and [B, P] the projected pooled state of an encoder that has one."""
        is_xl = len(self._parts) > 1
        ids, mask, left_out = tokens_of(part, texts)
        if told is not None:
            for words in filter(None, left_out):
                more = f" and {len(words) - _QUOTED} more characters" if len(words) > _QUOTED else ""
                told(f"prompt cut at {part.length} tokens; left out: {words[:_QUOTED]!r}{more}")
        # As diffusers: the pipeline of XL gives its encoders no mask, whatever they say.
        out = encoder(
            ids.to(self._device),
            attention_mask=mask.to(self._device) if part.uses_mask and not is_xl else None,
            output_hidden_states=True,
        )
        if is_xl:
            return out.hidden_states[-(clip_skip + 2)], out.text_embeds if part.is_projected else None
        if not clip_skip:
            return out.last_hidden_state, None
        # transformers 4 has one more module in between.
        network: Any = getattr(encoder, "text_model", encoder)
        return network.final_layer_norm(out.hidden_states[-(clip_skip + 1)]), None
