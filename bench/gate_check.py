"""What the gate of `ldmperf compare` answers to noise and to an injected slowdown: `python bench/gate_check.py`.

One repeat is two comparisons, of three sides that run in turn, each run in a process of its own: the checkout,
the checkout again, and the checkout with every trajectory made longer by --inject. It does take longer: after its
work it waits for that share of what it took. The gate (--fail-over wall_ms at the injected share) must not fail
the first two, and must fail the first and the third. The result, with each run's median and each verdict, goes to
--out as JSON after each repeat. Nothing else should run on the machine.

    python bench/gate_check.py --out gate.json
    python bench/gate_check.py --repeats 2 --rounds 3 -- --size 39M --latent 8 --steps 1 --backend torch
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldmperf.profiling import cli
from ldmperf.profiling.commands.shared import terminated_as_interrupted
from ldmperf.profiling.compare.comparison import AMBIGUOUS, SAME, Comparison, VerdictRule, compare_sets
from ldmperf.profiling.compare.gate import Threshold, answers
from ldmperf.profiling.compare.metrics import METRICS
from ldmperf.profiling.compare.rounds import OUT, RoundFailed, Side, run_rounds
from ldmperf.profiling.compare.sets import check_comparable
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.options import CaseError, percentage, whole_number
from ldmperf.profiling.trajectory import runner
from ldmperf.profiling.trajectory.backend import Backend, Inputs, Problem, Trajectory

# Seconds of samples in each run, so that a neighbour's short burst does not move its median.
PROFILE = (
    *("--size", "39M", "--latent", "16", "--steps", "2", "--backend", "torch,diffusers"),
    *("--min-count", "7", "--min-seconds", "2"),
)
METRIC = METRICS["wall_ms"]
CLI = "from ldmperf.profiling.cli import main; main()"


@dataclass(frozen=True)
class SlowedBackend:
    """A backend whose trajectories take longer by `share`; all else is that of the backend it has."""

    backend: Backend
    share: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def build(self, problem: Problem) -> Trajectory:
        return slowed(self.backend.build(problem), self.share, torch.device(problem.case.device))


def slowed(trajectory: Trajectory, share: float, device: torch.device) -> Trajectory:
    """The trajectory, then a wait of that share of what it took, in which the host is busy, as in slower code."""

    def call(inputs: Inputs) -> torch.Tensor:
        start = time.perf_counter()
        latents = trajectory(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        until = start + (1 + share) * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return latents

    return call


def run_slowed(share: float, arguments: Sequence[str]) -> None:
    """`ldmperf` with these arguments, its trajectories slowed."""
    made = runner.all_backends
    runner.all_backends = lambda: {name: SlowedBackend(backend, share) for name, backend in made().items()}
    cli.main(arguments)


def sides(folder: Path, injected: float, profile: Sequence[str]) -> list[Side]:
    """The checkout, the checkout again, and the slowed one."""
    plain = (sys.executable, "-P", "-c", CLI, "profile", *profile, "--out", OUT)
    slow = (sys.executable, "-P", __file__, "--run-slowed", str(injected), "--", *plain[4:])
    commands = {"checkout": plain, "checkout again": plain, "slowed": slow}
    return [
        Side(name, command, folder / name.replace(" ", "-"), Path.cwd(), dict(os.environ))
        for name, command in commands.items()
    ]


def repeat(threshold: Threshold, rounds: int, profile: Sequence[str], force: bool) -> dict[str, Any]:
    """One comparison of noise and one of the injection, as JSON has them."""
    with tempfile.TemporaryDirectory(prefix="ldmperf-gate-") as folder:
        first, again, slow = run_rounds(sides(Path(folder), threshold.worse, profile), rounds, tell)
    rule = VerdictRule()
    found = {}
    for name, other in (("noise", again), ("injected", slow)):
        check_comparable(first, other, force)
        found[name] = summary(compare_sets(first, other, [METRIC], rule), threshold, rule)
    return found


def summary(found: Comparison, threshold: Threshold, rule: VerdictRule) -> dict[str, Any]:
    """The cases of a comparison, and whether the gate failed it or a verdict was other than SAME and AMBIGUOUS."""
    cases = []
    for _, change, answer in answers(found, [threshold], rule):
        contrast = change.contrast
        if contrast is None:
            raise RunError(f"{change.name}: no verdict ({change.why}); give more --rounds")
        medians = {
            name: [record.wall_ms.p50 for record in side.of(change.key) if record.wall_ms is not None]
            for name, side in (("a_ms", found.a), ("b_ms", found.b))
        }
        cases.append(
            {
                "case": change.name,
                **medians,
                "ratio": contrast.ratio.value,
                "interval": [contrast.ratio.low, contrast.ratio.high],
                "p": change.p,
                "noise": contrast.noise,
                "verdict": change.verdict,
                "gate": answer,
            }
        )
    if found.broken:
        raise RunError(f"a case failed: {found.broken[0]}")
    return {
        "gate_fails": any(case["gate"] == "fails" for case in cases),
        "differs": any(case["verdict"] not in (SAME, AMBIGUOUS) for case in cases),
        "in_turn": found.in_turn,
        "cases": cases,
    }


def counts(repeats: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many repeats there are, and in how many the gate failed and a verdict differed, by what was compared."""
    return {"repeats": len(repeats)} | {
        f"{kind}_{what}": sum(found[kind][what] for found in repeats)
        for kind in ("noise", "injected")
        for what in ("gate_fails", "differs")
    }


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check(
    given: argparse.Namespace, profile: Sequence[str], measured: Callable[..., dict[str, Any]] = repeat
) -> None:
    """All repeats, the file written anew after each. Raises CaseError, RunError and RoundFailed."""
    threshold = Threshold(METRIC, percentage("inject", given.inject))
    number, rounds = (whole_number(name, getattr(given, name), 999) for name in ("repeats", "rounds"))
    found: list[dict[str, Any]] = []
    for place in range(1, number + 1):
        found.append(measured(threshold, rounds, profile, given.force))
        content = {
            "environment": collect_environment().model_dump(mode="json"),
            "profile": list(profile),
            "rounds": rounds,
            "fail_over": f"{METRIC.name}:{given.inject}",
            "counts": counts(found),
            "repeats": found,
        }
        write_whole(given.out, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        tell(f"repeat {place} of {number}: {json.dumps(content['counts'])}")
    told = counts(found)
    print(f"noise: the gate failed {told['noise_gate_fails']} of {number} comparisons of a checkout with itself")
    print(f"injected {given.inject}: the gate failed {told['injected_gate_fails']} of {number}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", default="20")
    parser.add_argument("--rounds", default="6", help="runs of each side in a repeat")
    parser.add_argument("--inject", default="5%", help="how much longer the third side's trajectories take")
    parser.add_argument("--out", type=Path, default=Path("gate.json"), help="the file for the result")
    parser.add_argument("--force", action="store_true", help="measure a checkout with uncommitted changes")
    parser.add_argument("--run-slowed", type=float, help=argparse.SUPPRESS)
    parser.add_argument("profile", nargs="*", help="options of ldmperf profile, after --")
    given = parser.parse_args()
    if given.run_slowed is not None:
        run_slowed(given.run_slowed, given.profile)
    try:
        # What is running ends with this process, and its folder with it.
        with terminated_as_interrupted():
            check(given, given.profile or PROFILE)
    except (CaseError, RunError) as wrong:
        sys.exit(f"gate_check.py: {wrong}")
    except RoundFailed as failed:
        sys.exit(f"gate_check.py: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
