"""Whether an operator takes a call, and the reasons if not, each logged once.

What is not taken is left to ComfyUI, not to the operators' references: so it costs what it did without the node.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if (Path(__file__).parent / "kernels").is_dir():
    from . import kernels
else:
    try:
        from ldmperf import kernels
    except ImportError as error:
        raise ImportError(
            f"ldmperf node: copy the kernels/ folder of ldmperf to {Path(__file__).parent}, or install ldmperf"
        ) from error

BACKENDS = ("auto", "triton", "torch")
MOST = 1024
logger = logging.getLogger(__name__)


def run(operator: str, call: Any, backend: str) -> Tensor:
    """The result of a call that `refusals` found nothing against."""
    result: Tensor = kernels.OPERATORS[operator].call(
        **call._asdict(), backend="torch" if backend == "torch" else "triton"
    )
    return result


def bind(operator: str, *arguments: Any, **named: Any) -> Any:
    """The call of these arguments: a value that `refusals` and `run` take."""
    return kernels.OPERATORS[operator].bind(*arguments, **named)


def refusals(operator: str, call: Any, backend: str) -> tuple[str, ...]:
    """Why the operator does not take this call; empty if it does. Asked once for each layout of its tensors."""
    if torch.compiler.is_compiling():
        return _refusals(operator, call, backend)
    key = (operator, backend, *map(_layout, call))
    if key not in _found:
        if len(_found) >= MOST:
            _found.clear()
        _found[key] = _refusals(operator, call, backend)
    return _found[key]


def log_once(what: str, reasons: Sequence[str]) -> None:
    """One warning for each kind of reasons, whatever the sizes in them."""
    if torch.compiler.is_compiling():
        return
    text = "; ".join(reasons)
    kind = (what, re.sub(r"\d+", "N", text))
    if kind not in _logged:
        _logged.add(kind)
        logger.warning("ldmperf: %s is left to ComfyUI: %s", what, text)


def _refusals(operator: str, call: Any, backend: str) -> tuple[str, ...]:
    parts = kernels.OPERATORS[operator]
    try:
        parts.check(call)
    except ValueError as error:
        return (str(error),)
    if backend == "torch":
        return ()
    reasons = parts.unsupported_reasons(call)
    if not reasons and backend == "auto" and operator == "attention":
        # Torch's own and others' attention is fast: the kernel has to have been measured to win.
        device = call.q.device
        if parts.tuning_key(call) not in _measured(device):
            reasons = [f"no measurement says that the kernel is the faster one on {_name(device)}"]
    return tuple(reasons)


def _layout(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    return value


@functools.cache
def _measured(device: torch.device) -> frozenset[str]:
    """The tuning keys of attention whose kernel was measured to be faster than torch's own on this GPU."""
    if device.type != "cuda":
        return frozenset()
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    table = kernels.tuned_table(kernels.Chip(properties.name, properties.multi_processor_count, arch))
    if not table.exists():
        return frozenset()
    document = json.loads(table.read_text())
    measured, torchs = (document.get(whose, {}).get("attention", ()) for whose in ("kernels", "torch"))
    return frozenset(measured) - frozenset(torchs)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_found: dict[Hashable, tuple[str, ...]] = {}
_logged: set[tuple[str, str]] = set()
