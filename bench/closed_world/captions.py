"""Captions as a network reads them: a token for each factor, a frozen embedding for each token."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from .scenes import COUNTS, FACTORS

TOKENS = len(FACTORS)
CONTEXT_DIM = 32
# Tokens of a factor come after those of the factors before it; the last ones stand for "no caption".
_OFFSETS = torch.tensor([sum(COUNTS[:i]) for i in range(TOKENS)])
_NONE = sum(COUNTS)
_SEED = 77


@cache
def _table() -> Tensor:
    """A sign in each dimension of each token [sum of values + 6, 32]: unit variance, the same bits everywhere."""
    words = np.random.Philox(key=_SEED).random_raw((_NONE + TOKENS) * CONTEXT_DIM)
    signs = (np.asarray(words) >> np.uint64(63)).astype(np.float32) * 2 - 1
    return torch.from_numpy(signs.reshape(-1, CONTEXT_DIM))


def embedded(factors: Tensor, told: Tensor | None = None) -> Tensor:
    """The context [n, 6, 32] of factors [n, 6]; where `told` [n] is false, of no caption."""
    tokens = factors + _OFFSETS
    if told is not None:
        tokens = torch.where(told[:, None], tokens, _none_tokens(len(factors)))
    return _table()[tokens]


def none_embedded(count: int) -> Tensor:
    """The context [count, 6, 32] of no caption."""
    return _table()[_none_tokens(count)]


def _none_tokens(count: int) -> Tensor:
    return torch.arange(_NONE, _NONE + TOKENS).expand(count, TOKENS)
