"""Checkpoints by what is in them: the SHA-256 of their files, and cases that carry it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from ..options import CaseError
from .case import Case, path_text

# A digest of fewer bytes takes less than a second: nothing is said.
QUIET_BYTES = 2**28


def identified(cases: Iterable[Case], told: Callable[[str], None] | None = None) -> list[Case]:
    """The cases, each with its weights' digest: what a record and its key are made of. Duplicates are left out.

    `told` gets a line before large files are read. Raises CaseError for a checkpoint that cannot be read, and
    where two paths hold the same weights under one name: a record could not tell them apart.
    """
    found: dict[str, Case] = {}
    for case in cases:
        if case.is_checkpoint and case.weights_sha256 is None:
            path = case.path.absolute()
            case = case.model_copy(update={"unet": path_text(path), "weights_sha256": weights_sha256(path, told)})
        if found.setdefault(case.key, case) != case:
            raise CaseError(
                f"--unet: {found[case.key].path} and {case.path} have the same name and the same weights; "
                "leave one out, or rename one"
            )
    return list(found.values())


def check_loadable(cases: Iterable[Case]) -> None:
    """Raises CaseError for a checkpoint that cannot be loaded. Only headers and configurations are read."""
    # Here, as reading a command's options does without torch.
    import torch

    from ldmperf.model import CheckpointError, load_unet

    for path in dict.fromkeys(case.path for case in cases if case.is_checkpoint):
        try:
            load_unet(path, dtype=torch.float32, device="meta", backend="torch")
        except CheckpointError as error:
            raise CaseError(f"--unet: {error}") from None


def check_unchanged(cases: Iterable[Case], told: Callable[[str], None] | None = None) -> None:
    """Raises CaseError where the files of a case's checkpoint are not those that its digest is of."""
    for path, digest in dict.fromkeys((case.path, case.weights_sha256) for case in cases if case.is_checkpoint):
        if digest is None:
            raise CaseError(f"{path}: the run does not say which weights it began with; start a new run")
        if weights_sha256(path, told) != digest:
            raise CaseError(f"{path} has changed since the run began; start a new run, or put the old file back")


def weights_sha256(path: Path, told: Callable[[str], None] | None = None, option: str = "--unet") -> str:
    """SHA-256, in hexadecimal, of the files that are loaded for a checkpoint's path, by name, in one stream.

    Read once in a process while the files stay as they are. Raises CaseError, which names the option that gave the
    path, where there is none, or one cannot be read.
    """
    # Loads torch, which reading a command's options does without.
    from ldmperf.model import CheckpointError, checkpoint_files

    try:
        files = checkpoint_files(path)
        states = [file.stat() for file in files]
        total = sum(state.st_size for state in states)
        stamps = tuple((f, s.st_ino, s.st_size, s.st_mtime_ns) for f, s in zip(files, states, strict=True))
        if stamps not in _digests:
            if told is not None and total >= QUIET_BYTES:
                told(f"{path.name}: reading {total / 1e9:.1f} GB for the SHA-256 of its weights")
            digest = hashlib.sha256()
            for file in files:
                with file.open("rb", buffering=0) as stream:
                    hashlib.file_digest(stream, lambda: digest)
            _digests[stamps] = digest.hexdigest()
        return _digests[stamps]
    except CheckpointError as error:
        raise CaseError(f"{option}: {error}") from None
    except OSError as failure:
        raise CaseError(f"{option}: {path} cannot be read ({failure.strerror}); give another path") from None


# Digests by path, inode, size and time of change of the files.
_digests: dict[tuple[tuple[Path, int, int, int], ...], str] = {}
