"""Every kernel in triton's interpreter: tests/interpreter in processes of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
FOLDER = Path(__file__).with_name("interpreter")


def release(version):
    return tuple(int(part) for part in version.split(".")[:2])


def test_kernels_in_the_interpreter(tmp_path):
    if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
        pytest.skip("triton 3.6's interpreter breaks under numpy 2.4: pip install 'numpy<2.4'")
    files = sorted(FOLDER.glob("test_*.py"))
    # Two processes at once, one of them for the file that takes as long as all others.
    halves = [
        [f for f in files if (f.name == "test_attention.py") == is_attention] for is_attention in (True, False)
    ]
    runs = [start(half, tmp_path / str(number)) for number, half in enumerate(halves)]
    outputs = [run.communicate(timeout=1200)[0] for run in runs]
    passed = 0
    for run, output in zip(runs, outputs, strict=True):
        last = output.strip().splitlines()[-1]
        assert run.returncode == 0, output[-5000:]
        assert not re.search(r"skipped|failed|error|xfailed", last), last
        passed += int(re.search(r"(\d+) passed", last)[1])
    # It must not pass because nothing ran.
    assert passed > 100


def start(files, folder):
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *map(str, files)],
        cwd=folder,
        env=os.environ
        | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder / "triton"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
