"""The UNet against diffusers' UNet2DConditionModel with the same weights."""

import copy
import dataclasses
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.model import FAMILY, Constants, UNet, UNetConfig, diffusers_config, diffusers_state_dict
from ldmperf.model.choices import Choices
from ldmperf.model.releases import beyond
from ldmperf.samplers import NoiseSchedule, make_plan, sample

from .tapes import graphed

SCHEDULE = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"})
SMALL = {"norm_groups": 8, "context_dim": 24}
# A pooled text embedding of 10 and 3 sizes, of 8 sinusoids each.
ADDED = {"added_time_dim": 8, "added_dim": 34}
CONFIGS = {
    "sd15": UNetConfig((32, 64, 64, 64), (8, 8, 8, 8), (True, True, True, False), conv_projection=True, **SMALL),
    "sd21": UNetConfig((32, 64, 96, 96), (2, 4, 6, 6), (True, True, True, False), **SMALL),
    "one-layer": UNetConfig((32, 64, 64), (4, 4, 4), (True, True, False), layers_per_block=1, **SMALL),
    "no-middle": UNetConfig((32, 64), (4, 4), (True, False), layers_per_block=1, has_middle=False, **SMALL),
    "three-levels": UNetConfig((24, 48, 48), (3, 3, 3), (True, True, True), has_middle=False, **SMALL),
    "super-resolution": UNetConfig((32, 64), (4, 4), (True, False), in_channels=8, **SMALL),
    "one-level": UNetConfig((32,), (4,), (False,), **SMALL),
    # Stable Diffusion XL; turbo is base.
    "sdxl-base": UNetConfig(
        (32, 64, 96), (2, 4, 6), (False, True, True), transformer_layers=(1, 2, 3), **ADDED, **SMALL
    ),
    "sdxl-refiner": UNetConfig(
        (24, 48, 72, 72), (2, 4, 6, 6), (False, True, True, False), transformer_layers=2, **ADDED, **SMALL
    ),
    "x4-upscaler": UNetConfig(
        (16, 32, 32),
        (2, 4, 4),
        (False, True, True),
        layers_per_block=1,
        in_channels=7,
        only_cross_attention=(True, True, False),
        num_class_embeds=10,
        **SMALL,
    ),
    # A latent consistency model, and all there is at once.
    "lcm": UNetConfig((16, 32), (2, 4), (True, False), layers_per_block=1, time_cond_proj_dim=6, **SMALL),
    "all": UNetConfig(
        (16, 32),
        (2, 4),
        (True, True),
        layers_per_block=1,
        transformer_layers=(2, 1),
        only_cross_attention=True,
        num_class_embeds=3,
        time_cond_proj_dim=6,
        **ADDED,
        **SMALL,
    ),
}
SDXL = ["sdxl-base", "sdxl-refiner"]
FEATURES = ["x4-upscaler", "lcm", "all"]


def pair(config, dtype, seed=0):
    """Ours with random weights, every bias and norm weight included, and diffusers' with the same."""
    torch.manual_seed(seed)
    ours = UNet(config, backend="torch").to(dtype).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs = UNet2DConditionModel(**diffusers_config(config)).to(dtype).eval()
    theirs.load_state_dict(diffusers_state_dict(ours), strict=True)
    return ours, theirs


def diffusers_gradients(ours):
    """The gradients of our parameters under diffusers' names."""
    with torch.device("meta"):
        other = UNet(ours.config)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    other.load_state_dict(gradients, assign=True)
    return diffusers_state_dict(other)


def relative_rms(a, b):
    return ((a - b).double().norm() / b.double().norm()).item()


def inputs(config, batch, size, tokens, dtype):
    sample = torch.randn(batch, config.in_channels, *size, dtype=dtype)
    context = torch.randn(batch, tokens, config.context_dim, dtype=dtype)
    return sample, context


def added_inputs(config, batch, dtype):
    """What the network takes besides, another for every sample."""
    added = {}
    if config.added_dim is not None:
        added["text_embeds"] = torch.randn(batch, 10, dtype=dtype)
        added["time_ids"] = torch.randint(0, 1025, (batch, 3))
    if config.num_class_embeds is not None:
        added["class_labels"] = torch.randint(0, config.num_class_embeds, (batch,))
    if config.time_cond_proj_dim is not None:
        added["timestep_cond"] = torch.randn(batch, config.time_cond_proj_dim, dtype=dtype)
    return added


def in_diffusers_arguments(added):
    """The same, as diffusers' network takes it."""
    own = {name: added[name] for name in ("class_labels", "timestep_cond") if name in added}
    return own | {"added_cond_kwargs": {name: value for name, value in added.items() if name not in own}}


@torch.no_grad()
def error(ours, theirs, batch, size, tokens, timestep):
    """Of ours against diffusers' on random inputs."""
    sample, context = inputs(ours.config, batch, size, tokens, ours.dtype)
    added = added_inputs(ours.config, batch, ours.dtype)
    expected = theirs(sample, timestep, context, **in_diffusers_arguments(added)).sample
    return relative_rms(ours(sample, timestep, context, **added), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name, dtype, tolerance):
    config = CONFIGS[name]
    ours, theirs = pair(config, dtype)
    for batch, size, tokens in ((1, (16, 16), 77), (2, (24, 8), 1), (3, (8, 16), 154)):
        for timestep in (torch.rand(batch) * 1000, 37.25):
            assert error(ours, theirs, batch, size, tokens, timestep) < tolerance


@pytest.mark.parametrize("size", [(15, 17), (9, 12), (5, 5), (1, 3)])
@pytest.mark.parametrize("name", ["sd15", "three-levels", *SDXL])
def test_odd_latent_sizes_equal_diffusers(name, size):
    ours, theirs = pair(CONFIGS[name], torch.float64)
    assert error(ours, theirs, 2, size, 5, 500.0) < 1e-9


def test_39m_at_full_width_equals_diffusers():
    ours, theirs = pair(FAMILY["39M"], torch.float32)
    assert error(ours, theirs, 1, (64, 64), 77, 981.0) < 1e-5


@pytest.mark.parametrize("name", ["sd15", *SDXL, *FEATURES])
def test_condition_and_denoise_are_forward(name):
    """A hoisted trajectory gives what single evaluations give, whatever the other steps are."""
    config = CONFIGS[name]
    unet, _ = pair(config, torch.float64)
    sample, context = inputs(config, 3, (16, 16), 7, torch.float64)
    added = added_inputs(config, 3, torch.float64)
    timesteps = [999.0, 640.5, 3.0]
    with torch.no_grad():
        conditioning = unet.condition(timesteps, context, **added, constants=unet.constants())
        for step, timestep in enumerate(timesteps):
            expected = unet(sample, timestep, context, **added)
            assert relative_rms(unet.denoise(sample, conditioning, step), expected) < 1e-13
        per_sample = torch.tensor([[1.0, 2.0, 3.0], [700.0, 800.0, 900.0]])
        conditioning = unet.condition(per_sample, context, **added)
        for step in range(2):
            expected = unet(sample, per_sample[step], context, **added)
            assert relative_rms(unet.denoise(sample, conditioning, step), expected) < 1e-13


class CountCopies(TorchDispatchMode):
    """Counts the calls that move an activation into another memory layout."""

    NAMES = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::_reshape_copy")

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().rsplit(".", 1)[0] in self.NAMES:
            self.copies.append((function.name(), tuple(args[0].shape)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_denoising_step_makes_no_layout_copy(name, batch):
    config = CONFIGS[name]
    unet = UNet(config, backend="torch").eval()
    sample, context = inputs(config, batch, (16, 24), 7, torch.float32)
    with torch.no_grad():
        conditioning = unet.condition([5.0], context, **added_inputs(config, batch, torch.float32))
        channels_last = sample.contiguous(memory_format=torch.channels_last)
        with CountCopies() as counter:
            out = unet.denoise(channels_last, conditioning, 0)
        assert counter.copies == []
        assert out.is_contiguous(memory_format=torch.channels_last)
        with CountCopies() as counter:
            unet.denoise(sample, conditioning, 0)
        # The counter counts: a contiguous sample is brought into the layout once.
        assert [shape for _, shape in counter.copies] == [tuple(sample.shape)]


def test_activations_stay_channels_last():
    config = CONFIGS["sd15"]
    unet = UNet(config, backend="torch").eval()
    layouts = {}

    def record(name):
        def hook(module, args, output):
            layouts[name] = [
                x.is_contiguous(memory_format=torch.channels_last)
                for x in (args[0], output)
                if isinstance(x, torch.Tensor) and x.ndim == 4
            ]

        return hook

    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
            module.register_forward_hook(record(name))
    sample, context = inputs(config, 2, (16, 16), 3, torch.float32)
    with torch.no_grad():
        unet(sample, 1.0, context)
    assert len(layouts) > 40
    assert all(all(flags) for name, flags in layouts.items() if name != "conv_in")


@pytest.mark.parametrize("name", ["one-layer", *SDXL, "all"])
def test_gradients_equal_diffusers(name):
    config = CONFIGS[name]
    ours, theirs = pair(config, torch.float64)
    sample, context = inputs(config, 2, (8, 8), 5, torch.float64)
    added = added_inputs(config, 2, torch.float64)
    grads = []
    for run in (
        lambda x, c, **added: ours(x, 10.0, c, **added),
        lambda x, c, **added: theirs(x, 10.0, c, **in_diffusers_arguments(added)).sample,
    ):
        given = [x.clone().requires_grad_() for x in (sample, context, *list(added.values())[:1])]
        run(*given[:2], **added | dict(zip(added, given[2:], strict=False))).square().sum().backward()
        grads.append([x.grad for x in given])
    for mine, reference in zip(*grads, strict=True):
        assert relative_rms(mine, reference) < 1e-9
    ours_by_key = diffusers_gradients(ours)
    for key, parameter in theirs.named_parameters():
        assert (ours_by_key[key] - parameter.grad).norm() < 1e-9 * parameter.grad.norm() + 1e-12, key


def test_compiled_fullgraph_equals_eager():
    config = CONFIGS["no-middle"]
    unet, _ = pair(config, torch.float32)
    sample, context = inputs(config, 1, (8, 8), 3, torch.float32)
    with torch.no_grad():
        conditioning = unet.condition([5.0], context)
        compiled = torch.compile(unet.denoise, fullgraph=True, backend="aot_eager")
        assert relative_rms(compiled(sample, conditioning, 0), unet.denoise(sample, conditioning, 0)) < 1e-6


def test_wrong_shapes_are_named():
    config = CONFIGS["one-layer"]
    unet = UNet(config, backend="torch")
    sample, context = inputs(config, 2, (8, 8), 5, torch.float32)
    with pytest.raises(ValueError, match=r"sample must be \[B, 4, H, W\]"):
        unet(sample[:, :3], 1.0, context)
    with pytest.raises(ValueError, match=r"context must be \[B, T, 24\]"):
        unet(sample, 1.0, context[..., :7])
    with pytest.raises(ValueError, match="conditioning's batch"):
        unet(sample, 1.0, context[:1])
    with pytest.raises(ValueError, match="one per sample"):
        unet(sample, torch.zeros(3), context)
    with pytest.raises(ValueError, match="timesteps must be"):
        unet.condition(torch.zeros(4, 3), context)


@pytest.mark.parametrize(
    "step",
    [3, -1, pytest.param(10**5000, id="long"), True, 1.0, None, "1", torch.tensor([1.0]), torch.tensor([0, 1])],
)
def test_a_step_that_the_conditioning_does_not_hold_is_refused(step):
    config = CONFIGS["one-layer"]
    unet = UNet(config, backend="torch")
    sample, context = inputs(config, 2, (8, 8), 5, torch.float32)
    with pytest.raises(ValueError, match=r"step must be a whole number from 0 to 2, .*: make [^\n]*\Z"):
        unet.denoise(sample, unet.condition([1.0, 2.0, 3.0], context), step)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sample": None}, "sample must be .*got None"),
        ({"sample": "x"}, "sample must be .*got str"),
        ({"sample": torch.zeros(2, 4, 0, 8)}, "sample must be .*not empty in H or W"),
        ({"sample": torch.zeros(2, 4, 8, 0)}, "sample must be .*not empty in H or W"),
        ({"context": None}, "context must be .*got None"),
        ({"context": [[[1.0]]]}, "context must be .*got list"),
        ({"timestep": None}, "timesteps must be numbers; got None"),
        ({"timestep": "abc"}, "timesteps must be numbers; got 'abc'"),
        ({"timestep": ["abc"]}, "timesteps must be numbers"),
        ({"timestep": [[1.0, 2.0], [3.0]]}, "timesteps must be numbers"),
        ({"timestep": 1j}, "timesteps must be numbers"),
        ({"timestep": 10**5000}, "timesteps must be numbers"),
        ({"text_embeds": "x"}, "got text_embeds str"),
    ],
)
def test_what_is_no_argument_is_refused_in_one_line(wrong, told):
    config = CONFIGS["one-layer"]
    sample, context = inputs(config, 2, (8, 8), 5, torch.float32)
    arguments = {"sample": sample, "timestep": 1.0, "context": context, **wrong}
    with pytest.raises(ValueError, match=rf"{told}.*: (pass|leave) [^\n]*\Z"):
        UNet(config, backend="torch")(**arguments)


@pytest.mark.parametrize("option", Choices._fields)
@pytest.mark.parametrize("value", ["zzz", None, "Triton"])
def test_an_unknown_backend_is_refused_as_it_is_given(tmp_path, option, value):
    config = CONFIGS["one-layer"]
    told = f"unknown {option} .*: choose one of auto, torch, triton"
    with pytest.raises(ValueError, match=told):
        UNet(config, **{option: value})
    with pytest.raises(ValueError, match=told):
        UNet(config).with_backend(**{"backend": "torch", option: value})


@pytest.mark.parametrize("name", SDXL)
def test_wrong_added_inputs_are_named(name):
    config = CONFIGS[name]
    unet = UNet(config, backend="torch")
    sample, context = inputs(config, 2, (8, 8), 5, torch.float32)
    added = added_inputs(config, 2, torch.float32)
    embeds, sizes = added["text_embeds"], added["time_ids"]
    for wrong in (
        {},
        {"text_embeds": embeds},
        {"time_ids": sizes},
        added | {"text_embeds": embeds[:, :9]},
        added | {"text_embeds": embeds[:1]},
        added | {"text_embeds": embeds[0]},
        added | {"time_ids": sizes[:, :2]},
        added | {"time_ids": sizes[:1]},
        added | {"time_ids": sizes.flatten()},
    ):
        for call in (lambda w: unet(sample, 1.0, context, **w), lambda w: unet.condition([1.0], context, **w)):
            with pytest.raises(
                ValueError, match=r"text_embeds must be \[2, P\] and time_ids \[2, N\] with P \+ 8 N"
            ):
                call(wrong)
    plain = UNet(CONFIGS["one-layer"], backend="torch")
    for wrong in (added, {"text_embeds": embeds}, {"time_ids": sizes}):
        with pytest.raises(
            ValueError, match=r"adds nothing to its time embedding; got text_embeds .*: leave both out"
        ):
            plain(sample, 1.0, context, **wrong)


LABELS = r"class_labels must be \[2\], integers from 0 to 9; got .*: pass one per sample[^\n]*\Z"
WRONG_LABELS = {
    "none": None,
    "too few": [1],
    "too many": torch.tensor([1, 2, 3]),
    "a column": torch.tensor([[1], [2]]),
    "above": torch.tensor([0, 10]),
    "below": [-1, 3],
    "no integers": torch.tensor([1.0, 2.0]),
    "truths": [True, False],
    "words": ["a", "b"],
    "long": [10**5000, 1],
    "one number": 3,
}


@pytest.mark.parametrize("wrong", WRONG_LABELS)
def test_class_labels_that_do_not_fit_are_refused(wrong):
    config = CONFIGS["x4-upscaler"]
    unet = UNet(config, backend="torch")
    sample, context = inputs(config, 2, (8, 8), 3, torch.float32)
    with pytest.raises(ValueError, match=LABELS):
        unet(sample, 1.0, context, class_labels=WRONG_LABELS[wrong])
    with pytest.raises(ValueError, match=LABELS):
        unet.condition([1.0, 2.0], context, class_labels=WRONG_LABELS[wrong])


def test_classes_and_conditions_that_a_network_has_not_are_refused():
    sample, context = inputs(CONFIGS["one-layer"], 2, (8, 8), 3, torch.float32)
    plain, lcm = (UNet(CONFIGS[name], backend="torch") for name in ("one-layer", "lcm"))
    with pytest.raises(ValueError, match=r"has no classes; got class_labels \[2\]: leave them out"):
        plain(sample, 1.0, context, class_labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"takes no timestep_cond; got \[2, 6\]: leave it out"):
        plain(sample, 1.0, context, timestep_cond=torch.zeros(2, 6))
    for wrong in (torch.zeros(2, 5), torch.zeros(1, 6), torch.zeros(6), [[0.0] * 6] * 2):
        with pytest.raises(ValueError, match=r"timestep_cond must be \[2, 6\]; got .*: pass"):
            lcm(sample, 1.0, context, timestep_cond=wrong)


def test_labels_may_be_given_as_numbers_and_a_condition_left_out():
    ours, theirs = pair(CONFIGS["all"], torch.float64)
    sample, context = inputs(ours.config, 2, (8, 8), 3, torch.float64)
    added = added_inputs(ours.config, 2, torch.float64) | {"class_labels": torch.tensor([2, 0])}
    del added["timestep_cond"]
    with torch.no_grad():
        expected = theirs(sample, 5.0, context, **in_diffusers_arguments(added)).sample
        for labels in ([2, 0], (2, 0), torch.tensor([2, 0], dtype=torch.uint8)):
            assert relative_rms(ours(sample, 5.0, context, **added | {"class_labels": labels}), expected) < 1e-9


def test_a_label_that_nobody_checked_makes_its_sample_nan_and_reads_nothing_outside():
    """On a device the host does not wait to read the labels; a compiled call does not read them either."""
    config = CONFIGS["x4-upscaler"]
    unet, _ = pair(config, torch.float32)
    sample, context = inputs(config, 3, (8, 8), 3, torch.float32)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        good = unet(sample, 1.0, context, class_labels=[0, 9, 4])
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = unet(sample, 1.0, context, class_labels=torch.tensor([0, 10, -1]))
    assert relative_rms(found[0], good[0]) < 1e-6
    assert found[1:].isnan().all()


@pytest.mark.parametrize("name", ["sd15", *FEATURES])
def test_a_step_sums_in_place(name):
    config = CONFIGS[name]
    unet = UNet(config, backend="torch").eval()
    sample, context = inputs(config, 1, (8, 8), 3, torch.float32)
    sums = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name().startswith("aten::addmm"):
                # Another one has a vector of biases.
                sums.append(function is torch.ops.aten.addmm_.default or args[0].ndim == 1)
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        conditioning = unet.condition([5.0], context, **added_inputs(config, 1, torch.float32))
        with Sums():
            unet.denoise(sample, conditioning, 0)
    assert len(sums) > 3
    assert all(sums)


def test_a_graphed_run_has_the_bits_of_its_eager_loop():
    """Other labels, conditions and prompts are copied into the memory of one capture."""
    config = dataclasses.replace(CONFIGS["all"], in_channels=4)
    unet, _ = pair(config, torch.float32)
    sampler, tapes = graphed(unet.denoise)
    plan, noise = make_plan("euler", SCHEDULE, 2), torch.randn(2, 4, 8, 8)
    timesteps = [step.timestep for step in plan.steps]
    for _ in range(3):
        _, context = inputs(config, 2, (8, 8), 3, torch.float32)
        conditioning = unet.condition(timesteps, context, **added_inputs(config, 2, torch.float32))
        with torch.no_grad():

            def denoise(x, step, conditioning=conditioning):
                return unet.denoise(x, conditioning, step.index)

            expected = sample(denoise, plan, noise, backend="torch")
        assert torch.equal(sampler(conditioning, plan, noise), expected)
    assert tapes.captured == 1


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mixture_of_features_equals_diffusers(data):
    draw = data.draw
    levels = draw(st.integers(1, 3))
    flags = st.lists(st.booleans(), min_size=levels, max_size=levels).map(tuple)
    heads = draw(st.lists(st.sampled_from((1, 2, 4)), min_size=levels, max_size=levels))
    sdxl = {"added_time_dim": 4, "added_dim": 10 + 3 * 4} if draw(st.booleans()) else {}
    config = UNetConfig(
        block_channels=tuple(draw(st.lists(st.sampled_from((8, 16)), min_size=levels, max_size=levels))),
        num_heads=tuple(heads),
        attention=draw(flags),
        layers_per_block=draw(st.integers(1, 2)),
        has_middle=draw(st.booleans()),
        in_channels=draw(st.sampled_from((4, 7, 9))),
        context_dim=12,
        conv_projection=draw(st.booleans()),
        norm_groups=4,
        transformer_layers=tuple(draw(st.lists(st.integers(1, 2), min_size=levels, max_size=levels))),
        only_cross_attention=draw(st.one_of(st.booleans(), flags)),
        num_class_embeds=draw(st.sampled_from((None, 1, 5))),
        time_cond_proj_dim=draw(st.sampled_from((None, 3))),
        **sdxl,
    )
    ours, theirs = pair(config, torch.float64)
    written = dict(theirs.config) | {"mid_block_only_cross_attention": draw(st.sampled_from((None, True, False)))}
    assert UNetConfig.from_diffusers(written) == config
    assert beyond(config, [tuple(value.shape) for value in theirs.state_dict().values()]) == ""
    batch, size = draw(st.integers(1, 3)), draw(st.sampled_from(((4, 4), (5, 3))))
    assert error(ours, theirs, batch, size, draw(st.integers(0, 3)), draw(st.floats(0, 1000))) < 1e-9


def test_a_step_held_by_a_tensor_is_that_step():
    config = CONFIGS["one-layer"]
    unet, _ = pair(config, torch.float32)
    sample, context = inputs(config, 2, (8, 8), 5, torch.float32)
    with torch.no_grad():
        for timesteps in ([999.0, 640.5, 3.0], torch.tensor([[1.0, 2.0], [700.0, 800.0], [3.0, 4.0]])):
            conditioning = unet.condition(timesteps, context)
            padded = conditioning.padded(8)
            for step in range(3):
                expected = unet.denoise(sample, conditioning, step)
                assert torch.equal(unet.denoise(sample, conditioning, torch.tensor([step])), expected)
                assert torch.equal(unet.denoise(sample, padded, torch.tensor([step])), expected)
        with pytest.raises(ValueError, match="holds 3 steps, more than 2"):
            conditioning.padded(2)


@pytest.mark.parametrize("name", ["one-layer", *SDXL, "all"])
def test_another_backend_works_on_the_same_memory(name):
    config = CONFIGS[name]
    unet, _ = pair(config, torch.bfloat16)
    other = unet.requires_grad_(False).with_backend("auto")
    assert {module.backend for module in other.modules() if hasattr(module, "backend")} == {"auto"}
    assert not other.training
    for (name, mine), (same, theirs) in zip(unet.named_parameters(), other.named_parameters(), strict=True):
        assert name == same
        assert (mine.data_ptr(), mine.stride(), mine.dtype) == (theirs.data_ptr(), theirs.stride(), theirs.dtype)
        assert not theirs.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_no_bias_but_the_last_convolutions_has_a_launch_of_its_own(name):
    """Convolutions get no bias, sums and matrix products take them; what is left are the operators themselves."""
    config = CONFIGS[name]
    unet = UNet(config, backend="torch").eval()
    sample, context = inputs(config, 2, (8, 8), 5, torch.float32)
    biased = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                biased.append(args[2] is not None)
            assert function not in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        conditioning = unet.condition([5.0], context, **added_inputs(config, 2, torch.float32))
        with Calls():
            unet.denoise(sample, conditioning, 0)
    assert biased.count(True) == 1
    assert biased[-1]


def test_constants_that_were_kept_are_those_that_would_be_computed():
    config = CONFIGS["one-layer"]
    unet, _ = pair(config, torch.float32)
    sample, context = inputs(config, 1, (8, 8), 3, torch.float32)
    with torch.no_grad():
        constants = unet.constants()
        kept, fresh = unet.condition([1.0], context, constants=constants), unet.condition([1.0], context)
        assert kept.constants is constants.values
        assert torch.equal(kept.constants, fresh.constants)
        assert torch.equal(unet.denoise(sample, kept, 0), unet.denoise(sample, fresh, 0))
        # Of other weights they are others.
        unet.up[1].transformers[0].blocks[0].ff_out.bias.add_(1.0)
        assert not torch.equal(unet.constants().values, constants.values)
    with pytest.raises(ValueError, match=r"constants must be \["):
        unet.condition([1.0], context, constants=Constants(constants.values[1:]))


def test_every_bias_gets_a_gradient():
    config = CONFIGS["one-layer"]
    unet, _ = pair(config, torch.float32)
    sample, context = inputs(config, 1, (8, 8), 3, torch.float32)
    unet(sample, 1.0, context).square().sum().backward()
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["no-middle", "sdxl-base", "all"])
def test_a_copy_and_a_pickle_are_networks_of_their_own(name):
    config = CONFIGS[name]
    unet, _ = pair(config, torch.float32)
    sample, context = inputs(config, 1, (8, 8), 3, torch.float32)
    added = added_inputs(config, 1, torch.float32)
    with torch.no_grad():
        expected = unet(sample, 1.0, context, **added)
        for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
            assert torch.equal(other(sample, 1.0, context, **added), expected)
            other.conv_in.bias.add_(1.0)
            assert not torch.equal(other(sample, 1.0, context, **added), expected)
        assert torch.equal(unet(sample, 1.0, context, **added), expected)


def test_a_context_of_no_tokens_and_a_batch_of_none():
    config = CONFIGS["sd21"]
    ours, theirs = pair(config, torch.float64)
    assert error(ours, theirs, 2, (8, 8), 0, 5.0) < 1e-9
    sample, context = inputs(config, 2, (8, 8), 0, torch.float64)
    with torch.no_grad():
        assert ours(sample[:0], 5.0, context[:0]).shape == (0, 4, 8, 8)


def test_under_autocast_a_forward_without_gradients_is_that_with_them():
    config = CONFIGS["one-layer"]
    unet, _ = pair(config, torch.float32)
    sample, context = inputs(config, 1, (8, 8), 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = unet(sample, 5.0, context)
        with torch.no_grad():
            assert relative_rms(unet(sample, 5.0, context), expected) < 1e-2
