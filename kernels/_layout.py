"""Strided memory as kernels address it: rows of contiguous columns, and the pixels of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._launch import ceil_div, next_power_of_two
from ._triton import jit, tl

# Rows and pixels are numbered in 32 bits inside a kernel, with room for a last block; their offsets are 64-bit.
MAX_INDEX = 2**30


@dataclass(frozen=True)
class Rows:
    """The leading dimensions of tensors as `count` rows; row r starts at (r // inner, r % inner) @ strides."""

    count: int
    inner: int
    strides: tuple[tuple[int, int], ...]

    @property
    def flat(self) -> bool:
        """Whether one stride leads from each row to the next."""
        return self.inner == self.count


def collapse_rows(tensors: Sequence[Tensor]) -> Rows | None:
    """The rows of tensors of one shape [..., C], or None where more than two strides are needed to number them."""
    shape = tensors[0].shape[:-1]
    dims = [(size, [t.stride(i) for t in tensors]) for i, size in enumerate(shape) if size != 1]
    merged: list[tuple[int, list[int]]] = []
    for size, strides in dims:
        if merged and all(outer == stride * size for outer, stride in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        return None
    while len(merged) < 2:
        merged.insert(0, (1, [0] * len(tensors)))
    (outer_size, outer_strides), (inner, inner_strides) = merged
    return Rows(outer_size * inner, inner, tuple(zip(outer_strides, inner_strides, strict=True)))


def row_count(x: Tensor) -> int:
    """The rows of a tensor [..., C]."""
    return x.numel() // max(x.shape[-1], 1)


def row_reasons(rows: Rows | None, **tensors: Tensor | None) -> list[str]:
    """Why kernels over rows cannot address these tensors [..., C]; empty if they can."""
    reasons = [
        f"{name}'s last dimension has stride {tensor.stride(-1)}, not 1"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    ]
    if rows is None:
        reasons.append("the leading dimensions do not collapse to two strides")
    elif rows.count > MAX_INDEX:
        reasons.append(f"{rows.count} rows are more than {MAX_INDEX}")
    return reasons


@dataclass(frozen=True)
class ImageStrides:
    """Strides of [B, C, H, W]; `flat` where pixel h * W + w lies at (h * W + w) * w-stride."""

    b: int
    c: int
    h: int
    w: int
    flat: bool


def image_strides(x: Tensor) -> ImageStrides:
    """The strides of an image batch, with those of dimensions of size one set so that it is flat if it can be."""
    b, c, h, w = x.stride()
    height, width = x.shape[2:]
    if width == 1:
        w = h
    return ImageStrides(b, c, h, w, flat=height == 1 or width == 1 or h == w * width)


def named_strides(letter: str, strides: ImageStrides, axes: str = "bchw") -> dict[str, int]:
    """Those of these axes as a kernel's arguments: {"stride_xb": ...} for the letter x."""
    return {f"stride_{letter}{axis}": getattr(strides, axis) for axis in axes}


def image_reasons(x: Tensor) -> list[str]:
    """Why kernels over pixels cannot address an image batch; empty if they can."""
    pixels = x.shape[2] * x.shape[3]
    return [f"{pixels} pixels are more than {MAX_INDEX}"] if pixels > MAX_INDEX else []


def column_block(columns: int, most: int) -> int:
    """The power of two up to `most` that wastes the fewest lanes over `columns`; the largest of those."""
    sizes = [1 << i for i in range(most.bit_length()) if (1 << i) >= min(64, next_power_of_two(columns))]
    return min(sizes, key=lambda size: (ceil_div(columns, size) * size, -size))


def memory_format(x: Tensor) -> torch.memory_format:
    """That of an operator's result: channels-last if the image batch x is, else contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


@jit
def row_offsets(rows, inner, stride_outer, stride_inner, FLAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """64-bit offsets of rows, as `Rows` numbers them."""
    if FLAT:
        return rows.to(tl.int64) * stride_inner
    else:
        return (rows // inner).to(tl.int64) * stride_outer + (rows % inner).to(tl.int64) * stride_inner


@jit
def pixel_offsets(pixels, width, stride_h, stride_w, FLAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """64-bit offsets of pixels numbered row by row, as `ImageStrides` gives them."""
    if FLAT:
        return pixels.to(tl.int64) * stride_w
    else:
        return (pixels // width).to(tl.int64) * stride_h + (pixels % width).to(tl.int64) * stride_w
