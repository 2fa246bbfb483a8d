"""The command `ldmperf emulate`."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from ..options import LARGEST_SEED, CaseError, dtype_named, known_name, real
from .operator_shapes import check_known, option, size_options
from .shared import AsJson, whole_option, with_options

SIZES = size_options("Images, 1 unless told.", 16)
ACCUMULATE = ("float32", "tensor-core")
TF32 = ("truncate", "round")


def _real(text: str) -> Any:
    """An option that takes a finite number."""

    def parse(given: object) -> float:
        value = real(str(given))
        if not math.isfinite(value):
            raise typer.BadParameter(f"{given!r} is not a finite number")
        return value

    return typer.Option(help=text, parser=parse, metavar="NUMBER")


@with_options("sizes", SIZES)
def emulate(
    kernel: Annotated[
        str,
        typer.Argument(
            help="An operator (attention, group_norm_silu, layer_norm, geglu, ...), or a kernel or function of a "
            "Python file.",
            metavar="OPERATOR | FILE.py:NAME",
            show_default=False,
        ),
    ],
    arch: Annotated[str, typer.Option(help="sm_80 or sm_90; none has to be there.")] = "sm_90",
    dtype: Annotated[
        str | None, typer.Option(help="Of an operator: bfloat16, float16, float32; bfloat16 unless told.")
    ] = None,
    *,
    sizes: dict[str, Any],
    config: Annotated[
        str | None,
        typer.Option(
            help="Of an operator: fields of its launch configuration that differ from the default.",
            metavar="FIELD=NUMBER,...",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Of an operator: random, unless told; extreme, which is huge, tiny, largest, subnormal, zeros "
            "and one-hot; one of these; or tensors named as the operator's arguments.",
            metavar="KIND | FILE.safetensors",
        ),
    ] = None,
    mean: Annotated[float | None, _real("Of random numbers; 0 unless told.")] = None,
    scale: Annotated[float | None, _real("Standard deviation of random numbers; 1 unless told.")] = None,
    seed: Annotated[int | None, whole_option("Of random numbers; 0 unless told.", 0, LARGEST_SEED // 2)] = None,
    accumulate: Annotated[
        str, typer.Option(help="How matmuls sum: float32, or tensor-core, cut off as measured on the chips.")
    ] = "float32",
    perturb: Annotated[
        int | None,
        whole_option(
            "A seed: exponentials, reciprocals, ... err by up to what NVIDIA documents. Correctly rounded unless "
            "told.",
            0,
            2**32 - 1,
        ),
    ] = None,
    tf32: Annotated[
        str, typer.Option(help="What matmuls of float32 do with the bits that TF32 lacks: truncate or round.")
    ] = "truncate",
    as_json: AsJson = False,
) -> None:
    """Run a Triton kernel on the CPU, as compiled for a GPU that need not be there.

    Every thread executes the PTX that Triton compiled. Told are findings with the line of the kernel's source
    (races, missing barriers and waits, accesses out of bounds, memory read before it is written, ...), the error
    against float64, and what was executed: instructions by class, bytes, coalescing of global memory, bank
    conflicts of shared memory, divergence. Exit code 1 where something was found; a large error is told, and is no
    finding.

    OPERATOR: a call with the shape options of `ldmperf inspect`, small unless told. Arguments that a file of
    tensors lacks and that are no tensors may be in its metadata, as JSON.

    FILE.py:NAME: a function without arguments, which launches Triton kernels on CPU tensors; or a kernel, beside
    which the file defines example_NAME(). That returns (grid, {argument: value}) and, as a third, what tensors
    should hold afterwards, best in float64: {argument: tensor}.

    \b
    Examples:
      ldmperf emulate geglu
      ldmperf emulate attention --head-dim 80 --context 77 --dtype float16
      ldmperf emulate group_norm_silu --channels 64 --height 9 --width 7 --inputs extreme
      ldmperf emulate linear --arch sm_80 --config block_m=64,num_warps=4 --accumulate tensor-core
      ldmperf emulate layer_norm --inputs activations.safetensors --json
      ldmperf emulate my_kernels.py:softmax_kernel
      ldmperf emulate tests/test_my_kernels.py:test_softmax --arch sm_80
    """
    from ..static.compile import require_compiler

    require_compiler()
    from ..emulator.emulation import ARCHITECTURES
    from ..emulator.numerics import Numerics
    from .emulate_run import emulate_module, emulate_operator

    check_known("architecture", arch, ARCHITECTURES)
    known_name("accumulate", accumulate, ACCUMULATE)
    known_name("tf32", tf32, TF32)
    numerics = Numerics(
        "float32" if accumulate == "float32" else "tensor core",
        perturb,
        "round" if tf32 == "round" else "truncate",
    )
    if ":" in kernel:
        given = {"dtype": dtype, "config": config, "inputs": inputs, "mean": mean, "scale": scale} | sizes
        for name, value in given.items():
            if value is not None:
                raise CaseError(f"{option(name)} is of an operator, and {kernel} is none: leave it out")
        found = emulate_module(kernel, arch, numerics, seed=seed or 0, as_json=as_json)
    else:
        found = emulate_operator(
            kernel,
            sizes,
            arch=arch,
            dtype=None if dtype is None else dtype_named(dtype),
            config=config,
            inputs=inputs or "random",
            numbers={"mean": mean, "scale": scale, "seed": seed},
            numerics=numerics,
            as_json=as_json,
        )
    if found:
        raise typer.Exit(1)
