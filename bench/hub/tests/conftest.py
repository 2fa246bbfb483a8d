"""The kernel under test, on the device that torch was built for."""

import tomllib
from pathlib import Path

import pytest
import torch

import kernels


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels_ci: the tests that kernel-builder runs")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def kernel():
    """The published kernel; this folder where LOCAL_KERNELS="<repo-id>=<this folder>", without a network."""
    general = tomllib.loads((Path(__file__).parents[1] / "build.toml").read_text())["general"]
    repo_id = general["hub"]["repo-id"]
    return kernels.get_kernel(repo_id, version=general["version"], trust_remote_code=[repo_id])
