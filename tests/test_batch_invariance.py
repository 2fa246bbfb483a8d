"""UNet(batch_invariant=True): the same bits in any batch, under a library that chooses by all that it sees."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import batch_invariance
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tapes import graphed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmperf.model import UNet, UNetConfig, load_unet, save_unet
from ldmperf.profiling.trajectory.network import randomize
from ldmperf.samplers import NoiseSchedule, initial_noise, make_plan, sample

SMALL = {"layers_per_block": 1, "norm_groups": 4, "context_dim": 12}
CONFIGS = {
    "plain": UNetConfig((8, 16), (1, 2), (True, False), **SMALL),
    "no-middle": UNetConfig((12, 12), (3, 1), (False, True), has_middle=False, **SMALL),
    "sdxl": UNetConfig(
        (8, 16), (1, 2), (False, True), transformer_layers=2, added_time_dim=4, added_dim=17, **SMALL
    ),
    "upscaler": UNetConfig(
        (8, 16), (1, 2), (True, True), in_channels=7, only_cross_attention=True, num_class_embeds=9, **SMALL
    ),
    "consistency": UNetConfig((8,), (2,), (True,), time_cond_proj_dim=6, **SMALL),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
STEPS = 3
# What moves numbers keeps them.
MOVES = batch_invariance._MOVES | {"ones_like", "new_zeros", "zeros"}


class Chooses(TorchDispatchMode):
    """A library whose results depend on all that one may choose an algorithm by: shapes, strides, alignment.

    names: of the calls that choose; all that compute unless given.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = names
        self.batches: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        seen = [(x.shape, x.stride(), x.data_ptr() % 64, x.dtype) for x in tensors]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        chooses = name in self.names if self.names else name not in MOVES
        if chooses and not is_view and isinstance(out, Tensor) and out.is_floating_point() and tensors:
            choice = zlib.crc32(repr(seen).encode()) % 997
            out = out.mul_(1 + choice / 2000)
            self.batches.add(tensors[0].shape[0])
        return out


def network(name: str, dtype: torch.dtype, batch_invariant: bool = True) -> UNet:
    unet = UNet(CONFIGS[name], backend="torch", batch_invariant=batch_invariant)
    randomize(unet, 0)
    return unet.to(dtype).eval()


@functools.cache
def kept(name: str, dtype: torch.dtype = torch.float32) -> UNet:
    """A network that no test changes."""
    return network(name, dtype)


def image(config: UNetConfig, number: int, size: tuple[int, int], tokens: int) -> dict[str, Tensor]:
    """The inputs of an image, by its number: those with a leading dimension of one, timesteps [K, 1]."""
    drawn = torch.Generator().manual_seed(number)
    found = {
        "sample": torch.randn(1, config.in_channels, *size, generator=drawn),
        "timesteps": torch.randint(0, 1000, (STEPS, 1), generator=drawn).float(),
        "context": torch.randn(1, tokens, config.context_dim, generator=drawn),
    }
    if config.added_dim is not None:
        found["text_embeds"] = torch.randn(1, 5, generator=drawn)
        found["time_ids"] = torch.randint(0, 99, (1, 3), generator=drawn)
    if config.num_class_embeds is not None:
        found["class_labels"] = torch.randint(0, config.num_class_embeds, (1,), generator=drawn)
    if config.time_cond_proj_dim is not None:
        found["timestep_cond"] = torch.randn(1, config.time_cond_proj_dim, generator=drawn)
    return found


def batch_of(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in images], dim=int(name == "timesteps")) for name in images[0]}


def run(unet: UNet, given: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
    """(the result of a step, its conditioning's shifts); `condition` and `denoise` as a trajectory calls them."""
    values = dict(given)
    x, t, context = values.pop("sample").to(unet.dtype), values.pop("timesteps"), values.pop("context")
    with torch.inference_mode():
        conditioning = unet.condition(t, context, **values)
        return unet.denoise(x, conditioning, step), conditioning.shifts


@pytest.mark.parametrize("name", CONFIGS)
def test_each_kind_of_network_gives_an_image_the_same_bits(name: str) -> None:
    """In a case that the test below finds too, but at once."""
    unet = kept(name)
    images = [image(unet.config, number, (3, 5), 3) for number in range(3)]
    shared = {"timesteps": images[0]["timesteps"]}
    with Chooses():
        for given in (images, [one | shared for one in images]):
            together = batch_of(given) | (shared if given is not images else {})
            found, _ = run(unet, together, 1)
            assert torch.equal(found, torch.cat([run(unet, one, 1)[0] for one in given]))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_an_image_has_the_same_bits_alone_and_at_any_place_of_any_batch(data: st.DataObject) -> None:
    """Under a library that chooses by what it sees, so that on every machine a call of two images would show."""
    name, dtype = data.draw(st.sampled_from(sorted(CONFIGS))), data.draw(st.sampled_from(DTYPES))
    unet = kept(name, dtype)
    size = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    numbers = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    tokens, step = data.draw(st.integers(1, 5)), data.draw(st.integers(0, STEPS - 1))
    images = {number: image(unet.config, number, size, tokens) for number in {*numbers}}
    if data.draw(st.booleans()):
        # One row of timesteps for all images.
        shared = {"timesteps": next(iter(images.values()))["timesteps"]}
        images = {number: one | shared for number, one in images.items()}
        together = batch_of([images[number] for number in numbers]) | shared
    else:
        together = batch_of([images[number] for number in numbers])
    layout = data.draw(st.sampled_from((torch.contiguous_format, torch.channels_last)))
    together["sample"] = together["sample"].contiguous(memory_format=layout)
    if data.draw(st.booleans()):
        with Chooses():
            alone = {number: run(unet, one, step)[0] for number, one in images.items()}
            found, _ = run(unet, together, step)
    else:
        alone = {number: run(unet, one, step)[0] for number, one in images.items()}
        found, _ = run(unet, together, step)
    assert found.shape == (len(numbers), unet.config.out_channels, *size)
    for row, number in enumerate(numbers):
        assert torch.equal(found[row : row + 1], alone[number]), (row, number)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_plain_network_to_rounding(name: str) -> None:
    invariant = kept(name, torch.float64)
    plain = invariant.with_backend("torch", batch_invariant=False)
    assert not plain.batch_invariant
    assert invariant.with_backend("torch").batch_invariant
    together = batch_of([image(plain.config, number, (5, 6), 4) for number in range(3)])
    (expected, shifts), (found, own) = (run(unet, together, 1) for unet in (plain, invariant))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(own, shifts, rtol=1e-11, atol=1e-11)
    assert found.is_contiguous(memory_format=torch.channels_last)
    with Chooses() as chooses:
        whole = run(plain, together, 1)[0]
        parts = [run(plain, image(plain.config, number, (5, 6), 4), 1)[0] for number in range(3)]
    # The plain network is not invariant under such a library, so that the test above can fail.
    assert not torch.equal(whole, torch.cat(parts))
    assert 3 in chooses.batches


def test_every_call_sees_one_image() -> None:
    """A batch of a prime number of images, whose sizes have no such factor."""
    unet = kept("plain")
    together = batch_of([image(unet.config, number, (4, 4), 6) for number in range(31)])
    with Chooses() as chooses:
        run(unet, together, 0)
    assert chooses.batches
    assert not any(rows % 31 == 0 for rows in chooses.batches), chooses.batches


@pytest.mark.parametrize("name", CONFIGS)
def test_what_lies_strided_in_a_batch_has_the_bits_of_what_does_not(name: str) -> None:
    """Inputs whose images are interleaved in memory, or that several images share."""
    unet = kept(name, torch.bfloat16)
    images = [image(unet.config, number, (3, 5), 3) for number in range(3)]
    together = {key: interleaved(value) for key, value in batch_of(images).items()}
    shared = {key: value.expand(3, *value.shape[1:]) for key, value in images[0].items() if key != "timesteps"}
    with Chooses():
        alone = [run(unet, one, 2)[0] for one in images]
        assert torch.equal(run(unet, together, 2)[0], torch.cat(alone))
        found = run(unet, {**shared, "timesteps": images[0]["timesteps"]}, 2)[0]
        assert torch.equal(found, torch.cat([alone[0]] * 3))


def interleaved(x: Tensor) -> Tensor:
    """x with its dimensions in the reverse order in memory, so that those of images are next to each other."""
    reverse = list(reversed(range(x.ndim)))
    return x.permute(reverse).contiguous().permute(reverse)


def test_shifts_of_all_images_are_kept_once() -> None:
    for name, rows in (("plain", 1), ("upscaler", 3), ("sdxl", 3), ("consistency", 3)):
        unet = kept(name)
        images = [image(unet.config, number, (4, 4), 6) for number in range(3)]
        together = batch_of(images) | {"timesteps": images[0]["timesteps"]}
        assert run(unet, together, 0)[1].shape[:2] == (STEPS, rows)
        assert run(unet, batch_of(images), 0)[1].shape[:2] == (STEPS, 3)


SCHEDULE = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "steps_offset": 1})


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_trajectorys_latents_have_the_same_bits_eager_and_captured(sampler: str, guidance: float) -> None:
    unet, plan, seeds = kept("plain"), make_plan(sampler, SCHEDULE, 3), [5, 3, 8]
    texts = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(1, 4, 12)
    captured, graphs = graphed(lambda x, conditioning, step: unet.denoise(x, conditioning, step))

    @torch.inference_mode()
    def latents(chosen: list[int], is_captured: bool) -> Tensor:
        context = texts[chosen]
        if guidance != 1.0:
            context = torch.cat([nothing.expand(len(chosen), -1, -1), context])
        conditioning = unet.condition([step.timestep for step in plan.steps], context)
        noise = initial_noise([seeds[i] for i in chosen], (4, 3, 5))
        options: dict[str, Any] = {"guidance_scale": guidance, "seeds": [seeds[i] for i in chosen]}
        if is_captured:
            return captured(conditioning, plan, noise, **options)
        denoise = lambda x, step: unet.denoise(x, conditioning, step.index)  # noqa: E731
        return sample(denoise, plan, noise, backend="torch", **options)

    alone = [latents([i], False) for i in range(3)]
    for chosen in ([0, 1, 2], [2, 0]):
        for is_captured in (False, True):
            found = latents(chosen, is_captured)
            for row, i in enumerate(chosen):
                assert torch.equal(found[row : row + 1], alone[i]), (chosen, is_captured, row)
    assert graphs.captured == 2


@pytest.mark.parametrize("shape", [(4, 1, 1), (3, 7, 13), (4, 91, 93)])
def test_noise_and_updates_need_no_mode(shape: tuple[int, int, int]) -> None:
    """At sizes that are no multiple of a vector, small ones and those that threads share."""
    seeds, plan = [4, 2, 9], make_plan("ddpm", SCHEDULE, 2)

    def latents(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        noise = initial_noise(chosen, shape)
        options: dict[str, Any] = {"guidance_scale": 7.5, "seeds": chosen, "backend": "torch"}
        return noise, sample(lambda x, step: 0.9 * x.flip(1), plan, noise, **options)

    together = latents(seeds)
    for row, seed in enumerate(seeds):
        for of_all, alone in zip(together, latents([seed]), strict=True):
            assert torch.equal(of_all[row : row + 1], alone)


def test_a_capture_is_made_anew_where_the_mode_is_switched() -> None:
    unet = kept("plain").with_backend("torch")
    plan, noise = make_plan("ddim", SCHEDULE, 2), initial_noise([1, 2], (4, 3, 5))
    captured, graphs = graphed(lambda x, conditioning, step: unet.denoise(x, conditioning, step))
    with torch.inference_mode():
        conditioning = unet.condition([step.timestep for step in plan.steps], torch.zeros(2, 4, 12))
        captured(conditioning, plan, noise)
        unet.batch_invariant = False
        captured(conditioning, plan, noise)
    assert graphs.captured == 2


def test_the_hooks_of_a_module_see_one_image_at_a_time() -> None:
    unet = kept("plain").with_backend("torch")
    seen: list[int] = []
    unet.conv_out.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    run(unet, batch_of([image(unet.config, number, (4, 4), 6) for number in range(3)]), 0)
    assert seen == [1, 1, 1]


def test_gradients_flow_through_every_image() -> None:
    invariant = network("plain", torch.float64)
    plain = network("plain", torch.float64, batch_invariant=False)
    given = batch_of([image(plain.config, number, (4, 4), 6) for number in range(3)])
    for unet in (plain, invariant):
        unet(given["sample"].double(), given["timesteps"][0], given["context"]).square().sum().backward()
    for expected, found in zip(plain.parameters(), invariant.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_a_compiler_leaves_the_images_alone() -> None:
    unet = kept("consistency")
    given = batch_of([image(unet.config, number, (4, 4), 6) for number in range(3)])
    arguments = given["sample"], given["timesteps"][0], given["context"]
    expected = unet(*arguments)
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    try:
        found = torch.compile(unet, backend=backend)(*arguments)
    finally:
        # What is learnt here of a batch is not to reach the graphs of other tests.
        torch.compiler.reset()
    assert torch.equal(found, expected)
    # What is compiled reads the weights alone, copies and joins.
    assert compiled
    assert not [name for name in compiled if "conv2d" in name or "group_norm" in name or "linear" in name]


def test_no_image_is_a_result_of_none() -> None:
    unet = kept("plain")
    with torch.inference_mode():
        assert unet(torch.empty(0, 4, 4, 4), 1.0, torch.empty(0, 6, 12)).shape == (0, 4, 4, 4)


def test_a_checkpoint_is_loaded_in_the_mode(tmp_path: Any) -> None:
    save_unet(network("plain", torch.float32), tmp_path / "unet.safetensors")
    assert load_unet(tmp_path / "unet.safetensors", batch_invariant=True).batch_invariant
    assert not load_unet(tmp_path / "unet.safetensors").batch_invariant
