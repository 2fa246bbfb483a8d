"""`make closed-world`, or `python -m closed_world` in bench/: from training to records."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ldmperf.profiling.measure.recorded import new_run_id

from . import cells
from .adversarial import gan_folder
from .captions import TOKENS
from .family import WORLDS
from .judge import JudgeError, ceiling, load_judge
from .metrics import FEWEST
from .networks import COMMITTED, network_folder
from .options import OptionsError, hold_to, refuse_others
from .pool import run_all
from .study import Study
from .super_resolution import super_folder
from .tasks import stages
from .training import ADVERSARIAL, CONTINUED, Recipe

_STAGES = "judge, train, tune, sample, guidance, shares, stitch, distill, super-resolution, gan, masked, time"

# What needs no network of the family.
_OF_THEIR_OWN = {"judge", "gan", "masked"}
# What needs no judge.
_UNJUDGED = {"train", "time"}
# What is done of the committed networks.
_TRAINED = ("judge", "train")


def main(
    out: Annotated[Path, typer.Option(help="Folder of records; a run that was stopped goes on there.")] = Path(
        "runs/closed-world"
    ),
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the networks. [default: weights in --out]")
    ] = None,
    committed: Annotated[
        bool, typer.Option("--committed", help="Take the judge and the family of this repository.")
    ] = False,
    latent: Annotated[
        int, typer.Option(help="Side of a latent, which chooses the family: 8 for a CPU, 16 for a GPU.")
    ] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each network.")] = Recipe.steps,
    seeds: Annotated[
        int, typer.Option(min=1, help="Networks of each width, each trained with a seed of its own.")
    ] = 3,
    samplers: Annotated[str, typer.Option(help="Some of " + ", ".join(cells.STEPS) + ".")] = ",".join(cells.STEPS),
    only: Annotated[
        str | None,
        typer.Option(help=f"Some of the stages {_STAGES}. [default: all]"),
    ] = None,
    distill_steps: Annotated[
        int, typer.Option(min=1, help="Training steps of each round of distillation.")
    ] = CONTINUED.steps,
    fine_tuned: Annotated[str, typer.Option(help="Training steps of super-resolution.")] = ",".join(
        map(str, cells.FINE_TUNED)
    ),
    gan_steps: Annotated[
        int, typer.Option(min=1, help="Training steps of each generator of a GAN.")
    ] = ADVERSARIAL.steps,
    masked_steps: Annotated[
        int, typer.Option(min=1, help="Training steps of each masked transformer.")
    ] = Recipe.steps,
    samples: Annotated[
        int, typer.Option(min=FEWEST, help="Images that each network, sampler and number of steps is judged by.")
    ] = cells.SAMPLES,
    held_out: Annotated[
        int, typer.Option(min=FEWEST, help="Images that each guidance is chosen by.")
    ] = cells.HELD_OUT,
    workers: Annotated[int, typer.Option(min=0, help="Processes, of one thread each; 0: one for each core.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train small networks on synthetic scenes, judge their samples, measure their cost: docs/closed-world.md."""
    if latent not in WORLDS:
        raise typer.BadParameter(f"no world has latent {latent}: give one of {', '.join(map(str, WORLDS))}")
    chosen = _words(samplers)
    if unknown := [name for name in chosen if name not in cells.STEPS]:
        raise typer.BadParameter(f"no sampler {', '.join(unknown)}: give some of {', '.join(cells.STEPS)}")
    if not all(word.isdecimal() and int(word) > 0 for word in fine_tuned.split(",")):
        raise typer.BadParameter(f"no numbers of steps: {fine_tuned}; give some such as 100,300")
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out {out} is a file: give a folder")
    if committed and weights is not None:
        raise typer.BadParameter("--committed has networks of its own: leave --weights out")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}: give cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: torch sees no GPU here; leave it out")
    folder = COMMITTED if committed else weights or out / "weights"
    study = Study(
        out,
        folder,
        new_run_id(),
        latent,
        device,
        Recipe(steps=steps),
        distilling=replace(CONTINUED, steps=distill_steps),
        fine_tuned=tuple(sorted(set(map(int, fine_tuned.split(","))))),
        adversarial=replace(ADVERSARIAL, steps=gan_steps),
        masked=Recipe(steps=masked_steps),
        seeds=tuple(range(seeds)),
        samples=samples,
        held_out=held_out,
    )
    parts = stages(study, chosen)
    known = [name for name in (*parts, "time") if not (committed and name in _TRAINED)]
    wanted = tuple(known) if only is None else _words(only)
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"no stage {', '.join(unknown)}: give some of {', '.join(known)}")
    source = "committed" if committed else str(weights.resolve()) if weights else "its own"
    try:
        of_networks: dict[str, int | str] = {"--latent": latent, "--steps": steps}
        of_study = {**of_networks, "--weights": source}
        advice = "leave {option} out" if committed else "give another folder"
        refuse_others(folder, of_networks, advice)
        refuse_others(out, of_study)
        if "train" not in wanted and set(wanted) - _OF_THEIR_OWN:
            _check_networks(study, committed)
        judges = bool(set(wanted) - _UNJUDGED)
        if judges and not study.judge.exists() and "judge" not in wanted:
            raise typer.BadParameter(f"{study.judge} is not there: train it with --only judge")
        # Nothing is written before all of this holds.
        hold_to(folder, of_networks)
        hold_to(out, of_study)
        for name, tasks in parts.items():
            if name in wanted:
                run_all(name, tasks, study, workers or len(os.sched_getaffinity(0)))
            if name == "judge" and judges:
                _tell_ceiling(study)
        if "time" in wanted:
            _time(study)
    except (OptionsError, JudgeError) as failure:
        raise SystemExit(str(failure)) from None
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenProcessPool:
        raise SystemExit(
            "A worker was killed, perhaps for its memory. The same command goes on; --workers 1 takes the least."
        ) from None
    except subprocess.CalledProcessError as failure:
        raise SystemExit(failure.returncode) from None
    print(f"Records are in {out}; judge the claims with: ldmperf claims {out}")


def _words(told: str) -> tuple[str, ...]:
    """Of a list with commas."""
    return tuple(word.strip() for word in told.split(","))


def _check_networks(study: Study, committed: bool) -> None:
    """Raises BadParameter where a stage would miss a network."""
    folders = (network_folder(study.weights, width, seed) for width in study.world.widths for seed in study.seeds)
    if missing := next((folder for folder in folders if not folder.exists()), None):
        how = "give fewer --seeds" if committed else "train it (--only judge,train), or give fewer --seeds"
        raise typer.BadParameter(f"{missing} is not there: {how}")


def _tell_ceiling(study: Study) -> None:
    """What the judge reads right of real latents: no network's alignment means more than that."""
    found = ceiling(load_judge(study.judge, study.world), study.world)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
    print(f"The judge reads right, of real latents: {shares}", file=sys.stderr)


def _time(study: Study) -> None:
    """The cost of the networks' steps by the project's own profiler: an image alone, and one in a batch.

    Students have the times of their teachers. Of super-resolution, once it is trained, DDIM is timed, and of GANs
    one step of it, which is a pass of theirs.
    """
    widths, seed, weights = study.world.widths, study.seeds[0], study.weights
    for batch, (samplers, steps) in cells.TIMED.items():
        family = [network_folder(weights, width, seed) for width in widths]
        _profile(study, family, "t2i", "1,2", samplers, steps, batch)
        wider = [super_folder(study, width, seed, max(study.fine_tuned), True) for width in widths]
        passes = [gan_folder(study, width, seed) for width in widths]
        for task, folders, numbers in (("sr", wider, steps), ("t2i", passes, (1,))):
            if all(folder.exists() for folder in folders):
                _profile(study, folders, task, "1", ("ddim",), numbers, batch)


def _profile(
    study: Study,
    networks: Sequence[Path],
    task: str,
    guidance: str,
    samplers: Sequence[str],
    steps: Sequence[int],
    batch: int,
) -> None:
    size = f"{study.latent}x{study.latent}"
    options = {
        **{"--task": task, "--unet": ",".join(map(str, networks)), "--latent": size, "--tokens": str(TOKENS)},
        **{"--sampler": ",".join(samplers), "--steps": ",".join(map(str, steps)), "--batch": str(batch)},
        **{"--guidance": guidance, "--dtype": "float32", "--device": study.device},
        **{"--backend": "torch" if study.device == "cpu" else "graph", "--out": str(study.folder / "times")},
    }
    words = [word for option in options.items() for word in option]
    profiler = Path(sys.executable).with_name("ldmperf")
    subprocess.run([str(profiler), "profile", "--one-process", *words], check=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
