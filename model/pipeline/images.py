"""Images as PNG files with texts in them: written whole or not at all, read back."""

from __future__ import annotations

import io
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor


def as_bytes(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] as uint8 [B, H, W, 3], rounded to the nearest, ties to even."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def check_finite(
    latents: Tensor, unet_dtype: torch.dtype, pixels: Tensor, decoder_dtype: torch.dtype, seeds: Sequence[int]
) -> None:
    """Raises FloatingPointError for latents or images [B, ...] that are not finite: a PNG file shows black."""
    for what, values, dtype in (("the UNet", latents, unet_dtype), ("the autoencoder", pixels, decoder_dtype)):
        finite = values.flatten(1).isfinite().all(1).tolist()
        if wrong := [seed for seed, is_finite in zip(seeds, finite, strict=True) if not is_finite]:
            raise FloatingPointError(
                f"seed {wrong[0]}: {what} gives what is not finite in {str(dtype).removeprefix('torch.')}; take "
                "another dtype (bfloat16, float32), or weights that are whole"
            )


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


def save_png(
    path: str | Path, images: Tensor, texts: Mapping[str, str] | None = None, columns: int | None = None
) -> None:
    """Writes images, uint8 [B, H, W, 3], several as a `grid`, with texts by keyword: a whole file or nothing.

    A text is kept as tEXt where it is Latin-1, else as iTXt. Raises OSError where the file cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    content = io.BytesIO()
    Image.fromarray(grid(images, columns).numpy()).save(content, "PNG", pnginfo=info)
    path = Path(path)
    # Who reads the file, or an interrupt, meets the old or the new, never a part.
    unfinished = path.with_name(f".ldmperf-{secrets.token_hex(8)}.tmp")
    try:
        unfinished.write_bytes(content.getvalue())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_texts(path: str | Path) -> dict[str, str]:
    """The texts before the pixels of a PNG file, by keyword; no pixel is read.

    Raises OSError, or SyntaxError as Pillow does, for what is no PNG file.
    """
    # Not Image.open, which refuses images of more pixels than a grid may have.
    with PngImagePlugin.PngImageFile(path) as image:
        return {str(key): str(text) for key, text in image.info.items() if isinstance(text, str)}
