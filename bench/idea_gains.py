"""What each idea of the fast path is predicted to gain alone, and the lines of code that it takes.

A part of docs/performance.md, which `make inventory` writes. Predicted by the operators' own models, those that
decide what "auto" takes; each launch that is spared counts there with 2.5 us.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ldmperf.kernels import OPERATORS, Chip, planned_for
from ldmperf.model import AUTO, FAMILY, SEPARATE, Choices
from ldmperf.profiling.step.recorded_steps import our_step
from ldmperf.profiling.step.recording import RecordedCall
from ldmperf.profiling.step.rules import launches_of

SIZES = ("39M", "145M", "866M", "5B")
# A GPU that nothing was measured on: what "auto" takes is then predicted.
CHIP = Chip("an H200 without a tuned table", 132, "sm_90")
ROOT = Path(__file__).resolve().parents[1]
_STATISTICS = ("kernels/_statistics.py", "kernels/_group_norm_given.py")
# By idea: the choices beside `SEPARATE`, and the files that are there for it.
IDEAS: dict[str, tuple[dict[str, str], Sequence[str]]] = {
    "norms and gates in matmuls": (
        {"products": "auto"},
        ("kernels/linear.py", "kernels/_linear_config.py", "kernels/_linear_kernels.py"),
    ),
    "statistics of sums": ({"statistics": "triton"}, _STATISTICS),
    "convolutions": (
        {"convolutions": "auto"},
        (
            *("kernels/conv3x3.py", "kernels/_conv3x3_torch.py"),
            *("kernels/_conv3x3_config.py", "kernels/_conv3x3_kernels.py"),
        ),
    ),
    "convolutions, with statistics": ({"convolutions": "auto", "statistics": "auto"}, ()),
    "transformers' tails": (
        {"tails": "auto"},
        ("kernels/transformer_tail.py", "kernels/_transformer_tail_kernels.py", "kernels/_transformer_config.py"),
    ),
    "tails, and fronts behind statistics": (
        {"tails": "auto", "statistics": "triton"},
        ("kernels/transformer_front.py", "kernels/_transformer_front_kernels.py"),
    ),
    "all that auto takes": (AUTO._asdict() | {"backend": "auto"}, ()),
}


def table() -> list[str]:
    """A line for each idea: launches and predicted gain at each size, lines of code."""
    heads = " | ".join(f"{size}: launches | us" for size in SIZES)
    lines = [f"| beside `graph+separate` | {heads} | lines of code |", f"|---|{'---:|' * (2 * len(SIZES) + 1)}"]
    with planned_for(CHIP):
        plain = [len(launches_of(_step(size, SEPARATE))) for size in SIZES]
        lines.append(f"| nothing | {' | '.join(f'{count} | -' for count in plain)} | - |")
        for name, (choices, files) in IDEAS.items():
            steps = [_step(size, SEPARATE._replace(**choices)) for size in SIZES]
            cells = [f"{len(launches_of(calls))} | {_gain_us(calls):.0f}" for calls in steps]
            code = sum(len((ROOT / file).read_text().splitlines()) for file in files)
            lines.append(f"| {name} | {' | '.join(cells)} | {code or 'as above'} |")
    return lines


def _step(size: str, choices: Choices) -> tuple[RecordedCall, ...]:
    return our_step(FAMILY[size], torch.bfloat16, choices=choices)


def _gain_us(calls: Iterable[RecordedCall]) -> float:
    """Predicted of the calls that merge something: what they take less than their parts one after the other."""
    gain = 0.0
    for call in calls:
        operator = OPERATORS.get(call.operator or "")
        if operator is not None and operator.predicted_ns is not None:
            merged, separate = operator.predicted_ns(operator.bind(**call.given), CHIP)
            gain += separate - merged
    return gain / 1e3
