"""The command `ldmperf env`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..options import best_device, device_named
from .shared import print_json, tell


def env(
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; cuda where there is one.")] = None,
    ceilings: Annotated[
        bool,
        typer.Option("--ceilings", help="Print the ceilings of the device too; measured where none are kept."),
    ] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="Measure the ceilings again, some seconds; the best of all is kept.")
    ] = False,
) -> None:
    """Print what is recorded of this machine, as JSON.

    Ceilings are the most bytes, FLOPs and exponentials a second that were measured here; floors of steps rest on
    them. They are kept in the user's cache folder, by machine, device, torch and threads.

    \b
    Examples:
      ldmperf env --device cpu
      ldmperf env --ceilings
      ldmperf env --ceilings --anew
    """
    from ..measure.environment import collect_environment, device_state

    name = best_device() if device is None else device_named(device)
    state = device_state(name).model_dump(mode="json")
    told = collect_environment(name).model_dump(mode="json") | {"device_now": state}
    if ceilings or anew:
        told["ceilings"] = _ceilings(name, anew=anew)
    print_json(told)


def _ceilings(device: str, *, anew: bool) -> dict[str, Any]:
    """The device's ceilings and the file that they are kept in."""
    from ..measure.ceiling_cache import KeptCeilings

    source = KeptCeilings(tell)
    found = source.anew(device) if anew else source.of(device)
    path = source.path(device)
    return found.model_dump(mode="json") | {"kept_in": None if path is None else str(path)}
