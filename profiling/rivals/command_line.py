"""The command that measures a set of cases, told from the cases alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..measure.timing import RepetitionRule
from ..options import device_kind
from ..paper import paper_sizes
from ..terminal.visible import counted
from ..trajectory.case import BACKENDS, DEFAULT_GUIDANCE, PIPELINE_BACKENDS, RELEASED_NAMES, Case
from ..trajectory.presets import PRESETS, Combinations, preset_named
from .rival import RIVAL_BACKENDS, RIVALS
from .rival_selection import rival_cases

# The options of a sweep's lists, in the order in which they are spelled.
_OPTIONS: Mapping[str, str] = {
    "size": "unets",
    "task": "tasks",
    "sampler": "samplers",
    "steps": "steps",
    "batch": "batches",
    "guidance": "guidance_scales",
    "dtype": "dtypes",
    "device": "devices",
    "latent": "latents",
    "tokens": "tokens",
    "seed": "seeds",
    "backend": "backends",
}
# Left out where a sweep has only this, as every preset does.
_USUAL: Mapping[str, object] = {
    "tasks": ("t2i",),
    "samplers": ("ddim",),
    "guidance_scales": None,
    "latents": ((64, 64),),
    "tokens": (77,),
    "seeds": (0,),
}

# What rivals take of them.
_OF_RIVALS = ("batch", "guidance", "dtype", "device", "latent", "tokens", "seed")


def measuring_command(
    cases: Iterable[Case], rule: RepetitionRule | None = None, with_decoder: bool = False
) -> str | None:
    """The `ldmperf profile` that measures these cases and no others; None where no lists of values do.

    rule: how often each trajectory is repeated, where that is the same for all. Checkpoints have names in records,
    not paths: there is no command for them.
    """
    wanted = set(cases)
    if not wanted or not all(map(_is_known, wanted)):
        return None
    words, usual = _of_preset(wanted) or (_of_lists(wanted), _usual_rule(wanted))
    if words is None:
        return None
    if rule is not None and rule.min_count != usual.min_count:
        words = [*words, "--min-count", str(rule.min_count)]
    if rule is not None and rule.min_seconds != usual.min_seconds:
        words = [*words, "--min-seconds", f"{rule.min_seconds:g}"]
    return shlex.join(["ldmperf", "profile", *words, *(["--with-decoder"] if with_decoder else [])])


def cases_in_words(cases: Iterable[Case]) -> str:
    """How many cases there are, of what: where no command makes them."""
    wanted = set(cases)
    networks, backends = {case.network for case in wanted}, {case.backend for case in wanted}
    of = counted(len(networks), "network"), counted(len(backends), "backend")
    return f"{counted(len(wanted), 'case')} of {of[0]} on {of[1]}"


def _is_known(case: Case) -> bool:
    """Whether options of this release can name it."""
    if case.task == "rival":
        return case.unet in RIVALS and case.backend in RIVAL_BACKENDS
    is_named = case.unet in paper_sizes() or case.unet in RELEASED_NAMES
    backends = PIPELINE_BACKENDS if case.task == "pipeline" else BACKENDS
    return not case.is_checkpoint and is_named and case.backend in backends


def _of_preset(wanted: set[Case]) -> tuple[list[str] | None, RepetitionRule] | None:
    for name, preset in PRESETS.items():
        if {case for sweep in preset.sweeps for case in sweep.cases()} == wanted:
            return ["--preset", name], preset.rule
    return None


def _usual_rule(wanted: set[Case]) -> RepetitionRule:
    return preset_named("cpu" if all(device_kind(case.device) == "cpu" for case in wanted) else "gpu").rule


def _of_lists(wanted: set[Case]) -> list[str] | None:
    """The options whose lists make these cases in all combinations."""
    family = [case for case in wanted if case.task != "rival"]
    rivals = [case for case in wanted if case.task == "rival"]
    sweep = _sweep_of(family or rivals, all(case.guidance_scale == _own_guidance(case) for case in wanted))
    made = set(sweep.cases()) if family else set()
    words = _spelled(sweep, _OPTIONS if family else _OF_RIVALS)
    if rivals:
        names, backends = (_listed(rivals, name) for name in ("unet", "backend"))
        made |= set(rival_cases([sweep], names, backends))
        words += ["--rival", ",".join(names), "--rival-backend", ",".join(backends)]
    return words if made == wanted else None


def _listed(cases: Sequence[Case], field: str) -> tuple[Any, ...]:
    """The different values of a field: sizes and backends in the order of their tables, others sorted."""
    values = {getattr(case, field) for case in cases}
    tables = {
        "unet": (*paper_sizes(), *RELEASED_NAMES, *RIVALS),
        "backend": (*BACKENDS, *PIPELINE_BACKENDS, *RIVAL_BACKENDS),
    }
    table = tables.get(field)
    return tuple(sorted(values, key=None if table is None else table.index))


def _sweep_of(cases: Sequence[Case], with_own_guidance: bool) -> Combinations:
    """The lists of all values in the cases; guidance of each task's and rival's own is in no list."""
    return Combinations(
        unets=_listed(cases, "unet"),
        tasks=_listed(cases, "task"),
        samplers=_listed(cases, "sampler"),
        steps=_listed(cases, "steps"),
        batches=_listed(cases, "batch"),
        guidance_scales=None if with_own_guidance else _listed(cases, "guidance_scale"),
        dtypes=_listed(cases, "dtype"),
        devices=_listed(cases, "device"),
        latents=tuple(sorted({(case.latent_height, case.latent_width) for case in cases})),
        # A rival without a text has none.
        tokens=tuple(tokens for tokens in _listed(cases, "context_tokens") if tokens) or (77,),
        seeds=_listed(cases, "seed"),
        backends=_listed(cases, "backend"),
    )


def _own_guidance(case: Case) -> float:
    if case.task == "rival":
        return RIVALS[case.unet].guidance_scale or 1.0
    return DEFAULT_GUIDANCE[case.task]


def _spelled(sweep: Combinations, names: Iterable[str]) -> list[str]:
    words = []
    for name in names:
        field = _OPTIONS[name]
        values = getattr(sweep, field)
        if field in _USUAL and values == _USUAL[field]:
            continue
        texts = (
            f"{value[0]}x{value[1]}" if name == "latent" else f"{value:g}" if name == "guidance" else str(value)
            for value in values
        )
        words += [f"--{name}", ",".join(texts)]
    return words
