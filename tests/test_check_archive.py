"""The archive of a GPU check: whole, small, written at once; and its import: safe, idempotent, nothing mixed."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import check_archive
import pytest
from check_archive import ArchiveError, import_archive, read_archive, write_archive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import Record, load_records
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord, record_key
from ldmperf.profiling.measure.environment import Environment, Gpu
from ldmperf.profiling.measure.store import load_lines
from ldmperf.profiling.step.calls import sampler_call

MakeRecord = Callable[..., Record]
COMMIT = "7d35813a1b2c3d4e5f60718293a4b5c6d7e8f901"
H100 = "NVIDIA H100 80GB HBM3"


def environment(gpu: str | None = H100, commit: str | None = COMMIT, **changes: Any) -> Environment:
    found = None if gpu is None else Gpu(name=gpu, count=1)
    return Environment(os="Linux", python="3.12.3", cpu="AMD EPYC", gpu=found, git_commit=commit, **changes)


def kernel_record() -> KernelRecord:
    case = sampler_call("ddim", 2, "float32")
    return KernelRecord(
        case_key=record_key(case, "cuda", "triton", "graph"),
        size="39M",
        batch=2,
        case=case,
        peer="triton",
        mode="graph",
        device="cuda",
        status="unsupported",
        message="no GPU",
        environment=environment(),
        started_at=datetime(2026, 11, 27, 1, tzinfo=UTC),
    )


class Checkout:
    """A check's folder, a checkout to import into, and the archive between them."""

    def __init__(self, folder: Path) -> None:
        self.check = folder / "there" / "20261127T010000Z-gpu-check"
        self.tuned = folder / "there" / "tuned"
        self.root = folder / "here"
        self.archive = folder / "a.txz"
        self.check.mkdir(parents=True)
        self.tuned.mkdir()
        self.root.mkdir()

    def put(self, part: str, name: str, *records: Any) -> None:
        path = self.check / part / "20261127T010001Z-7d35813" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.writelines(record.model_dump_json().encode() + b"\n" for record in records)

    def write(self, **options: Any) -> list[str]:
        return write_archive(self.archive, self.check, self.tuned, **options)

    def lay(self) -> list[str]:
        return import_archive(self.archive, self.root, self.root / "runs")

    def results(self) -> dict[str, int]:
        folder = self.root / "bench" / "results"
        return {
            path.relative_to(folder).as_posix(): len(path.read_bytes().splitlines())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def table(entries: dict[str, Any], gpu: str = H100) -> bytes:
    return json.dumps({"schema_version": 1, "gpu": gpu, "kernels": {"linear": entries}}).encode()


def test_records_tables_and_logs_come_back_and_a_second_time_nothing_is_new(
    checkout: Checkout, make_record: MakeRecord
) -> None:
    checkout.put("ladder", "records.jsonl", make_record(environment=environment()))
    checkout.put("attention", "kernels.jsonl", kernel_record())
    (checkout.check / "tests.log").write_text("all good\n")
    (checkout.tuned / "nvidia-h100-80gb-hbm3.json").write_bytes(table({"a": {"num_warps": 4}}))
    assert checkout.write() == []
    told = checkout.lay()
    folder = checkout.root / "bench" / "results" / "nvidia-h100-80gb-hbm3"
    ladder, kernels = folder / "2026-11-23-7d35813.jsonl", folder / "2026-11-27-7d35813-kernels.jsonl"
    assert load_records(ladder) == ([make_record(environment=environment())], 0)
    assert load_lines(kernels, KernelRecord) == ([kernel_record()], 0)
    assert (checkout.root / "kernels" / "tuned" / "nvidia-h100-80gb-hbm3.json").read_bytes() == table(
        {"a": {"num_warps": 4}}
    )
    assert (checkout.root / "runs" / checkout.check.name / "tests.log").read_text() == "all good\n"
    assert len(told) == 4
    assert "1 new records" in told[0]
    before = {path: path.read_bytes() for path in checkout.root.rglob("*") if path.is_file()}
    assert checkout.lay() == []
    assert {path: path.read_bytes() for path in checkout.root.rglob("*") if path.is_file()} == before


def test_a_later_archive_of_the_check_adds_what_is_new(checkout: Checkout, make_record: MakeRecord) -> None:
    records = [make_record(environment=environment(), parameters=number) for number in range(5)]
    checkout.put("ladder", "records.jsonl", *records[:2])
    checkout.write()
    early = checkout.archive.read_bytes()
    checkout.lay()
    checkout.put("ladder", "records.jsonl", *records[2:])
    (checkout.check / "ladder.log").write_text("longer")
    checkout.write()
    assert "3 new records" in checkout.lay()[0]
    (path,) = (checkout.root / "bench" / "results").rglob("*.jsonl")
    assert load_records(path) == (records, 0)
    # And the one before again changes nothing.
    checkout.archive.write_bytes(early)
    assert checkout.lay() == []


def test_the_later_of_two_records_of_a_case_is_behind(checkout: Checkout, make_record: MakeRecord) -> None:
    for hour, part in ((3, "compiled"), (1, "family"), (2, "ladder")):
        started = datetime(2026, 11, 27, hour, tzinfo=UTC)
        checkout.put(part, "records.jsonl", make_record(environment=environment(), started_at=started))
    checkout.write()
    (line,) = [line for line in checkout.lay() if "new records" in line]
    assert "3 new records" in line
    (path,) = (checkout.root / "bench" / "results").rglob("*.jsonl")
    assert [record.started_at.hour for record in load_records(path)[0]] == [1, 2, 3]


PLACES = st.tuples(
    st.sampled_from([None, H100, "NVIDIA H200"]),
    st.sampled_from([COMMIT, "1" * 40, None]),
    st.sampled_from([True, False, None]),
    st.integers(1, 3),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs=st.lists(st.lists(PLACES, min_size=1, max_size=4), max_size=4))
def test_machines_commits_and_changes_are_never_in_one_file(
    runs: list[list[Any]], tmp_path_factory: pytest.TempPathFactory, make_record: MakeRecord
) -> None:
    checkout = Checkout(tmp_path_factory.mktemp("mixed"))
    expected = set()
    for number, places in enumerate(runs):
        for gpu, commit, dirty, day in places:
            found = environment(gpu, commit, git_dirty=dirty, ldmperf="0.1.0")
            started = datetime(2026, 11, day, tzinfo=UTC)
            record = make_record(environment=found, started_at=started, parameters=len(expected))
            checkout.put(f"part{number}", "records.jsonl", record)
            expected.add(record.model_dump_json())
    checkout.write()
    checkout.lay()
    laid = set()
    for path in (checkout.root / "bench" / "results").rglob("*.jsonl"):
        records, rejected = load_records(path)
        assert rejected == 0
        assert (
            len({(r.environment.gpu, r.environment.git_commit, bool(r.environment.git_dirty)) for r in records})
            == 1
        )
        assert path.stem.endswith("-dirty") == bool(records[0].environment.git_dirty)
        laid |= {record.model_dump_json() for record in records}
    assert laid == expected


def test_lines_that_are_no_records_are_told_and_left(checkout: Checkout, make_record: MakeRecord) -> None:
    checkout.put("ladder", "records.jsonl", make_record(environment=environment()))
    with next(checkout.check.rglob("records.jsonl")).open("ab") as file:
        file.write(b'{"status": "ok"}\n{"torn')
    checkout.write()
    told = checkout.lay()
    assert any(re.search("2 lines of .*records.jsonl are no records", line) for line in told)
    assert list(checkout.results().values()) == [1]


def noise(count: int) -> bytes:
    """What no compression makes smaller."""
    return random.Random(count).randbytes(count)


def test_a_large_archive_loses_the_middles_of_logs_and_never_records(
    checkout: Checkout, make_record: MakeRecord
) -> None:
    record = make_record(environment=environment(), status="error", message=noise(60_000).hex())
    checkout.put("ladder", "records.jsonl", record)
    log = b"begin" + noise(900_000) + b"end"
    (checkout.check / "tests.log").write_bytes(log)
    (checkout.check / "page.html").write_bytes(noise(100_000))
    told = checkout.write(limit=250_000)
    assert checkout.archive.stat().st_size <= 250_000
    assert "the middle of" in told[0]
    assert "tests.log" in told[0]
    contents = read_archive(checkout.archive)
    (kept,) = (content for name, content in contents.items() if name.endswith("records.jsonl"))
    assert Record.model_validate_json(kept) == record
    cut = contents[f"runs/{checkout.check.name}/tests.log"]
    assert cut.startswith(b"begin")
    assert cut.endswith(b"end")
    assert b"bytes left out" in cut
    assert f"runs/{checkout.check.name}/page.html" in contents
    assert json.loads(contents["manifest.json"])["left_out"]
    # Smaller still: the page goes; and smaller than the records can be: they stay, and it says so.
    assert "page.html" in checkout.write(limit=100_000)[0]
    assert checkout.archive.stat().st_size <= 100_000
    before = checkout.archive.read_bytes()
    checkout.archive.write_bytes(before[:9_000])
    told = checkout.write(limit=10_000)
    assert "the one before stays" in told[-1]
    assert checkout.archive.read_bytes() == before[:9_000]
    checkout.archive.unlink()
    told = checkout.write(limit=10_000)
    assert "records alone" in told[-1]
    contents = read_archive(checkout.archive)
    assert Record.model_validate_json(contents[next(n for n in contents if n.endswith("records.jsonl"))]) == record


def test_references_are_left_out_and_nothing_is_packed_more_than_twice(
    checkout: Checkout, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("references", "ladder/20261127T010001Z-7d35813/references"):
        (checkout.check / folder).mkdir(parents=True)
        (checkout.check / folder / "a.safetensors").write_bytes(noise(50_000))
    checkout.put("ladder", "records.jsonl", make_record(environment=environment()))
    for number in range(20):
        (checkout.check / f"{number}.html").write_bytes(noise(10_000 + number))
    state = check_archive.state_of(checkout.check, checkout.tuned)
    counted: list[int] = []
    pack = check_archive._packed
    monkeypatch.setattr(check_archive, "_packed", lambda *given: counted.append(1) or pack(*given))
    told = checkout.write(limit=100_000)
    assert "safetensors" not in told[0]
    assert not any("safetensors" in name for name in read_archive(checkout.archive))
    assert 80_000 < checkout.archive.stat().st_size <= 100_000
    assert len(counted) == 1
    # An estimate that is too low costs a second time, and no more.
    monkeypatch.setattr(check_archive, "_estimate", lambda content: 0)
    checkout.write(limit=100_000)
    assert len(counted) == 3
    assert checkout.archive.stat().st_size <= 100_000
    assert state == check_archive.state_of(checkout.check, checkout.tuned)
    (checkout.check / "references" / "b.safetensors").touch()
    assert state == check_archive.state_of(checkout.check, checkout.tuned)
    (checkout.check / "0.html").write_text("more")
    assert state != check_archive.state_of(checkout.check, checkout.tuned)


def test_an_archive_is_replaced_at_once_or_not_at_all(
    checkout: Checkout, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.put("ladder", "records.jsonl", make_record(environment=environment()))
    checkout.write()
    before = checkout.archive.read_bytes()
    monkeypatch.setattr(
        check_archive.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    (checkout.check / "more.log").write_text("more")
    with pytest.raises(OSError, match="No space"):
        checkout.write()
    assert checkout.archive.read_bytes() == before
    monkeypatch.undo()
    with checkout.archive.open("rb") as reader:
        checkout.write()
        assert reader.read() == before
    assert checkout.archive.read_bytes() != before


def packed(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(found, field, value)
    return found


MANIFEST = (member("ldmperf-gpu-check/manifest.json"), json.dumps({"format": 1}).encode())
FOREIGN = {
    "no archive at all": b"PK\x03\x04 zip",
    "nothing": b"",
    "another archive": packed((member("etc/passwd"), b"x")),
    "no manifest": packed((member("ldmperf-gpu-check/runs/a/a.log"), b"x")),
    "a manifest of another thing": packed((member("ldmperf-gpu-check/manifest.json"), b"[]")),
    "another version": packed((member("ldmperf-gpu-check/manifest.json"), b'{"format": 2}')),
    "a way up": packed(MANIFEST, (member("ldmperf-gpu-check/runs/../../../x"), b"x")),
    "a root": packed(MANIFEST, (member("/ldmperf-gpu-check/runs/x"), b"x")),
    "a hidden file": packed(MANIFEST, (member("ldmperf-gpu-check/runs/.git/hooks"), b"x")),
    "a link": packed(
        MANIFEST, (member("ldmperf-gpu-check/runs/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")
    ),
    "a device": packed(MANIFEST, (member("ldmperf-gpu-check/runs/x", type=tarfile.CHRTYPE), b"")),
    "gzip": packed(MANIFEST, mode="w:gz"),
    "the half of one": packed(MANIFEST, (member("ldmperf-gpu-check/runs/x"), noise(4000)))[:3000],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_archive_of_ours_is_refused_in_one_line(name: str, checkout: Checkout) -> None:
    checkout.archive.write_bytes(FOREIGN[name])
    with pytest.raises(ArchiveError) as raised:
        checkout.lay()
    assert "\n" not in str(raised.value)
    assert "a.txz" in str(raised.value)
    assert list(checkout.root.rglob("*")) == []


def test_what_unpacks_to_too_much_is_refused(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_archive, "MOST_BYTES", 1000)
    checkout.archive.write_bytes(packed(MANIFEST, (member("ldmperf-gpu-check/runs/x"), bytes(2000))))
    with pytest.raises(ArchiveError):
        checkout.lay()


def test_a_tuned_table_is_laid_and_never_loses_what_is_here(checkout: Checkout) -> None:
    name = "nvidia-h100-80gb-hbm3.json"
    here = checkout.root / "kernels" / "tuned" / name
    (checkout.tuned / name).write_bytes(table({"a": {"num_warps": 4}}))
    checkout.write()
    assert any("1 new entries, 0 changed" in line for line in checkout.lay())
    (checkout.tuned / name).write_bytes(table({"a": {"num_warps": 8}, "b": None}))
    checkout.write()
    assert any("1 new entries, 1 changed" in line for line in checkout.lay())
    assert here.read_bytes() == table({"a": {"num_warps": 8}, "b": None})
    here.write_bytes(table({"a": {"num_warps": 8}, "c": None}))
    (checkout.check / "tests.log").write_text("more")
    checkout.write()
    with pytest.raises(ArchiveError, match="linear c; move it away"):
        checkout.lay()
    assert here.read_bytes() == table({"a": {"num_warps": 8}, "c": None})
    assert not (checkout.root / "runs" / checkout.check.name / "tests.log").exists()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="give a file of --archive"):
        import_archive(tmp_path / "no.txz", tmp_path, tmp_path)
