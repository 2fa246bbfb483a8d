"""Memory that is set aside for captured CUDA graphs, which torch's own counters do not see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def graph_memory(device: torch.device) -> int:
    """Bytes that are set aside for captured CUDA graphs and hold no tensor that torch counts as allocated."""
    return unused_in_pools(torch.cuda.memory_snapshot()) if device.type == "cuda" else 0


def unused_in_pools(segments: Iterable[Mapping[str, Any]]) -> int:
    """Unused bytes in the allocator's segments outside the pool that all tensors share."""
    return sum(
        s["total_size"] - s["allocated_size"] for s in segments if s.get("segment_pool_id", (0, 0)) != (0, 0)
    )
