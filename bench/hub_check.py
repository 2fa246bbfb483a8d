"""Validates a repository for Hugging Face's kernel hub by its packages `kernels` and `kernels-data`; no network.

Rules: https://huggingface.co/docs/kernels/kernel-requirements and .../layers.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# No public name has the parser of build.toml.
from kernels._rust import Build
from kernels_data import Digest, DigestValidationError, Metadata
from torch import nn

from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping

# What a kernel may import besides itself and the standard library; triton comes with torch where there is a GPU.
ALLOWED = {"torch", "triton"}
BOTH_MODES = Mode.TRAINING | Mode.TORCH_COMPILE


def problems(repository: Path) -> list[str]:
    """What is wrong, one line each; empty where the hub's packages take every variant and every layer."""
    try:
        backends = [str(backend).lower() for backend in Build.open(repository).general.backends]
    except ValueError as error:
        return [f"build.toml: {error}"]
    variants = [repository / f"build/torch-{backend}" for backend in backends]
    packages = [*sorted(repository.glob("torch-ext/*/")), *variants]
    found = [problem for package in packages for problem in _import_problems(package)]
    found += [problem for variant in variants for problem in _metadata_problems(variant)]
    # Loading runs what is there; what is wrong with one variant is wrong with all.
    for variant in variants:
        found = found or list(_loading_problems(variant))
    return found


def _import_problems(package: Path) -> Iterator[str]:
    """Imports that need the kernel to be installed, or something else to be."""
    if not (package / "__init__.py").exists():
        yield f"{package}: holds no __init__.py"
    for path in sorted(package.rglob("*.py")):
        depth = len(path.relative_to(package).parts)
        try:
            syntax = ast.parse(path.read_bytes())
        except SyntaxError as error:
            yield f"{path}:{error.lineno}: {error.msg}"
            continue
        for node in ast.walk(syntax):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if node.level > depth:
                    yield f"{path}:{node.lineno}: the relative import leaves the kernel"
                if node.level:
                    continue
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ALLOWED:
                    yield f"{path}:{node.lineno}: imports {name}; a kernel imports torch, and itself relatively"


def _metadata_problems(variant: Path) -> Iterator[str]:
    """Where metadata.json does not describe the folder that it is in."""
    path = variant / "metadata.json"
    try:
        metadata = Metadata.read_from_file(path)
    except ValueError as error:
        yield f"{path}: {error}"
        return
    backend = str(metadata.backend.backend_type).lower()
    if variant.name != f"torch-{backend}":
        yield f"{path}: is of the backend {backend}"
    if not metadata.id.startswith(f"_{metadata.name.python_name}_{backend}_") or not metadata.id.isidentifier():
        yield f"{path}: the id {metadata.id!r} is not _<name>_<backend>_<hash>"
    if metadata.digest is None:
        yield f"{path}: has no digest"
        return
    try:
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
    except DigestValidationError as error:
        yield from (f"{variant}: {violation}" for violation in error.violations)


def _loading_problems(variant: Path) -> Iterator[str]:
    """What shows when the variant is loaded: its operators' namespace, and layers that `kernelize` refuses."""
    build_id = Metadata.read_from_file(variant / "metadata.json").id
    before = set(torch._C._dispatch_get_all_op_names())
    try:
        kernel = get_local_kernel(variant)
    except Exception as error:
        yield f"{variant}: {type(error).__name__}: {error}"
        return
    outside = {name for name in torch._C._dispatch_get_all_op_names() if not name.startswith(f"{build_id}::")}
    yield from (f"{variant}: registers {name}, outside {build_id}" for name in sorted(outside - before))
    for name, layer in public_layers(kernel).items():
        try:
            _kernelized(layer, LocalLayerRepository(variant, layer_name=name))
        except (TypeError, ValueError) as error:
            yield f"{variant}: layer {name}: {error}"


def public_layers(kernel: Any) -> dict[str, type[nn.Module]]:
    """The layers that a loaded kernel offers, by name."""
    members = vars(kernel.layers).items()
    return {
        name: value
        for name, value in members
        if isinstance(value, type) and value.__module__ == kernel.layers.__name__ and not name.startswith("_")
    }


def _kernelized(layer: type[nn.Module], repository: LocalLayerRepository) -> None:
    """Put the layer in the place of a module with the same forward, for training and torch.compile."""
    module_class = type("Adopting", (nn.Module,), {"forward": layer.forward, "kernel_layer_name": layer.__name__})
    mapping = {layer.__name__: {"cpu": {BOTH_MODES: repository}}}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(module_class(), mode=BOTH_MODES, device="cpu", use_fallback=False)
