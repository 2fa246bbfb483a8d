"""The store: whatever tears, joins, fills or shares its file, each record that was appended stays in it."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pydantic import BaseModel, ConfigDict

from ldmperf.profiling import Case, Record, load_records
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord
from ldmperf.profiling.measure import store as stores
from ldmperf.profiling.measure.recorded import READABLE_VERSIONS
from ldmperf.profiling.measure.store import Store, read_lines, rejected_path
from ldmperf.profiling.record_files import gather
from ldmperf.profiling.static.inspection_records import InspectionRecord
from ldmperf.profiling.trajectory.records import RECORDS_NAME, RecordStore

MakeRecord = Callable[..., Record]


class Sample(BaseModel):
    """A record as small as one may be."""

    model_config = ConfigDict(strict=True, extra="forbid")
    run: int
    text: str


SAMPLES = st.builds(Sample, run=st.integers(0, 9), text=st.text('aé\n"\\{}\ufeff\u2028', max_size=6))
SEVERAL = st.lists(SAMPLES, min_size=1, max_size=3)
BOOLEANS = st.booleans()
FOREIGN = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [
            *(b"{}\n", b"null\n", b"[1", b'{"run": 1}\n', b'{"run": "1", "text": ""}\n', b"NaN\n", b"\x00" * 50),
            *(b"\n\n", b"\r\n", b" \t", b"\x0b\n", b"[" * 3000, b"x" * 100_000 + b"\n", codecs.BOM_UTF8),
            '{"run": 1, "text": ""}\n'.encode("utf-16"),
        ]
    ),
)


def line_of(sample: Sample) -> bytes:
    return sample.model_dump_json().encode()


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: a write takes what still fits, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class StoreMachine(RuleBasedStateMachine):
    """The bytes of the file and of the one beside it are kept here as well, by rules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "samples.jsonl"
        self.store = Store(self.path, Sample)
        self.known: dict[bytes, Sample] = {}
        self.content = self.beside = b""

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def lines(self) -> list[bytes]:
        """Those that are not blank; a mark of the encoding is no part of a line."""
        lines = [line.removeprefix(codecs.BOM_UTF8) for line in self.content.split(b"\n")]
        return [line for line in lines if line.strip()]

    def record(self, line: bytes) -> Sample | None:
        return self.known.get(line.strip(b" \t\r"))

    def written(self, samples: list[Sample]) -> bytes:
        """What appending adds to the file as it is: an unfinished line is ended first."""
        self.known |= {line_of(sample): sample for sample in samples}
        ended = b"" if self.content[-1:] in (b"", b"\n") else b"\n"
        return ended + b"".join(line_of(sample) + b"\n" for sample in samples)

    def set_aside(self) -> None:
        self.beside += b"".join(line + b"\n" for line in self.lines() if not self.record(line))

    @rule(samples=SEVERAL)
    def append(self, samples: list[Sample]) -> None:
        self.content += self.written(samples)
        self.store.append(*samples)

    @rule(samples=SEVERAL, data=st.data())
    def append_where_the_disk_is_full(self, samples: list[Sample], data: st.DataObject) -> None:
        room = data.draw(st.integers(0, len(self.written(samples)) - 1))
        with disk_full_at(len(self.content) + room), pytest.raises(OSError, match="large"):
            self.store.append(*samples)

    @rule(samples=SEVERAL, data=st.data())
    def die_while_appending(self, samples: list[Sample], data: st.DataObject) -> None:
        torn = (whole := self.written(samples))[: data.draw(st.integers(0, len(whole)))]
        self.content += torn
        with self.path.open("ab") as file:
            file.write(torn)

    @rule(raw=FOREIGN)
    def somebody_writes(self, raw: bytes) -> None:
        self.content += raw
        with self.path.open("ab") as file:
            file.write(raw)

    @rule(samples=SEVERAL, ends=st.sampled_from([b"\n", b"\r\n", b" \n\n"]), mark=BOOLEANS, whole=BOOLEANS)
    def another_file_is_concatenated(self, samples: list[Sample], ends: bytes, mark: bool, whole: bool) -> None:
        self.known |= {line_of(sample): sample for sample in samples}
        raw = codecs.BOM_UTF8 * mark + b"".join(line_of(sample) + ends for sample in samples)
        self.somebody_writes(raw if whole else raw.rstrip())

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        self.content = self.content[: data.draw(st.integers(0, len(self.content) - 1))]
        os.truncate(self.path, len(self.content))

    @rule()
    def reopen(self) -> None:
        self.set_aside()
        self.content = b"".join(line + b"\n" for line in self.lines() if self.record(line))
        self.store = Store(self.path, Sample)

    @rule()
    def die_between_the_steps_of_setting_aside(self) -> None:
        kept = b"".join(line + b"\n" for line in self.lines() if self.record(line))
        with mock.patch.object(stores, "write_whole", side_effect=KeyboardInterrupt):
            try:
                Store(self.path, Sample)
            except KeyboardInterrupt:
                # The lines are in both files.
                self.set_aside()
            else:
                assert kept == self.content

    @invariant()
    def both_files_are_as_told(self) -> None:
        beside = rejected_path(self.path)
        assert self.path.read_bytes() == self.content
        assert (beside.read_bytes() if beside.exists() else b"") == self.beside

    @invariant()
    def every_whole_record_is_read_and_nothing_else(self) -> None:
        records, aside = read_lines(self.path, Sample)
        mine = [record for line in self.lines() if (record := self.record(line))]
        assert records == mine
        assert aside.in_file == len(self.lines()) - len(mine)
        assert aside.count - aside.in_file == self.beside.count(b"\n")


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), tail=st.sampled_from([b"", b"\n", b"\r\n", b"\x00" * 4096]))
def test_real_records_torn_at_any_byte(
    make_record: MakeRecord, tmp_path_factory: pytest.TempPathFactory, share: float, tail: bytes
) -> None:
    """As a power cut leaves it: short, or with zeros where nothing was written."""
    path = tmp_path_factory.mktemp("run") / RECORDS_NAME
    *written, late = (make_record(Case(unet="39M", steps=steps)) for steps in (1, 2, 3, 4))
    lines = {record.model_dump_json().encode(): record for record in written}
    content = b"".join(line + b"\n" for line in lines)
    content = content[: round(share * len(content))] + tail
    path.write_bytes(content)
    whole = [lines[line] for line in content.replace(b"\r", b"").split(b"\n") if line in lines]
    assert load_records(path)[0] == whole
    store = RecordStore(path)
    store.append(late)
    assert load_records(path)[0] == store.load() == [*whole, late]


@pytest.mark.parametrize("earlier", [b"", b'{"run":0,"text":"earlier"}\n', b'{"run":0,"text":"torn'])
def test_an_append_that_the_disk_cuts_off_leaves_nothing(earlier: bytes, tmp_path: Path) -> None:
    samples = [Sample(run=1, text="first"), Sample(run=2, text="second")]
    path = tmp_path / "samples.jsonl"
    store = Store(path, Sample)
    path.write_bytes(earlier)
    store.append(*samples)
    after = path.read_bytes()
    for room in range(len(after) - len(earlier)):
        path.write_bytes(earlier)
        with disk_full_at(len(earlier) + room), pytest.raises(OSError, match="large") as raised:
            store.append(*samples)
        assert raised.value.errno == errno.EFBIG
        assert path.read_bytes() == earlier
        store.append(*samples)
        assert path.read_bytes() == after


def test_setting_aside_on_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    sample = Sample(run=1, text="kept" * 10)
    content = line_of(sample) + b"\n" + b"foreign" * 5 + b"\n" + line_of(sample) + b"\n"
    path = tmp_path / "samples.jsonl"
    for size in range(0, 2 * len(line_of(sample)) + 2, 5):
        path.write_bytes(content)
        rejected_path(path).unlink(missing_ok=True)
        with disk_full_at(size), pytest.raises(OSError, match="large"):
            Store(path, Sample)
        assert path.read_bytes() == content
        assert Store(path, Sample).load() == [sample, sample]
        assert b"foreign" * 5 + b"\n" in rejected_path(path).read_bytes()
        assert {entry.name for entry in tmp_path.iterdir()} == {path.name, rejected_path(path).name}


# In the folder, as a user whom the folder's rights bind, root too.
READ_ONLY = """
import os, sys
from pathlib import Path
from pydantic import BaseModel
from ldmperf.profiling.measure.store import Store, read_lines

class Sample(BaseModel):
    run: int
    text: str

os.chdir(sys.argv[1])
os.chmod(".", 0o555)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for name in ("samples.jsonl", "foreign.jsonl", "new.jsonl"):
    try:
        Store(Path(name), Sample)
    except OSError as failure:
        print(type(failure).__name__, end=" ")
records, aside = read_lines(Path("foreign.jsonl"), Sample)
print(records, aside.count, [str(line) for line in aside.first])
"""


def test_a_read_only_folder_is_an_oserror_and_can_be_read(tmp_path: Path) -> None:
    content = b'{"run":1,"text":"a"}\n'
    contents = {"samples.jsonl": content, "foreign.jsonl": content + b"[1\n"}
    for name, held in contents.items():
        (tmp_path / name).write_bytes(held)
        (tmp_path / name).chmod(0o444)
    try:
        command = [sys.executable, "-c", READ_ONLY, str(tmp_path)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split(
            " ", 3
        )
    finally:
        tmp_path.chmod(0o755)
    assert told[:3] == ["PermissionError"] * 3
    assert told[3].startswith("[Sample(run=1, text='a')] 1 ['foreign.jsonl:2: no JSON object")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == contents


# Processes that begin together on a file that does not exist: writers append records of several blocks; openers
# leave half a line, as one that was killed at it, and open the file, which rewrites it.
TOGETHER = """
import fcntl, os, sys, traceback
from pathlib import Path
from pydantic import BaseModel
from ldmperf.profiling.measure.store import Store

class Sample(BaseModel):
    run: int
    text: str

path, writers, openers, count = Path(sys.argv[1]), *map(int, sys.argv[2:])

def write(run):
    store = Store(path, Sample)
    for number in range(count):
        store.append(Sample(run=run, text=f"{number} " + "x" * 20_000), Sample(run=run, text=f"{number} second"))

def die():
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.write(b'\\n{"run":0,"text":"torn')
                file.flush()
                return

def open_again(run):
    for _ in range(count):
        die()
        Store(path, Sample)

begin, go = os.pipe()
children = []
for run, work in enumerate([write] * writers + [open_again] * openers):
    if child := os.fork():
        children.append(child)
        continue
    try:
        os.close(go)
        os.read(begin, 1)
        work(run)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
os.close(go)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.parametrize(("writers", "openers"), [(4, 0), (3, 2)])
def test_processes_at_one_file_lose_and_glue_nothing(writers: int, openers: int, tmp_path: Path) -> None:
    path, count = tmp_path / "samples.jsonl", 25
    given_ = [str(path), str(writers), str(openers), str(count)]
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, *given_], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    records, aside = read_lines(path, Sample)
    expected = [(f"{n} " + "x" * 20_000, f"{n} second") for n in range(count)]
    for run in range(writers):
        # Each writer's are in its order, the two of one append next to each other.
        places = [place for place, record in enumerate(records) if record.run == run]
        assert [records[place].text for place in places] == [text for pair in expected for text in pair]
        assert all(second == first + 1 for first, second in zip(places[::2], places[1::2], strict=True))
    assert len(records) == writers * count * 2
    # Each half line was set aside, by whoever opened the file next.
    assert aside.count == openers * count
    assert Counter(path.parent.iterdir()).keys() <= {path, rejected_path(path)}


# Prints the number of a record when `append` has returned.
ACKNOWLEDGE = """
import sys
from pathlib import Path
from pydantic import BaseModel
from ldmperf.profiling.measure.store import Store

class Sample(BaseModel):
    run: int
    text: str

store = Store(Path(sys.argv[1]), Sample)
number = int(sys.argv[2])
while True:
    store.append(Sample(run=number, text="x" * 50_000))
    print(number, flush=True)
    number += 1
"""


def test_what_append_has_returned_for_survives_a_kill(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "samples.jsonl", []
    for kill in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", ACKNOWLEDGE, str(path), str(1000 * kill)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged += [int(process.stdout.readline()) for _ in range(5)]
        process.kill()
        acknowledged += [int(line) for line in process.communicate()[0].split()]
    records = Store(path, Sample).load()
    numbers = [record.run for record in records]
    assert all(len(record.text) == 50_000 for record in records)
    assert numbers == sorted(set(numbers))
    # One that was on disk when the kill came may not have been told any more.
    assert set(acknowledged) <= set(numbers)
    assert len(numbers) <= len(acknowledged) + 4


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_who_waits_for_a_file_that_is_replaced_appends_to_the_new_one(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.jsonl"
    store, opened = Store(path, Sample), threading.Event()
    lock = fcntl.flock

    def told(*arguments: Any) -> None:
        opened.set()
        lock(*arguments)

    with path.open("ab") as holder:
        lock(holder, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", told)
        waiting = threading.Thread(target=store.append, args=(Sample(run=1, text="late"),))
        waiting.start()
        assert opened.wait(60)
        if change == "replaced":
            other = tmp_path / "other"
            other.write_bytes(line_of(Sample(run=0, text="kept")) + b"\n")
            other.replace(path)
        else:
            path.unlink()
    waiting.join(60)
    assert not waiting.is_alive()
    assert [record.text for record in store.load()] == ["kept", "late"][change == "removed" :]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Callable[..., None]:
        def flock(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    path = tmp_path / "samples.jsonl"
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    Store(path, Sample).append(Sample(run=1, text="a"))
    assert Store(path, Sample).load() == [Sample(run=1, text="a")]
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        Store(path, Sample)


ROOT = Path(__file__).parents[1]
OLD = sorted((ROOT / "tests" / "old_records").glob("*.jsonl"))
COMMITTED = sorted(path for place in ("results", "static") for path in (ROOT / "bench" / place).rglob("*.jsonl"))


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where what an old line says is not in the new one, or otherwise."""
    if isinstance(old, dict) and isinstance(new, dict):
        lost = [f"{place}.{key} is lost" for key in old.keys() - new.keys()]
        return lost + [
            t for key in old.keys() & new.keys() for t in differences(old[key], new[key], f"{place}.{key}")
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [told for n, pair in pairs for told in differences(*pair, f"{place}[{n}]")]
    same = old == pytest.approx(new, rel=1e-12) if type(old) is float else (type(old), old) == (type(new), new)
    return [] if same else [f"{place}: {old!r} became {new!r}"]


@pytest.mark.parametrize("path", [*OLD, *COMMITTED], ids=lambda path: path.name)
def test_an_old_line_is_read_with_all_that_is_in_it(path: Path) -> None:
    """Figures that are derived from others too: they are computed as they were."""
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = json.loads(lines[0])
    models: tuple[type[BaseModel], ...] = (Record, KernelRecord, InspectionRecord)
    (model,) = (model for model, field in zip(models, ("harness", "peer", "arch"), strict=True) if field in fields)
    records, aside = read_lines(path, model)
    assert not aside.count
    assert len(records) == len(lines)
    for line, record in zip(lines, records, strict=True):
        old, new = json.loads(line), json.loads(record.model_dump_json())
        del old["schema_version"]
        assert not differences(old, new)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_files_of_every_version_are_gathered_whoever_saved_them(path: Path, ends: str, tmp_path: Path) -> None:
    """With a mark of the encoding, with another system's ends of lines, both kinds in one file."""
    lines = [line for old in (path, OLD[-1]) for line in old.read_text(encoding="utf-8").splitlines()]
    saved = tmp_path / "records.jsonl"
    saved.write_text("".join(line + ends for line in dict.fromkeys(lines)), encoding="utf-8-sig", newline="")
    gathered = gather([saved])
    assert gathered.aside.count == 0
    assert len(gathered.records) == len(set(lines))


@pytest.mark.parametrize("kind", ["trajectories", "kernels"])
def test_every_version_that_is_read_has_lines(kind: str) -> None:
    versions = {
        path.stem: {json.loads(line)["schema_version"] for line in path.read_text(encoding="utf-8").splitlines()}
        for path in OLD
        if path.stem.startswith(kind)
    }
    assert versions == {f"{kind}-{version}": {version} for version in READABLE_VERSIONS}
    states = {json.loads(line)["status"] for path in OLD for line in path.read_text(encoding="utf-8").splitlines()}
    assert states >= {"ok", "unsupported"}
