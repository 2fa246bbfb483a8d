"""The decode that a profile with --with-decoder times beside every case."""

from __future__ import annotations

from ..options import CaseError
from ..trajectory.case import Case
from .rival import LATENT_DECODER, RIVALS


def decoder_case(case: Case) -> Case | None:
    """The decode of the case's batch, a case of its own, eager; None where the case's samples are images.

    The family's latents go to Stable Diffusion's decoder, a masked transformer's tokens to aMUSEd's.
    """
    if case.task == "pipeline":
        return None
    decoder = LATENT_DECODER if case.task != "rival" else RIVALS[case.unet].decoder
    if decoder is None:
        return None
    return Case(
        unet=decoder,
        task="rival",
        sampler="none",
        steps=1,
        batch=case.batch,
        guidance_scale=1.0,
        dtype=case.dtype,
        device=case.device,
        latent_height=case.latent_height,
        latent_width=case.latent_width,
        context_tokens=0,
        backend="eager",
    )


def check_decoders() -> None:
    """Raises CaseError where decoders cannot be made."""
    # Loads torch.
    from ..measure.outcomes import Unsupported
    from ..peer import import_diffusers

    try:
        import_diffusers()
    except Unsupported as reason:
        raise CaseError(f"--with-decoder: {reason}") from None
