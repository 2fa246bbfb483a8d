"""The options that a folder was begun with: with others, what lies there would be taken for what it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

OPTIONS_NAME = "options.json"


class OptionsError(ValueError):
    """A folder that was begun with other options."""


def refuse_others(folder: Path, options: Mapping[str, int | str], advice: str = "give another folder") -> None:
    """Raises OptionsError where the folder has others; `advice` may name the {option}. Writes nothing."""
    path = folder / OPTIONS_NAME
    begun = json.loads(path.read_text()) if path.exists() else options
    for name, value in options.items():
        if begun.get(name) != value:
            told = f"{folder} was begun with {name} {begun.get(name)}, not {value}"
            raise OptionsError(f"{told}: {advice.format(option=name)}")


def hold_to(folder: Path, options: Mapping[str, int | str]) -> None:
    """Writes the options into a folder that has none. Raises OptionsError where it has others."""
    refuse_others(folder, options)
    path = folder / OPTIONS_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(options), indent=1) + "\n")
