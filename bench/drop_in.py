"""Write the counted tables of docs/diffusers-kernels.md and docs/drop-in.md: `make inventory`, no GPU needed.

An evaluation of diffusers' own UNet is recorded launch by launch on the meta device, before and after
`ldmperf.model.dropin.accelerate`. tests/test_drop_in_tables.py fails while a document differs from what this writes.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from markers import with_blocks

from ldmperf.model import RELEASED
from ldmperf.profiling.machines import BYTES_PER_S, EXPONENTIALS_PER_S, FLOP_PER_S
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.step.launches import GROUPS, GpuLaunch
from ldmperf.profiling.step.recorded_steps import diffusers_network, record_evaluation
from ldmperf.profiling.step.recording import RecordedCall, Recorder
from ldmperf.profiling.step.roofline import Roof
from ldmperf.profiling.step.rules import launches_of

DOCS = Path(__file__).parents[1] / "docs"
# Latent pixels of the images that the networks were made for: 512x512 and 1024x1024.
LATENTS = {"SD1.5": 64, "SDXL": 128}
DTYPE = torch.float16
H200 = Roof(BYTES_PER_S, FLOP_PER_S, EXPONENTIALS_PER_S)
# The same chip with slower memory: 3.35 TB/s by its data sheet, where the H200 has 4.8.
H100 = replace(H200, bytes_per_s=BYTES_PER_S * 3.35 / 4.8)
# diffusers' layers whose work changes, by what a launch is told to belong to: the innermost of them.
LAYERS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention", "GEGLU", "GroupNorm")
REST = "all else"


@dataclass(frozen=True)
class Launched:
    """A launch, and the innermost layer of `LAYERS` that makes it."""

    layer: str
    launch: GpuLaunch


@dataclass(frozen=True)
class Evaluation:
    """A network before and after; `kernel_attention`: after, with our attention instead of torch's."""

    before: tuple[Launched, ...]
    after: tuple[Launched, ...]
    kernel_attention: tuple[Launched, ...]


@cache
def evaluation(network: str) -> Evaluation:
    """A guided evaluation of one image; takes diffusers, no GPU, no memory."""
    before = _recorded(network, is_accelerated=False)
    after = _recorded(network, is_accelerated=True)
    return Evaluation(_launched(before), _launched(after, _with_torchs_attention), _launched(after))


def _recorded(network: str, *, is_accelerated: bool) -> list[tuple[str, RecordedCall]]:
    """The calls of an evaluation, each with its layer."""
    from ldmperf.model.dropin import accelerate

    config = RELEASED[network]
    unet = diffusers_network(config, DTYPE)
    recorder = Recorder()
    open_layers: list[str] = []
    # (first call, layer): what is open from that call on.
    changes: list[tuple[int, str]] = []

    def told() -> None:
        changes.append((len(recorder.calls), open_layers[-1] if open_layers else REST))

    def entered(layer: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_layers.append(layer)
            told()

        return hook

    def left(*_: object) -> None:
        open_layers.pop()
        told()

    told()
    for layer, module in _layers(unet):
        module.register_forward_pre_hook(entered(layer))
        module.register_forward_hook(left)
    if is_accelerated:
        accelerate(unet)
    record_evaluation(recorder, unet, config, LATENTS[network])
    ends = [first for first, _ in changes[1:]] + [len(recorder.calls)]
    return [
        (layer, call)
        for (first, layer), end in zip(changes, ends, strict=True)
        for call in recorder.calls[first:end]
    ]


def _layers(unet: Any) -> list[tuple[str, Any]]:
    """The layers by name. Norms inside of them, which a kernel takes along, are none: a hook would forbid that."""
    names = dict.fromkeys(LAYERS)
    found = [(type(module).__name__, path, module) for path, module in unet.named_modules()]
    inner = [path for name, path, _ in found if name == "ResnetBlock2D"]
    return [
        (name, module)
        for name, path, module in found
        if name in names and path != "conv_norm_out" and not any(path.startswith(f"{of}.") for of in inner)
    ]


def _with_torchs_attention(call: RecordedCall) -> RecordedCall:
    """The call that `backend="auto"` makes of our attention's where nothing was measured: torch's flash attention."""
    if call.operator != "attention":
        return call
    names = {"q": "query", "k": "key", "v": "value"}
    given = {names[name]: call.arguments[name].transpose(1, 2) for name in names}
    function = torch.ops.aten._scaled_dot_product_flash_attention.default
    return replace(call, function=function, arguments=given, result=call.results[0].transpose(1, 2))


def _launched(
    calls: Sequence[tuple[str, RecordedCall]],
    served: Callable[[RecordedCall], RecordedCall] = lambda call: call,
) -> tuple[Launched, ...]:
    return tuple(Launched(layer, launch) for layer, call in calls for launch in launches_of([served(call)]))


@dataclass(frozen=True)
class Sums:
    """Sums over launches; floors in ms."""

    launches: int
    nbytes: int
    h200: float
    h100: float


def sums(launched: Sequence[Launched], of: Callable[[Launched], bool] = lambda one: True) -> Sums:
    """The sums over those of `of`."""
    chosen = [one.launch for one in launched if of(one)]
    h200, h100 = (1e3 * sum(max(roof.seconds(x).values()) for x in chosen) for roof in (H200, H100))
    return Sums(len(chosen), sum(x.nbytes for x in chosen), h200, h100)
