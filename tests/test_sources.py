"""What a report says of where it is from: what was put together, the commits, the command, safe links."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmperf.profiling import Case, Record
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.record_files import Gathered
from ldmperf.profiling.report.sources import Sources, records_url

MakeRecord = Callable[..., Record]


def test_one_file_of_one_machine_needs_no_words(make_record: MakeRecord) -> None:
    records = (make_record(), make_record(Case(unet="83M", steps=3)))
    sources = Sources.of({"/somewhere/runs/a/records.jsonl": Gathered(records)})
    assert sources.together == ""
    assert sources.commits == ("7d35813",)
    assert sources.is_command
    assert sources.command.startswith("ldmperf profile --size 39M,83M --steps 3 ")
    assert [link.name for link in sources.links] == ["a/records.jsonl"]


def test_what_is_put_together_is_counted(make_record: MakeRecord) -> None:
    here = make_record().environment
    there = here.model_copy(update={"cpu": "Intel", "git_commit": "a" * 40})
    files = {
        "/a.jsonl": Gathered((make_record(), make_record(Case(unet="83M", steps=3)))),
        "/b.jsonl": Gathered((make_record(environment=there),)),
    }
    sources = Sources.of(files)
    assert sources.together == (
        "3 records of trajectories from 2 files, 2 commits (7d35813, aaaaaaa), 2 kinds of machines "
        "(AMD EPYC; Intel). Nothing is compared across kinds of machines."
    )
    # Of one kind, but several machines.
    machines = [here.model_copy(update={"machine_id": letter * 16}) for letter in "abc"]
    shards = {f"/{e.machine_id}.jsonl": Gathered((make_record(environment=e),)) for e in machines}
    assert Sources.of(shards).together == (
        "3 records of trajectories from 3 files, 1 commit (7d35813), 1 kind of machine (AMD EPYC), 3 machines."
    )
    # In one file, too.
    assert Sources.of({"/all.jsonl": Gathered(tuple(make_record(environment=e) for e in machines))}).together


def test_compiled_launches_have_no_machine(make_record: MakeRecord, make_inspection: Callable[..., Any]) -> None:
    launches = Gathered(inspections=(make_inspection(), make_inspection(128)))
    assert Sources.of({"/a.jsonl": launches}).together == ""
    both = Sources.of({"/a.jsonl": launches, "/b.jsonl": Gathered((make_record(),))})
    assert both.together == (
        "1 record of trajectories and 2 compiled launches from 2 files, 1 commit (7d35813), "
        "1 kind of machine (AMD EPYC)."
    )
    alone = Sources.of({"/a.jsonl": launches, "/b.jsonl": launches})
    assert alone.together == "4 compiled launches from 2 files, 1 commit (7d35813)."


def test_cases_that_no_lists_make_are_counted(make_record: MakeRecord) -> None:
    cases = [Case(unet="39M", steps=3), Case(unet="83M", steps=4)]
    sources = Sources.of({"/a.jsonl": Gathered(tuple(map(make_record, cases)))})
    assert (sources.command, sources.is_command) == ("2 cases of 2 networks on 1 backend", False)
    assert Sources.of({}).command == ""


NAMES = st.one_of(
    st.sampled_from(["javascript:alert(1).jsonl", "a b#c?d.jsonl", "%41.jsonl", '"><script>.jsonl', "é/ü.jsonl"]),
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=10).filter(
        lambda name: name not in (".", "..")
    ),
)


@given(name=NAMES)
def test_a_link_leads_to_its_file_and_to_nothing_else(name: str) -> None:
    path = Path("/data/runs") / name
    (link,) = Sources.of({str(path): Gathered()}, Path("/data/pages")).links
    parts = urllib.parse.urlsplit(link.href)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
    assert not set(link.href) & set("\"'<>& \\\n")
    there = os.path.normpath(os.path.join("/data/pages", urllib.parse.unquote(link.href)))
    assert there == os.path.normpath(path)


def test_where_the_records_can_be_had_is_an_address() -> None:
    url = records_url("https://example.org/records.jsonl?raw=1")
    (link,) = Sources.of({"/a": Gathered(), "/b": Gathered()}, Path("/"), url).links
    assert link.href == link.name == url
    for wrong in (
        "javascript:alert(1)",
        "example.org/a",
        "file:///etc/passwd",
        "",
        "https://",
        "data:text/html,x",
    ):
        with pytest.raises(CaseError, match="is no address; give one that begins with https://"):
            records_url(wrong)
