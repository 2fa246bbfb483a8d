"""The command `ldmperf sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import CaseError, best_device, device_named, dtype_named
from ..terminal.visible import counted
from .sample_files import out_files
from .sample_run import SampleRun
from .sample_settings import (
    SampleSettings,
    guidance_of,
    kept_settings,
    sampler_options_of,
    seeds_of,
    settings_of,
)
from .shared import list_option, stop, tell, terminated_as_interrupted, whole_option

if TYPE_CHECKING:
    from ldmperf.model.pipeline import PipelineFolder


def sample(
    *,
    pipeline: Annotated[
        Path,
        typer.Option(help="A folder that diffusers' save_pretrained wrote: Stable Diffusion 1, 2 or XL's base."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The PNG file; with {seed} in its name one for each image, with {prompt} the prompt's number.",
            metavar="FILE.png",
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeat it for more prompts.", metavar="TEXT")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from.", metavar="TEXT")
    ] = None,
    seed: list_option("Seeds, as in 7, 1,2,3 or 1-4; 0 unless told.") = None,  # type: ignore[valid-type]
    steps: Annotated[int | None, whole_option("Sampling steps; 50 unless told.", 1)] = None,
    guidance_scale: Annotated[
        str | None,
        typer.Option(help="Up to 1 is without guidance; 7.5, or 5 of XL, unless told.", metavar="NUMBER"),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, dpmpp_2m, ...; the folder's own unless told.", metavar="NAME")
    ] = None,
    sampler_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Over scheduler_config.json, as in use_karras_sigmas=true; repeat it.", metavar="NAME=VALUE"
        ),
    ] = None,
    height: Annotated[int | None, whole_option("Pixels; the network's own unless told.", 1)] = None,
    width: Annotated[int | None, whole_option("Pixels; the network's own unless told.", 1)] = None,
    clip_skip: Annotated[int | None, whole_option("Last layers of the text encoder to leave out.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16; float16 on a GPU, else float32.", metavar="NAME"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N; cuda where there is one.", metavar="NAME")
    ] = None,
    batch: Annotated[int | None, whole_option("Images made at once; 1 unless told.", 1)] = None,
    tile: Annotated[
        int | None, whole_option("Decode large images in tiles of so many pixels, to save memory.", 1)
    ] = None,
    preview: Annotated[
        int | None,
        whole_option("Write the image so far beside the output, FILE.preview.png, every so many steps.", 1),
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option(help="Take what is not told from a PNG file of this command.", metavar="FILE.png"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Make images of prompts with a local pipeline, as PNG files.

    Several images go into one grid, or a file each where the name holds {seed}. The file keeps the settings, as
    web UIs read them and as JSON, from which --again makes the same pixels; it needs --pipeline, as the file holds
    the weights' digests and not their place. A seed gives the same image on every device, alone and in any batch,
    up to rounding; other programs make other images of it. The folder is checked before anything big is read, and
    every fault is told. Nothing is fetched, no pickle is opened, no code in the folder is run, nor is its safety
    checker. A file that is there is replaced only with --force. On a CPU it takes minutes. Needs transformers and
    pillow: pip install transformers pillow.

    \b
    Examples:
      ldmperf sample --pipeline ./stable-diffusion-v1-5 --prompt "a lighthouse" -o lighthouse.png
      ldmperf sample --pipeline ./sdxl --prompt "a lighthouse" --seed 1-4 --batch 4 --steps 30 -o grid.png
      ldmperf sample --pipeline ./sd21 --prompt "a lighthouse" --seed 1-4 --preview 5 -o "lighthouse-{seed}.png"
      ldmperf sample --pipeline ./sdxl --again grid.png --seed 3 --height 1536 --width 1536 --tile 512 -o large.png
    """
    try:
        from ldmperf.model.pipeline import PipelineError, PipelineFolder
    except ImportError as missing:
        stop(str(missing), 1)
    given = {
        "prompts": list(dict.fromkeys(prompt)) if prompt else None,
        "negative_prompt": negative_prompt,
        "seeds": None if seed is None else seeds_of(seed),
        "steps": steps,
        "guidance_scale": None if guidance_scale is None else guidance_of(guidance_scale),
        "sampler": sampler,
        "sampler_options": None if sampler_option is None else sampler_options_of(sampler_option),
        "height": height,
        "width": width,
        "clip_skip": clip_skip,
        "dtype": None if dtype is None else dtype_named(dtype),
        "batch": batch,
        "tile": tile,
    }
    kept = {} if again is None else kept_settings(again)
    settings = settings_of(given, kept)
    on = best_device() if device is None else device_named(device)
    files = out_files(out, settings, previews=preview is not None, force=force)
    try:
        folder = PipelineFolder.read(
            pipeline, sampler=settings.sampler, steps=settings.steps, options=settings.sampler_options
        )
    except PipelineError as error:
        *first, last = error.faults
        for fault in first:
            tell(f"ldmperf: {fault}")
        stop(last, 2)
    settings = _resolved(settings, folder)
    run = SampleRun(folder, settings, files, on, preview, kept.get("weights_sha256"))
    try:
        with terminated_as_interrupted():
            run.make()
    except KeyboardInterrupt:
        stop(f"stopped; {counted(run.written, 'file')} of {len(files.names)} written", 130)


def _resolved(settings: SampleSettings, folder: PipelineFolder) -> SampleSettings:
    """The settings with what the folder says where they say nothing. Raises CaseError."""
    own = {
        "sampler": settings.sampler or folder.sampler,
        "guidance_scale": folder.usual_guidance if settings.guidance_scale is None else settings.guidance_scale,
    }
    for name in ("height", "width", *(("tile",) if settings.tile is not None else ())):
        try:
            own[name] = folder.side(name, getattr(settings, name))
        except ValueError as wrong:
            raise CaseError(f"--{wrong}") from None
    try:
        folder.check_clip_skip(settings.clip_skip)
    except ValueError as wrong:
        raise CaseError(f"--clip-skip: {wrong}") from None
    return settings.model_copy(update=own)
