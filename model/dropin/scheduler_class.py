"""`class_under_name`: a class of ours in place of a scheduler of diffusers, with its name and its signatures."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ldmperf.samplers import sampler_of

# Lists of the caller's own: pipelines look for these names, and say that the scheduler does not take them.
_NOT_TAKEN = ("timesteps", "sigmas")

# A method's work, given its arguments by name.
Work = Callable[[Any, dict[str, Any]], Any]


@functools.cache
def class_under_name(base: Any, original: Any, *, step: Work, set_timesteps: Work) -> Any:
    """The subclass of `base` and of `original`, a scheduler's class, with two methods of their own.

    It has the name and the module of `original`, which a pipeline writes into its model_index.json.

    sampler   the sampler's name
    host      the class, `original`
    output    what `step` returns, unless a tuple is asked for
    """
    body = {
        "__module__": original.__module__,
        "__qualname__": f"{base.__name__}[{original.__name__}]",
        "__doc__": base.__doc__,
        "sampler": sampler_of({"_class_name": original.__name__}),
        "host": original,
        "output": getattr(sys.modules[original.__module__], f"{original.__name__}Output", SchedulerOutput),
        "step": _with_signature(original.step, step),
        "set_timesteps": _with_signature(original.set_timesteps, set_timesteps),
    }
    return type(original.__name__, (base, original), body)


def _with_signature(original: Callable[..., Any], work: Work) -> Callable[..., Any]:
    """A method that takes what `original` takes, which pipelines look up, and hands it on by name."""
    signature = inspect.signature(original)
    taken = [parameter for name, parameter in signature.parameters.items() if name not in _NOT_TAKEN]
    signature = signature.replace(parameters=taken)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _, *given = signature.bind(self, *args, **kwargs).arguments.items()
        return work(self, dict(given))

    method.__signature__ = signature  # type: ignore[attr-defined]
    return method
