"""Counter-based noise: Philox4x32-10 keyed by the seed of an image, and Box-Muller on its words.

Element `e` of an image (row-major index of its logical [C, H, W]) belongs to group `e // 4` and lane `e % 4`:

    key     = (low, high) 32 bits of the image's seed
    counter = (group low, group high, step, stream)
    word    = Philox4x32-10(counter, key)                       4 words of 32 bits a group
    lanes 0, 1 = r cos(theta), r sin(theta) of words 0 and 1;   lanes 2, 3 of words 2 and 3
    r       = sqrt(-2 log((word_a + 0.5) 2^-32)),   theta = 2 pi word_b 2^-32

So a seed gives the same noise on every device, alone or in any batch, whatever the memory layout.
Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.3.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import whole
from ._triton import jit, tl

INITIAL_NOISE = 0
STEP_NOISE = 1

_MASK = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_TWO_POW_MINUS_32 = 2.0**-32


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; `word` is int64 in [0, 2^32)."""
    # In two halves of 16 bits: the full product overflows int64, and signed overflow is undefined in C++.
    upper = word * (multiplier >> 16)
    lower = word * (multiplier & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & _MASK
    return high, low


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Philox4x32 bijection; every word is an int64 tensor in [0, 2^32), all broadcast together.

    Source: Salmon et al. (SC 2011), figure 2; the constants are those of Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    # The half keeps the logarithm finite; float32 on every device, so the numbers agree everywhere.
    uniform = (radius_word.to(torch.float32) + 0.5) * _TWO_POW_MINUS_32
    theta = (angle_word.to(torch.float32) * _TWO_POW_MINUS_32) * (2.0 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    return radius * torch.cos(theta), radius * torch.sin(theta)


def seed_tensor(seeds: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """Seeds as int64 [B] on `device`, modulo 2^64; ValueError for anything but integers, which may be numpy's.

    The host does not wait for the device, unless `device` is the CPU and the seeds are elsewhere.
    """
    if isinstance(seeds, Tensor):
        if seeds.dim() != 1 or seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
            raise ValueError(
                f"seeds must be integers [B], one per image, not {seeds.dtype} {list(seeds.shape)}; for one image "
                "give a tensor of one element"
            )
        if seeds.device.type != "cpu":
            return seeds.to(device=device, dtype=torch.int64)
        # Of a copy in pageable memory, which is read before the call returns.
        return seeds.to(torch.int64, copy=True).to(device, non_blocking=True)
    if isinstance(seeds, torch.Generator):
        raise ValueError(
            "seeds must be integers, one per image, not a generator; [generator.initial_seed()] is one"
        )
    # An array of numpy is no Sequence.
    values = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    try:
        if not isinstance(values, Sequence):
            raise TypeError
        numbers = [whole("seed_tensor", "seeds", value) for value in values]
    except (TypeError, ValueError):
        shown = " ".join(reprlib.repr(seeds).split())
        raise ValueError(
            f"seeds must be a list of integers, one per image, not {shown}; for one image give [seed]"
        ) from None
    host = torch.tensor([(n + 2**63) % 2**64 - 2**63 for n in numbers], dtype=torch.int64, device="cpu")
    return host.to(device, non_blocking=True)


def philox_normal(
    seeds: Tensor, shape: Sequence[int], step: int | Tensor = 0, stream: int = INITIAL_NOISE
) -> Tensor:
    """Standard normal noise, float32 [B, *shape], on the device of `seeds`.

    seeds   int64 [B], one per image; every bit counts, the sign among them
    shape   of one image
    step    an integer, or an int64 tensor of one element on that device (never read by the host); modulo 2^32
    stream  INITIAL_NOISE (0) or STEP_NOISE (1)

    Raises ValueError for seeds of another shape or dtype.
    """
    if not isinstance(seeds, Tensor):
        raise ValueError(f"seeds must be an int64 tensor [B], not a {type(seeds).__name__}; seed_tensor makes one")
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds must be an int64 tensor [B], not {seeds.dtype} of shape {list(seeds.shape)}")
    numel = math.prod(shape)
    group = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seeds.device)[None, :]
    step_word = (
        step.reshape(1, 1) if isinstance(step, Tensor) else torch.full_like(group, operator.index(step) & _MASK)
    ) & _MASK
    key = ((seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None])
    words = philox4x32((group & _MASK, group >> 32, step_word, torch.full_like(group, stream)), key)
    lanes = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1)
    return lanes.flatten(1)[:, :numel].reshape(seeds.shape[0], *shape)


@jit
def philox_normal_lanes(seed, element, step, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same inside a kernel: float32 noise of `element` (int64, any shape) of the image with `seed` (int64)."""
    group = element >> 2
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    step_word = (step & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, step_word, tl.full([], STREAM, tl.uint32))
    # An element needs one pair of its group's words, and one of the pair's two numbers.
    first_pair = (element & 2) == 0
    radius_word = tl.where(first_pair, w0, w2)
    angle_word = tl.where(first_pair, w1, w3)
    uniform = (radius_word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    # cos(theta), or sin(theta) = cos(theta - pi / 2), in quarter turns: a quarter is exact in float32, so it needs
    # none of the general reduction of cos(), whose slow path takes local memory.
    turns = angle_word.to(tl.float32) * 9.313225746154785e-10
    nearest = tl.floor(turns + 0.5)
    angle = (turns - nearest) * 1.5707963267948966
    quarter = nearest.to(tl.int32) - (element & 1).to(tl.int32)
    z = angle * angle
    # Cephes' sinf and cosf on [-pi / 4, pi / 4].
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    cosine = (((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z - 0.5) * z + 1.0
    # Quarters 0, 1, 2, 3: cos, -sin, -cos, sin.
    value = tl.where((quarter & 1) == 0, cosine, sine)
    return radius * tl.where(((quarter + 1) & 2) == 0, value, -value)
