"""Dependent launches on a GPU: the bits of others, eager and captured; programmatic edges of a graph."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from ldmperf.kernels import chip_of, dependent_launch_reasons, dependent_launches, geglu
from ldmperf.model import FAMILY, UNetConfig
from ldmperf.samplers import initial_noise, make_plan

pytestmark = pytest.mark.gpu

TINY = UNetConfig((32, 64, 64), (4, 8, 8), (True, True, False), layers_per_block=1, context_dim=24, norm_groups=8)
# A read before its time may come right by chance: so often.
RUNS = 20
PROGRAMMATIC = 1


@pytest.fixture(autouse=True)
def _chip() -> None:
    if torch.cuda.is_available() and (reasons := dependent_launch_reasons(chip_of(torch.device("cuda", 0)))):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("name", ["tiny", "39M"])
@torch.no_grad()
def test_replays_have_the_bits_of_other_launches(name: str, kit: SimpleNamespace) -> None:
    config = TINY if name == "tiny" else FAMILY[name]
    latents, tokens = (16, 7) if name == "tiny" else (64, 77)
    unet = kit.network(config, torch.bfloat16)
    sampler = kit.graphed(unet)
    plan = make_plan("dpmpp_2m", kit.schedule, 6)
    generator = torch.Generator().manual_seed(3)
    for run in range(RUNS):
        noise = initial_noise([run], (4, latents, latents), device=kit.device)
        context = torch.randn(2, tokens, config.context_dim, generator=generator).to(kit.device)
        conditioning = unet.condition([step.timestep for step in plan.steps], context)
        options = {"guidance_scale": 3.0, "seeds": [run]}
        expected = kit.eager(unet, conditioning, plan, noise, **options)
        with dependent_launches():
            assert torch.equal(sampler(conditioning, plan, noise, **options), expected), run
            assert torch.equal(kit.eager(unet, conditioning, plan, noise, **options), expected), run
    assert len(sampler.captures) == 1


def edge_kinds(graph: torch.cuda.CUDAGraph) -> list[int]:
    """The type of each edge, CUgraphDependencyType, by the CUDA driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, "cuGraphGetEdges_v2"):
        pytest.skip("this CUDA driver does not tell a graph's edges: it is older than CUDA 12.3")
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t(0)
    assert driver.cuGraphGetEdges_v2(handle, None, None, None, ctypes.byref(count)) == 0
    begins, ends = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    # CUgraphEdgeData: bytes for the port it leaves, the port it enters, its type, and five that are reserved.
    data = (ctypes.c_uint64 * count.value)()
    assert driver.cuGraphGetEdges_v2(handle, begins, ends, data, ctypes.byref(count)) == 0
    return [value >> 16 & 0xFF for value in data]


@pytest.mark.parametrize("dependent", [False, True])
@torch.no_grad()
def test_a_captured_graph_has_programmatic_edges(dependent: bool) -> None:
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)

    def work() -> torch.Tensor:
        return geglu(geglu(x, backend="triton"), backend="triton")

    with dependent_launches(dependent):
        expected = work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            result = work()
    assert edge_kinds(graph) == [PROGRAMMATIC if dependent else 0]
    graph.instantiate()
    graph.replay()
    assert torch.equal(result, expected)
