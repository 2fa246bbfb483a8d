"""The UNet on the kernels, in the interpreter, against the same network on the reference operators."""

import pytest
import torch

from ldmperf.kernels import _recipes, group_norm
from ldmperf.kernels.group_norm import GroupNormConfig
from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import NoiseSchedule, initial_noise, make_plan, sample

SMALL = {"norm_groups": 4, "context_dim": 12, "layers_per_block": 1}
CONFIGS = {
    # Shortcuts and their absence, transformers and their absence at each kind of place, odd widths.
    "two-levels": UNetConfig((8, 16), (1, 2), (True, False), has_middle=False, **SMALL),
    "same-width": UNetConfig((12, 12), (1, 1), (False, True), has_middle=False, **SMALL),
    "one-level": UNetConfig((8,), (1,), (True,), **SMALL),
    # Wide enough for convolutions of ours.
    "wide": UNetConfig((16, 32), (2, 2), (True, False), has_middle=False, **SMALL),
}


def networks(config, dtype, products="triton", **choices):
    torch.manual_seed(0)
    reference = UNet(config, backend="torch").to(dtype).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return reference, reference.with_backend("triton", products, **choices)


def relative_rms(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("products", ["torch", "triton"])
@pytest.mark.parametrize(("name", "size"), [("two-levels", (3, 5)), ("same-width", (4, 4)), ("one-level", (2, 3))])
def test_equals_the_reference_network(name, size, products):
    config = CONFIGS[name]
    reference, ours = networks(config, torch.float32, products)
    x, context = torch.randn(2, config.in_channels, *size), torch.randn(2, 5, config.context_dim)
    timesteps = [981.0, 3.5]
    with torch.no_grad():
        exact, found = (unet.condition(timesteps, context) for unet in (reference, ours))
        for step, held in enumerate((0, torch.tensor([1]))):
            out = ours.denoise(x, found, held)
            assert relative_rms(out, reference.denoise(x, exact, step)) < 5e-6


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched; a group norm in chunks, as of large images."""
    names, real = [], _recipes._BoundLaunch.run

    def run(bound, tensors):
        names.append(bound.kernel.__name__)
        real(bound, tensors)

    monkeypatch.setattr(_recipes._BoundLaunch, "run", run)
    monkeypatch.setattr(
        group_norm, "default_config", lambda shape, chip: GroupNormConfig(shape.num_groups, 64, 4, 1)
    )
    _recipes.ByLayout.forget()
    yield names
    _recipes.ByLayout.forget()


@pytest.mark.parametrize("statistics", ["torch", "auto", "triton"])
@pytest.mark.parametrize("convolutions", ["torch", "triton"])
@pytest.mark.parametrize("tails", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_every_combination_of_what_can_be_merged(launched, dtype, tails, convolutions, statistics):
    config = CONFIGS["wide"]
    exact, _ = networks(config, torch.float32)
    reference, ours = networks(config, dtype, convolutions=convolutions, tails=tails, statistics=statistics)
    exact.load_state_dict({name: value.float() for name, value in reference.state_dict().items()})
    # More pixels than a group norm takes in one launch.
    x, context = torch.randn(1, 4, 17, 18).to(dtype), torch.randn(1, 5, config.context_dim).to(dtype)
    with torch.no_grad():
        expected = exact(x.float(), 500.0, context.float())
        error = relative_rms(ours(x, 500.0, context), expected)
        assert error < 1.2 * max(relative_rms(reference(x, 500.0, context), expected), 4e-6)
    assert any("conv3x3" in name for name in launched) == (convolutions == "triton")
    assert ("transformer_tail_kernel" in launched) == (tails == "triton")
    # The front needs statistics of the ResBlock before it.
    before = statistics == "triton" or (statistics == "auto" and convolutions == "triton")
    assert ("transformer_front_kernel" in launched) == (tails == "triton" and before)
    left = statistics == "triton" or (statistics == "auto" and "triton" in (convolutions, tails))
    assert ("group_norm_given_kernel" in launched) == left


def test_half_precision_errs_no_more_than_the_reference_does():
    config, dtype = CONFIGS["two-levels"], torch.float16
    reference, ours = networks(config, dtype)
    exact, _ = networks(config, torch.float32)
    exact.load_state_dict({name: value.float() for name, value in reference.state_dict().items()})
    x, context = torch.randn(2, 4, 4, 4).to(dtype), torch.randn(2, 5, config.context_dim).to(dtype)
    with torch.no_grad():
        expected = exact(x.float(), 500.0, context.float())
        error = relative_rms(ours(x, 500.0, context), expected)
        assert error < 1.5 * relative_rms(reference(x, 500.0, context), expected)


def test_a_trajectory_on_the_kernels():
    config = CONFIGS["one-level"]
    reference, ours = networks(config, torch.float32)
    schedule = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "steps_offset": 1})
    plan, noise = make_plan("dpmpp_2m", schedule, 2), initial_noise([7], (4, 3, 4))
    context = torch.randn(2, 5, config.context_dim)
    results = []
    with torch.no_grad():
        for unet, backend in ((reference, "torch"), (ours, "triton")):
            conditioning = unet.condition([step.timestep for step in plan.steps], context)

            def denoise(x, step, unet=unet, conditioning=conditioning):
                return unet.denoise(x, conditioning, step.index)

            results.append(sample(denoise, plan, noise, guidance_scale=5.0, backend=backend))
    assert relative_rms(results[1], results[0]) < 1e-5


def test_batch_invariant_an_image_has_the_same_bits_alone_and_beside_another():
    """On the kernels, whose plans are then those of one image."""
    config = CONFIGS["two-levels"]
    unet = networks(config, torch.float32)[1].with_backend("triton", "triton", batch_invariant=True)
    x, context = torch.randn(2, 4, 3, 5), torch.randn(2, 5, config.context_dim)
    timesteps = torch.tensor([981.0, 3.5])
    with torch.no_grad():
        found = unet(x, timesteps, context)
        for i in range(2):
            assert torch.equal(found[i : i + 1], unet(x[i : i + 1], timesteps[i], context[i : i + 1]))
