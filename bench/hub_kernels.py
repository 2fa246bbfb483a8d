"""Write build/hub-kernels/, a repository for Hugging Face's kernel hub, from kernels/: `make hub-kernels`.

The repository holds a source tree for kernel-builder (torch-ext/) and what kernel-builder makes of it, which the
package `kernels` loads (build/torch-<backend>/): kernels/ is Python alone, so that nothing has to be compiled. The
same kernels/ gives the same bytes. hub_check.py validates the result; docs/hub-kernels.md is given its tree.
"""

import argparse
import ast
import base64
import hashlib
import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from hub_check import problems
from markers import with_blocks

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build" / "hub-kernels"
PAGE = ROOT / "docs" / "hub-kernels.md"
TEMPLATES = ROOT / "bench" / "hub"
# The kernel is ldmperf-kernels there, so that its module does not hide the package ldmperf.
MODULE = "ldmperf_kernels"
REPO_ID = "ldmperf/ldmperf-kernels"
EXTENSIONS = (".py", ".json")


def repository(kernels: Path = ROOT / "kernels", *, repo_id: str = REPO_ID) -> dict[str, bytes]:
    """The content of every file of the repository, by its path; reads `kernels` and bench/hub/, writes nothing."""
    package = {path: content for path, content in _read(kernels).items() if path.endswith(EXTENSIONS)}
    values = {"repo_id": repo_id, **_described(package)}
    templates = _read(TEMPLATES)
    of_variants = _moved(templates, "variant/", "")
    files = {path: _filled(text, values) for path, text in templates.items() if not path.startswith("variant/")}
    files = _moved(package, "", f"torch-ext/{MODULE}/") | files | {"LICENSE": (kernels / "LICENSE").read_bytes()}
    sources = _moved(files, f"torch-ext/{MODULE}/", "")
    # Two builds of different sources may be loaded in one process: their operators have namespaces of their own.
    unique = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:7]
    general = tomllib.loads(files["build.toml"].decode())["general"]
    for backend in general["backends"]:
        build_id = f"_{MODULE}_{backend}_{unique}"
        variant = sources | {path: _filled(text, {"id": build_id}) for path, text in of_variants.items()}
        metadata = _metadata(general, backend, build_id, variant)
        files |= _moved(variant | {"metadata.json": metadata}, "", f"build/torch-{backend}/")
    return dict(sorted(files.items()))


def _read(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their paths in it, without bytecode and caches."""
    inner = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in inner if not any(part.startswith((".", "__pycache__")) for part in path.parts)]
    return {path.as_posix(): (folder / path).read_bytes() for path in kept}


def _moved(files: Mapping[str, bytes], before: str, after: str) -> dict[str, bytes]:
    """The files whose paths begin with `before`, with `after` in its place."""
    return {after + path.removeprefix(before): text for path, text in files.items() if path.startswith(before)}


def _filled(template: bytes, values: Mapping[str, str]) -> bytes:
    return Template(template.decode()).substitute(values).encode()


def _described(package: Mapping[str, bytes]) -> dict[str, str]:
    """What the templates say of a package, read without importing it: version, operators, modules, layers."""
    init = ast.parse(package["__init__.py"])
    release: str = _assigned(init, "__version__")
    public: list[str] = _assigned(init, "__all__")
    operators = [name for name in public if f"{name}_ref" in public]
    return {
        "release": release,
        # The hub counts incompatible versions; 0 is one whose interface may still change.
        "version": release.partition(".")[0],
        "operators": ", ".join(f"`{name}`" for name in operators),
        "modules": _rows(package["modules.py"]),
        "layers": _rows(package["layers.py"]),
    }


def _rows(source: bytes) -> str:
    """A row of a table for each public class: its name, and the first line of its docstring."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    summaries = {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in classes}
    return "\n".join(f"| `{name}` | {what} |" for name, what in summaries.items() if not name.startswith("_"))


def _assigned(module: ast.Module, name: str) -> Any:
    (value,) = (
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
    )
    return ast.literal_eval(value)


def _metadata(general: Mapping[str, Any], backend: str, build_id: str, variant: Mapping[str, bytes]) -> bytes:
    """metadata.json of a variant, with the SHA-256 of each of its other files."""
    digests = {
        path: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for path, content in sorted(variant.items())
    }
    fields = {
        "name": general["name"],
        "id": build_id,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def write(files: Mapping[str, bytes], target: Path) -> None:
    """Replace a repository; SystemExit where `target` holds something else."""
    if target.exists() and any(target.iterdir()) and not (target / "build.toml").exists():
        raise SystemExit(f"{target}: holds no kernel repository; name another folder with --target")
    shutil.rmtree(target, ignore_errors=True)
    for path, content in files.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)


def tree(paths: list[str]) -> str:
    """The folders and files of a repository, one a line; of a variant only what torch-ext/ has not."""
    sources = set(_moved(dict.fromkeys(paths, b""), f"torch-ext/{MODULE}/", ""))
    lines: list[str] = []
    before: list[str] = []
    for path in paths:
        *folders, name = path.split("/")
        if folders[:1] == ["build"] and "/".join(path.split("/")[2:]) in sources:
            continue
        for depth in range(len(folders)):
            if before[: depth + 1] != folders[: depth + 1]:
                what = f"    # torch-ext/{MODULE}/ and" if folders[0] == "build" and depth == 1 else ""
                what = "    # a table for each GPU that was tuned" if folders[depth] == "tuned" else what
                lines.append("    " * depth + f"{folders[depth]}/{what}")
        before = folders
        # So that the page stays as it is when another GPU is tuned.
        if folders[-1:] != ["tuned"]:
            lines.append("    " * len(folders) + name)
    return "\n".join(lines)


def with_tree(page: str, paths: list[str]) -> str:
    """docs/hub-kernels.md with the tree of these paths."""
    return with_blocks(page, {"hub-tree": lambda _: f"```\n{tree(paths)}\n```"})


def main() -> int:
    """Prints what is wrong with the repository that it wrote; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="the folder to write")
    parser.add_argument("--repo-id", default=REPO_ID, help="where it is to be published: owner/name")
    options = parser.parse_args()
    files = repository(repo_id=options.repo_id)
    write(files, options.target)
    PAGE.write_text(with_tree(PAGE.read_text(), list(files)))
    found = problems(options.target)
    for problem in found:
        print(problem)
    print(f"{options.target}: {len(files)} files, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
