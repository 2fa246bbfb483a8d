"""`GraphedSampler` without a GPU: a stand-in calls the captured step again, on the very memory of the capture."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.kernels import dependent_launches, dependent_launches_enabled
from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import (
    SAMPLERS,
    CaptureError,
    GraphedSampler,
    NoiseSchedule,
    SamplingPlan,
    initial_noise,
    make_plan,
    sample,
)

SCHEDULE = NoiseSchedule.from_diffusers(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
)
SHAPE = (4, 6, 7)
TINY = UNetConfig((16, 32), (2, 4), (True, False), layers_per_block=1, context_dim=12, norm_groups=4)


@dataclass(frozen=True)
class Prompt:
    """A conditioning with a table over steps and values of its own, beside None and nested tuples."""

    times: torch.Tensor
    fixed: tuple[torch.Tensor, ...]
    nothing: None = None

    def padded(self, steps: int) -> Prompt:
        missing = steps - len(self.times)
        return replace(self, times=torch.cat([self.times, torch.full((missing,), torch.nan)]))


def prompt(plan: SamplingPlan, value: float) -> Prompt:
    times = torch.tensor([step.timestep for step in plan.steps], dtype=torch.float32)
    return Prompt(times, (torch.tensor(value), torch.full((3, 2), value).t()))


def network(x: torch.Tensor, found: Prompt, step: torch.Tensor) -> torch.Tensor:
    """Depends on all that a run may change."""
    time = found.times.index_select(0, step)
    halves = torch.linspace(0.9, 1.1, x.shape[0]).reshape(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x * halves + 1e-3 * time + found.fixed[0] + found.fixed[1].mean())


@dataclass
class Replays:
    """Stands for CUDA graphs: keeps the work and calls it again. `failures` are raised by the captures to come."""

    failures: list[Exception] = field(default_factory=list)
    captured: int = 0
    warmed: int = 0
    replayed: int = 0
    turns: list[str] = field(default_factory=list)

    def check(self, device: torch.device) -> None:
        pass

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        self.turns.append("begin")
        try:
            yield
        finally:
            self.turns.append("end")

    def settle(self) -> None:
        self.turns.append("settle")

    def warm_up(self, work: Callable[[], None], device: torch.device) -> None:
        self.warmed += 1
        work()

    def memory(self, device: torch.device) -> int:
        return 0

    def timed(self, work: Callable[[], None], device: torch.device) -> Callable[[], float | None]:
        work()
        return lambda: None

    def capture(
        self, work: Callable[[], None], device: torch.device, *, shares: bool = True
    ) -> Callable[[], None]:
        if self.failures:
            raise self.failures.pop(0)
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def graphed(denoise: Any = network, **options: Any) -> tuple[GraphedSampler[Any], Replays]:
    graphs = Replays()
    return GraphedSampler(denoise, backend="torch", graphs=graphs, **options), graphs


def eager(plan: SamplingPlan, noise: torch.Tensor, found: Prompt, **options: Any) -> torch.Tensor:
    return sample(
        lambda x, step: network(x, found, torch.tensor([step.index])), plan, noise, backend="torch", **options
    )


@pytest.mark.parametrize("weight", [1.0, 7.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_bits_of_the_eager_loop(name: str, weight: float) -> None:
    plan = make_plan(name, SCHEDULE, 6)
    sampler, graphs = graphed()
    for seeds, value in (([3, 4], 0.5), ([5, 6], -0.25)):
        noise = initial_noise(seeds, SHAPE)
        kept, found = noise.clone(), prompt(plan, value)
        result = sampler(found, plan, noise, guidance_scale=weight, seeds=seeds)
        assert torch.equal(result, eager(plan, noise, found, guidance_scale=weight, seeds=seeds))
        assert torch.equal(noise, kept)
    assert (graphs.captured, graphs.warmed, graphs.replayed) == (1, 3, 2 * len(plan.steps))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_one_capture_serves_any_plan_prompt_seed_and_guidance(data: st.DataObject) -> None:
    addresses = set()

    def seen(x: torch.Tensor, found: Prompt, step: torch.Tensor) -> torch.Tensor:
        tensors = (x, found.times, *found.fixed, step)
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
        return network(x, found, step)

    sampler, graphs = graphed(seen)
    few_registers = [name for name in SAMPLERS if make_plan(name, SCHEDULE, 6).num_registers <= 4]
    for _ in range(data.draw(st.integers(2, 4))):
        plan = make_plan(data.draw(st.sampled_from(few_registers)), SCHEDULE, data.draw(st.integers(1, 9)))
        seeds = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2))
        weights = data.draw(st.lists(st.floats(1.5, 20), min_size=len(plan.steps), max_size=len(plan.steps)))
        found, noise = prompt(plan, data.draw(st.floats(-1, 1))), initial_noise(seeds, SHAPE)
        result = sampler(found, plan, noise, guidance_scale=weights, seeds=seeds)
        assert torch.equal(result, eager(plan, noise, found, guidance_scale=weights, seeds=seeds))
    # A graph holds addresses: the warm-up, the capture and every replay work on the same memory.
    assert graphs.captured == len(addresses) == 1


def test_a_unet_gives_the_bits_of_its_eager_loop() -> None:
    torch.manual_seed(0)
    unet = UNet(TINY, backend="torch").eval()
    sampler: GraphedSampler[Any] = GraphedSampler(unet.denoise, backend="torch", graphs=Replays())
    for name, steps, seeds in (("ddim", 3, [1]), ("dpmpp_2m", 5, [2]), ("ddpm", 2, [3])):
        plan, noise = make_plan(name, SCHEDULE, steps), initial_noise(seeds, (4, 8, 8))
        context = torch.randn(2, 5, TINY.context_dim)
        with torch.no_grad():
            conditioning = unet.condition([step.timestep for step in plan.steps], context)

            def denoise(x: torch.Tensor, step: Any, conditioning: Any = conditioning) -> torch.Tensor:
                return unet.denoise(x, conditioning, step.index)

            expected = sample(denoise, plan, noise, guidance_scale=3.0, seeds=seeds, backend="torch")
        result = sampler(conditioning, plan, noise, guidance_scale=3.0, seeds=seeds)
        assert torch.equal(result, expected)
    assert len(sampler.captures) == 1


def test_injected_noise_and_callbacks_are_those_of_the_eager_loop() -> None:
    plan, noise = make_plan("ddpm", SCHEDULE, 5), initial_noise([1, 2], SHAPE)
    injected = torch.randn(5, 2, *SHAPE, dtype=torch.float64)
    asked: list[list[int]] = [[], []]
    latents: list[list[torch.Tensor]] = [[], []]
    sampler, _ = graphed()
    found = prompt(plan, 0.1)

    def options(which: int) -> dict[str, Any]:
        def step_noise(k: int) -> torch.Tensor:
            asked[which].append(k)
            return injected[k].float()

        return {"step_noise": step_noise, "callback": lambda step, x: latents[which].append(x)}

    result = sampler(found, plan, noise, **options(0))
    assert torch.equal(result, eager(plan, noise, found, **options(1)))
    assert asked[0] == asked[1] != []
    assert all(torch.equal(a, b) for a, b in zip(*latents, strict=True))
    assert not torch.equal(latents[0][0], latents[0][1])


def test_what_takes_a_capture_of_its_own() -> None:
    sampler, graphs = graphed(max_captures=100)
    plan, noise = make_plan("ddim", SCHEDULE, 4), initial_noise([1, 2], SHAPE)
    ddpm = make_plan("ddpm", SCHEDULE, 4)
    calls: list[tuple[SamplingPlan, torch.Tensor, dict[str, Any]]] = [
        (plan, noise, {}),
        (plan, noise.double(), {}),
        (plan, noise[:1], {}),
        (plan, noise[..., :5], {}),
        (plan, noise, {"guidance_scale": 2.0}),
        (ddpm, noise, {"step_noise": lambda k: noise}),
        (make_plan("ddim", SCHEDULE, 200), noise, {}),
        (make_plan("pndm", SCHEDULE, 6), noise, {}),
    ]
    for number, (of, start, options) in enumerate(calls):
        sampler(prompt(of, 0.0), of, start, **options)
        assert graphs.captured == number + 1
    for of, start, options in calls:
        sampler(prompt(of, 1.0), of, start, **options)
    # A conditioning of another shape is read by other launches; a stochastic plan has those of a deterministic.
    sampler(Prompt(prompt(plan, 0.0).times, (torch.zeros(()), torch.zeros(3, 4))), plan, noise)
    sampler(prompt(ddpm, 0.0), ddpm, noise, seeds=[1, 2])
    assert graphs.captured == len(calls) + 1


def test_the_captures_used_longest_ago_are_dropped() -> None:
    sampler, graphs = graphed(max_captures=2)
    plan = make_plan("ddim", SCHEDULE, 2)
    noises = [initial_noise(list(range(batch)), SHAPE) for batch in (1, 2, 3)]

    def run(batch: int) -> None:
        sampler(prompt(plan, 0.0), plan, noises[batch - 1])

    for batch in (1, 2, 1, 3, 1):
        run(batch)
    assert graphs.captured == 3
    assert [capture.description.split("[")[1][0] for capture in sampler.captures] == ["3", "1"]
    run(2)
    assert graphs.captured == 4
    assert all(capture.warm_up_ms > 0 and capture.capture_ms >= 0 for capture in sampler.captures)
    sampler.clear()
    assert sampler.captures == ()
    with pytest.raises(ValueError, match="max_captures must be at least 1"):
        GraphedSampler(network, max_captures=0)


def test_a_failed_capture_says_why_and_leaves_the_others() -> None:
    sampler, graphs = graphed()
    plan, noise = make_plan("ddim", SCHEDULE, 3), initial_noise([1], SHAPE)
    found = prompt(plan, 0.5)
    sampler(found, plan, noise)
    graphs.failures = [RuntimeError("operation not permitted when stream is capturing\nmore lines")]
    with pytest.raises(CaptureError) as raised:
        sampler(found, plan, noise, guidance_scale=2.0)
    assert str(raised.value) == (
        "the step for noise [1, 4, 6, 7] float32 with guidance could not be captured: "
        "operation not permitted when stream is capturing"
    )
    assert len(sampler.captures) == 1
    result = sampler(found, plan, noise, guidance_scale=2.0)
    assert torch.equal(result, eager(plan, noise, found, guidance_scale=2.0))
    assert torch.equal(sampler(found, plan, noise), eager(plan, noise, found))


def test_out_of_memory_drops_the_other_captures_and_tries_again() -> None:
    sampler, graphs = graphed()
    plan, noise = make_plan("ddim", SCHEDULE, 3), initial_noise([1], SHAPE)
    found = prompt(plan, 0.5)
    sampler(found, plan, noise)
    graphs.failures = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")]
    result = sampler(found, plan, noise, guidance_scale=2.0)
    assert torch.equal(result, eager(plan, noise, found, guidance_scale=2.0))
    assert len(sampler.captures) == 1
    sampler.clear()
    graphs.failures = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")]
    with pytest.raises(CaptureError, match=r"could not be captured: CUDA out of memory\. Tried") as raised:
        sampler(found, plan, noise)
    assert isinstance(raised.value, torch.OutOfMemoryError)
    assert torch.equal(sampler(found, plan, noise), eager(plan, noise, found))


def test_a_wrong_call_is_told_in_one_line_and_leaves_the_sampler_usable() -> None:
    plan, noise = make_plan("ddpm", SCHEDULE, 3), initial_noise([1, 2], SHAPE)
    found = prompt(plan, 0.5)
    with pytest.raises(CaptureError, match="CUDA graphs need a CUDA device, and the input is on cpu"):
        GraphedSampler(network)(found, plan, noise, seeds=[1, 2])
    sampler, _ = graphed()
    with pytest.raises(ValueError, match="give seeds, one per image, or step_noise"):
        sampler(found, plan, noise)
    with pytest.raises(ValueError, match="noise must be float32 or float64"):
        sampler(found, plan, noise.half(), seeds=[1, 2])
    with pytest.raises(ValueError, match="seeds must be one per image: 2 images, 1 seeds"):
        sampler(found, plan, noise, seeds=[1])
    with pytest.raises(ValueError, match="guidance_scale must be a number or 3 numbers"):
        sampler(found, plan, noise, seeds=[1, 2], guidance_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="it holds a int"):
        sampler((found, 3), plan, noise, seeds=[1, 2])
    with pytest.raises(ValueError, match=r"step_noise\(0\) must be a float tensor"):
        sampler(found, plan, noise, step_noise=lambda k: noise[:1])
    wrong, _ = graphed(lambda x, found, step: x[:1])
    with pytest.raises(ValueError, match="denoise's output at step in the capture must be a float tensor"):
        wrong(found, plan, noise, seeds=[1, 2])
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"make another with GraphedSampler\(denoise\)"):
            copied(sampler)
    expected = eager(plan, noise, found, seeds=[1, 2])
    assert torch.equal(sampler(found, plan, noise, seeds=[1, 2]), expected)


def test_a_capture_made_in_inference_mode_serves_outside_it() -> None:
    sampler, graphs = graphed()
    plan, noise = make_plan("ddim", SCHEDULE, 3), initial_noise([1], SHAPE)
    with torch.inference_mode():
        sampler(prompt(plan, 0.5), plan, noise.clone())
    found = prompt(plan, 0.25)
    assert torch.equal(sampler(found, plan, noise), eager(plan, noise, found))
    with torch.inference_mode():
        inside = prompt(plan, 0.25)
        assert torch.equal(sampler(inside, plan, noise.clone()), eager(plan, noise, found))
    assert graphs.captured == 1


def test_the_model_input_has_the_networks_dtype() -> None:
    dtypes = []

    def denoise(x: torch.Tensor, found: Prompt, step: torch.Tensor) -> torch.Tensor:
        dtypes.append(x.dtype)
        return network(x.float(), found, step).to(x.dtype)

    plan, noise = make_plan("ddim", SCHEDULE, 3), initial_noise([1], SHAPE)
    found = prompt(plan, 0.5)
    sampler, _ = graphed(denoise, input_dtype=torch.bfloat16)
    result = sampler(found, plan, noise)
    expected = sample(
        lambda x, step: denoise(x, found, torch.tensor([step.index])),
        plan,
        noise,
        input_dtype=torch.bfloat16,
        backend="torch",
    )
    assert torch.equal(result, expected)
    assert result.dtype == torch.float32
    assert set(dtypes) == {torch.bfloat16}


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None = None


def trees(value: float) -> list[Any]:
    """Conditionings whose tensors are alike and whose structure is not."""
    tensor = torch.full((2, 3), value)
    return [
        (tensor, None), (None, tensor), [tensor, None], {"a": tensor}, {"b": tensor},
        Pair(tensor), (Pair(tensor),),
    ]  # fmt: skip


def test_conditionings_of_another_structure_are_captured_anew() -> None:
    plan, noise = make_plan("ddim", SCHEDULE, 2), initial_noise([1], SHAPE)
    names = ["(x, None)", "(None, x)", "[x, None]", "a", "b", "Pair", "(Pair,)"]

    def denoise(x: torch.Tensor, tree: Any, step: torch.Tensor) -> torch.Tensor:
        # Of what it is made is seen while it is captured: another one is another network.
        kinds = [type(one).__name__ if not isinstance(one, dict) else str(sorted(one)) for one in [tree]]
        place = [one is None for one in tree] if isinstance(tree, tuple | list) else []
        factor = sum(map(ord, str((kinds, place)))) % 97 / 97
        leaf = next(iter(tree.values())) if isinstance(tree, dict) else next(p for p in tree if p is not None)
        leaf = leaf[0] if isinstance(leaf, Pair) else leaf
        return torch.tanh(x * factor + leaf.mean())

    graphs = Replays()
    sampler: GraphedSampler[Any] = GraphedSampler(denoise, graphs=graphs, backend="torch", max_captures=9)
    for value in (0.25, 0.75):
        for name, tree in zip(names, trees(value), strict=True):
            expected = sample(
                lambda x, step, tree=tree: denoise(x, tree, torch.tensor([step.index])),
                plan,
                noise,
                backend="torch",
            )
            assert torch.equal(sampler(tree, plan, noise), expected), (name, value)
    assert len(sampler.captures) == len(names)


def test_an_expanded_tensor_is_kept_whole_and_takes_new_values() -> None:
    plan, noise = make_plan("ddim", SCHEDULE, 2), initial_noise([1, 2], SHAPE)

    def denoise(x: torch.Tensor, tree: Any, step: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + tree[0].sum(1)[:, None, None, None])

    sampler: GraphedSampler[Any] = GraphedSampler(denoise, graphs=Replays(), backend="torch")
    for value in (0.5, 0.125):
        tree = (torch.full((1, 3), value).expand(2, 3),)
        expected = sample(
            lambda x, step, tree=tree: denoise(x, tree, torch.zeros(1)), plan, noise, backend="torch"
        )
        assert torch.equal(sampler(tree, plan, noise), expected)
    assert len(sampler.captures) == 1


def test_a_conditioning_elsewhere_than_the_noise_is_refused() -> None:
    plan, noise = make_plan("ddim", SCHEDULE, 2), initial_noise([1], SHAPE)
    sampler: GraphedSampler[Any] = GraphedSampler(lambda x, tree, step: x, graphs=Replays(), backend="torch")
    with pytest.raises(ValueError, match="must be on cpu as the noise is; a tensor is on meta"):
        sampler((torch.empty(2, device="meta"),), plan, noise)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            torch.OutOfMemoryError,
            "CUDA out",
        ),
        (ValueError("no such layer"), CaptureError, "no such layer"),
        (RuntimeError("not permitted when stream is capturing"), CaptureError, "not permitted when stream"),
    ],
)
def test_what_went_wrong_is_told_where_ending_the_capture_fails_too(
    error: Exception, kind: type[Exception], told: str
) -> None:
    plan, noise = make_plan("ddim", SCHEDULE, 2), initial_noise([1], SHAPE)

    class Fails(Replays):
        def capture(
            self, work: Callable[[], None], device: torch.device, *, shares: bool = True
        ) -> Callable[[], None]:
            try:
                raise error
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    sampler: GraphedSampler[Any] = GraphedSampler(lambda x, tree, step: x, graphs=Fails(), backend="torch")
    with pytest.raises(kind, match=f"could not be captured: {told}") as raised:
        sampler((torch.zeros(1),), plan, noise)
    assert isinstance(raised.value, CaptureError)


def test_a_run_with_dependent_launches_has_a_capture_of_its_own() -> None:
    """Replays of one are never those of the other, whichever comes first."""
    seen: list[bool] = []

    def denoise(x: torch.Tensor, found: Prompt, step: torch.Tensor) -> torch.Tensor:
        seen.append(dependent_launches_enabled())
        return network(x, found, step)

    plan = make_plan("ddim", SCHEDULE, 2)
    noise = initial_noise([0], SHAPE)
    sampler: GraphedSampler[Prompt] = GraphedSampler(denoise, backend="torch", graphs=Replays())
    results = []
    for dependent in (False, True, False, True):
        with dependent_launches(dependent):
            results.append(sampler(prompt(plan, 0.5), plan, noise))
        assert len(sampler.captures) == (1 if not any(seen) else 2)
    assert all(torch.equal(result, results[0]) for result in results)
