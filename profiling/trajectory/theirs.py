"""diffusers as a backend: eager, with our kernels or compiled, at its best public settings, on our weights."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..measure.outcomes import Unsupported
from ..peer import diffusers_scheduler, diffusers_unet
from .backend import Inputs, Trajectory
from .unet_problem import UNetProblem

CompileMode = Literal["reduce-overhead", "max-autotune"]

# Of the public recipe github.com/huggingface/diffusion-fast (sd_benchmark.py, and diffusers' page "Accelerate
# inference"), beside max-autotune.
INDUCTOR_SETTINGS = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
}


@dataclass(frozen=True)
class DiffusersBackend:
    """diffusers: its UNet (channels-last, SDPA), its scheduler, the loop of its pipeline.

    compile_mode: torch.compile's, of the whole network as one graph (fullgraph), or None for eager. Both modes run
    what they compiled as CUDA graphs of their own, with fused QKV projections; max-autotune with the inductor
    settings that diffusers recommends beside it (`INDUCTOR_SETTINGS`).
    is_accelerated: whether `ldmperf.model.dropin.accelerate` put our kernels into the network, as one line does.
    """

    compile_mode: CompileMode | None = None
    is_accelerated: bool = False
    implementation = "diffusers"

    @property
    def settings(self) -> tuple[str, ...]:
        """What is set beside diffusers' defaults."""
        accelerated = ("accelerate",) if self.is_accelerated else ()
        if self.compile_mode is None:
            return accelerated
        options = inductor_options(self.compile_mode)
        told = (f"{name}={value}" for name, value in options.items())
        return (*accelerated, "fuse_qkv_projections", "fullgraph", *told)

    def build(self, problem: UNetProblem) -> Trajectory:
        case = problem.case
        is_compiled = self.compile_mode is not None
        if is_compiled and case.device == "cpu":
            raise Unsupported(f"torch.compile's {self.compile_mode} is for CUDA graphs: it needs a CUDA device")
        scheduler = diffusers_scheduler(case.sampler)
        unet = diffusers_unet(problem.unet)
        if self.compile_mode is not None:
            fuse_projections(unet)
        if self.is_accelerated:
            accelerated(unet)
        if self.compile_mode is not None:
            unet = compiled(unet, self.compile_mode)
        dtype = problem.unet.dtype
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters

        # The loop of StableDiffusionPipeline.__call__, latents in the network's dtype as there, and without
        # gradients as there when compiled: what inductor keeps between calls may not be of inference mode.
        @(torch.no_grad() if is_compiled else torch.inference_mode())
        def trajectory(inputs: Inputs) -> Tensor:
            device = inputs.noise.device
            scheduler.set_timesteps(case.steps, device=device)
            if len(scheduler.timesteps) != len(problem.plan.steps):
                raise RuntimeError(
                    f"{type(scheduler).__name__} takes {len(scheduler.timesteps)} model evaluations, "
                    f"our plan {len(problem.plan.steps)}"
                )
            options: dict[str, Any] = {"return_dict": False}
            if takes_generator:
                options["generator"] = torch.Generator(device).manual_seed(inputs.seeds[0])
            latents: Tensor = inputs.noise.to(dtype) * scheduler.init_noise_sigma
            with _step_noise(scheduler, inputs.step_noise) as at_step:
                for index, timestep in enumerate(scheduler.timesteps):
                    at_step(index)
                    model_input = torch.cat([latents] * 2) if case.guided else latents
                    model_input = scheduler.scale_model_input(model_input, timestep)
                    if inputs.low_resolution is not None:
                        beside = inputs.low_resolution.to(dtype)
                        beside = torch.cat([beside] * 2) if case.guided else beside
                        model_input = torch.cat([model_input, beside], dim=1)
                    if is_compiled:
                        # The output of the evaluation before is used up: its graph may overwrite it.
                        torch.compiler.cudagraph_mark_step_begin()
                    output = unet(
                        model_input.to(dtype),
                        timestep,
                        encoder_hidden_states=inputs.context,
                        added_cond_kwargs=dict(inputs.added) or None,
                        return_dict=False,
                    )[0]
                    if case.guided:
                        uncond, cond = output.chunk(2)
                        output = uncond + case.guidance_scale * (cond - uncond)
                    latents = scheduler.step(output, timestep, latents, **options)[0]
            return latents

        return trajectory


def accelerated(unet: Any) -> None:
    """Puts our kernels into diffusers' network, wherever they serve it."""
    # It imports diffusers, which need not be installed.
    from ldmperf.model.dropin import accelerate

    accelerate(unet)


def inductor_options(mode: CompileMode) -> dict[str, bool]:
    """The mode as options of torch.compile, which takes a mode or options, not both; with those of the recipe."""
    inductor: Any = importlib.import_module("torch._inductor")
    options = dict(inductor.list_mode_options(mode, dynamic=False))
    return options | INDUCTOR_SETTINGS if mode == "max-autotune" else options


def compiled(module: Callable[..., Any], mode: CompileMode) -> Any:
    """The module, or its method, under torch.compile, as one graph for one shape; compiled at its first call."""
    return torch.compile(module, options={**inductor_options(mode)}, fullgraph=True, dynamic=False)


def fuse_projections(unet: Any) -> None:
    """Applies diffusers' `fuse_qkv_projections`: one matmul for q, k and v, and one for k and v of a text.

    diffusers copies the weights. Where ours lie side by side they replace the copy, which would count in the peak
    memory of every other backend.
    """
    unet.fuse_qkv_projections()
    for attention in unet.modules():
        for name, parts in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
            fused = getattr(attention, name, None)
            if isinstance(fused, torch.nn.Linear):
                joined = side_by_side([getattr(attention, part).weight for part in parts])
                if joined is not None:
                    fused.weight = torch.nn.Parameter(joined, requires_grad=False)
                fused.requires_grad_(False)


def side_by_side(weights: list[Tensor]) -> Tensor | None:
    """Matrices that follow each other in one memory, as one matrix on it; None where they do not."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous() or weight.shape[1:] != first.shape[1:]:
            return None
        end += weight.numel() * weight.element_size()
    if len({weight.untyped_storage().data_ptr() for weight in weights}) > 1:
        return None
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


@contextmanager
def _step_noise(scheduler: Any, noise: Callable[[int], Tensor] | None) -> Iterator[Callable[[int], None]]:
    """Lets the scheduler draw noise(k) at model evaluation k, which the yielded function announces.

    diffusers' schedulers take a generator but no noise; their modules' `randn_tensor` is where they draw.
    """
    if noise is None:
        yield lambda index: None
        return
    module: Any = inspect.getmodule(type(scheduler))
    current = 0

    def announce(index: int) -> None:
        nonlocal current
        current = index

    def injected(shape: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return noise(current).to(dtype)

    drawn = module.randn_tensor
    module.randn_tensor = injected
    try:
        yield announce
    finally:
        module.randn_tensor = drawn
