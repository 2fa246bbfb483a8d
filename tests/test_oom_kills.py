"""Kills for want of memory, as control groups of both versions count them (cgroup-v2.rst, memory.rst)."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmperf.profiling.measure.oom_kills import oom_kills

V2 = "low 0\nhigh 0\nmax 61\noom 4\noom_kill 3\noom_group_kill 0\n"
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step/memory.events": V2}, 3),
        # A container, whose own group is mounted as the root.
        ("0::/../../far/away\n", {"memory.events": V2}, 3),
        ("11:cpu:/x\n4:memory:/slurm/job_1\n0::/\n", {"memory/slurm/job_1/memory.oom_control": V1}, 5),
        ("11:cpuset,memory:/a:b\n", {"memory/a:b/memory.oom_control": V1}, 5),
        # The root of all has no such file: the machine's count.
        ("0::/\n", {}, 7),
        ("", {}, 7),
        ("0::/job\n", {"job/memory.events": "oom_kill no\n"}, 7),
    ],
)
def test_the_count_is_the_groups_else_the_machines(
    tmp_path: Path, own: str, files: dict[str, str], expected: int
) -> None:
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(own)
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 7\n")
    assert oom_kills(tmp_path / "cgroup", tmp_path / "own", tmp_path / "vmstat") == expected


def test_where_nobody_counts_there_is_no_count(tmp_path: Path) -> None:
    assert oom_kills(tmp_path / "none", tmp_path / "none", tmp_path / "none") is None
