"""The operators of one denoising step in order, recorded without memory: ours, and diffusers' in eager mode.

Runs on the meta device, where shapes, strides and dtypes are computed as on a GPU and nothing else is. Three
things differ there and are put right while recording: a convolution forgets its channels-last layout, attention
would fall apart into matrix products, and a number cannot be read back.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import NoiseSchedule, Step, make_plan, sample

from ..peer import SCHEDULER_CONFIG, SCHEDULERS, diffusers_unet
from .flops import flop_counter

SAMPLER = "ddim"
GUIDANCE_SCALE = 7.5
# What a number that is read back is taken to be: any timestep or index but the last.
_READ_BACK = 500


@dataclass(frozen=True, eq=False)
class Op:
    """One operator call. Tensors are on the meta device, but for the host's own numbers, which are on the CPU.

    name        namespace::name, without overload: aten::add_, ldmperf::geglu
    arguments   by the names of the operator's schema
    results     the tensors it returned
    flops       two per multiply-add, by torch's formulas
    is_view     whether the results are arguments seen another way
    in_network  whether the network called it, and not the sampler
    """

    name: str
    arguments: Mapping[str, Any]
    results: tuple[Tensor, ...]
    flops: int
    is_view: bool
    in_network: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The distinct tensors among the arguments that are in device memory."""
        found = {id(tensor): tensor for tensor in _tensors(self.arguments.values()) if tensor.is_meta}
        return tuple(found.values())


class OpStream(TorchDispatchMode):
    """Notes in `ops` every operator that reads or writes device memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self._in_network = False
        self._formulas = flop_counter().flop_registry

    @contextmanager
    def network(self) -> Iterator[None]:
        """What is called inside belongs to the network."""
        self._in_network = True
        try:
            yield
        finally:
            self._in_network = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet, schema = func.overloadpacket, func._schema
        names = (argument.name for argument in schema.arguments)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if packet is torch.ops.aten._local_scalar_dense and args[0].is_meta:
            result: Any = True if args[0].dtype == torch.bool else _READ_BACK
        else:
            result = func(*args, **kwargs)
        if packet is torch.ops.aten.convolution and any(_channels_last(x) for x in args[:2]):
            # cuDNN's layout is channels-last as soon as the input's or the weight's is.
            result = result.contiguous(memory_format=torch.channels_last)
        results = tuple(_tensors([result]))
        if any(tensor.is_meta for tensor in (*_tensors(arguments.values()), *results)):
            formula = self._formulas.get(packet)
            aliases = [value.alias_info for value in schema.returns]
            self.ops.append(
                Op(
                    name=schema.name,
                    arguments=arguments,
                    results=results,
                    flops=0 if formula is None else int(formula(*args, **kwargs, out_val=result)),
                    is_view=bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases),
                    in_network=self._in_network,
                )
            )
        return result


class _FusedAttention(TorchFunctionMode):
    """torch's attention as the one operator that it is on a GPU."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _flash(*args, **kwargs)
        return func(*args, **kwargs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    if attn_mask is not None or dropout_p or query.shape[-1] % 8:
        raise NotImplementedError(
            "attention with a mask, dropout or a head dimension that is no multiple of 8 (torch pads it with "
            f"further launches) is not in the inventory; got head dimension {query.shape[-1]}"
        )
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = operator(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return out


@torch.no_grad()
def our_step(
    config: UNetConfig, dtype: torch.dtype, latents: int = 64, tokens: int = 77, *, products: str = "auto"
) -> tuple[Op, ...]:
    """One guided step of one image: `UNet.denoise` and the update that makes the next model input, from `sample`.

    Operators of ours are recorded whole; `products` as of `UNet`.
    """
    plan = make_plan(SAMPLER, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), 2)
    with torch.device("meta"):
        unet = UNet(config, products=products).to(dtype)
        context = torch.empty(2, tokens, config.context_dim, dtype=dtype)
        conditioning = unet.condition([step.timestep for step in plan.steps], context)
        noise = torch.empty(1, config.in_channels, latents, latents)
    stream = OpStream()
    starts: list[int] = []

    def denoise(model_input: Tensor, step: Step) -> Tensor:
        starts.append(len(stream.ops))
        with stream.network():
            return unet.denoise(model_input, conditioning, step.index)

    with stream:
        sample(denoise, plan, noise, guidance_scale=GUIDANCE_SCALE, input_dtype=dtype, backend="torch")
    return tuple(stream.ops[starts[0] : starts[1]])


@torch.no_grad()
def diffusers_step(config: UNetConfig, dtype: torch.dtype, latents: int = 64, tokens: int = 77) -> tuple[Op, ...]:
    """One guided step of one image as in the loop of diffusers' pipeline, eager, with channels-last weights.

    The second step is recorded, as the first one's latents may have another layout. Raises `Unsupported` without
    diffusers.
    """
    with torch.device("meta"):
        unet = diffusers_unet(UNet(config, backend="torch").to(dtype))
    # Of 1x1 weights too, whose shape alone does not tell cuDNN the layout.
    unet = unet.to(memory_format=torch.channels_last)
    scheduler = getattr(importlib.import_module("diffusers"), SCHEDULERS[SAMPLER]).from_config(SCHEDULER_CONFIG)
    scheduler.set_timesteps(50, device="meta")
    timestep = scheduler.timesteps[1]
    context = torch.empty(2, tokens, config.context_dim, dtype=dtype, device="meta")
    x = torch.empty(1, config.in_channels, latents, latents, dtype=dtype, device="meta")
    for stream in (OpStream(), OpStream()):
        with stream, _FusedAttention():
            model_input = scheduler.scale_model_input(torch.cat([x] * 2), timestep)
            with stream.network():
                output = unet(model_input, timestep, encoder_hidden_states=context, return_dict=False)[0]
            uncond, cond = output.chunk(2)
            output = uncond + GUIDANCE_SCALE * (cond - uncond)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return tuple(stream.ops)


def _channels_last(x: Tensor) -> bool:
    """Whether cuDNN takes an image or weight for channels-last: by its strides, which alone tell it of 1x1."""
    return x.dim() == 4 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
