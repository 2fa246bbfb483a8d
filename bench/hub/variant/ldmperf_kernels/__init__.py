"""The package one folder up, for early releases of `kernels`, which load a build from this folder."""

import importlib.util
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("${id}_early", Path(__file__).parents[1] / "__init__.py")
if _SPEC is None or _SPEC.loader is None:
    raise ImportError(f"{__file__}: the folder above holds no __init__.py; download the build anew")
_PACKAGE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _PACKAGE
_SPEC.loader.exec_module(_PACKAGE)
__all__ = _PACKAGE.__all__
globals().update({name: getattr(_PACKAGE, name) for name in __all__})
