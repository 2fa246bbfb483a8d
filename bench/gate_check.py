"""What the gate of `ldmperf compare` answers to noise and to an injected slowdown: `python bench/gate_check.py`.

A repeat runs the checkout and the checkout again as `ldmperf compare --commits` does, and compares them: the gate
(--fail-over wall_ms at the share of --inject) must not fail. In the first --injections repeats a third side takes
part, the checkout with every trajectory made longer by --inject; there the gate must fail. It does take longer:
after its work it waits for that share of what it took.

The result, with each run's median and each verdict, goes to --out as JSON after each repeat. The same call goes on
from there; what was begun and not ended is measured again. Nothing else should run on the machine. `make readme`
writes what docs/comparing.md says of it.

    python bench/gate_check.py --seconds 2400 --out gate.json
    python bench/gate_check.py --repeats 2 --rounds 3 -- --size 39M --latent 8 --steps 1 --backend torch
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldmperf.profiling import cli
from ldmperf.profiling.commands.shared import terminated_as_interrupted
from ldmperf.profiling.compare.comparison import AMBIGUOUS, SAME, Comparison, VerdictRule, compare_sets
from ldmperf.profiling.compare.gate import Threshold, answers
from ldmperf.profiling.compare.metrics import METRICS
from ldmperf.profiling.compare.sets import check_comparable
from ldmperf.profiling.compare.turns import OUT, RoundFailed, Side, run_rounds
from ldmperf.profiling.measure.environment import Environment, collect_environment
from ldmperf.profiling.measure.folders import RunError
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.measure.timing import Deadline
from ldmperf.profiling.options import CaseError, percentage, whole_number
from ldmperf.profiling.rivals.subjects import all_subjects
from ldmperf.profiling.sweep.events import Event
from ldmperf.profiling.sweep.group_process import measured
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Workers
from ldmperf.profiling.trajectory.backend import Backend, Inputs, Problem, Subject, Trajectory
from ldmperf.profiling.trajectory.case import Task

# A short case, as most of a run's time is its start. At smaller latents two processes differ by more.
PROFILE = (
    *("--size", "39M", "--latent", "32", "--steps", "1", "--backend", "torch"),
    *("--min-count", "12", "--min-seconds", "1"),
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


@dataclass(frozen=True)
class SlowedSubject:
    """A subject whose backends are slowed; all else is that of the subject it has."""

    subject: Subject
    share: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.subject, name)

    @property
    def backends(self) -> Mapping[str, Backend]:
        return {name: SlowedBackend(backend, self.share) for name, backend in self.subject.backends.items()}


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
    """`ldmperf` with these arguments, its trajectories slowed, whichever process they run in."""
    cli.main(arguments, workers=Workers(partial(slowed_measured, share)))


def slowed_measured(share: float, task: GroupTask) -> Generator[Event, None, None]:
    """`measured`, with slowed subjects."""
    return measured(replace(task, subjects=partial(slowed_subjects, share)))


def slowed_subjects(share: float) -> Mapping[Task, Subject]:
    """All subjects, their trajectories slowed."""
    return {task: SlowedSubject(subject, share) for task, subject in all_subjects().items()}


def sides(folder: Path, injected: float | None, profile: Sequence[str]) -> list[Side]:
    """The checkout, the checkout again, and one that is slowed by the injected share, if any."""
    plain = (sys.executable, "-P", "-c", CLI, "profile", *profile, "--out", OUT)
    commands = {"checkout": plain, "checkout again": plain}
    if injected is not None:
        commands["slowed"] = (sys.executable, "-P", __file__, "--run-slowed", str(injected), "--", *plain[4:])
    return [
        Side(name, command, folder / name.replace(" ", "-"), Path.cwd(), dict(os.environ))
        for name, command in commands.items()
    ]


def repeat(
    threshold: Threshold, rounds: int, profile: Sequence[str], force: bool, is_injected: bool
) -> dict[str, Any]:
    """A comparison of noise, and one of the injection if there is one, as JSON has them."""
    with tempfile.TemporaryDirectory(prefix="ldmperf-gate-") as folder:
        injected = threshold.worse if is_injected else None
        first, *others = run_rounds(sides(Path(folder), injected, profile), rounds, tell)
    rule = VerdictRule()
    found = {}
    for name, other in zip(("noise", "injected"), others, strict=False):
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
    """How many comparisons there are, and in how many the gate failed and a verdict differed, by their kind."""
    told = {}
    for kind in ("noise", "injected"):
        made = [found[kind] for found in repeats if kind in found]
        told[f"{kind}_comparisons"] = len(made)
        told |= {f"{kind}_{what}": sum(one[what] for one in made) for what in ("gate_fails", "differs")}
    return told


def earlier(out: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The repeats that the file has already. Raises CaseError where it is of another check."""
    if not out.exists():
        return []
    other = f"{out} is of another check"
    try:
        content = json.loads(out.read_bytes())
        then, now = (Environment.model_validate_json(json.dumps(of["environment"])) for of in (content, header))
        unlike = then.differences(now)
        alike = ("profile", "rounds", "fail_over")
        unlike += [f"{name}: {content[name]}" for name in alike if content[name] != header[name]]
        found: list[dict[str, Any]] = content["repeats"]
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise CaseError(f"{other}, or of none ({type(wrong).__name__}); name another file with --out") from None
    if unlike:
        raise CaseError(f"{other} ({'; '.join(unlike)}); name another file with --out")
    return found


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check(
    given: argparse.Namespace, profile: Sequence[str], measured: Callable[..., dict[str, Any]] = repeat
) -> None:
    """All repeats that are left, the file written anew after each. Raises CaseError, RunError and RoundFailed."""
    threshold = Threshold(METRIC, percentage("inject", given.inject))
    number, rounds = (whole_number(name, getattr(given, name), 999) for name in ("repeats", "rounds"))
    injections = whole_number("injections", given.injections, 999)
    header = {
        "environment": collect_environment().model_dump(mode="json"),
        "profile": list(profile),
        "rounds": rounds,
        "fail_over": f"{METRIC.name}:{given.inject}",
    }
    found = earlier(given.out, header)
    if found:
        tell(f"{given.out}: {len(found)} repeats are there already")
    deadline, longest = Deadline(given.seconds), 0.0
    for place in range(len(found), number):
        if deadline.left < longest:
            tell(f"--seconds would be over before the next repeat is; the same call goes on from {given.out}")
            break
        begun = deadline.now()
        found.append(measured(threshold, rounds, profile, given.force, place < injections))
        longest = max(longest, deadline.now() - begun)
        content = header | {"counts": counts(found), "repeats": found}
        write_whole(given.out, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        tell(f"repeat {place + 1} of {number} ({longest:.0f} s at most): {json.dumps(content['counts'])}")
    told = counts(found)
    for kind, of in (("noise", "a checkout with itself"), ("injected", f"it with {given.inject} injected")):
        print(f"the gate failed {told[f'{kind}_gate_fails']} of {told[f'{kind}_comparisons']} comparisons of {of}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", default="20")
    parser.add_argument("--rounds", default="6", help="runs of each side in a repeat")
    parser.add_argument("--inject", default="5%", help="how much longer the third side's trajectories take")
    parser.add_argument("--injections", default="10", help="repeats that have the third side")
    parser.add_argument("--seconds", type=float, help="begin no repeat that would not end within so many")
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
        tell(f"stopped; the same call goes on from {given.out}")
        sys.exit(130)


if __name__ == "__main__":
    main()
