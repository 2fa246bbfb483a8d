"""The repository for Hugging Face's kernel hub, by the packages `kernels` and `kernels-data`; no network.

`kernels` is PyPI's: our folder of that name hides it where the checkout is on sys.path (`python -m pytest`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_kernels import MODULE, PAGE, REPO_ID, repository, tree, with_tree, write
from kernels._rust import Build
from kernels.backends import CPU, CUDA, XPU, Backend, ROCm
from kernels.variants import _resolve_variant_for_system, get_variants_local
from kernels_data import Digest, DigestAlgorithm, KernelName, Metadata
from packaging.version import Version
from torch import Tensor

import kernels
import ldmperf.kernels

ROOT = Path(__file__).parents[1]
BACKENDS = ("cpu", "cuda", "rocm", "xpu")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return repository()


@pytest.fixture(scope="module")
def folder(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hub") / "hub-kernels"
    write(files, target)
    return target


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Any:
    return kernels.get_local_kernel(folder)


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of other kernels: tuned for a GPU, of version 1.0.0, with the other sign in geglu's result."""
    source = tmp_path_factory.mktemp("later") / "kernels"
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__"))
    for name, before, after in (
        ("__init__.py", '"0.1.0"', '"1.0.0"'),
        ("geglu.py", "gated = value * F", "gated = -value * F"),
    ):
        text = (source / name).read_text()
        assert text.count(before) == 1
        (source / name).write_text(text.replace(before, after))
    (source / "tuned").mkdir(exist_ok=True)
    (source / "tuned" / "a-gpu.json").write_text('{"kernels": {}}')
    write(repository(source), source.parent / "repository")
    return source.parent / "repository"


def test_the_same_sources_give_the_same_bytes(files: dict[str, bytes], tmp_path: Path) -> None:
    assert repository() == files
    write({"build.toml": b"", "former.py": b""}, tmp_path)
    write(files, tmp_path)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in written} == files


def test_other_sources_give_another_id(folder: Path, later: Path) -> None:
    paths = [target / f"build/torch-{backend}/metadata.json" for target in (folder, later) for backend in BACKENDS]
    found = [Metadata.read_from_file(path) for path in paths]
    assert len({metadata.id for metadata in found}) == len(paths)
    assert [metadata.version for metadata in found] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_build_toml_is_read_by_the_hubs_parser(folder: Path) -> None:
    assert {str(backend).lower() for backend in Build.open(folder).general.backends} == set(BACKENDS)
    assert KernelName("ldmperf-kernels").python_name == MODULE


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_describes_its_variant(folder: Path, backend: str) -> None:
    variant = folder / f"build/torch-{backend}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert re.fullmatch(rf"_{MODULE}_{backend}_[0-9a-f]{{7}}", metadata.id)
    assert (str(metadata.name), metadata.license, metadata.python_depends) == ("ldmperf-kernels", "MIT", [])
    assert metadata.version == int(ldmperf.kernels.__version__.partition(".")[0])
    assert str(metadata.backend.backend_type).lower() == backend
    assert metadata.digest is not None
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    sources = folder / "torch-ext" / MODULE
    expected = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    assert metadata.digest.files.keys() == expected | {"_ops.py", f"{MODULE}/__init__.py"}


@pytest.mark.parametrize(
    ("system", "variant"),
    [
        (CPU(), "torch-cpu"),
        (CUDA(Version("12.8")), "torch-cuda"),
        (ROCm(Version("7.1")), "torch-rocm"),
        (XPU(Version("2025.3")), "torch-xpu"),
    ],
)
def test_each_system_is_given_its_variant(folder: Path, system: Backend, variant: str) -> None:
    applicable, _ = _resolve_variant_for_system(
        get_variants_local(folder / "build"), system, "x86_64", "linux", Version("2.13"), True, None
    )
    assert [found.variant_str for found in applicable] == [variant]


def results(operators: Any) -> list[Tensor]:
    """Of one call of each operator, by the references, on tensors that are always the same."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 9, 3, 4, 8, generator=generator).unbind(2)
    image, vector = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(8, generator=generator)
    x = image.clone().requires_grad_()
    operators.group_norm_silu(x, 4, vector, vector, backend="torch").sum().backward()
    assert x.grad is not None
    return [
        x.grad,
        operators.attention(*qkv, backend="torch"),
        operators.linear(image, image[0, 0], backend="torch"),
        operators.residual_add(image, image, vector, backend="torch"),
        *operators.layer_norm(image[..., 0].mT, vector, vector, residual=image[..., 1].mT, backend="torch"),
    ]


def test_two_versions_and_ldmperf_run_in_one_process(
    folder: Path, kernel: Any, later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPO_ID}={later}")
    second = kernels.get_kernel(REPO_ID, version=1)
    early = importlib.util.spec_from_file_location("early", folder / f"build/torch-cpu/{MODULE}/__init__.py")
    assert early is not None
    assert early.loader is not None
    third = importlib.util.module_from_spec(early)
    early.loader.exec_module(third)
    registered = torch._C._dispatch_get_all_op_names()
    for build in (kernel, second):
        assert {f"{build.__name__}::{name}" for name in build.OPERATORS} <= set(registered)
    assert len({kernel.__name__, second.__name__}) == 2
    assert second.tuned_table(second.Chip("A GPU", 1, "sm_90")).read_text() == '{"kernels": {}}'
    assert set(kernel.__all__) == set(ldmperf.kernels.__all__) == set(third.__all__)
    expected = results(ldmperf.kernels)
    for build in (kernel, second, third):
        assert all(map(torch.equal, results(build), expected))
    gated = [build.geglu(expected[0], backend="torch") for build in (ldmperf.kernels, kernel, third, second)]
    assert all(map(torch.equal, gated[1:], (gated[0], gated[0], -gated[0])))


IN_A_PROCESS_OF_ITS_OWN = """
import sys
import pytest
from kernels.cli import main
main()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--strict-markers", "--rootdir", sys.argv[2], sys.argv[2]]))
"""


def test_the_benchmarks_and_the_tests_of_the_repository_run(folder: Path) -> None:
    """`kernels benchmark` itself, and the repository's own tests."""
    output = folder.parent / "benchmark.json"
    options = ("--iterations", "1", "--warmup", "0", "--output", str(output))
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, "benchmark", str(folder), *options]
    here = {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"{REPO_ID}={folder}", "OMP_NUM_THREADS": "1"}
    # Not in the checkout, whose folder kernels/ would hide the package.
    result = subprocess.run(
        command, cwd=folder.parent, env=os.environ | here, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 passed" in result.stdout
    found = json.loads(output.read_text())
    operators = ("Attention", "GEGLU", "GroupNormSiLU", "LayerNormResidual")
    expected = {f"{operator}.{level}" for operator in operators for level in ("shallow", "deep")}
    assert {entry["workload"] for entry in found["results"] if entry["verified"]} == expected
    assert Metadata.read_from_file(folder / "build/torch-cpu/metadata.json").id.endswith(found["kernelCommitSha"])


def test_another_folder_is_not_replaced(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds no kernel repository"):
        write(files, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_page_shows_the_tree(files: dict[str, bytes]) -> None:
    page = PAGE.read_text()
    assert with_tree(page, list(files)) == page, "run make hub-kernels"
    another = sorted(
        [*files, f"torch-ext/{MODULE}/tuned/another-gpu.json", "build/torch-cuda/tuned/another-gpu.json"]
    )
    assert with_tree(page, another) == page
    assert f"torch-ext/\n    {MODULE}/\n        __init__.py" in tree(list(files))
