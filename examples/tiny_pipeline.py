"""A tiny random pipeline as a folder, to try `ldmperf sample` and `rebuild` on without a checkpoint.

    python examples/tiny_pipeline.py [FOLDER]

Needs diffusers and transformers. FOLDER, "tiny-pipeline" unless given, becomes what diffusers' save_pretrained
writes. Its images are noise, of 32x32 pixels unless told.
"""

import string
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from ldmperf.model.pipeline import TextToImage

# Letters, within a word and at its end: every English prompt has its tokens.
LETTERS = [letter + end for letter in string.printable.strip() for end in ("", "</w>")]
TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS]


def tiny_pipeline():
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(TOKENS)}, merges=[], model_max_length=77)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(TOKENS),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
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
        scaling_factor=0.18215,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny-pipeline")
    if folder.exists():
        sys.exit(f"{folder} is there already; name another folder")
    logging.disable_progress_bar()
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    # The same in this process, from the folder and without diffusers.
    made = TextToImage.load(folder)
    latents = torch.randn(1, 4, 16, 16)
    ours = made.decode(latents)
    with torch.no_grad():
        theirs = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    error = (ours - (theirs / 2 + 0.5).clamp(0, 1)).abs().max().item()
    print(f"{folder}: largest error of a decoded image {error:.0e}; try")
    print(f'  ldmperf sample --pipeline {folder} --prompt "a lighthouse" --steps 4 -o lighthouse.png')
    assert error < 1e-4


if __name__ == "__main__":
    main()
