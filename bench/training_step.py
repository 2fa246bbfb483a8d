"""CPU time of a training step of a small UNet, our operators beside plain torch's, width by width.

Both are the same network on the same weights, in float32 on one thread: forward, mean square, backward. Plain
torch is `profiling/kernel_bench/plain.py` under ordinary autograd, in the operators' place. The two take turns in
one process, so that what else runs on the machine meets both. The ratio is of medians. Where the time goes is by
operator: its forward, its backward, and the rest (convolutions, matmuls, sums of gradients), which both have.

    python bench/training_step.py
    python bench/training_step.py --width 8 --steps 40
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ldmperf.kernels import modules
from ldmperf.model import UNet, UNetConfig, blocks, written
from ldmperf.profiling.kernel_bench.plain import PLAIN

BATCH, TOKENS, CONTEXT_DIM, SIZE = 32, 6, 32, 8
WIDTHS = (8, 16, 32)
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
    """Three levels, attention in two, for latents [4, 8, 8]."""
    torch.manual_seed(width)
    config = UNetConfig(
        block_channels=(width, 2 * width, 2 * width),
        num_heads=(2, 2, 2),
        attention=(True, True, False),
        layers_per_block=1,
        context_dim=CONTEXT_DIM,
        norm_groups=4,
        sample_size=SIZE,
    )
    return UNet(config, backend="torch").train()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps, the text, and what the network is to say."""
    generator = torch.Generator().manual_seed(0)
    latents, target = torch.randn(2, BATCH, 4, SIZE, SIZE, generator=generator)
    timesteps = torch.randint(1000, (BATCH,), generator=generator).float()
    return latents, timesteps, torch.randn(BATCH, TOKENS, CONTEXT_DIM, generator=generator), target


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


def cpu_ms(run: Callable[[], None]) -> float:
    begin = time.process_time()
    run()
    return 1e3 * (time.process_time() - begin)


def medians(unet: UNet, steps: int) -> tuple[float, float]:
    """(ours, plain torch's) in ms of CPU time, step by step in turns."""
    given, times = batch(), ([], [])  # type: tuple[Any, tuple[list[float], list[float]]]
    for i in range(WARMUP + steps):
        for found, which in zip(times, (ours, plain), strict=True):
            with which():
                spent = cpu_ms(lambda: step(unet, *given))
            if i >= WARMUP:
                found.append(spent)
    return statistics.median(times[0]), statistics.median(times[1])


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


def report(width: int, steps: int) -> list[str]:
    unet = network(width)
    own, theirs = medians(unet, steps)
    found = [by_operator(unet, which) for which in (ours, plain)]
    lines = [f"width {width}: ours {own:.1f} ms, plain torch {theirs:.1f} ms, ratio {own / theirs:.2f}"]
    lines.append(f"  under the profiler, ms: {'ours':>37} {'plain':>7}")
    for name in sorted(found[0].keys() | found[1].keys()):
        lines.append(f"    {name:<56} {found[0].get(name, 0.0):6.2f}  {found[1].get(name, 0.0):6.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, action="append", help="of the first level; 8, 16 and 32 unless told")
    parser.add_argument("--steps", type=int, default=20, help="of each, that count (default: 20)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for width in options.width or WIDTHS:
        print("\n".join(report(width, options.steps)), flush=True)


if __name__ == "__main__":
    main()
