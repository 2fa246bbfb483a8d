"""The command `ldmperf kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..measure.timing import Deadline
from ..options import best_device, device_named, dtype_named, known_names, split_values, whole_number
from ..terminal.visible import console, say
from .shared import DEFAULT_OUT, list_option, seconds_option, tell

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord, KernelStore, Mode
    from ..kernel_bench.run import BenchChoices
    from ..measure.environment import Environment

DEFAULT_SECONDS = 240.0


def kernels(
    kernel: Annotated[list[str] | None, list_option("Operators: group_norm_silu, layer_norm, ...")] = None,
    size: Annotated[list[str] | None, list_option("Sizes of the family, or vae; all unless told.")] = None,
    batch: Annotated[list[str] | None, list_option("The UNet's batch: 2 and 16 unless told.")] = None,
    peer: Annotated[
        list[str] | None,
        list_option(
            "triton, auto, separate, compile, eager, reference, sdpa-cudnn, sdpa-flash, sdpa-efficient, flex, "
            "diffusers, diffusers-compile, xformers; those that this machine can run unless told."
        ),
    ] = None,
    head_dim: Annotated[
        list[str] | None, list_option("Attention of 8 heads of these sizes, instead of the family's calls.")
    ] = None,
    tokens: Annotated[
        list[str] | None, list_option("With --head-dim: sequence lengths; 4096, 1024, 256 and 64 unless told.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; cuda where there is one.")] = None,
    seconds: Annotated[
        float, seconds_option("Begin no call after so long; the most important come first.")
    ] = DEFAULT_SECONDS,
    out: Annotated[
        Path | None, typer.Option(help="Where the folder of records goes; runs unless told.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A folder of records to add to, with the same options: its calls are not measured again.",
            metavar="FOLDER",
        ),
    ] = None,
) -> None:
    """Measure each kernel at the shapes of a denoising step, in turn with its peers, and print the table.

    A call is timed only when its result is right. On a GPU by its own clock, inputs rotated past the L2 cache,
    launched one by one and replayed as a CUDA graph; on a CPU by the host's clock. Without --peer: the peers that
    this machine can run, but for FlexAttention (flex), and on a CPU those that compile: these only when named.
    Exit code 1 when a call ended as error or incorrect, or none as ok. A call's records are on disk before the
    next call begins.

    \b
    Examples:
      ldmperf kernels
      ldmperf kernels --kernel group_norm_silu,geglu --size 39M,866M --batch 2 --seconds 60
      ldmperf kernels --kernel attention --head-dim 40,64,80,128,160 --batch 16 --tokens 4096
      ldmperf kernels --device cpu --size 39M --peer eager,reference --dtype float32
      ldmperf kernels --resume runs/20260101T000000Z-1a2b3c4-kernels
    """
    from ldmperf.kernels import OPERATORS

    from ..kernel_bench.peers import PEERS
    from ..kernel_bench.run import BenchChoices
    from ..kernel_bench.selection import SIZES, VAE
    from ..options import CaseError

    lists = {"kernel": kernel, "size": size, "batch": batch, "peer": peer, "head-dim": head_dim, "tokens": tokens}
    for name, given in lists.items():
        if given and not split_values(given):
            raise CaseError(f"--{name}: no value given; leave the option out to take the usual ones")
    if resume is not None and out is not None:
        raise CaseError("--resume adds to its own folder: leave --out out, or --resume for a new folder")
    operators = known_names("kernel", kernel or (), OPERATORS) or tuple(OPERATORS)
    head_dims = tuple(whole_number("head-dim", text, 1024) for text in split_values(head_dim or ()))
    sizes = known_names("size", size or (), SIZES)
    if head_dims and (size or (kernel and set(operators) != {"attention"})):
        raise CaseError("--head-dim chooses attention's calls: leave --size out, and --kernel or name attention")
    if tokens and not head_dims:
        raise CaseError("--tokens goes with --head-dim: name head dimensions, or leave --tokens out")
    if batch and set(sizes) == {VAE}:
        raise CaseError("--batch is the UNet's, and the VAE is measured at batch 1: leave --batch out")
    choices = BenchChoices(
        operators=("attention",) if head_dims else operators,
        sizes=sizes,
        batches=tuple(sorted({whole_number("batch", text, 1024) for text in split_values(batch or ())})),
        peers=known_names("peer", peer or (), PEERS),
        dtype=dtype_named(dtype),
        device=best_device() if device is None else device_named(device),
        head_dims=head_dims,
        tokens=tuple(whole_number("tokens", text, 2**20) for text in split_values(tokens or ())),
    )
    _run(choices, Deadline(seconds), out or DEFAULT_OUT, resume)


def _run(choices: BenchChoices, deadline: Deadline, out: Path, resume: Path | None) -> None:
    """Measures, with a line for each call on stderr; then the table on stdout and as kernels.md."""
    from ..kernel_bench import KERNELS_NAME
    from ..kernel_bench.kernel_records import KernelStore
    from ..kernel_bench.run import earlier_records
    from ..measure.environment import collect_environment
    from ..measure.folders import locked, new_folder
    from ..measure.recorded import utc_now

    environment = collect_environment(choices.device)
    earlier = [] if resume is None else earlier_records(resume, environment, choices.dtype, choices.device)
    try:
        folder = resume or new_folder(out, utc_now(), environment, "-kernels")
        lock = locked(folder, tell)
        store = KernelStore(folder / KERNELS_NAME)
    except OSError as failure:
        tell(f"ldmperf: cannot write to {resume or out} ({failure.strerror}); choose another folder with --out")
        raise typer.Exit(1) from None
    with lock:
        _measure(choices, environment, folder, store, earlier, deadline)


def _measure(
    choices: BenchChoices,
    environment: Environment,
    folder: Path,
    store: KernelStore,
    earlier: list[KernelRecord],
    deadline: Deadline,
) -> None:
    """Measures into a folder that nobody else holds; exit codes as `kernels` says."""
    from ..kernel_bench.run import run_jobs, write_markdown
    from ..kernel_bench.table import markdown, print_records

    tell(f"{folder}: begins no call after {deadline.left:.0f} s")

    def told(records: Sequence[KernelRecord]) -> None:
        tell(progress_line(records))

    try:
        bench = choices.bench(environment)
        if bench.rates is not None and bench.rates.message is not None:
            tell(f"no bounds: {bench.rates.message}", "yellow")
        records, complete = run_jobs(bench, choices.jobs, store, deadline, told, earlier)
    except KeyboardInterrupt:
        print_records(store.load(), console())
        tell(f"ldmperf: stopped; go on with the same options and --resume {folder}")
        raise typer.Exit(130) from None
    except OSError as failure:
        tell(
            f"ldmperf: cannot write to {folder} ({failure.strerror}); "
            f"make room, then go on with the same options and --resume {folder}"
        )
        raise typer.Exit(1) from None
    print_records(records, console())
    if not complete:
        tell(
            f"not every call was reached in time; go on with the same options and --resume {folder}, "
            "give more --seconds, or name fewer with --kernel, --size, --batch"
        )
    try:
        path = write_markdown(folder, markdown(records))
    except OSError as failure:
        tell(f"ldmperf: cannot write to {folder} ({failure.strerror}); the records there are whole")
        raise typer.Exit(1) from None
    say(console(), str(path))
    statuses = {record.status for record in records}
    if statuses & {"error", "incorrect"} or "ok" not in statuses:
        raise typer.Exit(1)


def progress_line(records: Sequence[KernelRecord]) -> str:
    """One line on a call: its peers and their times, or why there is none."""
    from ..kernel_bench.kernel_records import MODES

    first = records[0]
    by_mode: dict[Mode, list[str]] = {}
    for r in records:
        time = r.status if r.ms is None else f"{r.ms.p50:.4g} ms"
        by_mode.setdefault(r.mode, []).append(f"{r.peer} {time}")
    times = [
        ", ".join(peers) if len(by_mode) == 1 else f"{MODES[m]} {', '.join(peers)}" for m, peers in by_mode.items()
    ]
    return f"{first.case.operator} {first.case.label} ({first.size} batch {first.batch}): {'; '.join(times)}"
