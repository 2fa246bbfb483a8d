"""At which calls of a step our kernels' launches depend on the batch, planned without a GPU.

Prints the rows of a table of docs/batch-invariance.md: of each operator's calls in a step, how many are launched
otherwise than one row alone: other tiles, warps or chunks. What the default configurations choose; a tuned table
may choose otherwise.

    python bench/batch_choices.py --size 866M --rows 2,16
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import torch

from ldmperf.kernels._launch import Chip, planned_for
from ldmperf.model import FAMILY, UNet
from ldmperf.profiling.step.recording import calls_of_ours

H100 = Chip("NVIDIA H100 80GB HBM3", 132)
# Arguments of a launch that a configuration decides.
_CHOSEN = ("chunks", "chunk_pixels", "tiles_n")


def choices(size: str, rows: int) -> list[tuple[str, object]]:
    """(operator, what its launches were chosen to be) of each call of a step of so many rows, in bfloat16."""
    with torch.device("meta"), planned_for(H100), torch.inference_mode():
        unet = UNet(FAMILY[size], backend="triton", products="triton").to(torch.bfloat16)
        x = torch.empty(rows, 4, 64, 64, dtype=unet.dtype).to(memory_format=torch.channels_last)
        conditioning = unet.condition([1.0], torch.empty(rows, 77, unet.config.context_dim))
        calls = calls_of_ours(lambda: unet.denoise(x, conditioning, 0))
        return [
            (
                call.operator or "",
                [
                    (
                        launch.name,
                        launch.num_warps,
                        launch.num_stages,
                        {k: v for k, v in launch.arguments.items() if k.isupper() or k in _CHOSEN},
                    )
                    for launch in call.launches
                ],
            )
            for call in calls
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="866M", choices=list(FAMILY))
    parser.add_argument("--rows", default="2,16", help="rows of the network's batch, two for each guided image")
    given = parser.parse_args(arguments)
    alone = choices(given.size, 1)
    calls = Counter(operator for operator, _ in alone)
    for rows in map(int, given.rows.split(",")):
        others = choices(given.size, rows)
        differ = Counter(one[0] for one, other in zip(alone, others, strict=True) if one != other)
        told = ", ".join(f"{name} {differ[name]} of {count}" for name, count in sorted(calls.items()))
        print(f"{given.size}, {rows} rows: {told}")


if __name__ == "__main__":
    main()
