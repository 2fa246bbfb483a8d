"""The command `ldmperf inspect`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import LONGEST_SEQUENCE, CaseError, dtype_named, whole
from ..terminal.visible import console
from .shared import AsJson, print_json, stop, whole_option, with_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from ldmperf.kernels import Launch

    from ..machines import Machine
    from ..static.shapes import Shape


# The largest number that most options take: a program grows with the channels, and compiling it takes time
# and memory.
_MOST = 2**14


def _number(text: str, least: int = 1, most: int = _MOST) -> Any:
    return Annotated[int | None, whole_option(text, least, most)]


# By the names that `Shape` has for them.
SIZES = {
    "batch": _number("Images in the model, 2 unless told; of a step images, 1 unless told."),
    "channels": _number("Channels of the image, or of the tokens of the result."),
    "height": _number("Pixels; 64 unless told."),
    "width": _number("Pixels; 64 unless told."),
    "groups": _number("Groups of a group norm; 32 unless told."),
    "skip_channels": _number("Channels of a skip connection that is normalized with the image.", 0),
    "head_dim": Annotated[
        str | None,
        typer.Option(
            help="Size of a head of attention, 40 unless told; `family`: every one of the family in one table, "
            "the farthest from its bound first."
        ),
    ],
    "heads": _number("Heads of attention; 8 unless told."),
    "context": _number(
        "Tokens of the context attended to, 77 of a text; 0, unless told: the image's own.", 0, LONGEST_SEQUENCE
    ),
    "features": _number("Channels of a matmul's result; four times its own unless told."),
}

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
        typer.Option("--separate", help="Of a step: count every matmul apart from norms and gates."),
    ],
}


@with_options("step", STEP)
@with_options("sizes", SIZES)
def inspect(
    kernel: Annotated[
        str,
        typer.Argument(
            help="An operator (attention, group_norm_silu, layer_norm, geglu, ...), a size of the family or a "
            "checkpoint's path.",
            metavar="OPERATOR | SIZE | CHECKPOINT",
        ),
    ],
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
        typer.Option(help="All launches of the kernel in a step of this size, 39M ... 5B, or of `vae`."),
    ] = None,
    *,
    sizes: dict[str, Any],
    step: dict[str, Any],
    as_json: AsJson = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the machine code too.")] = False,
) -> None:
    """Compile a kernel for a chip that need not be there; or print the roofline of a network's step.

    Of an operator: registers, spills, shared memory and instructions are the compiler's; cycles of each unit and
    the one that bounds are a prediction from published throughputs, never a measurement.

    Of a size or checkpoint: launches, FLOPs, bytes and floor of each class of operator in a step, at the ceilings
    measured on this machine (some seconds the first time), and beside them what a trace measured.

    \b
    Examples:
      ldmperf inspect geglu --arch sm_90
      ldmperf inspect layer_norm --size 866M --batch 2
      ldmperf inspect group_norm_silu --arch sm_80 --channels 1280 --height 8 --width 8 --groups 32
      ldmperf inspect residual_add --dtype float32 --json
      ldmperf inspect attention --head-dim 80 --context 77
      ldmperf inspect attention --head-dim family
      ldmperf inspect 39M
      ldmperf inspect 866M --arch sm_90 --batch 8 --json
      ldmperf inspect ./my-unet --latent 128x128 --trace runs/20260101T000000Z-1a2b3c4-trace
    """
    if _is_step(kernel):
        _inspect_step(kernel, arch, dtype, size, sizes, step, as_json=as_json, sass=sass)
        return
    for name in step:
        raise CaseError(f"{kernel} takes no {_option(name)}, which is of a step: name a size or a checkpoint")
    arch, dtype = arch or "sm_90", dtype or "bfloat16"
    from ..static.display import by_distance, print_inspection, print_work_list
    from ..static.inspection import inspect_launch

    if sizes.get("head_dim") == "family":
        results = _every_head_dim(kernel, arch, dtype_named(dtype), size, sizes, sass=sass)
        if as_json:
            print_json(by_distance(results))
        else:
            print_work_list(results, console())
        return
    if "head_dim" in sizes:
        sizes["head_dim"] = _head_dim(sizes["head_dim"])
    machine, launches = _chosen(kernel, arch, dtype_named(dtype), size, sizes)
    with _told_in_one_line(kernel, arch):
        inspections = [inspect_launch(launch, machine) for launch in launches]
    if as_json:
        told = [one.as_json() | ({"sass": one.code} if sass else {}) for one in inspections]
        print_json(told)
        return
    out = console()
    for inspection in inspections:
        print_inspection(inspection, out, sass=sass)


def _is_step(name: str) -> bool:
    """Whether it is a network's name; an operator's goes before a file of that name."""
    from ldmperf.kernels import OPERATORS
    from ldmperf.model import FAMILY

    return name not in OPERATORS and (name in FAMILY or os.path.exists(os.path.expanduser(name)))


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
        raise CaseError(f"{_option(name)} is of an operator, and {unet} is a network: leave it out")
    given = {name: str(sizes[name]) for name in sizes} | ({} if dtype is None else {"dtype": dtype})
    paths = {name: step.pop(name, None) for name in ("trace", "records")}
    separate = bool(step.pop("separate", False))
    inspect_step(unet, given | step, arch=arch, **paths, separate=separate, as_json=as_json)


def _chosen(
    kernel: str, arch: str, dtype: str, size: str | None, given: dict[str, int]
) -> tuple[Machine, list[Launch]]:
    """The machine and the launches that the options name."""
    from ..static.compile import require_compiler

    require_compiler()
    from ldmperf.kernels import OPERATORS

    from ..machines import MACHINES
    from ..static.planned import planned
    from ..static.shapes import SHAPES

    known = [name for name in OPERATORS if name in SHAPES]
    for what, name, names in (("kernel", kernel, known), ("architecture", arch, MACHINES)):
        if name not in names:
            others = ", sizes (39M ... 5B) and paths of checkpoints" if what == "kernel" else ""
            raise CaseError(f"unknown {what} {name!r}; there are {', '.join(names)}{others}")
    machine = MACHINES[arch]
    if size is None:
        build, shape = _shape(kernel, dtype, given)
        return machine, planned(kernel, build(shape), machine)
    return machine, _of_size(kernel, dtype, size, machine, given)


def _every_head_dim(
    kernel: str, arch: str, dtype: str, size: str | None, given: dict[str, int], *, sass: bool
) -> list[dict[str, Any]]:
    """`Inspection.as_json` of the kernel at each head dimension of the family."""
    machine, _ = _chosen(kernel, arch, dtype, size, given | {"head_dim": 8})
    if machine.backend != "cuda":
        raise CaseError(f"no units of {arch} are modelled, so --head-dim family has no table; give one number")
    if sass:
        raise CaseError("--head-dim family prints a table; for --sass give one number")
    from ..static.forked import usable_cores
    from ..static.sweep import ShapeItem, inspect_items
    from ..step.calls import FAMILY_HEAD_DIMS
    from ..terminal.counting import counting

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
    stop(reason, 1)


def _head_dim(text: str) -> int:
    value = whole(text)
    if value is None or value % 4 or not 4 <= value <= 384:
        raise CaseError(f"--head-dim {text} is neither a multiple of 4 up to 384 nor `family`")
    return value


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
