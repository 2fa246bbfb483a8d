"""An evaluation of the UNet for a loop that is not ours: replayed from a capture, or eager."""

from __future__ import annotations

import logging
from collections import deque

import torch
from torch import Tensor

from ldmperf.samplers import Capture, CaptureError, GraphedDenoiser, Graphs

from ..conditioning import Conditioning
from ..unet import UNet

logger = logging.getLogger(__name__)
# Of so many shapes: a run may alternate between two, with guidance and without.
MAX_CAPTURES = 4


def check_graphs(call: str, graphs: object) -> None:
    """Raises ValueError for what is no choice of graphs: "auto", True, False, or how to capture."""
    if graphs != "auto" and not isinstance(graphs, bool) and not hasattr(graphs, "capture"):
        raise ValueError(f'{call}: graphs must be "auto", True or False, or how to capture; got {graphs!r}')


class Evaluation:
    """Calls `unet.denoise`, by captures where `graphs` says so (`PipelineUNet`)."""

    def __init__(self, unet: UNet, graphs: bool | str | Graphs) -> None:
        self._unet, self._graphs = unet, graphs
        self._denoiser: GraphedDenoiser[Conditioning] | None = None
        # Shapes that cannot be captured, tried once.
        self._refused: set[object] = set()
        self._lines: deque[str] = deque(maxlen=16)

    @property
    def captures(self) -> tuple[Capture, ...]:
        return () if self._denoiser is None else self._denoiser.captures

    @property
    def decisions(self) -> tuple[str, ...]:
        return (*self._lines, *(() if self._denoiser is None else self._denoiser.decisions))

    def in_words(self, device: torch.device) -> str:
        """Whether evaluations on a device are captured."""
        if not self._captures_on(device):
            return "none: graphs=False" if self._graphs is False else f"none: {device} captures none"
        which = "every shape" if self._graphs is True else "each shape where it pays"
        return f"{which}; the last {MAX_CAPTURES} are kept"

    def __call__(self, sample: Tensor, conditioning: Conditioning, step: int) -> Tensor:
        """`UNet.denoise` of these, without gradients."""
        shape = (sample.shape, sample.dtype, sample.device)
        if not self._captures_on(sample.device) or shape in self._refused:
            with torch.no_grad():
                return self._unet.denoise(sample, conditioning, step)
        if self._denoiser is None:
            graphs = None if isinstance(self._graphs, bool | str) else self._graphs
            self._denoiser = GraphedDenoiser(
                self._unet.denoise,
                modules=self._unet,
                max_captures=MAX_CAPTURES,
                graphs=graphs,
                eager_unless_worth=self._graphs is not True,
            )
        try:
            return self._denoiser(sample, conditioning, step)
        except CaptureError as error:
            if self._graphs is True:
                raise
            self._refused.add(shape)
            self._lines.append(f"{error}; such calls run eagerly")
            logger.warning("PipelineUNet: %s", self._lines[-1])
        return self(sample, conditioning, step)

    def _captures_on(self, device: torch.device) -> bool:
        if isinstance(self._graphs, bool):
            return self._graphs
        return device.type == "cuda" or self._graphs != "auto"
