"""`PlanRun`: the device memory of one run of a plan, whose steps are launches of `sampler_update`.

A step reads its row of the table, updates float32 (or float64) registers and writes the next sample in the
pipeline's dtype. One register more than the plan's holds the estimate of the clean sample, where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmperf.kernels import sampler_update
from ldmperf.samplers import SamplingPlan

# Plans that a scheduler keeps: a run from noise and one from an image, of a few step counts.
_KEPT = 8


@dataclass(frozen=True)
class PlanRows:
    """A plan on a device: all that its steps read, so that a step makes nothing on the host.

    table    [K, R, R + 2] in the registers' dtype; R counts the estimate's register, the last, where there is one
    numbers  K tensors [1] int64
    scales   [K] ones: the sample is written as it is
    """

    plan: SamplingPlan
    estimates: bool
    table: Tensor
    numbers: tuple[Tensor, ...]
    scales: Tensor

    @classmethod
    # A tensor made in inference mode cannot be used in autograd outside it.
    @torch.inference_mode(False)
    def of(cls, plan: SamplingPlan, *, estimates: bool, dtype: torch.dtype, device: torch.device) -> PlanRows:
        """The copies to the device do not wait for it."""
        count, steps = plan.num_registers, len(plan.steps)
        extra = 1 if estimates else 0
        table = np.zeros((steps, count + extra, count + extra + 2))
        table[:, :count, :count] = plan.table[..., :count]
        table[:, :count, -2:] = plan.table[..., count:]
        if estimates:
            estimate = clean_estimates(plan)
            table[:, count, :count], table[:, count, -2:] = estimate[:, :count], estimate[:, count:]
        # Each number twice, so that a view starts every 16 bytes, as Triton wants it.
        numbers = (torch.arange(2 * steps, device="cpu") // 2).to(device, non_blocking=True)
        return cls(
            plan,
            estimates,
            torch.tensor(table, dtype=dtype, device="cpu").to(device, non_blocking=True),
            numbers.view(-1, 2)[:, :1].unbind(),
            torch.ones(steps, dtype=dtype, device="cpu").to(device, non_blocking=True),
        )


class PlanRun:
    """The registers of a run, for samples of one shape on one device."""

    @torch.inference_mode(False)
    def __init__(self, rows: PlanRows, sample: Tensor) -> None:
        self.plan = rows.plan
        self.rows = rows
        self.steps_done = 0
        self.dtype = rows.table.dtype
        self.device = sample.device
        self.shape = sample.shape
        self._registers: Tensor | None = None
        self._written: tuple[Tensor, int] | None = None

    def fits(self, sample: Tensor, dtype: torch.dtype) -> bool:
        """Whether this run's registers hold such a sample."""
        return (self.shape, self.device, self.dtype) == (sample.shape, sample.device, dtype)

    @torch.no_grad()
    def step(
        self,
        row: int,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
        *,
        dtype: torch.dtype,
        estimate_dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """(the next sample in `dtype`, the estimate of the clean sample or None), both new tensors.

        A sample that is the very tensor that the last step returned, unchanged, is not read: the registers hold it
        with more digits.
        """
        rows = self.rows
        if self._registers is None:
            self._registers = _registers(rows.table.shape[1], self.shape, self.dtype, self.device)
        if not self._wrote(sample):
            self._registers[0].copy_(_image(sample))
        result = torch.empty_like(sample, dtype=dtype)
        written = _image(result)
        sampler_update(
            self._registers,
            _image(model_output),
            rows.table,
            rows.numbers[row],
            noise=None if noise is None else _image(noise),
            model_input=written,
            input_scale=rows.scales,
            backend=backend,
        )
        if written.data_ptr() != result.data_ptr():
            # Only of strides that cannot be viewed as an image.
            result.copy_(written.view(self.shape))
        self.steps_done += 1
        self._written = None if result.is_inference() else (result, result._version)
        estimate = None
        if rows.estimates:
            estimate = torch.empty_like(sample, dtype=estimate_dtype)
            estimate.copy_(self._registers[-1].view(self.shape) if sample.dim() != 4 else self._registers[-1])
        return result, estimate

    def _wrote(self, sample: Tensor) -> bool:
        """Whether the sample is what the last step returned, and nobody wrote to it since."""
        if self._written is None:
            return False
        tensor, version = self._written
        return sample is tensor and sample._version == version


def clean_estimates(plan: SamplingPlan) -> np.ndarray:
    """[K, R + 2] float64: the estimate of the clean sample at each step; of a consistency model, its output f."""
    if plan.name != "lcm":
        return plan.x0
    rows = plan.table[:, 0].copy()
    rows[:, -1] = 0.0
    # x_next = alpha_next f + sigma_next z, and f after the last step.
    rows[:-1] /= np.array([[step.alpha] for step in plan.steps[1:]]).reshape(-1, 1)
    return rows


def _image(tensor: Tensor) -> Tensor:
    """[B, C, H, W] as it is, any other shape as [1, N]: the operator takes images of up to three dimensions."""
    return tensor if tensor.dim() == 4 else tensor.reshape(1, -1)


def _registers(count: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, *image] zeros; channels-last for images, the layout of the network's output."""
    with torch.inference_mode(False):
        if len(shape) != 4:
            return torch.zeros((count, 1, shape.numel()), dtype=dtype, device=device)
        batch, channels, height, width = shape
        return torch.zeros((count, batch, height, width, channels), dtype=dtype, device=device).movedim(-1, -3)


def kept(cache: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """The cache's value, made if it is not there; the oldest of many is forgotten."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > _KEPT:
            del cache[next(iter(cache))]
    return cache[key]
