"""What the fork server loads, once, so that no child of it has to: nothing of it may touch CUDA."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import suppress

# By their names. A fork of a process that has asked CUDA for anything cannot use it.
PRELOADED = ("ldmperf.profiling.sweep.group_child", "ldmperf.profiling.sweep.preload_peers")
# Makes torch.cuda.is_available ask NVML.
_ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def load_peer() -> None:
    """Loads of diffusers what cases need, where it is installed.

    Without xformers, which asks CUDA while it is imported: diffusers takes it for missing. No case uses it.
    """
    if importlib.util.find_spec("diffusers") is None:
        return
    from ldmperf.samplers import DIFFUSERS_CLASSES

    before = os.environ.get(_ASK_NVML)
    os.environ[_ASK_NVML] = "1"
    # What is None there is not found.
    is_hidden = sys.modules.setdefault("xformers", None) is None  # type: ignore[arg-type]
    try:
        # Whatever is wrong with it is a case's to tell.
        with suppress(Exception):
            diffusers = importlib.import_module("diffusers")
            for name in ("UNet2DConditionModel", *DIFFUSERS_CLASSES.values()):
                getattr(diffusers, name)
    finally:
        if is_hidden:
            del sys.modules["xformers"]
        if before is None:
            del os.environ[_ASK_NVML]
        else:
            os.environ[_ASK_NVML] = before
