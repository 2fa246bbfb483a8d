"""Our UNet, sampler and autoencoder in a diffusers pipeline in one line, the images beside its own, and back.

    python examples/pipelines.py

Needs diffusers and transformers. The pipeline is small and random; yours goes in as it is: rebuild(pipe).
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from ldmperf.model.dropin import rebuild


def small_pipeline():
    unet = UNet2DConditionModel(
        sample_size=8,
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
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(unet=unet, vae=vae, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, text, noise):
    """Two images; with a text encoder a prompt stands in place of its embedding."""
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        latents=noise,
        num_inference_steps=4,
        output_type="pt",
    ).images


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = small_pipeline().to(device)
    text, noise = torch.randn(2, 77, 48).to(device), torch.randn(2, 4, 8, 8).to(device)
    before = images(pipe, text, noise)

    with rebuild(pipe) as rebuilt:
        during = images(pipe, text, noise)
        print(rebuilt)

    after = images(pipe, text, noise)
    error = ((during - before).norm() / before.norm()).item()
    print(f"\nrelative error of ours {error:.0e}, after the undo {(after - before).abs().max().item()}")
    assert error < 1e-3
    assert torch.equal(after, before)


if __name__ == "__main__":
    main()
