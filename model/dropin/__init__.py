"""The kernels in a diffusers UNet, VAE or pipeline, in one line, with an undo.

    with accelerate(pipe) as report:
        image = pipe("a lighthouse").images[0]
    print(report)

Needs diffusers (the extra `dropin`), which only this package of `ldmperf.model` imports.
"""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(f"ldmperf.model.dropin needs diffusers: pip install diffusers ({error})") from None

from .plan_scheduler import PlanScheduler
from .report import Left, Replaced, Report
from .swap import accelerate, undo

__all__ = ["Left", "PlanScheduler", "Replaced", "Report", "accelerate", "undo"]
