"""The choice between an operator's Triton kernel and its torch reference, and the reasons against the kernel."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Literal

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "triton")

logger = logging.getLogger(__name__)


class KernelUnsupported(RuntimeError):
    """`backend="triton"` was asked for and the kernel cannot serve the call; `reasons` lists every cause."""

    def __init__(self, operator: str, reasons: Sequence[str]) -> None:
        self.operator = operator
        self.reasons = tuple(reasons)
        listed = "; ".join(self.reasons)
        super().__init__(
            f'{operator}: the Triton kernel cannot serve this call: {listed}; backend="auto" takes torch for it'
        )


def choose_backend(
    operator: str,
    backend: str,
    reasons: Sequence[str],
    fastest: Callable[[], Literal["torch", "triton"]] | None = None,
) -> Literal["torch", "triton"]:
    """The backend that serves this call.

    `reasons` are those against the Triton kernel, empty when it can serve; `fastest` tells which of two that can
    serve "auto" takes, the kernel without it. Raises `KernelUnsupported` when "triton" is asked for in vain,
    `ValueError` for an unknown backend. The fall back of "auto" is logged once for each operator and kind of
    reasons, whatever the sizes in them; a choice for speed is none.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{operator}: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        if backend == "triton" and reasons:
            raise KernelUnsupported(operator, reasons)
        return backend
    if reasons:
        _log_fallback(operator, tuple(reasons))
        return "torch"
    return "triton" if fastest is None else fastest()


def _log_fallback(operator: str, reasons: tuple[str, ...]) -> None:
    text = "; ".join(reasons)
    # Images of many sizes have strides of many sizes, and one reason.
    kind = (operator, re.sub(r"\d+", "N", text))
    if kind not in _logged:
        _logged.add(kind)
        logger.warning("%s: falling back to the torch reference: %s", operator, text)


_logged: set[tuple[str, str]] = set()
