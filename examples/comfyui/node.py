"""The node: a clone of a MODEL whose attention, GroupNorm + SiLU and GEGLU run on the kernels.

Attention goes through `optimized_attention_override` in the clone's transformer_options; modules through an
injection, which the ModelPatcher puts in when it loads the clone and takes out before anything else is loaded.
"""

from __future__ import annotations

import logging
from typing import Any

from .attention_override import KEY, attention_override
from .fused_modules import eject, inject, pairs_and_gates
from .serving import BACKENDS

logger = logging.getLogger(__name__)
INJECTION = "ldmperf"


class LdmperfKernels:
    """MODEL -> MODEL. The model that goes in is not touched."""

    CATEGORY = "model/patch"
    DESCRIPTION = "Runs attention, GroupNorm + SiLU and GEGLU of this MODEL on fused kernels. Bypass it to undo."
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]:  # noqa: N802
        """The sockets and widgets, by the name that ComfyUI asks for."""
        backend = "auto: a kernel where it serves, attention only where measured to be faster on this GPU. "
        backend += "triton: a kernel wherever it serves. torch: the references, to compare results."
        return {
            "required": {
                "model": ("MODEL",),
                "attention": ("BOOLEAN", {"default": True}),
                "norms": ("BOOLEAN", {"default": True, "tooltip": "GroupNorm and the SiLU behind it"}),
                "geglu": ("BOOLEAN", {"default": True, "tooltip": "the gate of the feed-forward layers"}),
                "backend": (list(BACKENDS), {"default": "auto", "tooltip": backend}),
            }
        }

    def apply(
        self, model: Any, attention: bool = True, norms: bool = True, geglu: bool = True, backend: str = "auto"
    ) -> tuple[Any]:
        """(the clone,). What an earlier node of this kind set is replaced, what another node set is kept.

        An attention override that is there already is asked first, and gets the kernel as its `func`.
        """
        clone = model.clone()
        options = clone.model_options
        previous = options["transformer_options"].get(KEY)
        previous = getattr(previous, "ldmperf_previous", previous)
        transformer_options = {key: value for key, value in options["transformer_options"].items() if key != KEY}
        if attention:
            transformer_options[KEY] = attention_override(backend, previous)
            if previous is not None:
                logger.info("ldmperf: an attention override was set before; it is asked first")
        elif previous is not None:
            transformer_options[KEY] = previous
        options["transformer_options"] = transformer_options

        clone.remove_injections(INJECTION)
        if norms or geglu:
            # Of ComfyUI, which is there when a node runs, and need not be when this file is imported.
            from comfy.patcher_extension import PatcherInjection

            _report(clone.model, norms, geglu)
            clone.set_injections(
                INJECTION,
                [PatcherInjection(lambda patcher: inject(patcher.model, norms, geglu, backend), _eject)],
            )
        return (clone,)


def _eject(patcher: Any) -> None:
    eject(patcher.model)


def _report(model: Any, norms: bool, geglu: bool) -> None:
    pairs, gates = pairs_and_gates(model)
    for wanted, found, what in ((norms, pairs, "GroupNorm + SiLU"), (geglu, gates, "GEGLU")):
        if wanted and not found:
            logger.warning("ldmperf: %s has no %s that this node knows", type(model).__name__, what)
        elif wanted:
            logger.info("ldmperf: %s: %d of %s", type(model).__name__, len(found), what)
