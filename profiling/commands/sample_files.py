"""Where `ldmperf sample` writes: names checked before anything is read, files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..options import CaseError
from .sample_settings import SampleSettings

_LONGEST_NAME = 255
# The keyword that marks a preview among PNG files.
PREVIEW_KEYWORD = "ldmperf preview"


@dataclass(frozen=True)
class OutFiles:
    """One file of all images, or one for each where the name holds {seed}; {prompt} is a prompt's number."""

    pattern: Path
    names: tuple[Path, ...]

    @property
    def is_grid(self) -> bool:
        return len(self.names) == 1

    @property
    def preview(self) -> Path:
        """The file of the image so far."""
        first = self.names[0]
        return first.with_name(f"{first.stem}.preview{first.suffix}")


def out_files(out: Path, settings: SampleSettings, *, previews: bool, force: bool) -> OutFiles:
    """The files for the images of these settings. Raises CaseError where they cannot be written."""
    if out.suffix.lower() != ".png":
        raise CaseError(f"--out: {out}: the name must end in .png")
    names = [
        out.with_name(out.name.replace("{seed}", str(seed)).replace("{prompt}", str(number)))
        for number in range(1, len(settings.prompts) + 1)
        for seed in settings.seeds
    ]
    different = tuple(dict.fromkeys(names))
    if 1 < len(different) < len(names):
        lacking = [field for field in ("{prompt}", "{seed}") if field not in out.name]
        advice = f"put {lacking[0]} into the name too" if lacking else "write {prompt}-{seed} in the name"
        raise CaseError(f"--out: {out}: names several images alike; {advice}")
    files = OutFiles(out, different)
    # A call that was stopped leaves its preview to look at; the next one writes over it.
    is_new = previews and not _is_preview(files.preview)
    _check_writable([*different, *([files.preview] if is_new else [])], out, force=force)
    return files


def _is_preview(path: Path) -> bool:
    """Whether the file is a preview of this command."""
    from ldmperf.model.pipeline import read_texts

    try:
        return PREVIEW_KEYWORD in read_texts(path)
    # Of a broken file Pillow raises more kinds than it documents.
    except Exception:
        return False


def _check_writable(names: Sequence[Path], out: Path, *, force: bool) -> None:
    folder = out.parent
    if not folder.is_dir():
        raise CaseError(f"--out: {folder}: no such folder; make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CaseError(f"--out: {folder} cannot be written; name another folder")
    for name in names:
        # The preview's name is longer.
        if len(os.fsencode(name.name)) + len(".preview") > _LONGEST_NAME:
            raise CaseError(f"--out: {name.name[:40]}...: the name is too long; give a shorter one")
        if name.is_dir():
            raise CaseError(f"--out: {name} is a folder; name a file in it")
        if not force and os.path.lexists(name):
            raise CaseError(f"--out: {name} is there already; name another file, or give --force to replace it")
