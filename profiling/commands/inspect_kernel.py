"""`ldmperf inspect OPERATOR`: a kernel compiled for a chip that need not be there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..options import CaseError, dtype_named
from ..terminal.visible import console, say
from .operator_shapes import (
    check_known,
    head_dim_of,
    known_operators,
    last_line,
    option,
    refusals_in_one_line,
    shape_of,
)
from .shared import print_json

if TYPE_CHECKING:
    from ldmperf.kernels import Launch

    from ..machines import Machine

# Sizes that a shape's name has otherwise, or a record apart.
_NAMED_APART = ("height", "width", "batch", "head_dim")


def inspect_kernel(
    kernel: str,
    sizes: dict[str, Any],
    *,
    arch: str,
    dtype: str,
    size: str | None,
    as_json: bool,
    sass: bool,
    out: Path | None = None,
) -> None:
    """Prints what the compiler makes of the kernel's launches at those sizes, or of all in a step of `size`.

    With `out` they are recorded there instead, and printed as a table with a line for each.
    """
    from ..static.display import by_distance, print_inspection, print_work_list
    from ..static.inspection import inspect_launch

    if out is not None and (as_json or sass):
        raise CaseError(f"--out writes records: leave {'--json' if as_json else '--sass'} out")
    call = {"size": size or _shape_name(sizes), "dtype": dtype_named(dtype)}
    call["batch"] = sizes.get("batch", 1 if size == "vae" else 2)
    if sizes.get("head_dim") == "family":
        results = _every_head_dim(kernel, arch, dtype_named(dtype), size, sizes, sass=sass)
        if out is not None:
            _record([told | call for told in results], out)
            return
        if as_json:
            print_json(by_distance(results))
        else:
            print_work_list(results, console())
        return
    if "head_dim" in sizes:
        sizes["head_dim"] = head_dim_of(sizes["head_dim"], or_family=True)
    machine, launches = _chosen(kernel, arch, dtype_named(dtype), size, sizes)
    if out is not None:
        _record((_told(launch, machine) | call for launch in launches), out)
        return
    with refusals_in_one_line(kernel, arch):
        inspections = [inspect_launch(launch, machine) for launch in launches]
    if as_json:
        told = [one.as_json() | ({"sass": one.code} if sass else {}) for one in inspections]
        print_json(told)
        return
    for inspection in inspections:
        print_inspection(inspection, console(), sass=sass)


def _record(results: Iterable[dict[str, Any]], out: Path) -> None:
    """Writes the records and prints them; exit code 1 where the compiler refused one, or has made a fault."""
    from ..static.inspection_table import print_inspections
    from .inspect_out import write_inspections

    path, records = write_inspections(results, out)
    print_inspections(records, console())
    say(console(), str(path))
    if any(record.status != "ok" for record in records):
        raise typer.Exit(1)


def _told(launch: Launch, machine: Machine) -> dict[str, Any]:
    """`Inspection.as_json` of a launch; of one that does not compile what it is, and the `error`."""
    from triton.errors import TritonError

    from ..static.compile import specialization_of
    from ..static.inspection import inspect_launch, launch_as_json

    try:
        return inspect_launch(launch, machine).as_json()
    # The compiler's passes raise RuntimeError.
    except (TritonError, RuntimeError) as failure:
        return launch_as_json(launch, specialization_of(launch, machine), machine) | {"error": last_line(failure)}


def _shape_name(given: dict[str, Any]) -> str:
    """A shape by the options that name it: "64x64 context=77". A head's size is one of the kernel's constants."""
    rest = [f"{name}={value}" for name, value in given.items() if name not in _NAMED_APART]
    return " ".join([f"{given.get('height', 64)}x{given.get('width', 64)}", *sorted(rest)])


def _chosen(
    kernel: str, arch: str, dtype: str, size: str | None, given: dict[str, int]
) -> tuple[Machine, list[Launch]]:
    """The machine and the launches that the options name."""
    from ..static.compile import require_compiler

    require_compiler()
    from ..machines import MACHINES
    from ..static.planned import planned

    check_known("kernel", kernel, known_operators(), ", sizes (39M ... 5B) and paths of checkpoints")
    check_known("architecture", arch, MACHINES)
    machine = MACHINES[arch]
    if size is None:
        build, shape = shape_of(kernel, dtype, given)
        arguments = build(shape)
        launches = planned(kernel, arguments, machine)
        _check_served(kernel, arguments, launches)
        return machine, launches
    return machine, _of_size(kernel, dtype, size, machine, given)


def _check_served(kernel: str, arguments: dict[str, Any], launches: list[Launch]) -> None:
    """Raises CaseError where the operator would refuse the call on a GPU: these launches never run."""
    from torch import Tensor

    from ldmperf.kernels import OPERATORS, _triton

    operator = OPERATORS[kernel]
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    for launch in launches[:1]:
        found = operator.unsupported_reasons(operator.bind(**arguments))
        if reasons := _triton.of_layout(found, launch.kernel, first):
            raise CaseError(f"the kernel of {kernel} cannot serve this call: {'; '.join(reasons)}")


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
    from ..static.launch_items import ShapeItem, inspect_items
    from ..step.calls import FAMILY_HEAD_DIMS
    from ..terminal.counting import counting

    shapes = (shape_of(kernel, dtype, given | {"head_dim": dim})[1] for dim in FAMILY_HEAD_DIMS)
    items = [ShapeItem(kernel, f"head_dim={shape.head_dim}", shape, arch) for shape in shapes]
    results = []
    with (
        refusals_in_one_line(kernel, arch),
        counting(console(stderr=True), len(items), "head dimensions compiled") as count,
    ):
        for result in inspect_items(items, min(usable_cores(), 8)):
            results.append(result)
            count(str(result["size"]))
    return results


def _of_size(kernel: str, dtype: Any, size: str, machine: Machine, given: dict[str, int]) -> list[Launch]:
    from ldmperf.model import FAMILY

    from ..static.planned import distinct_launches, family_launches
    from ..step.calls import vae_calls

    for name in given:
        if name != "batch":
            raise CaseError(f"--size brings its own shapes; leave out {option(name)}")
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
