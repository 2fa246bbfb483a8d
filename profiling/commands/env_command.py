"""The command `ldmperf env`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..options import best_device, device_named


def env(
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; cuda where there is one.")] = None,
) -> None:
    """Print what is recorded of this machine, as JSON.

    \b
    Example:
      ldmperf env --device cpu
    """
    from ..measure.environment import collect_environment, device_state

    name = best_device() if device is None else device_named(device)
    state = device_state(name).model_dump(mode="json")
    typer.echo(json.dumps(collect_environment(name).model_dump(mode="json") | {"device_now": state}, indent=2))
