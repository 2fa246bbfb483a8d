"""The command `ldmperf inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ldmperf.kernels import Launch

    from .machines import Machine


class InspectError(Exception):
    """A wrong call of `ldmperf inspect`, in one line."""


def inspect(
    kernel: Annotated[str, typer.Argument(help="An operator: group_norm_silu, layer_norm, geglu, ...")],
    arch: Annotated[str, typer.Option(help="sm_80, sm_90 or gfx942; none has to be there.")] = "sm_90",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32.")] = "bfloat16",
    size: Annotated[
        str | None,
        typer.Option(help="All launches of the kernel in a step of this size, 39M ... 5B, or of `vae`."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in the model; 2 unless told.")] = None,
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
      ldmperf inspect layer_norm --size 866M --batch 2
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
        size,
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


def _chosen(
    kernel: str, arch: str, dtype: str, size: str | None, numbers: dict[str, int | None]
) -> tuple[Machine, list[Launch]]:
    """The machine and the launches that the options name."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise InspectError("inspecting compiles with triton, which is not installed: pip install triton") from None
    from ldmperf.kernels import OPERATORS

    from ..cases import DTYPES
    from .machines import MACHINES
    from .shapes import SHAPES

    known = [name for name in OPERATORS if name in SHAPES]
    for what, name, names in (
        ("kernel", kernel, known),
        ("architecture", arch, MACHINES),
        ("dtype", dtype, DTYPES),
    ):
        if name not in names:
            raise InspectError(f"unknown {what} {name!r}; there are {', '.join(names)}")
    given = {name: number for name, number in numbers.items() if number is not None}
    launches = _of_shape(kernel, dtype, given) if size is None else _of_size(kernel, dtype, size, given)
    return MACHINES[arch], launches


def _of_shape(kernel: str, dtype: str, given: dict[str, int]) -> list[Launch]:
    import torch

    from ldmperf.kernels import OPERATORS

    from .shapes import SHAPES, Shape

    build, takes, defaults = SHAPES[kernel]
    for name in given:
        if name not in takes:
            raise InspectError(f"{kernel} takes no {_option(name)}; it takes {', '.join(map(_option, takes))}")
    shape = Shape(getattr(torch, dtype), **{**defaults, **given})
    channels = shape.channels + shape.skip_channels
    if "groups" in takes and channels % shape.groups:
        raise InspectError(f"{channels} channels do not divide into {shape.groups} groups; choose --groups")
    return OPERATORS[kernel].plan(**build(shape))[1]


def _of_size(kernel: str, dtype: Any, size: str, given: dict[str, int]) -> list[Launch]:
    from ldmperf.model import FAMILY

    from ..kernel_cases import vae_kernel_cases
    from .family import distinct_launches, family_launches

    for name in given:
        if name != "batch":
            raise InspectError(f"--size brings its own shapes; leave out {_option(name)}")
    if size == "vae":
        cases = [case for case in vae_kernel_cases(dtype, given.get("batch", 1)) if case.operator == kernel]
        found = list(distinct_launches(cases).values())
    elif size in FAMILY:
        found = list(family_launches(size, given.get("batch", 2), dtype, kernel).values())
    else:
        raise InspectError(f"unknown size {size!r}; there are {', '.join(FAMILY)}, vae")
    if not found:
        raise InspectError(f"size {size} does not use {kernel}")
    return found


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
