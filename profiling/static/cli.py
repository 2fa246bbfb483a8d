"""The command `ldmperf inspect`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


class InspectError(Exception):
    """A wrong call of `ldmperf inspect`, in one line."""


def inspect(
    kernel: Annotated[str, typer.Argument(help="An operator: group_norm_silu, layer_norm, geglu, ...")],
    arch: Annotated[str, typer.Option(help="sm_80, sm_90 or gfx942; none has to be there.")] = "sm_90",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32.")] = "bfloat16",
    batch: Annotated[int | None, typer.Option(min=1, help="Images; 2 unless told.")] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="Channels of the image, or of the tokens of the result.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; 64 unless told.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; 64 unless told.")] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Groups of a group norm; 32 unless told.")] = None,
    skip_channels: Annotated[
        int | None, typer.Option(min=0, help="Channels of a skip connection that is normalized with the image.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the machine code too.")] = False,
) -> None:
    """Compile a kernel for a chip that need not be there; print its resources and what they predict.

    Registers, spills, shared memory, instructions: the compiler's. Cycles of each unit and the one that bounds: a
    prediction from published throughputs, never a measurement.

    \b
    Examples:
      ldmperf inspect geglu --arch sm_90
      ldmperf inspect group_norm_silu --arch sm_80 --channels 1280 --height 8 --width 8 --groups 32
      ldmperf inspect residual_add --dtype float32 --json
    """
    from rich.console import Console

    from .display import print_inspection
    from .inspection import inspect_launch

    machine, launches = _chosen(
        kernel,
        arch,
        dtype,
        {
            "batch": batch,
            "channels": channels,
            "height": height,
            "width": width,
            "groups": groups,
            "skip_channels": skip_channels,
        },
    )
    inspections = [inspect_launch(launch, machine) for launch in launches]
    if as_json:
        told = [
            inspection.as_json() | ({"sass": inspection.nvidia.text} if sass and inspection.nvidia else {})
            for inspection in inspections
        ]
        typer.echo(json.dumps(told, indent=2))
        return
    console = Console()
    for inspection in inspections:
        print_inspection(inspection, console, sass=sass)


def _chosen(kernel: str, arch: str, dtype: str, numbers: dict[str, int | None]) -> tuple[Any, list[Any]]:
    """The machine and the launches that the options name."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise InspectError("inspecting compiles with triton, which is not installed: pip install triton") from None
    import torch

    from ldmperf.kernels import OPERATORS

    from .machines import MACHINES
    from .shapes import SHAPES, Shape

    if kernel not in OPERATORS or kernel not in SHAPES:
        known = [name for name in OPERATORS if name in SHAPES]
        raise InspectError(f"unknown kernel {kernel!r}; there are {', '.join(known)}")
    if arch not in MACHINES:
        raise InspectError(f"unknown architecture {arch!r}; there are {', '.join(MACHINES)}")
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise InspectError(f"unknown dtype {dtype!r}; there are {', '.join(dtypes)}")
    build, takes, defaults = SHAPES[kernel]
    given = {name: number for name, number in numbers.items() if number is not None}
    for name in given:
        if name not in takes:
            options = ", ".join(f"--{other.replace('_', '-')}" for other in takes)
            raise InspectError(f"{kernel} takes no --{name.replace('_', '-')}; it takes {options}")
    shape = Shape(dtypes[dtype], **{**defaults, **given})
    channels = shape.channels + shape.skip_channels
    if "groups" in takes and channels % shape.groups:
        raise InspectError(f"{channels} channels do not divide into {shape.groups} groups; choose --groups")
    _, launches = OPERATORS[kernel].plan(**build(shape))
    return MACHINES[arch], launches
