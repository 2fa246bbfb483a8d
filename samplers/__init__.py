"""The mathematics of sampling: schedules, plans and the loop that runs them."""

from .plan import SAMPLERS, SamplingPlan, make_plan
from .sample import initial_noise, sample
from .schedule import NoiseSchedule
from .step import Step

__all__ = ["SAMPLERS", "NoiseSchedule", "SamplingPlan", "Step", "initial_noise", "make_plan", "sample"]
