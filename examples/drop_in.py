"""The kernels in a diffusers pipeline in one line, what they replace, and back.

    python examples/drop_in.py

Needs diffusers. The UNet and the VAE are small and random; a pipeline goes in as it is: accelerate(pipe).
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ldmperf.model.dropin import accelerate


def models():
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return unet.eval(), vae.eval()


@torch.inference_mode()
def image(unet, vae, noise, text):
    """Three steps towards an image, and the decoder."""
    x = noise
    for timestep in (900, 500, 100):
        x = x - 0.3 * unet(x, timestep, text).sample
    return vae.decode(x).sample


def main():
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    unet, vae = models()
    # Channels-last is the layout that the kernels read in whole pieces; others work too.
    unet.to(memory_format=torch.channels_last)
    noise, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 48)
    before = image(unet, vae, noise, text)

    with accelerate(unet) as report, accelerate(vae):
        during = image(unet, vae, noise, text)
        print(report)

    after = image(unet, vae, noise, text)
    error = ((during - before).norm() / before.norm()).item()
    print(f"\nrelative error with the kernels {error:.0e}, after the undo {(after - before).abs().max().item()}")
    assert error < 1e-3
    assert torch.equal(after, before)


if __name__ == "__main__":
    main()
