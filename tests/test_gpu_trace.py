"""A trace of a real GPU: kernels are in the ranges that launched them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ldmperf.profiling import Case
from ldmperf.profiling.step.classes import CLASSES
from ldmperf.profiling.trajectory.attribution import attributed
from ldmperf.profiling.trajectory.network import make_network, make_problem
from ldmperf.profiling.trajectory.ranges import ranged_trajectory
from ldmperf.profiling.trajectory.rungs import all_backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = {"unet": "39M", "steps": 3, "device": "cuda", "dtype": "bfloat16", "latent_height": 32, "latent_width": 32}
# Our kernels by the classes that they can be of.
OURS = {
    "attention_kernel": {"self-attention", "cross-attention"},
    "group_norm": {"norm"},
    "layer_norm_kernel": {"norm", "linear"},
    "geglu_kernel": {"elementwise"},
    "residual_add_kernel": {"elementwise"},
    "sampler_update_kernel": {"sampler"},
}


@pytest.mark.parametrize("backend", ["triton", "triton+hoist", "triton+hoist+merge", "diffusers"])
def test_kernels_are_in_the_ranges_that_launched_them(backend: str) -> None:
    times, trace = attributed(Case(**SMALL, backend=backend))
    assert times.clock == "device"
    assert times.steps == 3
    assert all(times.classes[kind].launches > 0 for kind in CLASSES)
    # A kernel of no operator would be a fault of the attribution.
    assert times.other.launches == 0, [k for k in times.kernels if k.operator_class == "other"]
    for part, classes in OURS.items():
        found = {kernel.operator_class for kernel in times.kernels if part in kernel.name}
        assert backend == "diffusers" or found <= classes, (part, found)
    assert any(event.get("cat") == "gpu_user_annotation" for event in trace["traceEvents"])


@pytest.mark.parametrize("backend", ["triton", "triton+hoist+merge"])
def test_ranges_and_nvtx_change_no_bit_on_a_gpu(backend: str) -> None:
    case = Case(**SMALL)
    problem = make_problem(case, make_network(case))
    inputs = problem.inputs(0)
    plain = all_backends()[backend].build(problem)(inputs)
    marks = SimpleNamespace(range_push=torch.cuda.nvtx.range_push, range_pop=torch.cuda.nvtx.range_pop)
    assert torch.equal(ranged_trajectory(all_backends()[backend], problem, marks)(inputs), plain)
