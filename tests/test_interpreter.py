"""Every kernel in triton's interpreter: tests/interpreter in a process of its own."""

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
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(FOLDER)],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    print(result.stdout)
    last = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    # It must not pass because nothing ran.
    assert int(re.search(r"(\d+) passed", last)[1]) > 100, last
    assert not re.search(r"skipped|failed|error|xfailed", last), last
