"""`PlanScheduler`: a diffusers scheduler whose step is one launch, with the coefficients of a plan.

    pipe.scheduler = PlanScheduler.from_scheduler(pipe.scheduler)

It is the scheduler's own class with another `step`: only the arithmetic of a step is ours, and the search for the
step, which waits for no device.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldmperf.samplers import DIFFUSERS_CLASSES, NoiseSchedule, SamplingPlan, make_plan, sampler_of

from .plan_run import PlanRows, PlanRun, kept
from .scheduler_class import class_under_name
from .timestep_places import TimestepPlaces

# Keywords of set_timesteps that a plan takes as options; of the others only the count and the device.
_PLAN_KEYWORDS = ("original_inference_steps", "strength")
# Classes whose step returns the sample in the dtype of the network's output, and works in float32.
_UPCAST = ("euler", "euler_a")
# Classes whose step finds its place by the timestep, not by counting.
_BY_TIMESTEP = ("ddim", "ddpm")


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A scheduler of diffusers with the steps of a plan: `from_scheduler`, `from_config`, `from_pretrained`.

    Every instance also belongs to the class that it stands for (DDIMScheduler, ...): `isinstance`, signatures,
    `config`, `compatibles`, `save_pretrained` and what a pipeline writes into its model_index.json are those of
    that class. Copies and pickles keep the state of a run.

    Samples may have any shape and float dtype; the state is kept in float32 (float64 for float64 samples). Noise
    is drawn as diffusers draws it, from the same generator in the same order. A step waits for no device as long
    as `timestep` is a number, a tensor on the CPU or an element of `timesteps`, as in diffusers' pipelines.
    """

    sampler: ClassVar[str]
    host: ClassVar[Any]
    output: ClassVar[Any]

    source: Any = None  # what it was made from
    backend = "auto"
    timesteps: Tensor

    _schedule: NoiseSchedule | None = None
    _schedule_config: Any = None
    _plans: dict[Any, SamplingPlan]
    _rows: dict[Any, PlanRows]
    _run: PlanRun | None = None
    _begin = 0
    _asked: dict[str, Any] | None = None
    _places: TimestepPlaces | None = None
    _roots: list[float] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> PlanScheduler:
        if cls is PlanScheduler:
            raise TypeError(
                "PlanScheduler is made by PlanScheduler.from_scheduler(scheduler), from_config or from_pretrained"
            )
        return super().__new__(cls)  # type: ignore[no-any-return]

    @classmethod
    def from_scheduler(cls, scheduler: Any, *, backend: str = "auto") -> PlanScheduler:
        """A scheduler that steps as `scheduler` does, from its config; the other is left as it is.

        backend   of `ldmperf.kernels.sampler_update`: "auto", "torch" or "triton"

        Raises ValueError, in one line that names the class or the config's key, for what no plan covers.
        """
        if isinstance(scheduler, PlanScheduler):
            return scheduler
        name = sampler_of({"_class_name": type(scheduler).__name__})
        if type(scheduler) is not getattr(diffusers, DIFFUSERS_CLASSES[name]):
            raise ValueError(
                f"{type(scheduler).__module__}.{type(scheduler).__name__} is not diffusers' own class of that "
                "name: its steps are not known"
            )
        made = _blank(type(scheduler))
        made.__dict__.update(vars(scheduler))
        made.source, made.backend = scheduler, backend
        made._check_covered()
        return made

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, *, sampler: str | None = None, **kwargs: Any
    ) -> Any:
        """As diffusers' `from_config`, of the class that the config names or of `sampler`, in `SAMPLERS`."""
        if cls is not PlanScheduler:
            original = cls.host
        elif sampler is None:
            original = getattr(diffusers, DIFFUSERS_CLASSES[sampler_of(config)])
        elif sampler in DIFFUSERS_CLASSES:
            original = getattr(diffusers, DIFFUSERS_CLASSES[sampler])
        else:
            raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(DIFFUSERS_CLASSES)}")
        made, unused = original.from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler = PlanScheduler.from_scheduler(made)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self).host,), {**vars(self), "_plans": {}, "_rows": {}}

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The network's input, as diffusers' class makes it."""
        if self._roots is None:
            return super().scale_model_input(sample, *args, **kwargs)  # type: ignore[no-any-return]
        if self.step_index is None:
            self._init_step_index(*args, **kwargs)
        self.is_scale_input_called = True
        return sample / self._roots[self.step_index]

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The index that diffusers' class finds, searched on the host."""
        places = self._places
        given = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if places is not None and given is places.timesteps:
            timestep, given = places.on_host(timestep), places.host
        return super().index_for_timestep(timestep, given)  # type: ignore[no-any-return]

    def _set_timesteps(self, given: dict[str, Any]) -> None:
        """`set_timesteps` of diffusers' class on the CPU, then the plan, then the timesteps on their device."""
        device = given.pop("device", None)
        type(self).host.set_timesteps(self, **given, device="cpu")
        self._run = None
        self._begin = 0
        host = self.timesteps
        self._asked = {key: given[key] for key in _PLAN_KEYWORDS if given.get(key) is not None}
        plan = self._plan(0, 0.0)
        if not np.array_equal(plan.timesteps, self.timesteps.double().numpy()):
            raise ValueError(
                f"{type(self).__name__} with {self.num_inference_steps} steps visits timesteps outside the "
                "training range, or others than its config's: choose another number of steps or timestep_spacing"
            )
        is_scaled = bool((plan.input_scales != 1.0).any())
        self._roots = ((self.sigmas**2 + 1) ** 0.5).tolist() if is_scaled else None
        if device is not None:
            self.timesteps = host.to(device, non_blocking=True)
        self._places = TimestepPlaces(host, self.timesteps)

    def _step(self, given: dict[str, Any]) -> Any:
        model_output, timestep, sample = given["model_output"], given["timestep"], given["sample"]
        self._check_step(given)
        eta = float(given.get("eta", 0.0))
        dtype = torch.float64 if torch.float64 in (sample.dtype, model_output.dtype) else torch.float32
        run, row = self._place(timestep, eta, sample, dtype)
        noise = self._noise(given, run.plan, row, eta)
        promoted = torch.promote_types(sample.dtype, model_output.dtype)
        result, estimate = run.step(
            row,
            model_output,
            sample,
            noise,
            dtype=model_output.dtype if self.sampler in _UPCAST else promoted,
            estimate_dtype=dtype if self.sampler in _UPCAST else promoted,
            backend=self.backend,
        )
        if hasattr(self, "_step_index"):
            self._step_index += 1
        if self.sampler == "pndm":
            self.counter += 1
        values = (result,) if estimate is None else (result, estimate)
        return type(self).output(*values) if given.get("return_dict", True) else values

    def _check_step(self, given: Mapping[str, Any]) -> None:
        """ValueError for what a plan's step cannot do."""
        model_output, sample = given["model_output"], given["sample"]
        if self._asked is None:
            raise ValueError("the scheduler has no timesteps yet: call set_timesteps first")
        if given.get("s_churn", 0.0) > 0.0:
            raise ValueError(
                "s_churn > 0 is not supported: a plan adds no noise that was not planned; leave it out"
            )
        if given.get("generator") is not None and given.get("variance_noise") is not None:
            raise ValueError("give either generator or variance_noise, not both")
        if model_output.shape != sample.shape or model_output.device != sample.device:
            raise ValueError(
                f"model_output must be like sample, {list(sample.shape)} on {sample.device}, not "
                f"{list(model_output.shape)} on {model_output.device}"
            )
        if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
            raise ValueError("a plan's step has no gradient: detach the sample, or use diffusers' own scheduler")

    def _place(self, timestep: Any, eta: float, sample: Tensor, dtype: torch.dtype) -> tuple[PlanRun, int]:
        """The run that the step belongs to, begun if it is the first, and the step's row of the plan."""
        assert self._places is not None
        if self.sampler in _BY_TIMESTEP:
            index = self._places.place(timestep)
        elif self.sampler == "pndm":
            if self.counter == 0:
                self._begin = self._places.place(timestep)
            index = self._begin + self.counter
            self._places.check(timestep, index)
        else:
            if self.step_index is None:
                self._init_step_index(timestep)
            index = self.step_index
        run = self._run
        full = self._plan(0, eta)
        if not 0 <= index < len(full.steps):
            raise ValueError(f"the run of {len(full.steps)} steps is over: call set_timesteps to begin another")
        if full.num_registers == 1:
            # What has no memory may step from anywhere.
            if run is None or run.plan is not full or not run.fits(sample, dtype):
                run = self._new_run(full, sample, dtype)
        elif run is None:
            run = self._new_run(self._plan(index, eta), sample, dtype)
        elif index != run.plan.begin + run.steps_done or not run.fits(sample, dtype):
            raise ValueError(
                f"steps of {type(self).__name__} build on the steps before, with samples of the same shape, dtype "
                "and device: call set_timesteps to begin another run"
            )
        self._run = run
        return run, index - run.plan.begin

    def _new_run(self, plan: SamplingPlan, sample: Tensor, dtype: torch.dtype) -> PlanRun:
        """A run of the plan, whose rows on the device are kept for the next."""
        key = (plan.num_steps, plan.begin, *plan.options.items(), dtype, sample.device)
        estimates = type(self).output is not SchedulerOutput
        if key in self._rows and self._rows[key].plan is not plan:
            del self._rows[key]
        rows = kept(
            self._rows,
            key,
            lambda: PlanRows.of(plan, estimates=estimates, dtype=dtype, device=sample.device),
        )
        return PlanRun(rows, sample)

    def _noise(self, given: Mapping[str, Any], plan: SamplingPlan, row: int, eta: float) -> Tensor | None:
        """The noise of a step, drawn wherever diffusers draws it, though the step may not use it."""
        step, output = plan.steps[row], given["model_output"]
        is_sde = str(plan.options.get("algorithm_type", "")).startswith("sde")
        if not (step.adds_noise or self.sampler == "euler_a" or is_sde or (self.sampler == "ddim" and eta > 0)):
            return None
        noise = given.get("variance_noise")
        if noise is None:
            dtype = torch.float32 if self.sampler == "dpmpp_2m" else output.dtype
            noise = randn_tensor(output.shape, generator=given.get("generator"), device=output.device, dtype=dtype)
        return noise.to(output.device) if step.adds_noise else None

    def _plan(self, begin: int, eta: float) -> SamplingPlan:
        """The plan of the timesteps that were set; kept."""
        assert self._asked is not None
        schedule = self._noise_schedule()
        options = {**self._asked, "eta": eta} if self.sampler == "ddim" else self._asked
        return kept(  # type: ignore[no-any-return]
            self._plans,
            (self.num_inference_steps, begin, *options.items()),
            lambda: make_plan(self.sampler, schedule, self.num_inference_steps, begin=begin, **options),
        )

    def _noise_schedule(self) -> NoiseSchedule:
        """The schedule of the config as it is now; another config makes other plans."""
        if self._schedule is None or self._schedule_config is not self.config:
            own = inspect.signature(type(self).host.__init__).parameters
            config = {key: value for key, value in self.config.items() if key in own}
            schedule = NoiseSchedule.from_diffusers({**config, "_class_name": type(self).__name__})
            # At zero SNR some classes have a small number, in place of zero.
            if not np.allclose(schedule.alphas_cumprod, self.alphas_cumprod.cpu().numpy(), rtol=1e-6, atol=1e-7):
                raise ValueError(f"alphas_cumprod of this {type(self).__name__} is not that of its config")
            self._schedule, self._schedule_config = schedule, self.config
            self._plans, self._rows = {}, {}
        return self._schedule

    def _check_covered(self) -> None:
        """ValueError where no step count has a plan."""
        schedule = self._noise_schedule()
        for num_steps in (1, 10):
            try:
                make_plan(self.sampler, schedule, min(num_steps, schedule.num_train_timesteps))
            except ValueError as error:
                refusal = error
            else:
                return
        raise refusal


def _planned_class(original: Any) -> Any:
    return class_under_name(
        PlanScheduler, original, step=PlanScheduler._step, set_timesteps=PlanScheduler._set_timesteps
    )


def _blank(original: Any) -> PlanScheduler:
    """What a copy or a pickle fills in."""
    planned = _planned_class(original)
    return planned.__new__(planned)  # type: ignore[no-any-return]
