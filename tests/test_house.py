"""The house itself: who may import whom, what importing does, and what the wheel holds."""

import ast
import graphlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import ldmperf.kernels

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "model", "samplers", "profiling")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Besides the standard library. Imports between folders run one way: profiling -> {model, samplers} -> kernels.
ALLOWED = {
    "kernels": {"torch", "triton"},
    "model": {"torch", "safetensors", "ldmperf.kernels"},
    "samplers": {"torch", "numpy", "ldmperf.kernels"},
    "profiling": {
        *("torch", "numpy", "pydantic", "typer", "click", "rich", "altair", "vl_convert", "jinja2", "pynvml"),
        *("scipy", "triton", "diffusers", "xformers", "safetensors"),
        *("ldmperf.kernels", "ldmperf.model", "ldmperf.samplers"),
        *("ldmperf.model.dropin", "ldmperf.model.pipeline"),
    },
}

# What a file or the files of a folder may import beside that: the only ones that know the engine of a cluster,
# what stands behind diffusers' pipelines, and the way from a prompt to an image.
ALLOWED_TO = {
    "profiling/sweep/cluster.py": {"ray"},
    "profiling/emulator/pytest_plugin.py": {"pytest"},
    "model/dropin": {"diffusers", "numpy", "ldmperf.samplers"},
    "model/pipeline": {"transformers", "PIL", "ldmperf.samplers"},
}

# Their classes take over others' classes, and keep the names, by which the hosts look them up.
NAMED_AS_THEIR_HOSTS = {"kernels/layers.py", "model/dropin/stand_ins.py"}

# The rooms of profiling and the files beside them, in their order: each imports only those above it.
ROOMS = (
    *("terminal", "options", "machines", "paper", "measure", "peer", "step", "static", "emulator"),
    *("trajectory", "pipelines", "rivals", "kernel_bench", "ahead", "sweep", "quality"),
    *("record_files", "figures", "claims", "compare", "export"),
    *("report", "commands", "cli"),
)


def imports(path):
    """(module, level) of every import statement of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def in_subprocess(code, cwd, python=sys.executable, **options):
    result = subprocess.run(
        [python, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **options
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_folder_and_run_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    depth = len(path.relative_to(ROOT / folder).parts)
    for module, level in imports(path):
        if level:
            assert level <= depth, f"relative import leaves {folder}/"
            continue
        top = module.partition(".")[0]
        places = (path.relative_to(ROOT), path.relative_to(ROOT).parent)
        allowed = ALLOWED[folder].union(*(ALLOWED_TO.get(place.as_posix(), set()) for place in places))
        # Across folders: absolute, and public names of the package, not of its modules.
        name = module if top == "ldmperf" else top
        assert name in allowed or name in sys.stdlib_module_names, f"{folder} may not import {module}"


def inner_imports(path):
    """The modules of its own folder that a file imports, dotted, those inside functions and for types too."""
    folder, *place = path.relative_to(ROOT).with_suffix("").parts
    modules = {".".join(p.relative_to(ROOT / folder).with_suffix("").parts) for p in (ROOT / folder).rglob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = place[: len(place) - node.level]
            target = [*base, *filter(None, [node.module])]
            for name in [a.name for a in node.names]:
                inside = [[*target, name], target, [*target, "__init__"]]
                yield next(dotted for found in inside if (dotted := ".".join(found)) in modules)


def test_rooms_of_profiling_import_only_those_above_them():
    files = sorted((ROOT / "profiling").rglob("*.py"))
    assert {path.relative_to(ROOT / "profiling").with_suffix("").parts[0] for path in files} == {
        *ROOMS,
        "__init__",
    }
    for path in files:
        room = path.relative_to(ROOT / "profiling").with_suffix("").parts[0]
        for module in inner_imports(path):
            above = module.partition(".")[0]
            if room != "__init__":
                assert ROOMS.index(above) <= ROOMS.index(room), f"{path} imports {module}, which is below it"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_import_goes_in_a_circle(folder):
    def name(path):
        return ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)

    graph = {name(path): set(inner_imports(path)) - {name(path)} for path in (ROOT / folder).rglob("*.py")}
    # Raises CycleError, which names the circle.
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_no_two_files_or_classes_have_the_same_name():
    """Across all folders, but for `__init__.py`; a name with an underscore is its own file's."""
    files = Counter(path.name for path in MODULES if path.name != "__init__.py")
    classes = Counter(
        node.name
        for path in MODULES
        if path.relative_to(ROOT).as_posix() not in NAMED_AS_THEIR_HOSTS
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in (files + classes).items() if count > 1] == []


def test_there_is_no_package_at_the_root():
    for name in ("__init__.py", "conftest.py", "ldmperf"):
        assert not (ROOT / name).exists()
    assert importlib.util.find_spec("ldmperf").origin is None


def test_outside_the_checkout_only_ldmperf_is_ours(tmp_path):
    """PyPI has a package called kernels, which may be installed too."""
    code = f"import importlib.util as u\nfor n in {FOLDERS!r}: s = u.find_spec(n); print(s and s.origin)"
    found = in_subprocess(code, tmp_path).splitlines()
    assert not {str(ROOT / folder / "__init__.py") for folder in FOLDERS} & set(found)
    assert str(ROOT) in in_subprocess("import ldmperf.kernels; print(ldmperf.kernels.__file__)", tmp_path)


def test_every_package_and_data_file_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {".".join(("ldmperf", *path.parent.relative_to(ROOT).parts)) for path in MODULES}
    assert set(declared) == packages


def test_importing_queries_no_device_and_reads_no_environment(tmp_path):
    """Reads that a library does on import are its own; a frame of ours above one is not allowed."""
    code = f"""
import os, sys, traceback
reads = []
class Environment(dict):
    def note(self, key):
        ours = (f for f in reversed(traceback.extract_stack()[:-2]) if "importlib" not in f.filename)
        frame = next(f for f in ours if f.filename != os.__file__)
        if frame.filename.startswith({str(ROOT / "")!r}) and ".venv" not in frame.filename:
            reads.append((key, frame.filename, frame.lineno))
    def __getitem__(self, key): self.note(key); return dict.__getitem__(self, key)
    def get(self, key, default=None): self.note(key); return dict.get(self, key, default)
    def __contains__(self, key): self.note(key); return dict.__contains__(self, key)
os.environ = Environment(os.environ)
import ldmperf.kernels, ldmperf.model, ldmperf.samplers, ldmperf.profiling, torch
assert reads == [], reads
assert not torch.cuda.is_initialized()
assert not {"diffusers", "altair", "torch._dynamo"} & sys.modules.keys()
"""
    in_subprocess(code, tmp_path)


def test_kernels_import_and_run_without_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch
from ldmperf.kernels import geglu
print(geglu(torch.ones(1, 4), backend="torch").shape)
"""
    assert "[1, 2]" in in_subprocess(code, tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    # From a copy: setuptools leaves build/ and *.egg-info beside what it builds.
    source = folder / "source"
    source.mkdir()
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not name.startswith((".types", "bench/results")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(path.read_bytes())
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("ldmperf/", "ldmperf-")) for name in names)
    for folder in FOLDERS:
        assert f"ldmperf/{folder}/py.typed" in names
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".json", ".j2", ".css", ".js"}:
                assert f"ldmperf/{path.relative_to(ROOT).as_posix()}" in names


def test_the_wheel_in_a_clean_environment_imports_every_module(wheel, tmp_path):
    """A new environment away from the checkout; only the dependencies are lent from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(in_subprocess("import sysconfig; print(sysconfig.get_path('purelib'))", tmp_path, python).strip())
    # A path line, not a site directory: the .pth files in there, our editable install's too, are not run.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    modules = [
        ".".join(("ldmperf", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in MODULES
    ]
    code = f"""
import importlib, pathlib
for name in {modules!r}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(site)!r}), module.__file__
print("imported", len({modules!r}))
"""
    assert f"imported {len(MODULES)}" in in_subprocess(code, tmp_path, python)
    help_text = subprocess.run(
        [tmp_path / "env" / "bin" / "ldmperf", "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert "profile" in help_text


def test_the_changelog_names_the_version():
    assert f"## [{ldmperf.kernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_kernels_carry_their_licence_their_page_and_the_version(wheel, tmp_path):
    """The examples of the page run in a copy, on the torch backend."""
    for name in ("LICENSE", "README.md"):
        carried = (ROOT / "kernels" / name).read_text()
        assert zipfile.ZipFile(wheel).read(f"ldmperf/kernels/{name}").decode() == carried
    assert (ROOT / "kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert wheel.name.startswith(f"ldmperf-{ldmperf.kernels.__version__}-")
    shutil.copytree(ROOT / "kernels", tmp_path / "fused")
    example = "".join(re.findall(r"```python\n(.*?)```", carried, re.DOTALL))
    in_subprocess(
        f"{example}\nimport fused\nassert fused.__version__ == {ldmperf.kernels.__version__!r}", tmp_path
    )
