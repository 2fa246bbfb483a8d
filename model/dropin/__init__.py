"""The kernels in a diffusers UNet, VAE or pipeline, or our own networks in a pipeline: one line, with an undo.

    with accelerate(pipe) as report:
        image = pipe("a lighthouse").images[0]
    print(report)

    rebuild(pipe)
    image = pipe("a lighthouse").images[0]

Needs diffusers (the extra `dropin`), which only this package of `ldmperf.model` imports.
"""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(f"ldmperf.model.dropin needs diffusers: pip install diffusers ({error})") from None

from .pipeline_unet import PipelineUNet
from .rebuild import Rebuilt, rebuild
from .report import Left, Replaced, Report
from .swap import accelerate, undo

__all__ = ["Left", "PipelineUNet", "Rebuilt", "Replaced", "Report", "accelerate", "rebuild", "undo"]
