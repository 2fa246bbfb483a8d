"""`pytest -p ldmperf.emulate` in a user's project: what fails and how it is shown; that else it is inert."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

from ldmperf.profiling.emulator import pytest_plugin

pytest.importorskip("triton")

USERS_TESTS = """\
import pytest
import torch
import triton
import triton.language as tl

DEVICE = triton.runtime.driver.active.get_active_torch_device()


@triton.jit
def scale_kernel(x_ptr, out_ptr, count, MASKED: tl.constexpr):
    offs = tl.arange(0, 64)
    x = tl.load(x_ptr + offs, mask=offs < count if MASKED else None)
    tl.store(out_ptr + offs, 2 * x, mask=offs < count)


def scale(count, masked=True):
    x = torch.arange(float(count), device=DEVICE)
    out = torch.empty_like(x)
    scale_kernel[(1,)](x, out, count, MASKED=masked)
    assert torch.equal(out, 2 * x)


def test_right():
    scale(50)


def test_wrong():
    scale(50, masked=False)


def test_expected(emulation):
    with emulation.expecting("out of bounds") as found:
        scale(50, masked=False)
    assert next(iter(found)).source == "test_scaling.py:12"


def test_late(emulation):
    emulation.strict = False
    try:
        scale(40, masked=False)
    finally:
        emulation.strict = True


def test_numbers():
    assert scale(64) == 1
"""


@pytest.fixture
def users(tmp_path):
    """Runs pytest on the tests of a user: (exit code, what it printed)."""
    (tmp_path / "test_scaling.py").write_text(USERS_TESTS)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTER"))}

    def run(*arguments, **environment):
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *arguments]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=kept | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_session_on_an_emulated_gpu(users, tmp_path):
    (tmp_path / "conftest.py").write_text(
        "import triton\nassert triton.runtime.driver.active.get_current_target().arch == 90\n"
    )
    code, told = users("-p", "ldmperf.emulate", "-v")
    assert code == 1, told
    assert "emulated: sm_90 (H200 SXM), float32 sums" in told
    outcomes = dict(re.findall(r"^test_scaling.py::(\w+) (\w+)", told, re.MULTILINE))
    assert outcomes == {
        **{"test_right": "PASSED", "test_wrong": "FAILED", "test_expected": "PASSED"},
        **{"test_late": "FAILED", "test_numbers": "FAILED"},
    }
    # The launch's own line, and no file of triton's.
    shown = told[told.index("= FAILURES =") :]
    assert re.search(r"^>\s+scale_kernel\[\(1,\)\]\(x, out, count, MASKED=masked\)$", shown, re.MULTILINE)
    assert "test_scaling.py:19: FindingsError" in shown
    assert "jit.py" not in shown
    assert re.search(
        r"FindingsError: out of bounds: scale_kernel at test_scaling.py:12.*, \d+ times \(read of", shown
    )
    assert re.search(r"^out of bounds: scale_kernel at test_scaling.py:12.*, \d+ times", shown, re.MULTILINE)
    assert "During handling" not in shown
    told_last = r"^5 launches of 1 kernels, ([\d,]+) thread instructions, 2 findings, \d+\.\d s in the emulator$"
    (instructions,) = re.findall(told_last, told, re.MULTILINE)
    assert 5 * 128 * 10 < int(instructions.replace(",", "")) < 5 * 128 * 200


def test_workers_of_xdist_sum_up(users):
    pytest.importorskip("xdist")
    options = ("--emulate=sm_80", "--emulate-accumulate=tensor-core", "--emulate-perturb=7", "--full-trace", "-n2")
    code, told = users(*options)
    assert code == 1, told
    assert "emulated: sm_80 (A100 SXM 80 GB), tensor core sums" in told
    assert re.search(r"^-+ emulated sm_80 -+$", told, re.MULTILINE)
    assert re.search(r"^5 launches of 1 kernels, [\d,]+ thread instructions, 2 findings, ", told, re.MULTILINE)
    assert "3 failed, 2 passed" in told
    # A full trace is of triton's files too.
    assert "jit.py" in told


@pytest.mark.parametrize(("plugins", "arch"), [(["ldmperf.emulate"], None), (["xdist"], "sm_70"), ([], "sm_90")])
def test_what_cannot_be_emulated_is_an_error_of_usage(plugins, arch, monkeypatch):
    """An architecture that is not known, and kernels that are interpreted."""
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", arch != "sm_70")
    numerics = {"emulate_accumulate": "float32", "emulate_tf32": "truncate", "emulate_perturb": None}
    options = SimpleNamespace(plugins=plugins, emulate=arch, **numerics)
    config = SimpleNamespace(known_args_namespace=options, stash=pytest.Stash(), add_cleanup=None)
    message = (
        "sm_70 is not emulated; there are sm_80, sm_90" if arch == "sm_70" else "TRITON_INTERPRET=1 interprets"
    )
    with pytest.raises(pytest.UsageError, match=f"--emulate: {message}"):
        pytest_plugin.pytest_load_initial_conftests(config)


def test_wrong_options(users):
    for option, message in (
        ("accumulate=exact", "invalid choice: 'exact'"),
        ("tf32=up", "invalid choice: 'up'"),
        ("perturb=x", "invalid int value: 'x'"),
    ):
        code, told = users(f"--emulate-{option}")
        assert code == 4, told
        assert message in told


def test_inert_unless_asked_for(users, tmp_path):
    """It is loaded, imports nothing that takes time, and changes nothing; its fixture skips."""
    (tmp_path / "test_scaling.py").write_text(
        "import sys\n"
        "HEAVY = {'torch', 'triton', 'numpy', 'pydantic', 'ldmperf.profiling.emulator.emulation'}\n"
        "def test_imports(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('ldmperf.emulate')\n"
        "    assert not HEAVY & sys.modules.keys()\n"
        "def test_fixture(emulation):\n"
        "    raise AssertionError\n"
    )
    code, told = users("-rs")
    assert code == 0, told
    assert "1 passed, 1 skipped" in told
    assert "needs an emulated GPU: pytest -p ldmperf.emulate" in told
    assert "emulated:" not in told


def test_the_entry_point_has_the_name_that_is_told():
    (plugin,) = (one for one in entry_points(group="pytest11") if one.name == "ldmperf.emulate")
    assert plugin.load() is pytest_plugin
    assert plugin.name == pytest_plugin.NAME
