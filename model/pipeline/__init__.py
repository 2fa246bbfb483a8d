"""From a prompt to an image, with the network, the samplers and the autoencoder of this project alone.

    pipeline = TextToImage.load("./stable-diffusion-v1-5")
    pipeline("a lighthouse", 7).save("lighthouse.png")

Text encoders, tokenizers and image files are transformers' and Pillow's (the extra `sample`).
"""

try:
    import PIL  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"ldmperf.model.pipeline needs transformers and pillow: pip install transformers pillow ({error})"
    ) from None

from .images import as_bytes, read_texts, save_png
from .pipeline_folder import PipelineError, PipelineFolder
from .text_to_image import Sampled, TextToImage

__all__ = [
    "PipelineError",
    "PipelineFolder",
    "Sampled",
    "TextToImage",
    "as_bytes",
    "read_texts",
    "save_png",
]
