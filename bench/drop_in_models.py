"""Write the tables of docs/drop-in.md from the reports of `accelerate`: `make inventory`, no GPU needed.

The models are diffusers' own, of the published shapes and on the meta device. tests/test_drop_in_models.py fails
while the page differs from what this writes.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from markers import with_blocks

from ldmperf.model import RELEASED, diffusers_config
from ldmperf.profiling.measure.store import write_whole

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "drop-in.md"
EXAMPLE = ROOT / "examples" / "by_hand.py"
_SD1 = diffusers_config(RELEASED["SD1.5"])
_SMALL = _SD1 | {"layers_per_block": 1, "transformer_layers_per_block": 1}
_DOWN, _UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_THREE_LEVELS = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (_DOWN,) * 3,
    "up_block_types": (_UP,) * 3,
    "attention_head_dim": 8,
}
_OPEN_CLIP = {"cross_attention_dim": 1024, "use_linear_projection": True}
# Of config.json of the releases.
UNETS: Mapping[str, Mapping[str, Any]] = {
    "SD1.5": _SD1,
    "SD1.5 inpainting": _SD1 | {"in_channels": 9},
    "SD2.1": _SD1 | _OPEN_CLIP | {"attention_head_dim": (5, 10, 20, 20)},
    "BK-SDM-Base": _SMALL,
    "BK-SDM-Small": _SMALL | {"mid_block_type": None},
    "BK-SDM-Tiny, tiny-sd": _SMALL | _THREE_LEVELS | {"mid_block_type": None},
    "SDXL, SDXL-turbo": diffusers_config(RELEASED["SDXL"]),
    "SD x4 upscaler": _SD1
    | _OPEN_CLIP
    | {
        "in_channels": 7,
        "block_out_channels": (256, 512, 512, 1024),
        "down_block_types": ("DownBlock2D", *(_DOWN,) * 3),
        "up_block_types": (*(_UP,) * 3, "UpBlock2D"),
        "attention_head_dim": 8,
        "only_cross_attention": (True, True, True, False),
        "num_class_embeds": 1000,
    },
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
# The kinds of a report, in the order of the table.
KINDS = ("resnet", "transformer block", "attention", "geglu", "norm")


@cache
def models() -> dict[str, Any]:
    """Every model of the table, without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        made: dict[str, Any] = {name: UNet2DConditionModel(**config) for name, config in UNETS.items()}
        return made | {"AutoencoderKL": AutoencoderKL(**VAE)}


@cache
def reports() -> dict[str, Any]:
    """The reports of `accelerate` on them, by model."""
    from ldmperf.model.dropin import accelerate

    return {name: accelerate(model) for name, model in models().items()}


def replaced_markdown() -> str:
    """How many modules of each kind are replaced in which model, and what is left."""
    lines = [
        "| model | ResnetBlock2D | BasicTransformerBlock | Attention | GEGLU | other norms | left as they are |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, report in reports().items():
        counts = Counter(one.kind for one in report.replaced)
        # A norm with the SiLU after it is one place.
        counts["norm"] -= sum("done by" in one.what for one in report.replaced)
        left = Counter(one.class_name for one in report.left)
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items(), key=lambda item: -item[1]))
        lines.append(f"| {name} | {' | '.join(str(counts[kind]) for kind in KINDS)} | {told} |")
    reasons = {one.class_name: one.reason for report in reports().values() for one in report.left}
    lines += ["", "| left | why |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {reason} |" for name, reason in sorted(reasons.items()))])


def report_text() -> str:
    """The report of SD1.5 as it is printed, less its last line, which tells the device."""
    lines = str(reports()["SD1.5"]).splitlines()
    return "\n".join(["```text", *lines[:-1], "```"])


def by_hand_markdown() -> str:
    """The lines of examples/by_hand.py."""
    text = EXAMPLE.read_text(encoding="utf-8")
    code = text[text.index("from types import") : text.index("# The lines end here.")].strip()
    return f"```python\n{code}\n```"


def reach_markdown() -> str:
    """How many attention layers have what diffusers' set_attention_backend and ours set."""
    lines = [
        "| model | attention layers | `set_attention_backend` reaches | `accelerate` reaches |",
        "|---|---:|---:|---:|",
    ]
    for name, report in reports().items():
        # diffusers' set_attention_backend sets this attribute of the processors that have it.
        processors = [m.processor for m in models()[name].modules() if hasattr(m, "processor")]
        reached = sum(hasattr(processor, "_attention_backend") for processor in processors)
        ours = sum(one.kind == "attention" for one in report.replaced)
        lines.append(f"| {name} | {len(processors)} | {reached} | {ours} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """The page with the blocks between its markers."""
    writers = {
        "by hand": by_hand_markdown,
        "replaced": replaced_markdown,
        "report": report_text,
        "reach": reach_markdown,
    }
    return with_blocks(page, {name: lambda _, write=write: write() for name, write in writers.items()})


def main() -> None:
    write_whole(PAGE, with_tables(PAGE.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    sys.exit(main())
