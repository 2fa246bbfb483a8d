"""The mathematics of sampling: schedules, plans and the loop that runs them."""

from .cuda_graphs import CaptureError, CudaGraphs, Graphs, own_workspaces
from .from_config import DIFFUSERS_CLASSES, plan_from_config, sampler_of
from .graph import GraphedSampler
from .graphed_denoiser import GraphedDenoiser
from .plan import SAMPLERS, SamplingPlan, make_plan
from .reads import Watch
from .sample import initial_noise, sample
from .schedule import NoiseSchedule
from .step import Step
from .worth import Capture

__all__ = [
    "DIFFUSERS_CLASSES",
    "SAMPLERS",
    "Capture",
    "CaptureError",
    "CudaGraphs",
    "GraphedDenoiser",
    "GraphedSampler",
    "Graphs",
    "NoiseSchedule",
    "SamplingPlan",
    "Step",
    "Watch",
    "initial_noise",
    "make_plan",
    "own_workspaces",
    "plan_from_config",
    "sample",
    "sampler_of",
]
