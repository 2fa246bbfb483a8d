"""The backends of a pipeline: diffusers' own, with our kernels, compiled, and on our networks; then ours alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldmperf.model import Conditioning
from ldmperf.samplers import Capture, CaptureError, CudaGraphs, GraphedSampler, Graphs, sample

from ..measure.outcomes import Unsupported
from ..trajectory.backend import Backend, Trajectory
from ..trajectory.ours import capture_phases, kept_constants
from ..trajectory.theirs import CompileMode, compiled, fuse_projections, inductor_options
from .components import NumberTokenizer
from .part_marks import PartMarks
from .pipeline_problem import PipelineInputs, PipelineProblem

_COMPILE_MODE: CompileMode = "reduce-overhead"


@dataclass(frozen=True)
class PartedTrajectory:
    """Calls that tell what each of their parts took (`Parted`), and what captures did (`Phased`)."""

    call: Callable[[PipelineInputs], Tensor]
    marks: PartMarks
    captures: Callable[[], Sequence[Capture]] = tuple

    def __call__(self, inputs: PipelineInputs) -> Tensor:
        self.marks.start()
        images = self.call(inputs)
        self.marks.end("rest")
        return images

    @property
    def parts(self) -> Mapping[str, float]:
        """Milliseconds of the last call's parts, by `PARTS`."""
        return self.marks.parts

    @property
    def phases(self) -> Mapping[str, float]:
        """Milliseconds of the captures that are kept; empty where all evaluations run eagerly."""
        return capture_phases(self.captures())


@dataclass(frozen=True)
class PipelineBackend:
    """diffusers' StableDiffusionPipeline, called with prompts.

    change   what is done to it before: nothing, `accelerate(pipe)`, torch.compile of the UNet and of the decoder
             as the compiled peers of a trajectory have it, or `rebuild(pipe)`
    """

    change: Literal["none", "accelerate", "compile", "rebuild"] = "none"

    @property
    def implementation(self) -> str:
        return "sample" if self.change == "rebuild" else "pipe"

    @property
    def settings(self) -> tuple[str, ...]:
        """What is set beside diffusers' defaults."""
        if self.change == "none":
            return ()
        if self.change != "compile":
            return (self.change,)
        options = inductor_options(_COMPILE_MODE)
        return ("fuse_qkv_projections", "fullgraph", *(f"{name}={value}" for name, value in options.items()))

    def build(self, problem: PipelineProblem) -> Trajectory:
        case = problem.case
        if self.change == "compile" and case.device == "cpu":
            raise Unsupported(f"torch.compile's {_COMPILE_MODE} is for CUDA graphs: it needs a CUDA device")
        pipe = problem.network.pipeline(case.sampler)
        captures = _changed(pipe, self.change)
        marks = PartMarks(torch.device(case.device))
        decode = pipe.vae.decode

        def timed_decode(*args: Any, **options: Any) -> Any:
            marks.end("steps")
            decoded = decode(*args, **options)
            marks.end("decode")
            return decoded

        pipe.vae.decode = timed_decode
        pipe.text_encoder.register_forward_hook(lambda *called: marks.end("text"))
        dtype = next(problem.network.parameters()).dtype

        def call(inputs: PipelineInputs) -> Tensor:
            images: Tensor = pipe(
                list(inputs.prompts),
                num_inference_steps=case.steps,
                guidance_scale=case.guidance_scale,
                latents=inputs.noise.to(dtype),
                output_type="pt",
            ).images
            # About zero, so that another image is as far off as other latents are.
            return 2.0 * images - 1.0

        return PartedTrajectory(call, marks, captures)


def _changed(pipe: Any, change: str) -> Callable[[], Sequence[Capture]]:
    """Does what a user does to a pipeline before calling it; what tells the captures of its calls.

    Raises `Unsupported` where that changes too little.
    """
    # Both import diffusers, which need not be installed.
    if change == "accelerate":
        from ldmperf.model.dropin import accelerate

        if not accelerate(pipe).replaced:
            raise Unsupported("accelerate replaced nothing in this pipeline, whose time would be diffusers' own")
    elif change == "rebuild":
        from ldmperf.model.dropin import rebuild

        rebuilt = rebuild(pipe)
        for left in rebuilt.left:
            # The text encoder stays transformers'.
            if left.path in ("unet", "vae", "scheduler"):
                raise Unsupported(
                    f"rebuild left the {left.path}, whose time would be diffusers' own: {left.reason}"
                )
        return lambda: rebuilt.captures
    elif change == "compile":
        fuse_projections(pipe.unet)
        pipe.unet = compiled(pipe.unet, _COMPILE_MODE)
        pipe.vae.decode = compiled(pipe.vae.decode, _COMPILE_MODE)
    return tuple


@dataclass(frozen=True)
class OurPipelineBackend:
    """Our UNet, samplers and autoencoder without diffusers' pipeline; the text encoder is transformers'.

    operators   the kernels' backend
    graphs      each step replays one captured graph, captured by these; None runs every step
    """

    operators: Literal["torch", "triton"] = "torch"
    graphs: Graphs | None = None
    implementation = "sample"

    def build(self, problem: PipelineProblem) -> Trajectory:
        case, network, plan = problem.case, problem.network, problem.plan
        if self.graphs is not None:
            try:
                self.graphs.check(torch.device(case.device))
            except CaptureError as reason:
                raise Unsupported(str(reason)) from None
        unet, autoencoder = network.unet, network.autoencoder
        if self.operators != "torch":
            unet, autoencoder = unet.with_backend(self.operators, "auto"), network.decoder_on(self.operators)
        text, tokenizer = network.text, NumberTokenizer(network.text.config)
        timesteps = [step.timestep for step in plan.steps]
        constants = kept_constants(unet)
        graphed: GraphedSampler[Conditioning] | None = None
        if self.graphs is not None:
            graphed = GraphedSampler(
                unet.denoise,
                max_captures=1,
                input_dtype=unet.dtype,
                backend=self.operators,
                graphs=self.graphs,
            )
        scale = autoencoder.config.scaling_factor
        assert scale is not None
        options: dict[str, Any] = {
            "guidance_scale": case.guidance_scale if case.guided else None,
            # Nothing is drawn at these steps.
            "seeds": range(case.batch),
        }
        marks = PartMarks(torch.device(case.device))

        @torch.inference_mode()
        def call(inputs: PipelineInputs) -> Tensor:
            texts = [*([""] * case.batch if case.guided else ()), *inputs.prompts]
            context = text(tokenizer(texts, padding="max_length").input_ids.to(case.device))[0]
            marks.end("text")
            conditioning = unet.condition(timesteps, context, constants=constants)
            if graphed is not None:
                latents = graphed(conditioning, plan, inputs.noise, **options)
            else:
                latents = sample(
                    lambda x, step: unet.denoise(x, conditioning, step.index),
                    plan,
                    inputs.noise,
                    input_dtype=unet.dtype,
                    backend=self.operators,
                    **options,
                )
            given = (latents / scale).to(autoencoder.dtype)
            # After the scaling, as in diffusers' pipeline.
            marks.end("steps")
            images = autoencoder.decode(given)
            marks.end("decode")
            return images.clamp(-1.0, 1.0)

        return PartedTrajectory(call, marks, lambda: () if graphed is None else graphed.captures)


def pipeline_backends() -> Mapping[str, Backend]:
    """By name, in the order of the table: each does more than the one before."""
    return {
        "pipe": PipelineBackend(),
        "pipe-accelerated": PipelineBackend("accelerate"),
        "pipe-compile": PipelineBackend("compile"),
        "pipe-rebuilt": PipelineBackend("rebuild"),
        "sample": OurPipelineBackend(),
        "sample-graph": OurPipelineBackend("triton", CudaGraphs()),
    }
