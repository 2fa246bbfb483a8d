"""One sampling step as one operator: guidance, the solver's update, the noise and the next model input.

    out          = uncond + w[k] (cond - uncond)                 or model_output, without guidance
    registers   <- U[k] @ [registers..., out, noise]             every register has the shape of the latents
    model_input <- input_scale[k] * registers[0]                 twice with guidance, cast to its dtype

Row `k` is read from device memory (`step`), so a captured CUDA graph replays with the next row.
Fused because each of these is a pass over the same few latents: separate, they are a dozen launches a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import tensors
from ._dependent import launch_dependents, launches_dependently, wait_for_primary
from ._launch import Chip, Launch, Operator, ceil_div, chip_of, next_power_of_two, tuned
from ._layout import MAX_INDEX
from ._library import define_operator, refuse_forward_mode
from ._triton import contiguity_reasons, device_reasons, dtype_reasons, jit, tl
from .philox import STEP_NOISE, philox_normal, philox_normal_lanes

MAX_CHANNELS = 4096
_REGISTER_DTYPES = (torch.float32, torch.float64)


class SamplerUpdateCall(NamedTuple):
    """The arguments of `sampler_update`."""

    registers: Tensor
    model_output: Tensor
    table: Tensor
    step: Tensor
    guidance_scale: Tensor | None = None
    seeds: Tensor | None = None
    noise: Tensor | None = None
    model_input: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def image(self) -> tuple[int, int, int]:
        """The image's shape as [C, H, W], with ones in front of shorter ones."""
        image = self.registers.shape[2:]
        channels, height, width = (*[1] * (3 - len(image)), *image)
        return channels, height, width


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
    coefficients = table.index_select(0, step)[0, :, : len(inputs)]
    # Term by term: a matmul may run in TF32, and the sum of a stack in an order that depends on its size, so that
    # registers of zeros would change the bits.
    rows = []
    for row in coefficients.unbind(0):
        total = torch.zeros_like(output)
        for coefficient, value in zip(row.unbind(0), inputs, strict=True):
            total = torch.addcmul(total, coefficient, value)
        rows.append(total)
    registers.copy_(torch.stack(rows))
    if model_input is not None and input_scale is not None:
        scaled = input_scale.index_select(0, step) * registers[0]
        for part in model_input.chunk(1 if guidance_scale is None else 2):
            part.copy_(scaled)


@jit
def _offsets(h, w, c, stride_h, stride_w, stride_c, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """64-bit offsets [pixels, channels] in an image; pixels begin at multiples of ALIGN elements."""
    pixels = h * stride_h + w * stride_w
    if ALIGN > 1:
        pixels = tl.multiple_of(pixels, (ALIGN, ALIGN))
    return pixels + c * stride_c


@jit
def _add_product(total, coefficient, x):  # type: ignore[no-untyped-def]
    """total + coefficient x, rounded once. The compiler would decide that by what stands around it, and a step
    with room for more registers would have other bits."""
    return tl.fma(coefficient + tl.zeros_like(total), x, total)


@jit
def sampler_update_kernel(  # type: ignore[no-untyped-def]
    registers_ptr,
    output_ptr,
    table_ptr,
    step_ptr,
    guidance_ptr,
    seeds_ptr,
    noise_ptr,
    input_ptr,
    input_scale_ptr,
    batch,
    pixels,
    width,
    stride_gr,
    stride_gb,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_ob,
    stride_oc,
    stride_oh,
    stride_ow,
    stride_nb,
    stride_nc,
    stride_nh,
    stride_nw,
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    CHANNELS: tl.constexpr,
    REGISTERS: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program does a tile of pixels, all channels, of one image."""
    launch_dependents(PDL)
    blocks_hw = tl.cdiv(pixels, BLOCK_HW)
    pid = tl.program_id(0)
    b = (pid // blocks_hw).to(tl.int64)
    cond_b = b + batch
    offs_hw = (pid % blocks_hw) * BLOCK_HW + tl.arange(0, BLOCK_HW)
    offs_c = tl.arange(0, BLOCK_C)
    mask = (offs_hw < pixels)[:, None] & (offs_c < CHANNELS)[None, :]
    h = (offs_hw // width).to(tl.int64)[:, None]
    w = (offs_hw % width).to(tl.int64)[:, None]
    c = offs_c.to(tl.int64)[None, :]

    wait_for_primary(PDL)
    step = tl.load(step_ptr)
    row_ptr = table_ptr + step * (REGISTERS * (REGISTERS + 2))
    output_ptrs = output_ptr + _offsets(h, w, c, stride_oh, stride_ow, stride_oc, ALIGN)
    output = tl.load(output_ptrs + b * stride_ob, mask=mask, other=0.0).to(tl.float32)
    if guidance_ptr is not None:
        # The unconditional half is first.
        cond = tl.load(output_ptrs + cond_b * stride_ob, mask=mask, other=0.0).to(tl.float32)
        output = _add_product(output, tl.load(guidance_ptr + step), cond - output)
    if noise_ptr is not None:
        noise_ptrs = noise_ptr + b * stride_nb + _offsets(h, w, c, stride_nh, stride_nw, stride_nc, ALIGN)
        noise = tl.load(noise_ptrs, mask=mask, other=0.0).to(tl.float32)
    elif seeds_ptr is not None:
        element = c * pixels + offs_hw.to(tl.int64)[:, None]
        noise = philox_normal_lanes(tl.load(seeds_ptr + b), element, step, STREAM)

    # All registers are read before any is written. Their numbers are 64-bit: a constant times a stride is not.
    registers_ptrs = registers_ptr + b * stride_gb + _offsets(h, w, c, stride_gh, stride_gw, stride_gc, ALIGN)
    registers = ()
    for j in tl.static_range(REGISTERS):
        registers += (tl.load(registers_ptrs + tl.full([], j, tl.int64) * stride_gr, mask=mask, other=0.0),)  # type: ignore[assignment]
    for i in tl.static_range(REGISTERS):
        coefficients = row_ptr + i * (REGISTERS + 2)
        new = tl.load(coefficients + REGISTERS) * output
        for j in tl.static_range(REGISTERS):
            new = _add_product(new, tl.load(coefficients + j), registers[j])
        if noise_ptr is not None or seeds_ptr is not None:
            new = _add_product(new, tl.load(coefficients + REGISTERS + 1), noise)
        tl.store(registers_ptrs + tl.full([], i, tl.int64) * stride_gr, new, mask=mask)
        if i == 0 and input_ptr is not None:
            scaled = (tl.load(input_scale_ptr + step) * new).to(input_ptr.dtype.element_ty)
            input_ptrs = input_ptr + _offsets(h, w, c, stride_ih, stride_iw, stride_ic, ALIGN)
            tl.store(input_ptrs + b * stride_ib, scaled, mask=mask)
            if guidance_ptr is not None:
                tl.store(input_ptrs + cond_b * stride_ib, scaled, mask=mask)


@dataclass(frozen=True)
class SamplerUpdateConfig:
    """A program takes a tile of block_hw pixels, all channels."""

    block_hw: int
    num_warps: int


def default_config(channels: int, pixels: int) -> SamplerUpdateConfig:
    """Four elements a thread in small programs: latents are small, and a launch takes longer than the work."""
    block_c = next_power_of_two(channels)
    block_hw = min(max(512 // block_c, 1), next_power_of_two(pixels))
    return SamplerUpdateConfig(block_hw, min(max(block_hw * block_c // 128, 1), 4))


def candidates(call: SamplerUpdateCall) -> list[SamplerUpdateConfig]:
    """The configurations that bench/tune.py tries for this call."""
    channels, height, width = call.image
    block_c = next_power_of_two(channels)
    return [
        SamplerUpdateConfig(block_hw, warps)
        for block_hw in (16, 32, 64, 128, 256, 512, 1024)
        for warps in (1, 2, 4, 8)
        if block_hw <= next_power_of_two(height * width) and 1 <= block_hw * block_c // (32 * warps) <= 16
    ] or [default_config(channels, height * width)]


def tuning_key(call: SamplerUpdateCall) -> str:
    """What a tuned configuration is looked up by."""
    channels, height, width = call.image
    count, batch = call.registers.shape[:2]
    generated = " philox" if call.seeds is not None and call.noise is None else ""
    return f"registers={count} batch={batch} channels={channels} pixels={height * width}{generated}"


def _strides(names: Sequence[str], tensor: Tensor | None, rank: int) -> dict[str, int]:
    """{name: stride}: the leading dimensions', then those of the image as [C, H, W]; zeros for None."""
    if tensor is None:
        return dict.fromkeys(names, 0)
    leading = len(names) - 3
    strides = tensor.stride()
    return dict(zip(names, (*strides[:leading], *[0] * (3 - rank), *strides[leading:]), strict=True))


def plan(
    call: SamplerUpdateCall, *, config: SamplerUpdateConfig | None = None, chip: Chip | None = None
) -> tuple[None, list[Launch]]:
    """The launch that updates registers and model_input in place."""
    registers, model_output, table, step, guidance_scale, seeds, noise, model_input, input_scale = call
    if not registers.numel():
        return None, []
    channels, height, width = call.image
    chip = chip or chip_of(registers.device)
    config = config or tuned("sampler_update", tuning_key(call), chip, SamplerUpdateConfig)
    config = config or default_config(channels, height * width)
    pdl = launches_dependently(chip)
    rank = registers.dim() - 2
    strides = {
        **_strides(("stride_gr", "stride_gb", "stride_gc", "stride_gh", "stride_gw"), registers, rank),
        **_strides(("stride_ob", "stride_oc", "stride_oh", "stride_ow"), model_output, rank),
        **_strides(("stride_nb", "stride_nc", "stride_nh", "stride_nw"), noise, rank),
        **_strides(("stride_ib", "stride_ic", "stride_ih", "stride_iw"), model_input, rank),
    }
    arguments = {
        "registers_ptr": registers,
        "output_ptr": model_output,
        "table_ptr": table,
        "step_ptr": step,
        "guidance_ptr": guidance_scale,
        "seeds_ptr": None if noise is not None else seeds,
        "noise_ptr": noise,
        "input_ptr": model_input,
        "input_scale_ptr": input_scale,
        "batch": registers.shape[1],
        "pixels": height * width,
        "width": width,
        **strides,
        "CHANNELS": channels,
        "REGISTERS": registers.shape[0],
        "STREAM": STEP_NOISE,
        "BLOCK_HW": config.block_hw,
        "BLOCK_C": next_power_of_two(channels),
        "ALIGN": math.gcd(8, *(strides[f"stride_{name}{axis}"] for name in "goni" for axis in "hw")),
        "PDL": pdl,
    }
    programs = registers.shape[1] * ceil_div(height * width, config.block_hw)
    launch = Launch(
        sampler_update_kernel,
        programs,
        arguments,
        config.num_warps,
        operator="sampler_update",
        updated=("registers_ptr",),
        pdl=pdl,
    )
    return None, [launch]


def unsupported_reasons(call: SamplerUpdateCall) -> list[str]:
    """Every reason why the Triton kernel cannot serve this call; empty when it can."""
    registers, model_output, table, _, guidance_scale, seeds, noise, model_input, input_scale = call
    reasons = [
        *device_reasons(sampler_update_kernel, registers),
        *dtype_reasons(registers=registers, model_output=model_output, noise=noise, model_input=model_input),
        *contiguity_reasons(table=table, guidance_scale=guidance_scale, seeds=seeds, input_scale=input_scale),
    ]
    if registers.dim() > 5:
        return [*reasons, f"images of {registers.dim() - 2} dimensions, more than 3"]
    channels, height, width = call.image
    if channels > MAX_CHANNELS:
        reasons.append(f"{channels} channels are more than {MAX_CHANNELS}")
    if height * width > MAX_INDEX:
        reasons.append(f"{height * width} pixels are more than {MAX_INDEX}")
    return reasons


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

    Autocast changes nothing. There are no derivatives. Raises ValueError for shapes, dtypes or devices that do not
    fit, NotImplementedError in forward mode, `KernelUnsupported` for `backend="triton"` where the kernel cannot
    serve.
    """
    call = SamplerUpdateCall(
        registers, model_output, table, step, guidance_scale, seeds, noise, model_input, input_scale
    )
    tensors(sampler_update, call[:4], call[4:])
    refuse_forward_mode("sampler_update", call)
    _sampler_update(*call, backend)


def _check(call: SamplerUpdateCall) -> None:
    """ValueError of one line for the first argument that does not fit the registers."""
    registers, model_output, table, step, guidance_scale, seeds, noise, model_input, input_scale = call
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


OPERATOR = Operator(
    "sampler_update",
    sampler_update,
    sampler_update_ref,
    SamplerUpdateCall,
    _check,
    plan,
    candidates,
    tuning_key,
    unsupported_reasons,
)
_sampler_update = define_operator(
    "sampler_update(Tensor(a!) registers, Tensor model_output, Tensor table, Tensor step, Tensor? guidance_scale, "
    "Tensor? seeds, Tensor? noise, Tensor(b!)? model_input, Tensor? input_scale, str backend) -> ()",
    OPERATOR,
    reference=lambda call: sampler_update_ref(**call._asdict()),
    fake=lambda call: None,
    differentiable=False,
)
