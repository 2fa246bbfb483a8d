"""The command `ldmperf kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..measure.timing import Deadline
from ..options import (
    LARGEST_SEED,
    LONGEST_SEQUENCE,
    CaseError,
    best_device,
    device_named,
    dtype_named,
    known_names,
    latent_size,
    split_values,
    whole_number,
)
from ..terminal.visible import console, say
from .shared import (
    DEFAULT_OUT,
    alone_on_gpu,
    exit_by,
    list_option,
    print_json,
    seconds_option,
    stop,
    tell,
    whole_option,
    with_options,
)

if TYPE_CHECKING:
    from ..kernel_bench.kernel_records import KernelRecord, KernelStore, Mode
    from ..kernel_bench.run import BenchChoices
    from ..measure.environment import Environment

LISTS = {
    name: list_option(text)
    for name, text in {
        "kernel": "Operators: group_norm_silu, layer_norm, ...",
        "size": "Sizes of the family, or vae; all unless told.",
        "batch": "The UNet's batch: 2 and 16 unless told.",
        "peer": "triton, auto, separate, compile, eager, reference, sdpa-cudnn, sdpa-flash, sdpa-efficient, flex, "
        "diffusers, diffusers-compile, xformers; those that this machine can run unless told.",
        "head-dim": "Attention of 8 heads of these sizes, instead of the family's calls.",
        "latent": "The UNet's latent sizes, height x width; 64x64 unless told.",
        "tokens": "Tokens of the text, 77 unless told; with --head-dim sequence lengths: 4096, 1024, 256 and 64 "
        "unless told.",
    }.items()
}


@with_options("lists", LISTS)
def kernels(
    lists: dict[str, list[str]],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; cuda where there is one.")] = None,
    seed: Annotated[int | None, whole_option("Seed of the random inputs; 0 unless told.", 0, LARGEST_SEED)] = None,
    seconds: Annotated[
        float, seconds_option("Begin no call after so long; the most important come first.")
    ] = 240.0,
    out: Annotated[
        Path | None, typer.Option(help="Where the folder of records goes; runs unless told.", show_default=False)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a record.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="A folder of records to add to, with the same options: its calls are not measured again.",
            metavar="FOLDER",
        ),
    ] = None,
) -> None:
    """Measure each kernel beside its peers, at the shapes of a step.

    Kernel and peers run in turn. A call is timed only when its result is right. On a GPU by its own clock, inputs
    rotated past the L2 cache, launched one by one and replayed as a CUDA graph; on a CPU by the host's clock.
    Without --peer: the peers that this machine can run, but for FlexAttention (flex), and on a CPU those that
    compile: these only when named. Exit code 1 when a call ended as error, incorrect or impossible, or none as ok.
    A call's records are on disk before the next call begins.

    \b
    Examples:
      ldmperf kernels
      ldmperf kernels --kernel group_norm_silu,geglu --size 39M,866M --batch 2 --seconds 60
      ldmperf kernels --size 866M --latent 96x128 --tokens 154
      ldmperf kernels --kernel attention --head-dim 40,64,80,128,160 --batch 16 --tokens 4096
      ldmperf kernels --device cpu --size 39M --peer eager,reference --dtype float32
      ldmperf kernels --resume runs/20260101T000000Z-1a2b3c4-kernels
    """
    from ldmperf.kernels import OPERATORS

    from ..kernel_bench.peers import PEERS
    from ..kernel_bench.run import BenchChoices
    from ..kernel_bench.selection import SIZES, VAE

    if schema:
        if lists or seed is not None or out is not None or resume is not None or device is not None:
            raise CaseError("--schema prints the schema and measures nothing: give it alone")
        from ..kernel_bench.kernel_records import kernel_schema

        print_json(kernel_schema())
        return
    given = {name: split_values(lists.get(name, ())) for name in LISTS}
    for name in lists:
        if not given[name]:
            raise CaseError(f"--{name}: no value given; leave the option out to take the usual ones")
    if resume is not None and out is not None:
        raise CaseError("--resume adds to its own folder: leave --out out, or --resume for a new folder")

    def numbers(name: str, most: int) -> tuple[int, ...]:
        return tuple(whole_number(name, text, most) for text in given[name])

    operators = known_names("kernel", given["kernel"], OPERATORS) or tuple(OPERATORS)
    head_dims = numbers("head-dim", 1024)
    sizes = known_names("size", given["size"], SIZES)
    if head_dims and (sizes or (given["kernel"] and set(operators) != {"attention"})):
        raise CaseError(
            "--head-dim chooses attention's calls: leave --size out; leave --kernel out too, "
            "or give --kernel attention"
        )
    if head_dims and given["latent"]:
        raise CaseError("--head-dim has no latent: give sequence lengths with --tokens, and leave --latent out")
    for name in ("batch", "latent", "tokens"):
        if given[name] and set(sizes) == {VAE}:
            raise CaseError(
                f"--{name} is the UNet's, and the VAE is measured at batch 1, 512x512 pixels: leave --{name} out"
            )
    choices = BenchChoices(
        operators=("attention",) if head_dims else operators,
        sizes=sizes,
        batches=tuple(sorted(set(numbers("batch", 1024)))),
        peers=known_names("peer", given["peer"], PEERS),
        dtype=dtype_named(dtype),
        device=best_device() if device is None else device_named(device),
        head_dims=head_dims,
        tokens=numbers("tokens", LONGEST_SEQUENCE),
        latents=tuple(latent_size("latent", text) for text in given["latent"]),
        seed=seed or 0,
    )
    deadline = Deadline(seconds)
    with alone_on_gpu(choices.device):
        _run(choices, deadline, out or DEFAULT_OUT, resume)


def _run(choices: BenchChoices, deadline: Deadline, out: Path, resume: Path | None) -> None:
    """Measures, with a line for each call on stderr; then the table on stdout and as kernels.md."""
    from ..kernel_bench import KERNELS_NAME
    from ..kernel_bench.kernel_records import KernelStore
    from ..kernel_bench.run import earlier_records
    from ..measure.environment import collect_environment
    from ..measure.folders import locked, new_folder
    from ..measure.recorded import utc_now

    environment = collect_environment(choices.device)
    earlier = (
        [] if resume is None else earlier_records(resume, environment, choices.dtype, choices.device, choices.seed)
    )
    try:
        folder = resume or new_folder(out, utc_now(), environment, "-kernels")
        lock = locked(folder, tell)
        store = KernelStore(folder / KERNELS_NAME)
    except OSError as failure:
        stop(f"cannot write to {resume or out} ({failure.strerror}); choose another folder with --out", 1)
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

    try:
        bench = choices.bench(environment)
        if bench.rates is not None and bench.rates.message is not None:
            tell(f"no bounds: {bench.rates.message}", "yellow")
        records, complete = run_jobs(
            bench, choices.jobs, store, deadline, lambda done: tell(progress_line(done)), earlier
        )
    except KeyboardInterrupt:
        print_records(store.load(), console())
        stop(f"stopped; go on with the same options and --resume {folder}", 130)
    except OSError as failure:
        stop(
            f"cannot write to {folder} ({failure.strerror}); make room, then go on with the same options and "
            f"--resume {folder}",
            1,
        )
    print_records(records, console())
    if not complete:
        tell(
            f"not every call was reached in time; go on with the same options and --resume {folder}, "
            "give more --seconds, or name fewer with --kernel, --size, --batch"
        )
    try:
        path = write_markdown(folder, markdown(records))
    except OSError as failure:
        stop(f"cannot write to {folder} ({failure.strerror}); the records there are whole", 1)
    say(console(), str(path))
    exit_by({record.status for record in records})


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
