"""The command `ldmperf inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import CaseError, dtype_named, whole
from ..terminal.visible import console, say
from .shared import whole_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from ldmperf.kernels import Launch

    from ..machines import Machine
    from ..static.shapes import Shape


# The largest number that most options take: a program grows with the channels, and compiling it takes time
# and memory.
_MOST = 2**14


def inspect(
    kernel: Annotated[str, typer.Argument(help="An operator: attention, group_norm_silu, layer_norm, geglu, ...")],
    arch: Annotated[str, typer.Option(help="sm_80, sm_90 or gfx942; none has to be there.")] = "sm_90",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32.")] = "bfloat16",
    size: Annotated[
        str | None,
        typer.Option(help="All launches of the kernel in a step of this size, 39M ... 5B, or of `vae`."),
    ] = None,
    batch: Annotated[int | None, whole_option("Images in the model; 2 unless told.", 1, _MOST)] = None,
    channels: Annotated[
        int | None, whole_option("Channels of the image, or of the tokens of the result.", 1, _MOST)
    ] = None,
    height: Annotated[int | None, whole_option("Pixels; 64 unless told.", 1, _MOST)] = None,
    width: Annotated[int | None, whole_option("Pixels; 64 unless told.", 1, _MOST)] = None,
    groups: Annotated[int | None, whole_option("Groups of a group norm; 32 unless told.", 1, _MOST)] = None,
    skip_channels: Annotated[
        int | None,
        whole_option("Channels of a skip connection that is normalized with the image.", 0, _MOST),
    ] = None,
    head_dim: Annotated[
        str | None,
        typer.Option(
            help="Size of a head of attention, 40 unless told; `family`: every one of the family in one table, "
            "the farthest from its bound first."
        ),
    ] = None,
    heads: Annotated[int | None, whole_option("Heads of attention; 8 unless told.", 1, _MOST)] = None,
    context: Annotated[
        int | None,
        whole_option(
            "Tokens of the context attended to, 77 of a text; 0, unless told: the image's own.", 0, 2**20
        ),
    ] = None,
    features: Annotated[
        int | None,
        whole_option("Channels of a product's result; four times its own unless told.", 1, _MOST),
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
      ldmperf inspect attention --head-dim 80 --context 77
      ldmperf inspect attention --head-dim family
    """
    from ..static.display import by_distance, print_inspection, print_work_list
    from ..static.inspection import inspect_launch

    numbers = {
        "batch": batch,
        "channels": channels,
        "height": height,
        "width": width,
        "groups": groups,
        "skip_channels": skip_channels,
        "heads": heads,
        "context": context,
        "features": features,
    }
    if head_dim == "family":
        results = _every_head_dim(kernel, arch, dtype_named(dtype), size, numbers, sass=sass)
        if as_json:
            typer.echo(json.dumps(by_distance(results), indent=2))
        else:
            print_work_list(results, console())
        return
    numbers["head_dim"] = _head_dim(head_dim)
    machine, launches = _chosen(kernel, arch, dtype_named(dtype), size, numbers)
    with _told_in_one_line(kernel, arch):
        inspections = [inspect_launch(launch, machine) for launch in launches]
    if as_json:
        told = [one.as_json() | ({"sass": one.code} if sass else {}) for one in inspections]
        typer.echo(json.dumps(told, indent=2))
        return
    out = console()
    for inspection in inspections:
        print_inspection(inspection, out, sass=sass)


def _chosen(
    kernel: str, arch: str, dtype: str, size: str | None, numbers: dict[str, int | None]
) -> tuple[Machine, list[Launch]]:
    """The machine and the launches that the options name."""
    from ..static.compile import require_compiler

    require_compiler()
    from ldmperf.kernels import OPERATORS

    from ..machines import MACHINES
    from ..static.shapes import SHAPES

    known = [name for name in OPERATORS if name in SHAPES]
    for what, name, names in (("kernel", kernel, known), ("architecture", arch, MACHINES)):
        if name not in names:
            raise CaseError(f"unknown {what} {name!r}; there are {', '.join(names)}")
    given = {name: number for name, number in numbers.items() if number is not None}
    machine = MACHINES[arch]
    if size is None:
        return machine, _of_shape(kernel, dtype, machine, given)
    return machine, _of_size(kernel, dtype, size, machine, given)


def _every_head_dim(
    kernel: str, arch: str, dtype: str, size: str | None, numbers: dict[str, int | None], *, sass: bool
) -> list[dict[str, Any]]:
    """`Inspection.as_json` of the kernel at each head dimension of the family."""
    machine, _ = _chosen(kernel, arch, dtype, size, numbers | {"head_dim": 8})
    if machine.backend != "cuda":
        raise CaseError(f"no units of {arch} are modelled, so --head-dim family has no table; give one number")
    if sass:
        raise CaseError("--head-dim family prints a table; for --sass give one number")
    from ..static.forked import usable_cores
    from ..static.sweep import ShapeItem, inspect_items
    from ..step.calls import FAMILY_HEAD_DIMS
    from ..terminal.counting import counting

    given = {name: number for name, number in numbers.items() if number is not None}
    shapes = (_shape(kernel, dtype, given | {"head_dim": dim})[1] for dim in FAMILY_HEAD_DIMS)
    items = [ShapeItem(kernel, f"head_dim={shape.head_dim}", shape, arch) for shape in shapes]
    results = []
    with (
        _told_in_one_line(kernel, arch),
        counting(console(stderr=True), len(items), "head dimensions compiled") as count,
    ):
        for result in inspect_items(items, min(usable_cores(), 8)):
            results.append(result)
            count(str(result["size"]))
    return results


@contextmanager
def _told_in_one_line(kernel: str, arch: str) -> Iterator[None]:
    """Ends the command with one line and exit code 1 where the compiler, or the folder it writes to, refuses."""
    from triton.errors import TritonError

    from ..static.compile import cache_refused

    try:
        yield
    except OSError as failure:
        reason = cache_refused(failure)
    # The compiler's passes raise RuntimeError.
    except (TritonError, RuntimeError) as failure:
        last = (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
        reason = f"{kernel} of this shape does not compile for {arch} ({last.strip()}); choose a smaller one"
    else:
        return
    say(console(stderr=True), f"ldmperf: {reason}")
    raise typer.Exit(1)


def _head_dim(text: str | None) -> int | None:
    if text is None:
        return None
    value = whole(text)
    if value is None or value % 4 or not 4 <= value <= 384:
        raise CaseError(f"--head-dim {text} is neither a multiple of 4 up to 384 nor `family`")
    return value


def _of_shape(kernel: str, dtype: str, machine: Machine, given: dict[str, int]) -> list[Launch]:
    from ..static.planned import planned

    build, shape = _shape(kernel, dtype, given)
    return planned(kernel, build(shape), machine)


def _shape(kernel: str, dtype: str, given: dict[str, int]) -> tuple[Callable[[Shape], dict[str, Any]], Shape]:
    """What makes the kernel's arguments, and of which numbers."""
    import torch

    from ..static.shapes import SHAPES, Shape

    build, takes, defaults = SHAPES[kernel]
    for name in given:
        if name not in takes:
            raise CaseError(f"{kernel} takes no {_option(name)}; it takes {', '.join(map(_option, takes))}")
    shape = Shape(getattr(torch, dtype), **{**defaults, **given})
    channels = shape.channels + shape.skip_channels
    if "groups" in takes and channels % shape.groups:
        raise CaseError(f"{channels} channels do not divide into {shape.groups} groups; choose --groups")
    return build, shape


def _of_size(kernel: str, dtype: Any, size: str, machine: Machine, given: dict[str, int]) -> list[Launch]:
    from ldmperf.model import FAMILY

    from ..static.planned import distinct_launches, family_launches
    from ..step.calls import vae_calls

    for name in given:
        if name != "batch":
            raise CaseError(f"--size brings its own shapes; leave out {_option(name)}")
    if size == "vae":
        cases = [case for case in vae_calls(dtype, given.get("batch", 1)) if case.operator == kernel]
        found = list(distinct_launches(cases, machine).values())
    elif size in FAMILY:
        found = list(family_launches(size, given.get("batch", 2), dtype, kernel, machine).values())
    else:
        raise CaseError(f"unknown size {size!r}; there are {', '.join(FAMILY)}, vae")
    if not found:
        raise CaseError(f"size {size} does not use {kernel}")
    return found


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
