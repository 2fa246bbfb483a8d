"""The grid of the study: which steps, samplers and guidance rates, and how a guidance is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .progress import Tell, to_nobody

# The steps of each sampler. ddim has those of the budgets, the others enough for a trend.
STEPS: Mapping[str, tuple[int, ...]] = {
    "ddim": (1, 2, 3, 4, 6, 8, 12, 16, 25, 50),
    "dpmpp_2m": (2, 4, 8, 16),
    "ddpm": (4, 8, 16, 50),
}
RATES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
# Where guidance is varied, at one number of steps.
VARIED = ("ddim", 16)
# Trajectories that two networks share: their steps, and the shares of these that the first one takes.
STITCHED_STEPS = (4, 8, 16)
STITCHED_PARTS = (0.25, 0.5, 0.75)
# A student's steps by round of distillation; the teacher of each takes twice as many.
STUDENT_STEPS = (8, 4)
# Super-resolution: the steps of its trainings; those of sampling after the longest, and after every one.
FINE_TUNED = (100, 300, 1000)
SUPER_RESOLVED, SUPER_RESOLVED_BRIEFLY = (1, 2, 4, 8, 16, 25, 50), (16,)
# A masked transformer's evaluations.
EVALUATIONS = (1, 2, 4, 8, 16)
# What is timed, by batch: an image alone under every sampler, and images at once, where the sampler weighs little.
TIMED: Mapping[int, tuple[tuple[str, ...], tuple[int, ...]]] = {
    1: (tuple(STEPS), (1, 4, 16, 50)),
    64: (("ddim",), (1, 8)),
}
# Samples of a cell that decides, and of one that a guidance is chosen by.
SAMPLES, HELD_OUT = 2000, 500


def climbed(score: Callable[[float], float], start: float, rates: Sequence[float] = RATES) -> float:
    """The rate of the least score, going downhill from `start` among neighbours: a score has one valley."""
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            known[place] = score(rates[place])
        return known[place]

    place = rates.index(start)
    while True:
        near = [other for other in (place - 1, place + 1) if 0 <= other < len(rates)]
        best = min(near, key=at)
        if at(best) >= at(place):
            return rates[place]
        place = best


def climbed_each(
    score: Callable[[int, float], float], numbers: Sequence[int], tell: Tell = to_nobody
) -> dict[int, float]:
    """The rate of the least score of each number of steps; the search starts where the one before it ended."""
    found: dict[int, float] = {}
    rate = 2.0
    for number in numbers:
        asked: list[float] = []

        def told(at: float, number: int = number, asked: list[float] = asked) -> float:
            asked.append(at)
            known = score(number, at)
            # How many rates a search asks for is not known before it ends.
            tell((sum(found) + number * len(asked) / (len(asked) + 1)) / sum(numbers))
            return known

        rate = found[number] = climbed(told, rate)
    return found


def stitched_pairs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Each narrower network before the widest (T-Stitch, arXiv 2402.14167), and the narrowest after it."""
    *narrower, widest = widths
    return [*((width, widest) for width in narrower), (widest, narrower[0])]
