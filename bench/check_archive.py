"""One file that brings a GPU check's results back, and laying it into a checkout.

An archive (.tar.xz) holds, below one folder: manifest.json, the check's folder as runs/<check>/, tuned/<gpu>.json.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

TOP = "ldmperf-gpu-check"
FORMAT = 1
LIMIT = 16 * 2**20
# Of a log that has to be shortened: so much of its beginning and of its end.
ENDS = (256 * 2**10, 32 * 2**10, 2 * 2**10)
# What an archive may unpack to: more is none of ours.
MOST_BYTES, MOST_FILES = 2 * 2**30, 10_000
NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")
RECORDS = {"records.jsonl": "", "kernels.jsonl": "-kernels"}


class ArchiveError(ValueError):
    """A file that is not an archive of a check, or cannot be laid here; one line that says what to do."""


def write_archive(path: Path, folder: Path, tuned: Path, limit: int = LIMIT) -> list[str]:
    """Replaces the archive at once by one of what `folder` and `tuned` hold now; returns what it lacks, in lines.

    Records, summary and tables are whole. Where the file would be larger than `limit`, logs lose their middles,
    then reports and other files are left out, the largest first.
    """
    whole: dict[str, bytes] = {}
    logs: dict[str, bytes] = {}
    others: dict[str, bytes] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        name = f"runs/{folder.name}/{file.relative_to(folder).as_posix()}"
        if not all(map(NAME.fullmatch, name.split("/"))):
            continue
        is_data = file.suffix in (".json", ".jsonl")
        (whole if is_data else logs if file.suffix == ".log" else others)[name] = file.read_bytes()
    whole |= {f"tuned/{file.name}": file.read_bytes() for file in sorted(tuned.glob("*.json"))}
    left_out: list[str] = []
    packed = _packed({**whole, **logs, **others}, left_out)
    for ends in ENDS:
        if len(packed) <= limit:
            break
        cut = {name: _without_its_middle(content, ends) for name, content in logs.items()}
        left_out = [f"the middle of {name}" for name in logs if len(cut[name]) < len(logs[name])]
        packed = _packed({**whole, **cut, **others}, left_out)
        logs = cut
    for name in sorted(others, key=lambda name: -len(others[name])):
        if len(packed) <= limit:
            break
        del others[name]
        left_out.append(name)
        packed = _packed({**whole, **logs, **others}, left_out)
    told = [f"{path}: left out {', '.join(left_out)}"] if left_out else []
    if len(packed) > limit:
        told.append(f"{path}: {len(packed) / 2**20:.1f} MiB, more than {limit / 2**20:.0f}: its records alone")
    replacement = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement.open("wb") as file:
        file.write(packed)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)
    return told


def _packed(contents: Mapping[str, bytes], left_out: list[str]) -> bytes:
    manifest = {"format": FORMAT, "made_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "left_out": left_out}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as tar:
        for name, content in {"manifest.json": json.dumps(manifest).encode(), **contents}.items():
            member = tarfile.TarInfo(f"{TOP}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _without_its_middle(content: bytes, ends: int) -> bytes:
    if len(content) <= 2 * ends:
        return content
    return content[:ends] + f"\n... {len(content) - 2 * ends} bytes left out ...\n".encode() + content[-ends:]


def read_archive(path: Path) -> dict[str, bytes]:
    """The contents by name, none written to disk. ArchiveError for whatever `write_archive` does not write."""
    contents: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:xz") as tar:
            for member in tar:
                top, *parts = member.name.split("/")
                total += member.size
                is_ours = member.isfile() and top == TOP and parts and all(map(NAME.fullmatch, parts))
                if not is_ours or total > MOST_BYTES or len(contents) >= MOST_FILES:
                    raise ArchiveError(f"{path} is no archive of gpu_check.py: it holds {member.name!r}")
                file = tar.extractfile(member)
                assert file is not None
                contents["/".join(parts)] = file.read()
        is_known = json.loads(contents["manifest.json"])["format"] == FORMAT
    except OSError as failure:
        raise ArchiveError(
            f"{path} cannot be read ({failure.strerror or failure}); give a file of --archive"
        ) from None
    except (tarfile.TarError, lzma.LZMAError, EOFError, KeyError, TypeError, ValueError) as failure:
        if isinstance(failure, ArchiveError):
            raise
        raise ArchiveError(
            f"{path} is no archive of gpu_check.py, or not the whole of one; fetch it again"
        ) from None
    if not is_known:
        raise ArchiveError(f"{path} is of another version of gpu_check.py; import it with that one")
    return contents


def import_archive(path: Path, root: Path, out: Path) -> list[str]:
    """Lays an archive into the checkout `root`, its logs and reports into `out`; what is new, in lines.

    Records go to bench/results/<machine>/<date>-<commit>.jsonl (a kernel bench's: <date>-<commit>-kernels.jsonl),
    behind those that are there. A tuned table replaces one that has no other keys than its own; else ArchiveError.
    """
    contents = read_archive(path)
    told: list[str] = []
    # Refused before anything is written.
    tables = dict(_new_tables(contents, root / "kernels" / "tuned"))
    sets, rejected = _record_sets(contents, root / "bench" / "results")
    for target, lines in sets.items():
        known = set(_lines(target))
        new = [line for line in dict.fromkeys(lines) if line not in known]
        if new:
            _replace(target, b"".join(line + b"\n" for line in [*_lines(target), *new]))
            told.append(f"{target.relative_to(root)}: {len(new)} new records")
    told += [f"{count} lines of {name} are no records, and left out" for name, count in rejected.items()]
    for table, (content, changes) in tables.items():
        _replace(table, content)
        told.append(f"{table.relative_to(root)}: {changes}")
    written = 0
    for name, content in contents.items():
        if name.startswith("runs/"):
            place = out.joinpath(*PurePosixPath(name).parts[1:])
            # A check's files grow: of two of a name the longer is the later one, or the one that is whole.
            if not place.exists() or len(place.read_bytes()) < len(content):
                _replace(place, content)
                written += 1
    checks = sorted({name.split("/")[1] for name in contents if name.startswith("runs/")})
    if written:
        told.append(f"{out / checks[0]}: {written} files; ldmperf report reads its runs")
    return told


def _record_sets(contents: Mapping[str, bytes], results: Path) -> tuple[dict[Path, list[bytes]], dict[str, int]]:
    """The lines that are records by where they go, in the order that their runs began; and counts of others."""
    from ldmperf.profiling import Record
    from ldmperf.profiling.kernel_bench.records import KernelRecord

    models: dict[str, Any] = {"records.jsonl": Record, "kernels.jsonl": KernelRecord}
    runs: list[tuple[datetime, dict[Path, list[bytes]]]] = []
    rejected: Counter[str] = Counter()
    for name, content in contents.items():
        kind = name.rpartition("/")[2]
        if not name.startswith("runs/") or kind not in models:
            continue
        first: datetime | None = None
        sets: dict[Path, list[bytes]] = {}
        for line in filter(None, content.splitlines()):
            try:
                record = models[kind].model_validate_json(line)
            except ValueError:
                rejected[name] += 1
                continue
            first = first or record.started_at
            machine, commit = _machine_and_commit(record.environment)
            path = results / machine / f"{first:%Y-%m-%d}-{commit}{RECORDS[kind]}.jsonl"
            sets.setdefault(path, []).append(line)
        if first is not None:
            runs.append((first, sets))
    merged: dict[Path, list[bytes]] = {}
    # Of two records of a case the one behind counts, and is to be the later one.
    for _, sets in sorted(runs, key=lambda run: run[0]):
        for path, lines in sets.items():
            merged.setdefault(path, []).extend(lines)
    return merged, dict(rejected)


def _machine_and_commit(environment: Any) -> tuple[str, str]:
    """The folder and the name of what was measured there: what differs in one is never merged."""
    from ldmperf.kernels import Chip

    name = environment.gpu.name if environment.gpu else f"cpu {environment.cpu}"
    commit = (environment.git_commit or f"v{environment.ldmperf}")[:7]
    dirty = "-dirty" if environment.git_dirty else ""
    return Chip(name, 0).file_name, commit + dirty


def _new_tables(contents: Mapping[str, bytes], tuned: Path) -> Iterator[tuple[Path, tuple[bytes, str]]]:
    """The tuned tables that differ from those here, and what is new in each. ArchiveError for lost keys."""
    for name, content in contents.items():
        if not name.startswith("tuned/"):
            continue
        path = tuned / name.partition("/")[2]
        try:
            new = _entries(content)
            old = _entries(path.read_bytes()) if path.exists() else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ArchiveError(f"{name} of the archive, or {path}, is no tuned table; move it away") from None
        if missing := old.keys() - new.keys():
            kernel, key = sorted(missing)[0]
            raise ArchiveError(
                f"{path} holds what the archive's does not, {kernel} {key}; move it away, then merge them"
            )
        if not path.exists() or path.read_bytes() != content:
            added = len(new.keys() - old.keys())
            changed = sum(old[key] != new[key] for key in old)
            yield path, (content, f"{added} new entries, {changed} changed")


def _entries(content: bytes) -> dict[tuple[str, str], Any]:
    kernels = json.loads(content)["kernels"]
    return {(kernel, key): value for kernel, entries in kernels.items() for key, value in entries.items()}


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_name(path.name + ".tmp")
    replacement.write_bytes(content)
    replacement.replace(path)
