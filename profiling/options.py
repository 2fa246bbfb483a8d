"""The values of options, read from their texts: one line that lists the valid ones where a text is none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal, get_args

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
DEVICE_PATTERN = r"^(cpu|cuda(:\d+)?)$"
# A side, in latent pixels: an image of 32768.
LARGEST_LATENT = 4096
# Of a text or an image, in tokens.
LONGEST_SEQUENCE = 2**20
LARGEST_SEED = 2**64 - 1


class CaseError(ValueError):
    """A wrong value for a case; its text is one line that lists the valid ones."""


def device_kind(device: str) -> str:
    """ "cpu" or "cuda", without the number."""
    return device.partition(":")[0]


_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def split_values(values: Iterable[str]) -> list[str]:
    """The values of an option that may be repeated, split at commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def known_name(option: str, name: str, valid: Iterable[str], noun: str | None = None) -> str:
    """The name, or CaseError where it is none of the valid ones. noun: what it names, the option's unless told."""
    known = tuple(valid)
    if name not in known:
        raise CaseError(f"--{option}: no {noun or option} {name!r}; choose from {', '.join(known)}")
    return name


def known_names(option: str, values: Iterable[str], valid: Iterable[str]) -> tuple[str, ...]:
    """The names given, or CaseError for one that is not valid."""
    known = tuple(valid)
    return tuple(known_name(option, name, known) for name in split_values(values))


def whole(text: str) -> int | None:
    """The number that ASCII digits write; None for any other text, a sign or an underscore in it included."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None


def real(text: str) -> float:
    """The number that ASCII text writes, as python does but without underscores; NaN for any other text."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def whole_within(text: str, least: int, most: int | None = None) -> int:
    """The number within those limits, or ValueError."""
    value = whole(text)
    if value is None or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{text!r} is not a whole number {limits}")
    return value


def whole_number(option: str, text: str, most: int | None = None, *, least: int = 1) -> int:
    """The number within those limits, or CaseError."""
    try:
        return whole_within(text, least, most)
    except ValueError as wrong:
        raise CaseError(f"--{option}: {wrong}") from None


def percentage(option: str, text: str) -> float:
    """The share that "5%" or "0.5%" writes (0.05, 0.005), at least 0 and below 1000 %; or CaseError."""
    share = real(text.removesuffix("%")) / 100
    if not text.endswith("%") or not 0 <= share < 10:
        raise CaseError(f"--{option}: {text!r} is no percentage; give one as in 5%")
    return share


# Units of an amount, each in the unit that its reader returns.
_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4}
_JOULES = {"mJ": 1e-3, "J": 1.0, "kJ": 1e3}


def milliseconds(option: str, text: str) -> float:
    """The positive time that a text such as "50ms" or "1.5 s" gives, or CaseError."""
    return _amount(option, text, _MILLISECONDS, "a time", "50ms or 1.5s")


def joules(option: str, text: str) -> float:
    """The positive energy that a text such as "5J" or "300 mJ" gives, or CaseError."""
    return _amount(option, text, _JOULES, "an energy", "5J or 300mJ")


def _amount(option: str, text: str, units: dict[str, float], what: str, example: str) -> float:
    # "ms" before "s", which ends it.
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if text.endswith(unit)), None)
    value = real(text.removesuffix(unit).strip()) * units[unit] if unit else math.nan
    if not 0 < value < math.inf:
        raise CaseError(
            f"--{option}: {text!r} is not {what}; give a number above 0 with its unit "
            f"({', '.join(units)}), as in {example}"
        )
    return value


def latent_size(option: str, text: str) -> tuple[int, int]:
    """Height and width of "64x96", or of a square "64"; or CaseError."""
    sides = text.split("x")
    if len(sides) > 2:
        raise CaseError(f"--{option}: {text!r} is no size; give height x width in latent pixels, as in 64x96")
    return whole_number(option, sides[0], LARGEST_LATENT), whole_number(option, sides[-1], LARGEST_LATENT)


def dtype_named(text: str) -> DType:
    """The dtype of that name or short name, or CaseError."""
    name = _DTYPE_ALIASES.get(text, text)
    if name not in DTYPES:
        raise CaseError(f"--dtype: no dtype {text!r}; choose from {', '.join(DTYPES)}")
    return name


def best_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_elsewhere(text: str) -> str:
    """A kind of device that another machine may have; CaseError for a text that is none, or names a card."""
    if text not in ("cpu", "cuda"):
        raise CaseError(f"--device: a cluster chooses the card: give cpu or cuda, not {text!r}")
    return text


def device_named(text: str) -> str:
    """The device, if it is here; else CaseError."""
    import torch

    if re.fullmatch(DEVICE_PATTERN, text) is None:
        raise CaseError(f"--device: no device {text!r}; choose from cpu, cuda, cuda:N")
    if text != "cpu" and (torch.device(text).index or 0) >= torch.cuda.device_count():
        raise CaseError(f"--device: {text} is not here ({torch.cuda.device_count()} CUDA devices); choose cpu")
    return text
