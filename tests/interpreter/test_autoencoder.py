"""The autoencoder on the kernels, in the interpreter, against the same network on the reference operators."""

import pytest
import torch

from ldmperf.model import Autoencoder, AutoencoderConfig, autoencoder_state_dict

CONFIG = AutoencoderConfig((8, 12), layers_per_block=1, norm_groups=4, latent_channels=3, sample_size=6)


def networks(dtype):
    torch.manual_seed(0)
    reference = Autoencoder(CONFIG, backend="torch").to(dtype).eval()
    ours = Autoencoder(CONFIG, backend="triton").to(dtype).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, value in autoencoder_state_dict(ours).items():
            value.copy_(autoencoder_state_dict(reference)[key])
    return reference, ours


def relative_rms(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


@torch.no_grad()
def test_equals_the_reference_network():
    reference, ours = networks(torch.float32)
    latents, image = torch.randn(2, 3, 2, 3), torch.randn(1, 3, 5, 6)
    assert relative_rms(ours.decode(latents), reference.decode(latents)) < 5e-6
    for found, exact in zip(ours.encode(image), reference.encode(image), strict=True):
        assert relative_rms(found, exact) < 5e-6


@torch.no_grad()
def test_half_precision_errs_no_more_than_the_reference_does():
    reference, ours = networks(torch.float16)
    exact, _ = networks(torch.float64)
    exact.load_state_dict({name: value.double() for name, value in reference.state_dict().items()})
    latents = torch.randn(1, 3, 3, 3).half()
    expected = exact.decode(latents.double())
    error = relative_rms(ours.decode(latents), expected)
    assert error < 1.5 * relative_rms(reference.decode(latents), expected)


@torch.no_grad()
@pytest.mark.parametrize(("width", "kernel"), [(384, "triton"), (388, "torch"), (6, "torch")])
def test_attention_of_a_head_that_no_kernel_serves_is_torchs(width, kernel):
    """Stable Diffusion's head is as wide as its image has channels, 512."""
    ours = Autoencoder(AutoencoderConfig((width,), 1, norm_groups=2), backend="triton")
    assert ours.decoder.middle.transformers[0].backend == kernel
    if width == 6:
        assert ours.decode(torch.randn(1, 4, 2, 2)).isfinite().all()
