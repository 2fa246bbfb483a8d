"""Captures that share a memory pool on a GPU: bits, memory, what comes back, and memory that runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import CudaGraphs, GraphedDenoiser, GraphedSampler, initial_noise, make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.alone]  # counts and bounds the memory of this process

TINY = UNetConfig((32, 64, 64), (4, 8, 8), (True, True, False), layers_per_block=1, context_dim=24, norm_groups=8)
# (batch, latents), the largest first.
SHAPES = ((4, 128), (3, 128), (2, 128))
SMALL = (1, 32)
STEPS = 4
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def unet(kit: SimpleNamespace) -> UNet:
    network: UNet = kit.network(TINY, torch.bfloat16)
    return network


def given(unet: UNet, batch: int, latents: int, seed: int = 0) -> tuple[torch.Tensor, Any]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(batch, 4, latents, latents, device=DEVICE, generator=generator).to(unet.dtype)
    context = torch.randn(batch, 7, TINY.context_dim, device=DEVICE, generator=generator)
    return x, unet.condition([float(step) for step in range(1, 1 + STEPS)], context)


def pool_bytes(graphs: CudaGraphs) -> int:
    """What the allocator has in private pools; this process has no other graphs."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


@contextmanager
def at_most(more_bytes: int) -> Iterator[None]:
    """What this process takes over this fails as if the device were full."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@torch.no_grad()
def test_three_shapes_that_alternate_in_one_pool_have_the_bits_of_eager_calls(unet: UNet) -> None:
    graphs = CudaGraphs()
    denoiser: GraphedDenoiser[Any] = GraphedDenoiser(unet.denoise, graphs=graphs)
    kept = []
    for seed in range(6):
        for batch, latents in SHAPES:
            x, conditioning = given(unet, batch, latents, seed)
            for step in (0, torch.tensor(STEPS - 1, device=x.device)):
                kept.append((denoiser(x, conditioning, step), unet.denoise(x, conditioning, int(step))))
    # Earlier results are not overwritten.
    assert all(torch.equal(*pair) for pair in kept)
    assert len(denoiser.captures) == len(SHAPES)
    torch.cuda.synchronize()
    reports = denoiser.captures
    assert all(report.replay_ms is not None and report.replay_ms > 0 for report in reports)
    assert all(report.eager_ms > 0 and report.uses == 12 for report in reports)


@torch.no_grad()
def test_the_pool_has_the_size_of_the_largest_and_reports_tell_it(unet: UNet) -> None:
    alone = []
    for shape in SHAPES:
        graphs = CudaGraphs()
        denoiser: GraphedDenoiser[Any] = GraphedDenoiser(unet.denoise, graphs=graphs)
        denoiser(*given(unet, *shape), 0)
        (report,) = denoiser.captures
        alone.append(report.memory_bytes)
        assert report.memory_bytes == graphs.memory(DEVICE) == pool_bytes(graphs) > 0
        denoiser.clear()
        assert graphs.memory(DEVICE) == pool_bytes(graphs) == 0
    graphs = CudaGraphs()
    denoiser = GraphedDenoiser(unet.denoise, graphs=graphs)
    for shape in SHAPES:
        denoiser(*given(unet, *shape), 0)
    together = [report.memory_bytes for report in denoiser.captures]
    assert together[0] == alone[0]
    assert sum(together) == graphs.memory(DEVICE) == pool_bytes(graphs)
    # Of 9 images the pool holds about 4; the allocator rounds, and what is left of a segment may not fit.
    assert sum(together) < 0.75 * sum(alone)


@torch.no_grad()
def test_a_dropped_captures_memory_serves_the_next_and_comes_back_with_the_last(unet: UNet) -> None:
    graphs = CudaGraphs()
    denoiser: GraphedDenoiser[Any] = GraphedDenoiser(unet.denoise, graphs=graphs, max_captures=1)
    sizes = []
    for shape in (SHAPES[0], SMALL, SHAPES[0]):
        x, conditioning = given(unet, *shape)
        assert torch.equal(denoiser(x, conditioning, 0), unet.denoise(x, conditioning, 0))
        sizes.append(graphs.memory(DEVICE))
    # One at a time: the pool is a new one each time, of the capture's own size, and the old one is freed.
    assert sizes[1] < sizes[0]
    assert sizes[2] == pool_bytes(graphs)
    denoiser.clear()
    assert pool_bytes(graphs) == 0
    denoiser = GraphedDenoiser(unet.denoise, graphs=graphs, max_captures=2)
    for number in range(2):
        for shape in SHAPES:
            x, conditioning = given(unet, *shape)
            assert torch.equal(denoiser(x, conditioning, number), unet.denoise(x, conditioning, number))
    # Six captures, of which four were dropped: less than two of the largest.
    assert graphs.memory(DEVICE) < 2 * sizes[0]


@torch.no_grad()
def test_two_samplers_share_the_pool_of_one_graphs(unet: UNet, kit: SimpleNamespace) -> None:
    graphs = CudaGraphs()
    denoiser: GraphedDenoiser[Any] = GraphedDenoiser(unet.denoise, graphs=graphs)
    x, conditioning = given(unet, *SHAPES[0])
    expected = unet.denoise(x, conditioning, 0)
    assert torch.equal(denoiser(x, conditioning, 0), expected)
    before = graphs.memory(DEVICE)
    sampler: GraphedSampler[Any] = GraphedSampler(
        unet.denoise, input_dtype=unet.dtype, backend=kit.operators, graphs=graphs
    )
    plan = make_plan("dpmpp_2m", kit.schedule, STEPS)
    noise = initial_noise([1, 2], (4, 64, 64), device=DEVICE)
    _, of_plan = given(unet, 2, 64)
    result = sampler(of_plan, plan, noise)
    assert torch.equal(result, kit.eager(unet, of_plan, plan, noise))
    assert graphs.memory(DEVICE) < 1.5 * before
    assert torch.equal(denoiser(x, conditioning, 0), expected)
    assert torch.equal(sampler(of_plan, plan, noise), result)


@torch.no_grad()
def test_memory_that_runs_out_beside_captures_and_alone(unet: UNet) -> None:
    graphs = CudaGraphs()
    denoiser: GraphedDenoiser[Any] = GraphedDenoiser(unet.denoise, graphs=graphs, eager_unless_worth=True)
    x, conditioning = given(unet, *SMALL)
    small = unet.denoise(x, conditioning, 0)
    assert torch.equal(denoiser(x, conditioning, 0), small)
    large = given(unet, *SHAPES[0])
    exact = unet.denoise(*large, 0)
    # Half of what an eager call takes: neither a capture nor its warm-up fits.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    unet.denoise(*large, 0)
    eager = torch.cuda.max_memory_allocated() - before
    with at_most(eager // 2), pytest.raises(torch.OutOfMemoryError):
        denoiser(*large, 0)
    assert any("because memory ran out" in line for line in denoiser.decisions)
    assert "runs eagerly until clear()" in denoiser.decisions[-1]
    assert denoiser.captures == ()
    # There is room now, but the shape is refused until clear().
    assert torch.equal(denoiser(*large, 0), exact)
    assert denoiser.captures == ()
    denoiser.clear()
    assert torch.equal(denoiser(*large, 0), exact)
    assert torch.equal(denoiser(x, conditioning, 0), small)
    assert len(denoiser.captures) == 2


@torch.no_grad()
def test_a_capture_that_waits_leaves_no_memory_behind(unet: UNet) -> None:
    """torch does not end an invalid capture's allocations; captures before and after it work on."""
    waits = False

    def denoise(x: torch.Tensor, conditioning: Any, step: torch.Tensor) -> torch.Tensor:
        if waits:
            step.item()
        return unet.denoise(x, conditioning, step)

    graphs = CudaGraphs()
    denoiser: GraphedDenoiser[Any] = GraphedDenoiser(denoise, modules=unet, graphs=graphs)
    first, second = given(unet, *SHAPES[2]), given(unet, *SMALL)
    expected = [unet.denoise(*one, 0) for one in (first, second)]
    assert torch.equal(denoiser(*first, 0), expected[0])
    waits = True
    with pytest.raises(RuntimeError, match="could not be captured"):
        denoiser(*second, 0)
    waits = False
    for _ in range(2):
        assert torch.equal(denoiser(*second, 0), expected[1])
        assert torch.equal(denoiser(*first, 0), expected[0])
    denoiser.clear()
    assert pool_bytes(graphs) == 0
