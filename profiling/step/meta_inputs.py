"""What a network takes beside the context, as tensors on "meta": how it divides changes no cost of a step."""

from __future__ import annotations

from typing import Any

import torch

from ldmperf.model import UNetConfig


def added_on_meta(config: UNetConfig, samples: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments of `UNet.condition` beside the context, for a batch of so many samples."""
    added: dict[str, Any] = {}
    with torch.device("meta"):
        if config.added_dim is not None:
            # All of the width as text, and no sizes.
            added["text_embeds"] = torch.empty(samples, config.added_dim, dtype=dtype)
            added["time_ids"] = torch.empty(samples, 0, dtype=dtype)
        if config.num_class_embeds is not None:
            added["class_labels"] = torch.empty(samples, dtype=torch.int64)
        if config.time_cond_proj_dim is not None:
            added["timestep_cond"] = torch.empty(samples, config.time_cond_proj_dim, dtype=dtype)
    return added
