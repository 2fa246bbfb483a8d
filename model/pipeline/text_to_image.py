"""`TextToImage`: from prompts to images with a folder's networks and nothing fetched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmperf.samplers import GraphedSampler, Graphs, SamplingPlan, Step, initial_noise, sample

from ..autoencoder import Autoencoder
from ..autoencoder_weights import load_autoencoder
from ..conditioning import Conditioning
from ..fields import shown
from ..loading import check_device, check_dtype
from ..unet import UNet
from ..weights import load_unet
from .estimate import Estimate
from .images import as_bytes, check_finite, save_png
from .part_clock import PartClock, Progress
from .pipeline_folder import PipelineFolder
from .prompts import Embedded, PromptEncoder

USUAL_STEPS = 50


@dataclass(frozen=True)
class Sampled:
    """Images and what they came from.

    pixels   [B, 3, H, W] float32 in [0, 1], on the CPU
    latents  [B, L, h, w] float32, on the pipeline's device
    seconds  host time of each part: "text", "steps" and "decode"
    plan     the sampler's plan that was run
    """

    pixels: Tensor
    latents: Tensor
    seconds: Mapping[str, float]
    plan: SamplingPlan

    @property
    def images(self) -> Tensor:
        """The pixels as uint8 [B, H, W, 3]."""
        return as_bytes(self.pixels)

    def save(self, path: str | Path) -> None:
        """Writes the images, several as one grid, as a PNG file: whole or not at all."""
        save_png(path, self.images)


# preview(step, pixels): [B, 3, H, W] in [0, 1], the image so far.
Preview = Callable[[Step, Tensor], None]


class TextToImage:
    """The networks of a pipeline's folder, loaded; a call makes images of prompts. `folder` is what was read."""

    def __init__(
        self,
        folder: PipelineFolder,
        prompts: PromptEncoder,
        unet: UNet,
        autoencoder: Autoencoder,
        *,
        sampler: str,
        backend: str,
        graphs: Graphs | str,
    ) -> None:
        self.folder = folder
        self.unet = unet
        self.autoencoder = autoencoder
        self.sampler = sampler
        self._prompts = prompts
        self._backend = backend
        self.device = unet.conv_in.weight.device
        is_graphed = self.device.type == "cuda" if graphs == "auto" else graphs != "off"
        self._graphed: GraphedSampler[Conditioning] | None = None
        if is_graphed:
            given = None if isinstance(graphs, str) else graphs
            self._graphed = GraphedSampler(unet.denoise, input_dtype=unet.dtype, backend=backend, graphs=given)

    @classmethod
    def load(
        cls,
        folder: str | Path | PipelineFolder,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        sampler: str | None = None,
        graphs: Graphs | str = "auto",
    ) -> TextToImage:
        """The pipeline in a folder that diffusers' `save_pretrained` wrote: Stable Diffusion 1, 2 or XL's base.

        dtype    float32, bfloat16 or float16; float16 on a GPU and float32 elsewhere unless given
        sampler  a name in `ldmperf.samplers.SAMPLERS`; the folder's own unless given
        graphs   "auto" replays captured steps on a GPU, "off" runs every step; or a `Graphs`, how to capture

        Nothing is fetched, no pickle is opened, no code in the folder is run. Raises PipelineError with every
        fault of the folder before weights are read; ValueError for a device that is not there.
        """
        if isinstance(graphs, str) and graphs not in ("auto", "off"):
            raise ValueError(f"graphs must be 'auto', 'off' or a Graphs, not {shown(graphs)}")
        check_dtype(dtype)
        check_device(device)
        if not isinstance(folder, PipelineFolder):
            folder = PipelineFolder.read(folder, sampler=sampler)
        if sampler is not None:
            folder.plan(1, sampler)
        if dtype is None:
            dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        unet = load_unet(folder.path / "unet", dtype=dtype, device=device, backend=backend)
        # As diffusers: only XL's pipeline decodes in float32 what overflows in float16.
        decoder_dtype = folder.autoencoder.compute_dtype(dtype) if folder.is_xl else dtype
        autoencoder = load_autoencoder(folder.path / "vae", dtype=decoder_dtype, device=device, backend=backend)
        return cls(
            folder,
            PromptEncoder(folder.text, dtype, device),
            unet,
            autoencoder,
            sampler=sampler or folder.sampler,
            backend=backend,
            graphs=graphs,
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int = USUAL_STEPS,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        options: Mapping[str, Any] | None = None,
        clip_skip: int = 0,
        tile: int | None = None,
        progress: Progress | None = None,
        preview: Preview | None = None,
        preview_every: int = 1,
        told: Callable[[str], None] | None = None,
    ) -> Sampled:
        """One image for each seed, with the prompt at its place; one prompt or negative prompt serves all.

        guidance_scale   w in uncond + w (cond - uncond); up to 1 it is off. 7.5, or 5 of XL, unless given
        height, width    in pixels, multiples of 8 (of the autoencoder's scale); the network's own unless given
        sampler          another than the pipeline's; options of `make_plan`, over those of scheduler_config.json
        clip_skip        how many of the text encoder's last layers are left out, for the prompts
        tile             decodes in tiles of so many pixels, for large images
        progress         called as progress(part, done, total)
        preview          called as preview(step, pixels) every `preview_every` steps with the image so far. Steps
                         then run without graphs
        told             called with a line for a prompt that was cut; warnings.warn unless given

        A seed gives the same image alone and in any batch, up to rounding. The noise is Philox's: other programs
        make other images of it. Raises ValueError, in one line, for what does not fit, and FloatingPointError for
        latents or an image with NaN, as where float16 overflows.
        """
        many = [seeds] if isinstance(seeds, int) else list(seeds)
        if not many:
            raise ValueError("seeds must be a list of integers, one per image, not []")
        if type(preview_every) is not int or preview_every < 1:
            raise ValueError(f"preview_every must be a whole number of at least 1, not {shown(preview_every)}")
        texts = _of_all("prompts", prompts, len(many))
        against = None if negative_prompt is None else _of_all("negative_prompt", negative_prompt, len(many))
        height, width = self.folder.side("height", height), self.folder.side("width", width)
        self.folder.check_clip_skip(clip_skip)
        if tile is not None:
            tile = self.folder.side("tile", tile)
        plan = self.folder.plan(steps, sampler or self.sampler, options)
        scale = self.folder.usual_guidance if guidance_scale is None else guidance_scale
        if not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise ValueError(f"guidance_scale must be a number of at least 0, not {shown(guidance_scale)}")
        is_guided = scale > 1.0
        told = told or _warn
        if against is not None and not is_guided:
            told(f"negative_prompt has no effect: guidance_scale = {scale:g} is no guidance")
        clock = PartClock(self.device, progress)
        with clock.part("text", 1):
            embedded = self._embedded(texts, against if is_guided else None, is_guided, clip_skip, told)
            conditioning = self._conditioning(plan, embedded, height, width)
        small = height // self.autoencoder.config.scale, width // self.autoencoder.config.scale
        noise = initial_noise(many, (self.unet.config.in_channels, *small), device=self.device)
        with clock.part("steps", len(plan.steps)) as count:
            latents = self._run(
                plan, noise, conditioning, scale if is_guided else None, many, count, preview, preview_every, tile
            )
        with clock.part("decode", 1):
            pixels = self.decode(latents, tile=tile)
        check_finite(latents, self.unet.dtype, pixels, self.autoencoder.dtype, many)
        return Sampled(pixels, latents, clock.seconds, plan)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1] on the CPU: the images of latents [B, L, h, w]. `tile` as of a call."""
        config, factor = self.autoencoder.config, self.folder.scaling_factor
        scaled = latents.float() / factor
        # As diffusers: the pipelines of 1 and 2 know no statistics of latents.
        if self.folder.is_xl and config.latents_mean is not None and config.latents_std is not None:
            mean, std = (
                latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
            )
            scaled = latents.float() * std / factor + mean
        given = scaled.to(self.autoencoder.dtype)
        if tile is None:
            images = self.autoencoder.decode(given)
        else:
            images = self.autoencoder.decode_tiled(given, tile=tile // config.scale)
        return (images.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _embedded(
        self,
        texts: Sequence[str],
        against: Sequence[str] | None,
        is_guided: bool,
        clip_skip: int,
        told: Callable[[str], None],
    ) -> Embedded:
        """The embeddings of the images' prompts, with guidance those of what they are guided from before them."""
        embedded = self._prompts.encode(texts, clip_skip=clip_skip, told=told)
        if not is_guided:
            return embedded
        if against is None and self.folder.zeros_for_nothing:
            return embedded.after(embedded.zeros)
        return embedded.after(self._prompts.encode(against or [""] * len(texts), told=told))

    def _conditioning(self, plan: SamplingPlan, embedded: Embedded, height: int, width: int) -> Conditioning:
        if embedded.pooled is None:
            return self.unet.condition(plan.timesteps.tolist(), embedded.states)
        # Original size, crop from the top left, target size.
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device)
        return self.unet.condition(
            plan.timesteps.tolist(),
            embedded.states,
            text_embeds=embedded.pooled,
            time_ids=sizes.expand(embedded.pooled.shape[0], -1),
        )

    def _run(
        self,
        plan: SamplingPlan,
        noise: Tensor,
        conditioning: Conditioning,
        guidance_scale: float | None,
        seeds: Sequence[int],
        count: Callable[[], None],
        preview: Preview | None,
        preview_every: int,
        tile: int | None,
    ) -> Tensor:
        """The latents: by replayed steps, or step by step where there are no graphs or previews are due."""
        if self._graphed is not None and preview is None:
            return self._graphed(
                conditioning,
                plan,
                noise,
                guidance_scale=guidance_scale,
                seeds=seeds,
                callback=lambda step, latents: count(),
            )
        estimate = Estimate(plan, noise, guidance_scale)

        def denoise(model_input: Tensor, step: Step) -> Tensor:
            return estimate.saw(self.unet.denoise(model_input, conditioning, step.index))

        def after(step: Step, latents: Tensor) -> None:
            count()
            estimate.moved(latents)
            # The last step's estimate is about to be the image itself.
            if preview is not None and (step.index + 1) % preview_every == 0 and step.index + 1 < len(plan.steps):
                preview(step, self.decode(estimate.clean(step), tile=tile))

        return sample(
            denoise,
            plan,
            noise,
            guidance_scale=guidance_scale,
            seeds=seeds,
            callback=after,
            input_dtype=self.unet.dtype,
            backend=self._backend,
        )


def _of_all(name: str, given: str | Sequence[str], count: int) -> list[str]:
    texts = [given] * count if isinstance(given, str) else list(given)
    if len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be one text, or one for each of the {count} seeds, not {shown(given)}")
    return texts


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)
