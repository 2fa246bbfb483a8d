"""The cases of rivals, from the options of `ldmperf profile`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from ..options import CaseError, device_kind, known_names, split_values
from ..trajectory.case import Case
from ..trajectory.presets import Sweep
from .rival import KINDS, RIVAL_BACKENDS, RIVALS


def rival_names(values: Iterable[str]) -> tuple[str, ...]:
    """The rivals that --rival names, each once; a kind stands for its sizes. Raises CaseError for another name."""
    given = list(values)
    if not split_values(given):
        raise CaseError(f"--rival: no value given; choose from {', '.join(KINDS)}")
    names = known_names("rival", given, (*KINDS, *RIVALS))
    chosen = ([rival for rival, of in RIVALS.items() if name in (rival, of.kind)] for name in names)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(chosen)))


def rival_cases(sweeps: Sequence[Sweep], names: Sequence[str], backends: Sequence[str] = ()) -> list[Case]:
    """The rivals under the conditions of the sweeps: devices, dtypes, seeds, latents, batches; each case once.

    Steps and sampler are the rival's own. One that takes a text takes the sweeps' numbers of tokens too, and their
    guidance where they say any. backends: "eager", and on a GPU "compile" beside it, unless told.
    """
    cases = (
        case
        for name, sweep in itertools.product(names, sweeps)
        for case in _cases(name, sweep, known_names("rival-backend", backends, RIVAL_BACKENDS))
    )
    return list(dict.fromkeys(cases))


def _cases(name: str, sweep: Sweep, backends: Sequence[str]) -> Iterator[Case]:
    rival = RIVALS[name]
    tokens: tuple[int, ...] = (0,)
    scales: tuple[float, ...] = (1.0,)
    if rival.guidance_scale is not None:
        tokens, scales = sweep.tokens, sweep.guidance_scales or (rival.guidance_scale,)
    for dtype, device, seed, (height, width), batch, count, scale in itertools.product(
        sweep.dtypes, sweep.devices, sweep.seeds, sweep.latents, sweep.batches, tokens, scales
    ):
        usual = RIVAL_BACKENDS[:1] if device_kind(device) == "cpu" else RIVAL_BACKENDS[:2]
        for backend in backends or usual:
            yield Case(
                unet=name,
                task="rival",
                sampler="none",
                steps=rival.steps,
                batch=batch,
                guidance_scale=float(scale),
                dtype=dtype,
                device=device,
                latent_height=height,
                latent_width=width,
                context_tokens=count,
                seed=seed,
                backend=backend,
            )
