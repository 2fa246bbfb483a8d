"""Images as PNG files with texts in them: written whole or not at all, read back."""

from __future__ import annotations

import io
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor


def as_bytes(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] as uint8 [B, H, W, 3], rounded to the nearest, ties to even."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images [B, H, W, 3] as one [rows * H, columns * W, 3], row by row; black where a row is not full.

    columns: as near to a square as can be unless given.
    """
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    rows = math.ceil(count / columns)
    whole = images.new_zeros((rows * columns, height, width, channels))
    whole[:count] = images
    return (
        whole.view(rows, columns, height, width, channels)
        .transpose(1, 2)
        .reshape(rows * height, columns * width, channels)
    )


def png(image: Tensor, texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG file of uint8 [H, W, 3] with texts by keyword: tEXt where they are Latin-1, else iTXt."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    content = io.BytesIO()
    Image.fromarray(image.numpy()).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def save_png(path: str | Path, pixels: Tensor, texts: Mapping[str, str] | None = None) -> None:
    """Writes images [B, 3, H, W] in [0, 1], several as one grid; the file is whole or as it was before."""
    write_whole(Path(path), png(grid(as_bytes(pixels)), texts))


def read_png(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """uint8 [H, W, 3] and the texts of a PNG file. Raises OSError or ValueError for what is none."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        texts = {str(key): str(text) for key, text in getattr(image, "text", {}).items()}
        content = bytearray(image.convert("RGB").tobytes())
        return torch.frombuffer(content, dtype=torch.uint8).view(image.height, image.width, 3), texts


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file at once: who reads it, or an interrupt, meets the old or the new, never a part."""
    unfinished = path.with_name(f".ldmperf-{secrets.token_hex(8)}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
