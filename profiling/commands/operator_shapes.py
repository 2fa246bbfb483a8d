"""What the commands on one call of an operator share: options of its shape, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import LONGEST_SEQUENCE, CaseError, whole
from .shared import stop, whole_option

if TYPE_CHECKING:
    from ..static.shapes import Shape

# The largest number that most options take: a program grows with the channels, and compiling it takes time
# and memory.
_MOST = 2**14


def _number(text: str, least: int = 1, most: int = _MOST) -> Any:
    return Annotated[int | None, whole_option(text, least, most)]


def size_options(batch: str, side: int, head_dim: str = "") -> Mapping[str, Any]:
    """By the names that `Shape` has for them. batch: its help; side: pixels unless told; head_dim: more help."""
    return {
        "batch": _number(batch),
        "channels": _number("Channels of the image, or of the tokens of the result."),
        "height": _number(f"Pixels; {side} unless told."),
        "width": _number(f"Pixels; {side} unless told."),
        "groups": _number("Groups of a group norm; 32 unless told."),
        "skip_channels": _number("Channels of a skip connection that is normalized with the image.", 0),
        "statistics": _number("1: an image's statistics come with it.", 0, 1),
        "head_dim": Annotated[
            str | None, typer.Option(help=f"Size of a head of attention, 40 unless told{head_dim}.")
        ],
        "heads": _number("Heads of attention; 8 unless told."),
        "context": _number(
            "Tokens of the context attended to, 77 of a text; 0, unless told: the image's own.",
            0,
            LONGEST_SEQUENCE,
        ),
        "features": _number("Channels of a matmul's result; four times its own unless told."),
    }


def option(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def head_dim_of(text: str, *, or_family: bool = False) -> int:
    """The size of a head, or CaseError; or_family: the option takes `family` too."""
    value = whole(text)
    if value is None or value % 4 or not 4 <= value <= 384:
        multiple = "a multiple of 4 up to 384"
        raise CaseError(
            f"--head-dim {text} is " + (f"neither {multiple} nor `family`" if or_family else f"not {multiple}")
        )
    return value


def known_operators() -> list[str]:
    """The operators that shapes are made for."""
    from ldmperf.kernels import OPERATORS

    from ..static.shapes import SHAPES

    return [name for name in OPERATORS if name in SHAPES]


def check_known(what: str, name: str, names: Collection[str], others: str = "") -> None:
    """CaseError for a name that is none of them; others: what the list goes on with."""
    if name not in names:
        raise CaseError(f"unknown {what} {name!r}; there are {', '.join(names)}{others}")


def shape_of(
    operator: str, dtype: str, given: Mapping[str, int]
) -> tuple[Callable[[Shape], dict[str, Any]], Shape]:
    """What makes the operator's arguments, and of which numbers."""
    import torch

    from ..static.shapes import SHAPES, Shape

    build, takes, defaults = SHAPES[operator]
    for name in given:
        if name not in takes:
            raise CaseError(f"{operator} takes no {option(name)}; it takes {', '.join(map(option, takes))}")
    shape = Shape(getattr(torch, dtype), **{**defaults, **given})
    channels = shape.channels + shape.skip_channels
    if "groups" in takes and channels % shape.groups:
        raise CaseError(f"{channels} channels do not divide into {shape.groups} groups; choose --groups")
    return build, shape


@contextmanager
def refusals_in_one_line(kernel: str, arch: str) -> Iterator[None]:
    """Ends the command with one line and exit code 1 where the compiler, or the folder it writes to, refuses."""
    from triton.errors import TritonError

    from ..static.compile import cache_refused

    try:
        yield
    except OSError as failure:
        reason = cache_refused(failure)
    # The compiler's passes raise RuntimeError.
    except (TritonError, RuntimeError) as failure:
        reason = f"{kernel} of this shape does not compile for {arch} ({last_line(failure)}); choose a smaller one"
    else:
        return
    stop(reason, 1)


def last_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[-1].strip()
