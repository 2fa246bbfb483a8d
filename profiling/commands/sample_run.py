"""`SampleRun`: what `ldmperf sample` does once its call is right: loads, samples, writes."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure.checkout import checkout
from ..options import CaseError
from ..terminal.counting import counting
from ..terminal.visible import console, counted, say
from ..trajectory.checkpoints import weights_sha256
from .sample_files import PREVIEW_KEYWORD, OutFiles
from .sample_settings import SampleSettings
from .sample_texts import texts_of
from .shared import stop, tell

if TYPE_CHECKING:
    from torch import Tensor

    from ldmperf.model.pipeline import PipelineFolder, Sampled, TextToImage
    from ldmperf.samplers import SamplingPlan, Step


@dataclass
class SampleRun:
    """One call of the command: its images in batches, a file of one image written as soon as it is made.

    preview: after how many steps the image so far is written, None for never. known: the digests of weights that
    another file of the same image tells, None without one.
    """

    folder: PipelineFolder
    settings: SampleSettings
    files: OutFiles
    device: str
    preview: int | None
    known: Any
    written: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)

    def make(self) -> None:
        """Makes and writes all images; ends the command where one cannot be made."""
        from ..measure.outcomes import failure

        if self.folder.has_checker:
            tell(f"{self.folder.name}: its safety checker is not run")
        try:
            self._make()
        except (OSError, CaseError):
            raise
        except Exception as error:
            status, message = failure(error)
            if status == "oom":
                message += "; give a smaller --batch, --height and --width, a --tile, or --dtype float16"
            stop(message, 1)

    def _make(self) -> None:
        import torch

        from ldmperf.model.pipeline import TextToImage

        settings, images = self.settings, self.settings.images
        # Without a GPU there is nothing to choose, and no line on it.
        backend = "torch" if self.device == "cpu" else "auto"
        facts = self._facts(backend)
        network = TextToImage.load(
            self.folder,
            dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
            device=self.device,
            backend=backend,
            sampler=settings.sampler,
        )
        dtype = str(network.unet.dtype).removeprefix("torch.")
        self.settings = settings = settings.model_copy(update={"dtype": dtype})
        plan = self.folder.plan(settings.steps, settings.sampler, settings.sampler_options)
        batches = [images[at : at + settings.batch] for at in range(0, len(images), settings.batch)]
        made: list[Tensor] = []
        with counting(console(stderr=True), len(batches) * len(plan.steps), "steps") as count:
            for number, batch in enumerate(batches):
                new = self._sampled(network, batch, number * settings.batch, count)
                self.seconds.update(new.seconds)
                if self.files.is_grid:
                    made += new.images
                    continue
                for image, pair in zip(new.images, batch, strict=True):
                    self._write(self.files.names[self.written], image[None], [pair], plan, facts, new.seconds)
        if self.files.is_grid:
            self._write(self.files.names[0], torch.stack(made), images, plan, facts, self.seconds)
        if self.preview is not None:
            self.files.preview.unlink(missing_ok=True)
        self._tell_end(len(images))

    def _sampled(
        self, network: TextToImage, batch: Sequence[tuple[str, int]], before: int, count: Callable[[str], None]
    ) -> Sampled:
        """The images of one batch, made with their progress and previews."""
        from ldmperf.model.pipeline import as_bytes, save_png

        def previewed(_: Step, pixels: Tensor) -> None:
            save_png(self.files.preview, as_bytes(pixels), {PREVIEW_KEYWORD: of_all.removesuffix(": ")})

        settings = self.settings
        last = before + len(batch)
        which = f"image {last}" if len(batch) == 1 else f"images {before + 1} to {last}"
        of_all = f"{which} of {len(settings.images)}: "

        def progress(part: str, done: int, total: int) -> None:
            if done and part == "steps":
                count(f"{of_all}step {done} of {total}")

        return network(
            [prompt for prompt, _ in batch],
            [seed for _, seed in batch],
            negative_prompt=settings.negative_prompt,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            options=settings.sampler_options,
            clip_skip=settings.clip_skip,
            tile=settings.tile,
            progress=progress,
            preview=None if self.preview is None else previewed,
            preview_every=self.preview or 1,
            told=self._tell_once,
        )

    def _write(
        self,
        path: Path,
        images: Tensor,
        pairs: Sequence[tuple[str, int]],
        plan: SamplingPlan,
        facts: dict[str, Any],
        seconds: Mapping[str, float],
    ) -> None:
        """Writes one file of images [B, H, W, 3] of these prompts and seeds; `seconds`: of their batches."""
        from ldmperf.model.pipeline import save_png

        prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
        columns = None if len(prompts) == 1 else len(self.settings.seeds)
        of_file = self.settings.model_copy(
            update={"prompts": prompts, "seeds": list(dict.fromkeys(seed for _, seed in pairs))}
        )
        save_png(path, images, texts_of(of_file, plan, facts, seconds), columns)
        self.written += 1

    def _facts(self, backend: str) -> dict[str, Any]:
        """What the file says beside the settings."""
        commit, is_dirty = checkout()
        paths = {"unet": self.folder.path / "unet", "vae": self.folder.path / "vae"}
        paths |= {part.weights.parent.name: part.weights for part in self.folder.text}
        digests = {name: weights_sha256(path, tell, "--pipeline") for name, path in paths.items()}
        if self.known is not None and self.known != digests:
            tell(f"{self.folder.name}: other weights than those of the image that --again names")
        return {
            "pipeline": self.folder.name,
            "class": self.folder.class_name,
            "device": self.device,
            "backend": backend,
            "version": metadata.version("ldmperf"),
            "commit": commit,
            "dirty": is_dirty,
            "torch": metadata.version("torch"),
            "python": platform.python_version(),
            "weights_sha256": digests,
        }

    def _tell_once(self, line: str) -> None:
        # Each batch has the same prompts, and two encoders may cut one alike.
        if line not in self.told:
            self.told.add(line)
            tell(line)

    def _tell_end(self, count: int) -> None:
        settings = self.settings
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        where = (
            str(self.files.names[0])
            if self.files.is_grid
            else f"{self.files.pattern}, {len(self.files.names)} files"
        )
        say(
            console(),
            f"{where}: {counted(count, 'image')} of {settings.width}x{settings.height}, {settings.steps} steps of "
            f"{settings.sampler}, {sum(self.seconds.values()):.1f} s ({parts})",
        )
