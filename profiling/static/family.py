"""The launches of one denoising step of a family size, found by running its UNet without memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import OPERATORS, Launch
from ldmperf.model import FAMILY, UNet

from .compile import Specialization, specialization_of
from .machines import MACHINES
from .shapes import SHAPES, Shape

# Operators of torch.library that are a part of a public one.
_PART_OF = {"add_layer_norm": "layer_norm"}
Call = tuple[str, dict[str, Any]]


class _Calls(TorchDispatchMode):
    """Notes the calls of our operators: (operator, arguments), in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            out = func(*args, **kwargs)
            # A convolution on the meta device forgets the layout that it has on every other.
            return (
                out.to(memory_format=torch.channels_last) if func.overloadpacket.__name__ == "convolution" else out
            )
        name = _PART_OF.get(func._schema.name.partition("::")[2], func._schema.name.partition("::")[2])
        if name in OPERATORS:
            names = (argument.name for argument in func._schema.arguments)
            arguments = dict(zip(names, args, strict=False)) | kwargs
            self.calls.append((name, {key: value for key, value in arguments.items() if key != "backend"}))
        return func(*args, **kwargs)


@functools.lru_cache(maxsize=64)
def step_calls(size: str, batch: int, dtype: torch.dtype, latent: int = 64) -> tuple[Call, ...]:
    """The distinct calls of our operators in a step of `size`, `batch` images in the model, on the meta device."""
    config = FAMILY[size]
    with torch.device("meta"):
        unet = UNet(config, backend="torch").to(dtype)
        sample = torch.empty(batch, config.in_channels, latent, latent, dtype=dtype)
        context = torch.empty(batch, 77, config.context_dim, dtype=dtype)
    with torch.no_grad(), _Calls() as found:
        unet(sample.to(memory_format=torch.channels_last), torch.empty(batch, device="meta"), context)
    build, _, defaults = SHAPES["sampler_update"]
    update = build(Shape(dtype, **{**defaults, "batch": max(batch // 2, 1)}))
    distinct = {_signature(call): call for call in (*found.calls, ("sampler_update", update))}
    return tuple(distinct.values())


def distinct_launches(calls: Iterable[Call], machine: str = "sm_90") -> dict[Specialization, Launch]:
    """The launches of calls that differ in the code they are compiled to."""
    launches: dict[Specialization, Launch] = {}
    for name, arguments in calls:
        for launch in OPERATORS[name].plan(**arguments)[1]:
            launches.setdefault(specialization_of(launch, MACHINES[machine]), launch)
    return launches


def _signature(call: Call) -> str:
    name, arguments = call
    return name + repr([(key, _described(value)) for key, value in arguments.items()])


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return value
