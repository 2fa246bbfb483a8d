"""Write the counted table of docs/diffusers-kernels.md: `make inventory`, no GPU needed.

An evaluation of diffusers' own UNet is recorded launch by launch on the meta device, before and after
`ldmperf.model.dropin.accelerate`. tests/test_drop_in_tables.py fails while the page differs from what this writes.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from markers import with_blocks

from ldmperf.kernels import layers
from ldmperf.model import RELEASED
from ldmperf.profiling.machines import BYTES_PER_S, EXPONENTIALS_PER_S, FLOP_PER_S
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.step.launches import GROUPS, GpuLaunch, LaunchGroup
from ldmperf.profiling.step.recorded_steps import diffusers_network, record_evaluation
from ldmperf.profiling.step.recording import RecordedCall, Recorder
from ldmperf.profiling.step.roofline import Roof
from ldmperf.profiling.step.rules import launches_of

PAGE = Path(__file__).parents[1] / "docs" / "diffusers-kernels.md"
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
    """An evaluation before and after, and after with other choices.

    norm_alone        every nn.GroupNorm on our kernel and nothing else, as a hub layer of that name would have it
    kernel_attention  as `after`, with our attention where "auto" takes torch's
    """

    before: tuple[Launched, ...]
    norm_alone: tuple[Launched, ...]
    after: tuple[Launched, ...]
    kernel_attention: tuple[Launched, ...]


@cache
def evaluation(network: str) -> Evaluation:
    """A guided evaluation of one image; takes diffusers, no GPU, no memory."""
    from ldmperf.model.dropin import accelerate

    unet = diffusers_network(RELEASED[network], DTYPE)
    marks = _Marks(unet)
    before = marks.recorded(network)
    norms = [module for module in unet.modules() if type(module) is torch.nn.GroupNorm]
    for norm in norms:
        norm.forward = MethodType(layers.GroupNorm.forward, norm)
    norm_alone = marks.recorded(network)
    for norm in norms:
        del norm.forward
    accelerate(unet)
    after = marks.recorded(network)
    return Evaluation(
        _launched(before), _launched(norm_alone), _launched(after, _with_torchs_attention), _launched(after)
    )


class _Marks:
    """Hooks that tell the layer of each call."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._open: list[str] = [REST]
        # The layer that is open from a call on.
        self._changes: list[tuple[int, str]] = []
        self._recorder = Recorder()
        for layer, module in _layers(unet):
            module.register_forward_pre_hook(lambda module, args, layer=layer: self._enter(layer))
            module.register_forward_hook(lambda module, args, out: self._leave())

    def recorded(self, network: str) -> list[tuple[str, RecordedCall]]:
        """The calls of an evaluation, each with its layer."""
        self._recorder, self._changes = Recorder(), [(0, REST)]
        record_evaluation(self._recorder, self._unet, RELEASED[network], LATENTS[network])
        calls = self._recorder.calls
        ends = [*(first for first, _ in self._changes[1:]), len(calls)]
        changes = zip(self._changes, ends, strict=True)
        return [(layer, call) for (first, layer), end in changes for call in calls[first:end]]

    def _enter(self, layer: str) -> None:
        self._open.append(layer)
        self._changes.append((len(self._recorder.calls), layer))

    def _leave(self) -> None:
        self._open.pop()
        self._changes.append((len(self._recorder.calls), self._open[-1]))


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
    """The call that "auto" makes of our attention's where nothing was measured: torch's flash attention."""
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


def markdown() -> str:
    """The tables of the page, between its markers."""
    versions = f"diffusers {version('diffusers')} and torch {version('torch').split('+')[0]}"
    lines = [f"Counted from {versions}; guided, one image, float16, channels-last, eager. MB are powers of ten."]
    for network, latents in LATENTS.items():
        found = evaluation(network)
        lines += ["", f"### {network}, {8 * latents}x{8 * latents}", "", *_by_layer(found), "", *_by_kind(found)]
    return "\n".join(lines)


def _by_layer(found: Evaluation) -> list[str]:
    """What each of diffusers' layers saves, the one that saves most first, and what other choices save."""
    whole = sums(found.before)

    def change(layer: str) -> tuple[Sums, Sums]:
        before, after = (sums(of, lambda one: one.layer == layer) for of in (found.before, found.after))
        return before, after

    changes = {layer: change(layer) for layer in (*LAYERS, REST)}
    ranked = sorted(changes, key=lambda layer: changes[layer][1].h200 - changes[layer][0].h200)
    # Of output_scale_factor and rescale_output_factor, which are 1.
    divisions = sums(found.before, lambda one: one.launch.name == "div" and one.layer != REST)
    return [
        "| taken over | launches: before | after | MB: before | after | floor, ms: before | after "
        "| change of the whole floor: H200 | H100 |",
        "|---|" + "---:|" * 8,
        *(_row(layer if layer == REST else f"`{layer}`", *changes[layer], whole) for layer in ranked),
        _row("**all of them: `accelerate`**", whole, sums(found.after), whole),
        _row("the same with our attention", whole, sums(found.kernel_attention), whole),
        _row("every `nn.GroupNorm`, and nothing else", whole, sums(found.norm_alone), whole),
        _row("no kernel: divisions by 1 left out", divisions, Sums(0, 0, 0.0, 0.0), whole),
    ]


def _row(title: str, before: Sums, after: Sums, whole: Sums) -> str:
    saved = ((after.h200 - before.h200) / whole.h200, (after.h100 - before.h100) / whole.h100)
    cells = (
        *(str(of.launches) for of in (before, after)),
        *(f"{of.nbytes / 1e6:.0f}" for of in (before, after)),
        *(f"{of.h200:.2f}" for of in (before, after)),
        *(f"{100 * share:+.1f} %" for share in saved),
    )
    return f"| {title} | {' | '.join(cells)} |"


def _by_kind(found: Evaluation) -> list[str]:
    """The launches by the groups of docs/step-inventory.md; the sampler has none here."""

    def cells(group: LaunchGroup) -> list[str]:
        before, after = (sums(of, lambda one: one.launch.group == group) for of in (found.before, found.after))
        return [str(before.launches), str(after.launches), *(f"{of.nbytes / 1e6:.0f}" for of in (before, after))]

    return [
        "| launches of | before | after | MB: before | after |",
        "|---|" + "---:|" * 4,
        *(f"| {group} | {' | '.join(cells(group))} |" for group in GROUPS if group != "sampler"),
    ]


def with_tables(page: str) -> str:
    """The page with the tables between its markers."""
    return with_blocks(page, {"counted": lambda _: markdown()})


def main() -> None:
    write_whole(PAGE, with_tables(PAGE.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    sys.exit(main())
