"""The cases of `ldmperf profile`: those of the family, and the rivals that are named beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..options import CaseError, device_kind, known_names, split_values
from ..trajectory.case import Case
from ..trajectory.case_options import OPTIONS, CaseOption, Choices
from ..trajectory.presets import Combinations, chosen_sweeps, select_cases
from .rival import KINDS, RIVAL_BACKENDS, RIVALS

# By option: its help.
RIVAL_OPTIONS: Mapping[str, str] = {
    "rival": f"Generators of other kinds: {', '.join(KINDS)} (both sizes), or a size by name, as gan-30M. Alone, "
    "without --size, --unet or --preset, only these are measured.",
    "rival-backend": f"Of rivals: {', '.join(RIVAL_BACKENDS)}; eager unless told, on a GPU compile too.",
}
# Options of the family alone: a rival has its own steps, and no sampler, task or backend of ours.
_OF_THE_FAMILY = ("sampler", "steps", "task", "backend")


def cases_beside(
    preset: str, choices: Choices, *, is_preset_given: bool, options: Mapping[str, CaseOption] = OPTIONS
) -> list[Case]:
    """The cases of the family that the options choose, then those of the rivals, each once.

    With rivals there are cases of the family only where a size, a checkpoint or the preset is given. Raises
    CaseError for a wrong value, and for an option that nothing measured here takes.
    """
    of_family = {name: values for name, values in choices.items() if name in OPTIONS}
    if "rival" not in choices:
        if "rival-backend" in choices:
            raise CaseError("--rival-backend: no rival is measured; name some with --rival, or leave it out")
        return select_cases(preset, of_family, options)
    rivals = rival_cases(
        chosen_sweeps(preset, of_family, options), rival_names(choices["rival"]), choices.get("rival-backend", ())
    )
    if is_preset_given or not {"size", "unet"}.isdisjoint(of_family):
        return [*select_cases(preset, of_family, options), *rivals]
    for name in _OF_THE_FAMILY:
        if name in of_family:
            raise CaseError(
                f"--{name}: rivals do not take it; add sizes of the family with --size, or leave it out"
            )
    return rivals


def rival_names(values: Iterable[str]) -> tuple[str, ...]:
    """The rivals that --rival names, each once; a kind stands for its sizes. Raises CaseError for another name."""
    given = list(values)
    if not split_values(given):
        raise CaseError(f"--rival: no value given; choose from {', '.join(KINDS)}")
    names = known_names("rival", given, (*KINDS, *RIVALS))
    chosen = ([rival for rival, of in RIVALS.items() if name in (rival, of.kind)] for name in names)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(chosen)))


def rival_cases(sweeps: Sequence[Combinations], names: Sequence[str], backends: Sequence[str] = ()) -> list[Case]:
    """The rivals under the conditions of the sweeps: devices, dtypes, seeds, latents, batches; each case once.

    Steps and sampler are the rival's own. One that takes a text takes the sweeps' numbers of tokens too, and their
    guidance where they say any. backends: "eager", and on a GPU "compile" beside it, unless told.
    """
    known = known_names("rival-backend", backends, RIVAL_BACKENDS)
    cases = (_cases(name, sweep, known) for name, sweep in itertools.product(names, sweeps))
    return list(dict.fromkeys(itertools.chain.from_iterable(cases)))


def _cases(name: str, sweep: Combinations, backends: Sequence[str]) -> Iterator[Case]:
    rival = RIVALS[name]
    tokens: tuple[int, ...] = (0,)
    scales: tuple[float, ...] = (1.0,)
    if rival.guidance_scale is not None:
        tokens, scales = sweep.tokens, sweep.guidance_scales or (rival.guidance_scale,)
    for device in sweep.devices:
        usual = RIVAL_BACKENDS[:1] if device_kind(device) == "cpu" else RIVAL_BACKENDS[:2]
        yield from replace(
            sweep,
            unets=(name,),
            tasks=("rival",),
            samplers=("none",),
            steps=(rival.steps,),
            devices=(device,),
            tokens=tokens,
            guidance_scales=scales,
            backends=tuple(backends) or usual,
        ).cases()
