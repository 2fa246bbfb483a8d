"""The miniature family: the project's own UNet in five widths, whose FLOPs span the paper's 0.07 to 1."""

from __future__ import annotations

from dataclasses import dataclass

from ldmperf.model import UNetConfig
from ldmperf.samplers import NoiseSchedule

from .captions import CONTEXT_DIM
from .latents import CHANNELS, PATCH

# Stable Diffusion's noise; of a v prediction, as one of epsilon fails at latents so small.
SCHEDULE = NoiseSchedule.from_diffusers(
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
    }
)


@dataclass(frozen=True)
class World:
    """A latent size, the widths trained at it, and what each level of a network multiplies its width by."""

    latent: int
    widths: tuple[int, ...]
    levels: tuple[int, ...]
    attention: tuple[bool, ...]

    @property
    def name(self) -> str:
        """The world's name in records; a change of scenes, latents or captions is another version."""
        return f"scenes-{self.latent}x{self.latent}-v1"

    @property
    def side(self) -> int:
        """Of an image, in pixels."""
        return PATCH * self.latent

    def config(self, width: int, in_channels: int = CHANNELS) -> UNetConfig:
        """The network of a width; 8 input channels are those of super-resolution."""
        return UNetConfig(
            block_channels=tuple(width * level for level in self.levels),
            num_heads=(2,) * len(self.levels),
            attention=self.attention,
            layers_per_block=1,
            context_dim=CONTEXT_DIM,
            in_channels=in_channels,
            norm_groups=4,
            sample_size=self.latent,
        )


# The first is for CPUs; the second wants a GPU.
WORLDS = {
    8: World(8, (8, 12, 16, 24, 32), (1, 2), (True, False)),
    16: World(16, (16, 24, 32, 48, 64), (1, 2, 4), (True, True, False)),
}
