"""Outcomes: the status of what may fail, with one line that says why, and its memory given back."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from ldmperf.kernels import KernelUnsupported
from ldmperf.model import UnsupportedConfig

from ..terminal.visible import visible
from .recorded import Status

T = TypeVar("T")
# How torch and the CUDA libraries word it where they raise no OutOfMemoryError.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
_LONGEST_MESSAGE = 400


def failure(error: Exception) -> tuple[Status, str]:
    """The status that an exception stands for, and its first line with its type."""
    text = str(error)
    # A record's texts are JSON, which has no lone surrogates; a path in a message may.
    lines = [visible(line.strip()) for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    if isinstance(error, Unsupported | KernelUnsupported | UnsupportedConfig):
        return "unsupported", _shortened(first)
    if isinstance(error, Untrusted):
        return error.status, _shortened(first)
    message = _shortened(f"{type(error).__name__}: {first}")
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )
    return ("oom" if out_of_memory else "error"), message


def _shortened(text: str) -> str:
    """At most so long, without its middle: a message begins with the cause and ends with what to do."""
    if len(text) <= _LONGEST_MESSAGE:
        return text
    half = _LONGEST_MESSAGE // 2 - 2
    return f"{text[:half]}... {text[-half:]}"


def release_memory() -> None:
    """Gives back what nothing refers to any more, to the device too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(kw_only=True)
class Outcome:
    """How something that may fail is going. Once it has failed, further work is refused."""

    status: Status = "ok"
    message: str | None = None

    @property
    def active(self) -> bool:
        """Whether nothing has gone wrong so far."""
        return self.status == "ok"

    def release(self) -> None:
        """Gives up what a failure leaves no use for; a subclass holds something."""

    def fail(self, status: Status, message: str) -> None:
        """Ends this one; others go on with the memory it held."""
        self.status, self.message = status, message
        self.release()

    def fail_with(self, error: Exception) -> None:
        """Ends this one by an exception."""
        self.fail(*failure(error))
        # The frames of the traceback hold the tensors that the next one needs the room of.
        traceback.clear_frames(error.__traceback__)
        release_memory()

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None when it raises, which ends this one, and when it has ended already."""
        if not self.active:
            return None
        try:
            return work()
        except Exception as error:
            self.fail_with(error)
            return None


class Untrusted(Exception):
    """A result that is not of its inputs (`incorrect`) or a time that is not of its work (`impossible`).

    The text is one line that names what was seen, and says what that means.
    """

    def __init__(self, status: Literal["incorrect", "impossible"], text: str) -> None:
        super().__init__(text)
        self.status: Status = status


class Unsupported(Exception):
    """A case that a backend cannot run here; the text is one line that says why."""
