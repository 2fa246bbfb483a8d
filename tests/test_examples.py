"""Every examples/*.py runs, from another folder, in a process of its own, without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.py"))
# What a kernel says once where it cannot run, as on a CPU.
FALLBACK = re.compile(r"\w+: falling back to the torch reference: .*\n")
# What transformers says when it is imported for a pipeline.
NO_TORCHVISION = re.compile(r"\[transformers\] `\w+` requires torchvision .*\n")

# Runs each file of its arguments in a fork, so that torch and diffusers are imported once.
RUN = """
import os, runpy, sys
import torch
from diffusers import UNet2DConditionModel
for path, log in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(log + str(stream), os.O_WRONLY | os.O_CREAT), stream)
        sys.path[0], sys.argv = os.path.dirname(path), [path]
        runpy.run_path(path, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    """The exit code and what was printed, by the name of the example."""
    folder = tmp_path_factory.mktemp("examples")
    command = [sys.executable, "-c", RUN]
    for path in EXAMPLES:
        command += [str(path), str(folder / path.stem)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    found = {}
    for path, code in zip(EXAMPLES, run.stdout.split(), strict=True):
        out, err = (Path(f"{folder / path.stem}{stream}").read_text() for stream in (1, 2))
        found[path.name] = code, out, err
    return found


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES])
def test_an_example_runs_without_a_warning_and_says_what_it_compared(
    name: str, outcomes: dict[str, tuple[str, str, str]]
) -> None:
    code, out, err = outcomes[name]
    assert code == "0", err
    assert NO_TORCHVISION.sub("", FALLBACK.sub("", err)) == ""
    assert "error" in out
