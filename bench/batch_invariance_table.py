"""What `batch_invariance.py` found, as docs/batch-invariance.md says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """The calls that differ as rows of markdown, one for each name and dtype, and a sentence for each dtype."""
    lines = ["| dtype | call | calls of a step | batches | elements | such as |", "|---|---|---:|---|---|---|"]
    for one in found["steps"]:
        by_name: dict[str, list[Mapping[str, Any]]] = {}
        for call in one["differing"]:
            by_name.setdefault(call["name"], []).append(call)
        for name, calls in by_name.items():
            batches = sorted({int(batch) for call in calls for batch in call["share"]})
            shares = [share for call in calls for share in call["share"].values()]
            most = max(calls, key=lambda call: max(call["share"].values()))
            cells = (
                one["dtype"],
                f"`{name}`",
                str(sum(call["count"] for call in calls)),
                ", ".join(map(str, batches)),
                f"up to {100 * max(shares):.2g}%",
                f"{most['shapes']} at `{most['places'][0]}`",
            )
            lines.append(f"| {' | '.join(cells)} |")
    # The last batch but one is the one that is timed.
    said = [_sentence(one, found["batches"][-2]) for one in found["steps"]]
    return "\n".join([*lines, "", *said])


def _sentence(one: Mapping[str, Any], priced: int) -> str:
    differ, kept = (
        [f"{count} of {batch}" for batch, count in one[key].items() if int(batch) > 1]
        for key in ("images", "images_with_the_mode")
    )
    ours = sorted(name.removeprefix("ldmperf::") for name in one["same"])
    differing = sum(call["count"] for call in one["differing"])
    return (
        f"- {one['dtype']}: of {one['calls']} calls that compute {differing} are of a name and shapes with which "
        f"some differ. Images of the step that have other bits than alone: {', '.join(differ)}; in the mode "
        f"{', '.join(kept)}. The same at every batch: "
        f"{', '.join(ours)}.{_price(priced, one['ms'])}"
    )


def _price(images: int, ms: Mapping[str, Sequence[float]]) -> str:
    if not ms:
        return ""
    told = ", ".join(f"{name} {median(times):.0f} ms" for name, times in ms.items())
    return f" A step of {images} images, median of {len(ms['plain'])} in turn, under a dispatch mode: {told}."
