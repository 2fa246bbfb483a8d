"""The mathematics of sampling: schedules, plans and the loop that runs them."""

from .cuda_graphs import CaptureError, CudaGraphs, Graphs, own_workspaces
from .graph import Capture, GraphedSampler
from .plan import SAMPLERS, SamplingPlan, make_plan
from .reads import Watch
from .sample import initial_noise, sample
from .schedule import NoiseSchedule
from .step import Step

__all__ = [
    "SAMPLERS",
    "Capture",
    "CaptureError",
    "CudaGraphs",
    "GraphedSampler",
    "Graphs",
    "NoiseSchedule",
    "SamplingPlan",
    "Step",
    "Watch",
    "initial_noise",
    "make_plan",
    "own_workspaces",
    "sample",
]
