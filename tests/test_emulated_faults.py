"""The emulator's self-test: a fault of each kind is found, and so are kernels with something taken away."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from emulated_faults import EDITS, EXAMPLES, WRITTEN, find_edited, find_written
from emulated_mutants import SUBJECTS, try_mutants

pytest.importorskip("triton")

from ldmperf.profiling.emulator.findings import KINDS
from ldmperf.profiling.emulator.mutants import MUTATIONS, mutants

PAGE = Path(__file__).parents[1] / "docs" / "emulate.md"
# The line of examples/emulate/faults.py that each fault is at, by its text.
LINES = {
    "race": "tl.store(out_ptr + offs, (left + here) / 2, mask=offs < n)",
    "race of programs": "tl.store(out_ptr + offs, (left + here) / 2, mask=offs < n)",
    "conflicting stores": "tl.store(counts_ptr + x, count + tl.arange(0, BLOCK))",
    "out of bounds": "tl.store(out_ptr + offs, x + y)",
    "misaligned": "tl.store(out_ptr + row * BLOCK + offs, tl.load(x_ptr + start + offs))",
    "uninitialised": "y = tl.load(y_ptr + offs, mask=mask)",
    "division by zero": "tl.store(out_ptr + offs, tl.load(x_ptr + offs) // parts)",
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton-cache")))
        yield


def test_there_is_a_fault_of_every_kind():
    assert {*WRITTEN, *(edit.kind for edit in EDITS)} == set(KINDS)
    page = PAGE.read_text()
    for kind, meaning in KINDS.items():
        assert f"FINDING {kind}: " in page
        assert f"| {kind} | {meaning} |" in page


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_written_fault_is_found_at_its_line(kind):
    finding = find_written(kind)
    (line,) = re.fullmatch(r"faults\.py:(\d+)", finding.source).groups()
    assert EXAMPLES.read_text().splitlines()[int(line) - 1].strip() == LINES[kind]


@pytest.mark.parametrize("kind", WRITTEN)
def test_and_on_an_older_chip(kind):
    assert find_written(kind, "sm_80").source.startswith("faults.py:")


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.kind)
def test_edited_code_is_found(edit):
    finding = find_edited(edit)
    # A result that is not written has no instruction.
    assert edit.kind == "unwritten result" or "_kernels.py:" in finding.source


def subject(name):
    return next(one for one in SUBJECTS if one.name == name)


@pytest.mark.parametrize(
    ("name", "arch"),
    [("group norm, one launch", "sm_90"), ("attention, a text", "sm_90"), ("attention, a text", "sm_80")],
)
def test_barriers_waits_and_stores_that_are_taken_away_are_noticed(name, arch):
    """All but those that another of their kind makes needless."""
    found = try_mutants(subject(name), arch, limit=6)
    for kind in ("wait of a copy", "wait of one copy less", "mask of a store", "global store"):
        assert found[kind].unnoticed == [], kind
    for kind in ("barrier", "warp barrier", "wait of a matmul", "proxy fence"):
        assert found[kind].found or not found[kind].made, kind
    made = sum(one.made for one in found.values())
    assert made > 10
    assert sum(bool(one.found or one.wrong) for one in found.values()) >= 5


def test_every_mutation_changes_one_line_and_is_made():
    ptx = inspect.cleandoc(
        """
        bar.sync 	0;
        bar.warp.sync 	-1;
        cp.async.wait_group 	2;
        wgmma.wait_group.sync.aligned 0;
        fence.proxy.async.shared::cta;
        @%p1 ld.global.b32 {%r1}, [%rd1];
        @!%p1 st.global.b32 [%rd1], {%r1};
        st.shared.b32 [%r1], %r2;
        add.s32 %r1, %r2, %r3;
        """
    )
    made = list(mutants(ptx))
    assert {mutant.kind for mutant in made} == set(MUTATIONS)
    for mutant in made:
        pairs = zip(ptx.splitlines(), mutant.ptx.splitlines(), strict=True)
        changed = [number for number, (before, after) in enumerate(pairs, 1) if before != after]
        assert changed == [mutant.line]
        assert ptx.splitlines()[mutant.line - 1].strip() == mutant.text
    weaker = next(mutant for mutant in made if mutant.kind == "wait of one copy less")
    assert re.search(r"cp\.async\.wait_group\s+3;", weaker.ptx)
