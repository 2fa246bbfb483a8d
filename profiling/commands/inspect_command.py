"""The command `ldmperf inspect`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import CaseError
from .inspect_kernel import inspect_kernel
from .operator_shapes import option, size_options
from .shared import AsJson, print_json, with_options

SIZES = size_options(
    "Samples that the UNet computes at once, 2 unless told. Of a step: images, 1 unless told.",
    64,
    "; `family`: every one of the family in one table, the farthest from its bound first",
)

# Of a step alone, as `ldmperf profile` has them, and where its measured times are.
STEP = {
    "task": Annotated[str | None, typer.Option(help="Of a step: t2i or sr (8 input channels).")],
    "latent": Annotated[str | None, typer.Option(help="Of a step: height x width, 64x64 unless told.")],
    "tokens": Annotated[str | None, typer.Option(help="Of a step: tokens of the text, 77 unless told.")],
    "guidance": Annotated[str | None, typer.Option(help="Of a step: 1 is without; 7.5 unless told.")],
    "device": Annotated[str | None, typer.Option(help="Of a step: whose ceilings; cpu, cuda, cuda:N.")],
    "trace": Annotated[
        Path | None, typer.Option(help="Of a step: a folder of `ldmperf trace` with measured times.")
    ],
    "records": Annotated[
        Path | None, typer.Option(help="Of a step: records with traces, a file or a run's folder.")
    ],
    "separate": Annotated[
        bool | None,
        typer.Option("--separate", help="Of a step: count every matmul and convolution alone."),
    ],
}


@with_options("step", STEP)
@with_options("sizes", SIZES)
def inspect(
    kernel: Annotated[
        str | None,
        typer.Argument(
            help="An operator (attention, group_norm_silu, layer_norm, geglu, ...), a size of the family or a "
            "checkpoint's path.",
            metavar="OPERATOR | SIZE | CHECKPOINT",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="sm_80, sm_90 or gfx942; none has to be there. Of an operator sm_90 unless told; of a step the "
            "ceilings measured here unless told."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16, float32; bfloat16 unless told, of a step on a CPU float32."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of an operator: all its launches in a step of this size, 39M ... 5B, or of `vae`."),
    ] = None,
    *,
    sizes: dict[str, Any],
    step: dict[str, Any],
    as_json: AsJson = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the machine code too.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Of an operator: write a record of each launch, to a new folder there or into a file.",
            metavar="FOLDER | FILE.jsonl",
        ),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of such a record.")] = False,
) -> None:
    """Show a kernel's machine code in figures, or a step's roofline.

    OPERATOR: the kernel is compiled for a chip that need not be there. Registers, spills, shared memory and
    instructions are the compiler's; cycles of each unit and the one that bounds are a prediction from published
    throughputs, never a measurement.

    SIZE or CHECKPOINT: launches, FLOPs, bytes and floor of each class of operator in a step, at the ceilings
    measured on this machine (some seconds the first time), and beside them what a trace measured.

    \b
    Examples:
      ldmperf inspect geglu --arch sm_90
      ldmperf inspect layer_norm --size 866M --batch 2
      ldmperf inspect group_norm_silu --arch sm_80 --channels 1280 --height 8 --width 8 --groups 32
      ldmperf inspect residual_add --dtype float32 --json
      ldmperf inspect attention --head-dim 80 --context 77
      ldmperf inspect attention --head-dim family
      ldmperf inspect linear --size 866M --out runs
      ldmperf inspect 39M
      ldmperf inspect 866M --arch sm_90 --batch 8 --json
      ldmperf inspect ./my-unet --latent 128x128 --trace runs/20260101T000000Z-1a2b3c4-trace
    """
    if schema:
        if kernel is not None:
            raise CaseError("--schema prints the schema and compiles nothing: give it alone")
        from ..static.inspection_records import inspection_schema

        print_json(inspection_schema())
        return
    if kernel is None:
        raise CaseError("name an operator (attention, ...), a size of the family or a checkpoint's path")
    if _is_step(kernel):
        if out is not None:
            raise CaseError(f"--out is of an operator, and {kernel} is a network: leave it out")
        _inspect_step(kernel, arch, dtype, size, sizes, step, as_json=as_json, sass=sass)
        return
    for name in step:
        raise CaseError(f"{kernel} is no size (39M ... 5B) and no path here; {option(name)} is of a step")
    inspect_kernel(
        kernel,
        sizes,
        arch=arch or "sm_90",
        dtype=dtype or "bfloat16",
        size=size,
        as_json=as_json,
        sass=sass,
        out=out,
    )


def _is_step(name: str) -> bool:
    """Whether it is a network's name; an operator's goes before a file of that name."""
    from ldmperf.kernels import OPERATORS
    from ldmperf.model import FAMILY, RELEASED

    is_network = name in FAMILY or name in RELEASED or os.path.exists(os.path.expanduser(name))
    return name not in OPERATORS and is_network


def _inspect_step(
    unet: str,
    arch: str | None,
    dtype: str | None,
    size: str | None,
    sizes: dict[str, Any],
    step: dict[str, Any],
    *,
    as_json: bool,
    sass: bool,
) -> None:
    """`inspect` of a step, with its own options alone."""
    from .inspect_step import inspect_step

    others = [name for name in sizes if name != "batch"]
    for name in [*others, *(["size"] if size is not None else []), *(["sass"] if sass else [])]:
        raise CaseError(f"{option(name)} is of an operator, and {unet} is a network: leave it out")
    given = {name: str(sizes[name]) for name in sizes} | ({} if dtype is None else {"dtype": dtype})
    paths = {name: step.pop(name, None) for name in ("trace", "records")}
    separate = bool(step.pop("separate", False))
    inspect_step(unet, given | step, arch=arch, **paths, separate=separate, as_json=as_json)
