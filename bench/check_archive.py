"""One file that brings a GPU check's results back, and laying it into a checkout.

An archive (.tar.xz) holds, below one folder: manifest.json, the check's folder as runs/<check>/, tuned/<gpu>.json.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

TOP = "ldmperf-gpu-check"
FORMAT = 1
# Below the 16 MiB that a file may have on its way back.
LIMIT = 31 * 2**19
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
    then reports and other files are left out, the largest first. One that is larger all the same replaces none
    that was not.
    """
    whole: dict[str, bytes] = {}
    logs: dict[str, bytes] = {}
    others: dict[str, bytes] = {}
    for file in packed_files(folder):
        name = f"runs/{folder.name}/{file.relative_to(folder).as_posix()}"
        is_data = file.suffix in (".json", ".jsonl")
        (whole if is_data else logs if file.suffix == ".log" else others)[name] = file.read_bytes()
    whole |= {f"tuned/{file.name}": file.read_bytes() for file in sorted(tuned.glob("*.json"))}
    left_out = _shortened(whole, logs, others, limit)
    packed = _packed({**whole, **logs, **others}, left_out)
    if len(packed) > limit:
        # The estimate was too low: then the least.
        left_out = list(dict.fromkeys([*left_out, *_shortened(whole, logs, others, 0)]))
        packed = _packed({**whole, **logs, **others}, left_out)
    told = [f"{path}: left out {', '.join(left_out)}"] if left_out else []
    if len(packed) > limit:
        size = f"{len(packed) / 2**20:.1f} MiB with records alone, more than {limit / 2**20:.1f}"
        if path.exists() and path.stat().st_size <= limit:
            return [f"{path}: would be {size}; the one before stays, and what is new is in {folder}"]
        told.append(f"{path}: {size}")
    _write_whole(path, packed)
    return told


def packed_files(folder: Path) -> list[Path]:
    """The files of a check that its archive may hold, without references: they are large and can be made again."""

    def is_packed(file: Path) -> bool:
        parts = (folder.name, *file.relative_to(folder).parts)
        return not file.is_symlink() and "references" not in parts and all(map(NAME.fullmatch, parts))

    return [file for file in sorted(folder.rglob("*")) if file.is_file() and is_packed(file)]


def state_of(folder: Path, tuned: Path) -> list[tuple[str, int, int]]:
    """What changes whenever a file that an archive holds does."""
    files = [*packed_files(folder), *sorted(tuned.glob("*.json"))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _shortened(
    whole: Mapping[str, bytes], logs: dict[str, bytes], others: dict[str, bytes], limit: int
) -> list[str]:
    """Shortens `logs` and thins out `others` until all are estimated at `limit` together; what they have lost."""
    lengths = {name: len(content) for name, content in logs.items()}
    # A file beside others takes a header; xz packs tighter than this.
    size = {name: _estimate(content) for name, content in {**whole, **logs, **others}.items()}
    for ends in ENDS:
        if sum(size.values()) <= limit:
            break
        for name, content in logs.items():
            logs[name] = _without_its_middle(content, ends)
            size[name] = _estimate(logs[name])
    left_out = [f"the middle of {name}" for name, length in lengths.items() if len(logs[name]) < length]
    for name in sorted(others, key=lambda name: -size[name]):
        if sum(size.values()) <= limit:
            break
        del others[name], size[name]
        left_out.append(name)
    return left_out


def _estimate(content: bytes) -> int:
    """Bytes in an archive, rather too many: one fast pass of another compression, and a header."""
    return len(zlib.compress(content, 1)) + 200


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
            _write_whole(target, b"".join(line + b"\n" for line in [*_lines(target), *new]))
            told.append(f"{target.relative_to(root)}: {len(new)} new records")
    told += [f"{count} lines of {name} are no records, and left out" for name, count in rejected.items()]
    for table, (content, changes) in tables.items():
        _write_whole(table, content)
        told.append(f"{table.relative_to(root)}: {changes}")
    written = 0
    for name, content in contents.items():
        if name.startswith("runs/"):
            place = out.joinpath(*PurePosixPath(name).parts[1:])
            # A check's files grow: of two of a name the longer is the later one, or the one that is whole.
            if not place.exists() or len(place.read_bytes()) < len(content):
                _write_whole(place, content)
                written += 1
    checks = sorted({name.split("/")[1] for name in contents if name.startswith("runs/")})
    if written:
        told.append(f"{out / checks[0]}: {written} files; ldmperf report reads its runs")
    return told


def _record_sets(contents: Mapping[str, bytes], results: Path) -> tuple[dict[Path, list[bytes]], dict[str, int]]:
    """The lines that are records by where they go, in the order that their runs began; and counts of others."""
    from ldmperf.profiling import Record
    from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord

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
    from ldmperf.profiling.compare.merging import machine_folder
    from ldmperf.profiling.measure.conditions import commit_name

    return machine_folder([environment]), commit_name(environment) + ("-dirty" if environment.git_dirty else "")


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


def _write_whole(path: Path, content: bytes) -> None:
    from ldmperf.profiling.measure.store import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
