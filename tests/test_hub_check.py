"""What a validated repository for Hugging Face's kernel hub may not be: each fault is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hub_check import problems
from hub_kernels import repository, write

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return repository()


def changed(tmp_path: Path, name: str, before: str, after: str) -> Path:
    """The repository of a copy of kernels/ in which the file `name` has `after` wherever it had `before`."""
    source = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__"))
    text = (source / name).read_text()
    assert before in text
    (source / name).write_text(text.replace(before, after))
    write(repository(source), tmp_path / "repository")
    return tmp_path / "repository"


def test_the_repository_is_valid(files: dict[str, bytes], tmp_path: Path) -> None:
    write(files, tmp_path)
    assert problems(tmp_path) == []


GEGLU_CLASS = "class GEGLU(nn.Module):"


@pytest.mark.parametrize(
    ("name", "before", "after", "complaint"),
    [
        ("geglu.py", "from ._checks import", "from ldmperf_kernels._checks import", "imports ldmperf_kernels"),
        ("geglu.py", "from ._checks import", "from .._checks import", "leaves the kernel"),
        ("geglu.py", "from torch import", "from torch", "invalid syntax"),
        ("geglu.py", "from torch import", "import numpy\nfrom torch import", "imports numpy"),
        ("_library.py", "from ._namespace import NAMESPACE", 'NAMESPACE = "too_many"', "registers too_many"),
        ("__init__.py", "from . import layers", "from . import missing as layers", "ImportError"),
        ("layers.py", "    can_torch_compile = True\n", "", "does not support torch.compile"),
        ("layers.py", "has_backward = True", "has_backward = False", "does not support backward"),
        ("layers.py", GEGLU_CLASS, f"{GEGLU_CLASS}\n    scale = 1", "must not contain additional members"),
        ("layers.py", GEGLU_CLASS, "class GEGLU(nn.Linear):", "must not override nn.Module constructor"),
    ],
)
def test_a_broken_kernel_is_refused(tmp_path: Path, name: str, before: str, after: str, complaint: str) -> None:
    found = problems(changed(tmp_path, name, before, after))
    assert any(complaint in problem for problem in found), found


def test_files_that_differ_from_their_digests_are_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    variant = "build/torch-rocm"
    broken = files | {f"{variant}/geglu.py": b"", f"{variant}/more.py": b""}
    del broken[f"{variant}/linear.py"]
    write(broken, tmp_path / "repository")
    found = problems(tmp_path / "repository")
    expected = ("hash mismatch for geglu.py", "Missing file: linear.py", "Unknown file: more.py")
    assert len(found) == len(expected)
    for problem, complaint in zip(found, expected, strict=True):
        assert complaint in problem
        assert variant in problem


@pytest.mark.parametrize(
    ("path", "before", "after", "complaint"),
    [
        ("build/torch-xpu/metadata.json", '"type": "xpu"', '"type": "cuda"', "is of the backend cuda"),
        ("build/torch-cpu/metadata.json", '"id": "_', '"id": "', "is not _<name>_<backend>_<hash>"),
        ("build/torch-cpu/metadata.json", '"digest"', '"digests"', "has no digest"),
        ("build/torch-cpu/metadata.json", '"name"', '"names"', "metadata.json"),
        ("build.toml", "edition = 5", "edition = 4", "edition 4"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    files: dict[str, bytes], tmp_path: Path, path: str, before: str, after: str, complaint: str
) -> None:
    assert before in files[path].decode()
    write(files | {path: files[path].decode().replace(before, after).encode()}, tmp_path / "repository")
    found = problems(tmp_path / "repository")
    assert any(complaint in problem for problem in found), found
