"""One sampling step as one operator: guidance, the solver's update, the noise and the next model input.

    out          = uncond + w[k] (cond - uncond)                 or model_output, without guidance
    registers   <- U[k] @ [registers..., out, noise]             every register has the shape of the latents
    model_input <- input_scale[k] * registers[0]                 twice with guidance, cast to its dtype

Row `k` is read from device memory (`step`), so a captured CUDA graph replays with the next row.
Fused because each of these is a pass over the same few latents: apart they are a dozen launches a step.
"""

import torch
from torch import Tensor

from ._dispatch import choose_backend
from ._library import define_operator
from .philox import STEP_NOISE, philox_normal

_REGISTER_DTYPES = (torch.float32, torch.float64)


def sampler_update_ref(
    registers: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    guidance_scale: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    model_input: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> None:
    """Reference of `sampler_update` in the registers' dtype; reads nothing back to the host."""
    dtype = registers.dtype
    output = model_output.to(dtype)
    if guidance_scale is not None:
        uncond, cond = output.chunk(2)
        output = uncond + guidance_scale.index_select(0, step) * (cond - uncond)
    inputs = [*registers.unbind(0), output]
    if noise is None and seeds is not None:
        noise = philox_normal(seeds, registers.shape[2:], step, STEP_NOISE)
    if noise is not None:
        inputs.append(noise.to(dtype))
    stacked = torch.stack(inputs)
    coefficients = table.index_select(0, step)[0, :, : len(inputs)]
    # A product and a sum, not a matmul: a matmul may run in TF32.
    columns = coefficients.reshape(*coefficients.shape, *[1] * (registers.dim() - 1))
    registers.copy_(torch.stack([(row * stacked).sum(0) for row in columns.unbind(0)]))
    if model_input is not None and input_scale is not None:
        scaled = input_scale.index_select(0, step) * registers[0]
        for part in model_input.chunk(1 if guidance_scale is None else 2):
            part.copy_(scaled)


def unsupported_reasons(registers: Tensor) -> list[str]:
    """Every reason why the Triton kernel cannot serve these registers; empty when it can."""
    return ["this version has no Triton kernel for sampler_update"]


def sampler_update(
    registers: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    guidance_scale: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    model_input: Tensor | None = None,
    input_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Advance a sampler's registers by one row of its table, in place.

    registers     [R, B, ...] float32 or float64, updated in place; register 0 holds the latents
    model_output  [B, ...], or [2B, ...] with guidance, the unconditional half first; any float dtype, any strides
    table         [K, R, R + 2] in the registers' dtype: columns are [registers..., model output, noise]
    step          [1] int64 on the registers' device: the row to apply
    guidance_scale [K] in the registers' dtype, the weight w of each row; None for no guidance
    seeds         [B] int64, one per image: Philox noise of this step, float32 (see philox.py)
    noise         [B, ...] float, instead of generated noise; with neither, the noise column is not read
    model_input   [B, ...], or [2B, ...] with guidance, any float dtype and strides: receives the next input
    input_scale   [K] in the registers' dtype: row k scales the input of the model evaluation after step k

    Raises ValueError for shapes, dtypes or devices that do not fit, `KernelUnsupported` for `backend="triton"`
    where the kernel cannot serve.
    """
    _validate(registers, model_output, table, step, guidance_scale, seeds, noise, model_input, input_scale)
    _sampler_update(
        registers, model_output, table, step, guidance_scale, seeds, noise, model_input, input_scale, backend
    )


def _implementation(
    registers: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor,
    guidance_scale: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    model_input: Tensor | None,
    input_scale: Tensor | None,
    backend: str,
) -> None:
    choose_backend("sampler_update", backend, unsupported_reasons(registers))
    sampler_update_ref(
        registers,
        model_output,
        table,
        step,
        guidance_scale=guidance_scale,
        seeds=seeds,
        noise=noise,
        model_input=model_input,
        input_scale=input_scale,
    )


def _fake(registers: Tensor, *_: object) -> None:
    return None


def _validate(
    registers: Tensor,
    model_output: Tensor,
    table: Tensor,
    step: Tensor,
    guidance_scale: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    model_input: Tensor | None,
    input_scale: Tensor | None,
) -> None:
    """Raise ValueError, in one line, for the first argument that does not fit the registers."""
    if registers.dim() < 2 or registers.dtype not in _REGISTER_DTYPES:
        raise ValueError(
            f"sampler_update: registers must be float32 or float64 [R, B, ...]; got {_describe(registers)}"
        )
    count, batch, *image = registers.shape
    dtype = registers.dtype
    evaluations = batch if guidance_scale is None else 2 * batch
    rows = table.shape[0] if table.dim() == 3 else 0
    _expect("table", table, [rows, count, count + 2], registers, dtype)
    _expect("step", step, [1], registers, torch.int64)
    _expect("guidance_scale", guidance_scale, [rows], registers, dtype)
    _expect("seeds", seeds, [batch], registers, torch.int64)
    _expect("model_output", model_output, [evaluations, *image], registers)
    _expect("noise", noise, [batch, *image], registers)
    _expect("model_input", model_input, [evaluations, *image], registers)
    _expect("input_scale", input_scale, [rows], registers, dtype)
    if (model_input is None) != (input_scale is None):
        raise ValueError("sampler_update: give model_input and input_scale together, or neither")


def _expect(
    name: str, tensor: Tensor | None, shape: list[int], registers: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`dtype` None stands for any floating dtype."""
    if tensor is None:
        return
    fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if not fits or list(tensor.shape) != shape or tensor.device != registers.device:
        wanted = "a float dtype" if dtype is None else str(dtype)
        raise ValueError(
            f"sampler_update: {name} must be {wanted} {shape} on {registers.device} for registers "
            f"{list(registers.shape)}; got {_describe(tensor)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


_sampler_update = define_operator(
    "sampler_update(Tensor(a!) registers, Tensor model_output, Tensor table, Tensor step, Tensor? guidance_scale, "
    "Tensor? seeds, Tensor? noise, Tensor(b!)? model_input, Tensor? input_scale, str backend) -> ()",
    _implementation,
    fake=_fake,
)
