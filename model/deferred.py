"""The biases that a step adds later than they arise: constants that depend on the weights alone.

To add a bias where it arises is a launch, or keeps a sum out of the matmul before it. A constant per channel can
wait: the next norm takes it as its shift, the next residual add as its bias. An in-place matmul adds none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .blocks import ResBlock, Transformer, TransformerBlock
from .route import Stop


class Biases(NamedTuple):
    """The deferred biases that a stop takes; None for nothing to add.

    before   [Cin]: missing from the ResBlock's input, its skip's channels included
    bias     [C]: added by the ResBlock's sum
    between  [C]: missing from the transformer's input
    closing  [C]: added by the transformer's sum
    tokens   [(3 L - 1) C]: missing from the tokens of L transformer blocks at each norm but the first
    tail     [C]: added by the sum of a transformer of one block whose tail adds the biases of its tokens itself
    """

    before: Tensor | None
    bias: Tensor | None
    between: Tensor | None
    closing: Tensor | None
    tokens: Tensor | None
    tail: Tensor | None


def deferred_biases(route: Iterable[Stop], first: Tensor) -> list[list[Tensor]]:
    """The fields of the `Biases` of every stop, then the bias missing at the last norm.

    first [C]: the bias of the first convolution. A field is a list of vectors to be concatenated, empty for None.
    """
    found: list[list[Tensor | None]] = []
    missing: Tensor | None = first
    skips = [missing]
    for stop in route:
        before = _beside(missing, skips.pop() if stop.pops else None, stop.resblock.norm1.num_channels)
        fields, missing = _at(stop, before)
        found += fields
        if stop.pushes:
            skips.append(missing)
        if stop.resample is not None:
            missing = stop.resample.conv.bias
            if stop.pushes:
                skips.append(missing)
    return [[vector for vector in field if vector is not None] for field in (*found, [missing])]


def biases_of(route: Sequence[Stop], first: Tensor) -> tuple[list[Biases], Tensor | None]:
    """The `Biases` of every stop of a network without skips, and the bias missing at the last norm."""
    *fields, last = [vectors[0] if vectors else None for vectors in deferred_biases(route, first)]
    count = len(Biases._fields)
    return [Biases(*fields[i : i + count]) for i in range(0, len(fields), count)], last


def split_biases(values: Tensor, sizes: Sequence[int]) -> tuple[Iterator[Biases], Tensor | None]:
    """The `Biases` of every stop and the bias missing at the last norm, as views of `values` [sum(sizes)].

    sizes: the length of each field, 0 for None.
    """
    pieces = iter(values.split([size for size in sizes if size]))
    *fields, last = [next(pieces) if size else None for size in sizes]
    count = len(Biases._fields)
    return (Biases(*fields[i : i + count]) for i in range(0, len(fields), count)), last


def _at(stop: Stop, before: Tensor | None) -> tuple[list[list[Tensor | None]], Tensor | None]:
    """The fields of a stop's `Biases`, and the bias missing from its result."""
    resblock, transformer = stop.resblock, stop.transformer
    # A separate residual add takes a bias at no cost.
    adds = resblock.shortcut is None
    # The convolution of a resampling pads with zeros: no bias may be missing from its input.
    whole = stop.resample is not None
    missing = after_resblock(resblock, before)
    if transformer is None:
        bias, after = (missing, None) if adds or whole else (None, missing)
        return [[before], [bias], [], [], [], []], after
    in_tokens = missing_in_tokens(transformer)
    if adds and whole:
        # Adds early the bias that the in-place matmul omits; the transformer's norm subtracts it.
        ahead = after_transformer(transformer, None, in_tokens)
        tail = tail_bias(transformer, None, in_tokens)
        return [[before], [missing + ahead], [-ahead], [], [*in_tokens[:-1]], tail], None
    bias, between = (missing, None) if adds else (None, missing)
    total = after_transformer(transformer, between, in_tokens)
    closing, after = (total, None) if whole else (None, total)
    tail = tail_bias(transformer, closing, in_tokens)
    return [[before], [bias], [between], [closing], [*in_tokens[:-1]], tail], after


def after_resblock(block: ResBlock, before: Tensor | None) -> Tensor:
    """[Cout]: the bias missing from the sum of both branches where `before` [Cin] is missing from the input."""
    bias = cast(Tensor, block.conv2.bias)
    if block.shortcut is None:
        return bias if before is None else before + bias
    bias = bias + block.shortcut.bias
    return bias if before is None else torch.addmv(bias, block.shortcut.weight, before)


def missing_in_tokens(transformer: Transformer) -> list[Tensor]:
    """[C] each: the bias missing from the tokens after each of the three sums of each block."""
    found: list[Tensor] = []
    for block in cast(Iterable[TransformerBlock], transformer.blocks):
        for layer in (block.to_out, block.cross_out, block.ff_out):
            bias = cast(Tensor, layer.bias)
            found.append(found[-1] + bias if found else bias)
    return found


def after_transformer(transformer: Transformer, before: Tensor | None, in_tokens: Sequence[Tensor]) -> Tensor:
    """[C]: the bias missing from the sum with the input where `before` [C] is missing from the input."""
    bias = transformer.proj_out.bias if before is None else before + transformer.proj_out.bias
    return torch.addmv(bias, transformer.proj_out.weight, in_tokens[-1]) if in_tokens else bias


def tail_bias(
    transformer: Transformer, closing: Tensor | None, in_tokens: Sequence[Tensor]
) -> list[Tensor | None]:
    """[C]: what the sum adds, `closing` or nothing, less what the biases in the tokens of one block have added."""
    # Of the three sums of one block.
    if len(in_tokens) != 3:
        return []
    added = torch.mv(transformer.proj_out.weight, in_tokens[-1])
    return [-added if closing is None else closing - added]


def _beside(x: Tensor | None, skip: Tensor | None, channels: int) -> Tensor | None:
    """x and skip in a row [channels], with zeros for one that is None; None for both."""
    given = [part for part in (x, skip) if part is not None]
    missing = channels - sum(map(len, given))
    if given and missing:
        zeros = given[0].new_zeros(missing)
        given = [zeros, *given] if x is None else [*given, zeros]
    if len(given) < 2:
        return given[0] if given else None
    return torch.cat(given)
