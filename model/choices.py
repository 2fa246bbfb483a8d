"""Which operators compute a network."""

from __future__ import annotations

from typing import NamedTuple

from .arguments import check_backend


class Choices(NamedTuple):
    """Each "auto", "torch" or "triton"; with `backend` "torch" all others are.

    backend       of every operator that replaces no faster one of torch's (`ldmperf.kernels`)
    products      matmuls merged with their norm or gate (`linear`)
    convolutions  3x3 convolutions with what stands beside them (`conv3x3`)
    tails         what follows a transformer's self-attention, in one launch (`transformer_tail`)
    statistics    left beside an image for its next norm: "auto" where convolutions or tails of ours write it,
                  "triton" by sums too, "torch" nowhere

    "auto" takes our kernel where it was measured or is predicted to be faster, "triton" wherever it can serve.
    """

    backend: str = "auto"
    products: str = "auto"
    convolutions: str = "auto"
    tails: str = "auto"
    statistics: str = "auto"

    def checked(self) -> Choices:
        """These choices. Raises ValueError for a value that is none of the three."""
        for option, value in zip(self._fields, self, strict=True):
            check_backend(option, value)
        return Choices(*["torch"] * len(self)) if self.backend == "torch" else self


AUTO = Choices()
# Nothing is merged.
SEPARATE = Choices("auto", *["torch"] * 4)
