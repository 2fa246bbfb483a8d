"""`Estimate`: the image so far, from the latents before a step and what the network made of them."""

from __future__ import annotations

import math

from torch import Tensor

from ldmperf.samplers import SamplingPlan, Step


class Estimate:
    """Keeps what the steps of one run see, and estimates x_0 after any of them.

    The latents before a step are alpha x_0 + sigma eps, and the network's output, guided, is eps, v or x_0.
    Source: Salimans and Ho, arXiv 2202.00512, appendix D.
    """

    def __init__(self, plan: SamplingPlan, noise: Tensor, guidance_scale: float | None) -> None:
        self._kind = plan.schedule.prediction_type
        self._guidance_scale = guidance_scale
        self._latents = noise * plan.init_noise_sigma
        self._before = self._latents
        self._output: Tensor | None = None

    def saw(self, output: Tensor) -> Tensor:
        """Keeps the network's output [B, ...], or [2B, ...] with guidance, and returns it."""
        self._output = output
        return output

    def moved(self, latents: Tensor) -> None:
        """Keeps the latents [B, ...] after a step."""
        self._before, self._latents = self._latents, latents

    def clean(self, step: Step) -> Tensor:
        """x_0 [B, ...] float32, as the network saw it at the step that was just made."""
        assert self._output is not None
        output: Tensor = self._output.float()
        if self._guidance_scale is not None:
            without, given = output.chunk(2)
            output = without + self._guidance_scale * (given - without)
        if self._kind == "sample":
            return output
        # In the Euler family alpha is 1: the network saw the latents at unit variance.
        norm = math.hypot(step.alpha, step.sigma)
        alpha, sigma, latents = step.alpha / norm, step.sigma / norm, self._before / norm
        if self._kind == "v_prediction":
            return alpha * latents - sigma * output
        return (latents - sigma * output) / alpha
