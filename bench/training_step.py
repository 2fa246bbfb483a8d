"""CPU time of a training step of the closed world's networks, our operators beside plain torch's, width by width.

Both are the same network on the same weights, in float32 on one thread: forward, mean square, backward. Plain
torch is `profiling/kernel_bench/plain.py` under ordinary autograd, in the operators' place. The two take turns in
one process, so that what else runs on the machine meets both. The ratio is of medians. A whole step of training,
with scenes, optimizer and averaged weights, takes its turn after them. Where the time goes is by operator: its
forward, its backward, and the rest (convolutions, matmuls, sums of gradients), which both have.

    python bench/training_step.py
    python bench/training_step.py --width 8 --steps 40
    python bench/training_step.py --steps 150 --out found.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from closed_world.captions import CONTEXT_DIM, TOKENS
from closed_world.family import WORLDS
from closed_world.latents import CHANNELS
from closed_world.networks import label
from closed_world.study import Study
from closed_world.tables import table
from closed_world.training import Recipe, Training, drawn_network
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ldmperf.kernels import modules
from ldmperf.model import UNet, blocks, written
from ldmperf.profiling.figures.phrases import processor_name
from ldmperf.profiling.kernel_bench.plain import PLAIN
from ldmperf.profiling.measure.conditions import commit
from ldmperf.profiling.measure.environment import Environment, collect_environment
from ldmperf.profiling.measure.store import write_whole

WORLD = WORLDS[8]
# Steps before any that counts.
WARMUP = 3
# By the names that the network calls: their modules, and the operator.
CALLED = {
    "group_norm_silu": (modules, "group_norm_silu"),
    "residual_add": (written, "residual_add"),
    "linear_separate": (blocks, "linear"),
    "attention": (blocks, "attention"),
}

Function = Callable[..., Any]


def network(width: int) -> UNet:
    """That of a width, as its training begins."""
    return drawn_network(WORLD.config(width), seed=0).train()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps, the text, and what the network is to say."""
    generator = torch.Generator().manual_seed(0)
    count = Recipe.batch
    latents, target = torch.randn(2, count, CHANNELS, WORLD.latent, WORLD.latent, generator=generator)
    timesteps = torch.randint(1000, (count,), generator=generator).float()
    return latents, timesteps, torch.randn(count, TOKENS, CONTEXT_DIM, generator=generator), target


def step(unet: UNet, latents: Tensor, timesteps: Tensor, context: Tensor, target: Tensor) -> None:
    """Forward and backward; gradients are new memory each time."""
    unet.zero_grad(set_to_none=True)
    (unet(latents, timesteps, context) - target).square().mean().backward()


def plain_of(operator: str) -> Function:
    """Plain torch, without the argument that names a backend."""
    return lambda *arguments, backend, **options: PLAIN[operator](*arguments, **options)


@contextmanager
def in_place(replaced: Callable[[str, Function], Function]) -> Iterator[None]:
    """Within, the network calls replaced(operator, its own function) for each of its operators."""
    own = {name: getattr(module, name) for name, (module, _) in CALLED.items()}
    for name, (module, operator) in CALLED.items():
        setattr(module, name, replaced(operator, own[name]))
    try:
        yield
    finally:
        for name, (module, _) in CALLED.items():
            setattr(module, name, own[name])


def ours() -> Any:
    return in_place(lambda operator, own: own)


def plain() -> Any:
    return in_place(lambda operator, own: plain_of(operator))


def cpu_ms(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return 1e3 * (time.process_time() - begin)


def medians(width: int, steps: int) -> dict[str, float]:
    """ms of CPU time: of ours, of plain torch's, and of a whole step of training, in turns."""
    unet, given = network(width), batch()
    training = Training(WORLD, network(width), 0, Recipe())
    times: dict[str, list[float]] = {"ours": [], "plain": [], "training": []}
    for i in range(WARMUP + steps):
        found = {}
        for name, which in (("ours", ours), ("plain", plain)):
            with which():
                found[name] = cpu_ms(lambda: step(unet, *given))
        found["training"] = cpu_ms(training.step)
        if i >= WARMUP:
            for name, spent in found.items():
                times[name].append(spent)
    return {name: statistics.median(each) for name, each in times.items()}


def by_operator(unet: UNet, which: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """ms of a step by operator, forward and backward, under the profiler, which adds to each.

    A node of the backward belongs to the operator whose forward made it: autograd numbers both.
    """
    given = batch()

    def named(operator: str, own: Function) -> Function:
        function = own if which is ours else plain_of(operator)

        def run(*arguments: Any, **options: Any) -> Any:
            with record_function(f"operator {operator}"):
                return function(*arguments, **options)

        return run

    with in_place(named):
        for _ in range(WARMUP):
            step(unet, *given)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(repeats):
                step(unet, *given)
    events = [event for event in found.events() if event.device_type == DeviceType.CPU]
    made_by: dict[int, str] = {}
    times: dict[str, float] = {}

    def add(name: str, us: float) -> None:
        times[name] = times.get(name, 0.0) + us / 1e3 / repeats

    for event in events:
        above = event
        while above is not None and not above.name.startswith("operator "):
            above = above.cpu_parent
        if above is event:
            add(f"{event.name.removeprefix('operator ')}, forward", event.cpu_time_total)
        elif above is not None and event.sequence_nr >= 0:
            made_by.setdefault(event.sequence_nr, above.name.removeprefix("operator "))
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function") and not is_nested(event):
            add(f"{made_by.get(event.sequence_nr, 'others')}, backward", event.cpu_time_total)
    return times


def is_nested(event: Any) -> bool:
    """Whether another node of the backward runs this one: where it recomputes under autograd."""
    above = event.cpu_parent
    while above is not None and not above.name.startswith("autograd::engine::evaluate_function"):
        above = above.cpu_parent
    return above is not None


def operator_lines(width: int) -> list[str]:
    """Where the time of a step goes, in lines of text."""
    unet = network(width)
    found = [by_operator(unet, which) for which in (ours, plain)]
    lines = [f"  under the profiler, ms: {'ours':>37} {'plain':>7}"]
    for name in sorted(found[0].keys() | found[1].keys()):
        lines.append(f"    {name:<56} {found[0].get(name, 0.0):6.2f}  {found[1].get(name, 0.0):6.2f}")
    return lines


def training_table(found: Mapping[str, Any]) -> str:
    """What `--out` has, for docs/closed-world.md."""
    environment = Environment.model_validate_json(json.dumps(found["environment"]))
    trainings = found["training_steps"] * found["seeds"]
    heads = [
        "network",
        "forward and backward, ms",
        "plain torch's, ms",
        "ratio",
        "a training step, ms",
        "core minutes",
    ]
    rows, whole = [], 0.0
    for width, ms in found["widths"].items():
        minutes = ms["training"] * trainings / 60e3
        whole += minutes
        times = (
            f"{ms['ours']:.1f}",
            f"{ms['plain']:.1f}",
            f"{ms['ours'] / ms['plain']:.2f}",
            f"{ms['training']:.1f}",
        )
        rows.append([label(int(width)), *times, f"{minutes:.0f}"])
    text = (
        f"**Measured**: {processor_name(environment)}, commit {commit(environment)}; CPU time of one thread, "
        f"medians of {found['steps']} steps in turns; *core minutes*: {found['seeds']} trainings of "
        f"{found['training_steps']} steps at that, {whole:.0f} for all networks."
    )
    return f"{textwrap.fill(text, 125)}\n\n{table(heads, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--width", type=int, action="append", choices=WORLD.widths, help="of the first level; all unless told"
    )
    parser.add_argument("--steps", type=int, default=20, help="of each, that count (default: 20)")
    parser.add_argument("--out", type=Path, help="a file for what was found, JSON")
    options = parser.parse_args()
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out: no folder {options.out.parent}; make it first")
    torch.set_num_threads(1)
    widths = {}
    for width in options.width or WORLD.widths:
        ms = widths[width] = medians(width, options.steps)
        told = f"ours {ms['ours']:.1f} ms, plain torch {ms['plain']:.1f} ms, ratio {ms['ours'] / ms['plain']:.2f}"
        print(f"width {width}: {told}; a whole training step {ms['training']:.1f} ms")
        print("\n".join(operator_lines(width)), flush=True)
    if options.out is not None:
        found = {
            "environment": collect_environment().model_dump(mode="json"),
            "steps": options.steps,
            "training_steps": Recipe.steps,
            "seeds": len(Study.seeds),
            "widths": widths,
        }
        write_whole(options.out, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
