"""Which calls of a step give an image other bits in a batch than alone: `python bench/batch_invariance.py`.

A step of the UNet runs at each batch. Every call that computes, an operator of ours or of torch's, is run again on
each image's part of its very inputs, copied to memory of its own with the strides that it has in the batch. A call
differs where any bit of an image's result does. The network that is asked is one without `batch_invariant`; the
step is then repeated with it, where every image has to be equal to itself alone.

With --repeats the price of four images: a step of the plain network, of the whole evaluation image by image (the
mode), and of each call image by image, in turn. The result goes to --out as JSON; `make readme` writes what
docs/batch-invariance.md says of it.

    python bench/batch_invariance.py --size 39M --latent 32 --dtype float32,bfloat16 --repeats 9 --out found.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from batch_invariance_table import table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ldmperf.model import FAMILY, UNet, UNetConfig
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.measure.store import write_whole
from ldmperf.profiling.options import known_names
from ldmperf.profiling.trajectory.network import randomize

BATCHES = (1, 2, 3, 4, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# They move numbers and compute none, and may put the batch elsewhere than first.
_MOVES = frozenset(
    (
        "cat",
        "stack",
        "clone",
        "copy_",
        "_to_copy",
        "index_select",
        "constant_pad_nd",
        "fill_",
        "lift_fresh",
        "full",
    )
)


@dataclass
class Finding:
    """A call with one image's shapes: how often a step makes it, where, and the batches at which bits differ.

    share: the largest share of a result's elements that differ, by batch.
    """

    name: str
    shapes: str
    count: int = 0
    places: list[str] = field(default_factory=list)
    share: dict[int, float] = field(default_factory=dict)


class CallByCall(TorchDispatchMode):
    """Runs every call that computes on each image's part of its inputs too, and calls `compare` with the results.

    network: whose parameters are no part of an image. batched: the tensors whose first dimension counts images.
    is_split: whether the step goes on with the images' own results, in place of the batch's.
    """

    def __init__(
        self, network: nn.Module, batch: int, batched: Sequence[Tensor], *, is_split: bool = False
    ) -> None:
        super().__init__()
        self._batch, self._is_split = batch, is_split
        self._names = {_address(p): name.rpartition(".")[0] for name, p in network.named_parameters()}
        self._batched = {_address(x) for x in batched}
        self._place = ""
        self.findings: dict[tuple[str, str], Finding] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        own = [self._names[_address(x)] for x in tensors if _address(x) in self._names]
        if own:
            self._place = own[0]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or not any(self._is_batched(x) for x in tensors):
            return self._marked(func(*args, **(kwargs or {})), any(map(self._is_batched, tensors)) and is_view)
        if func.overloadpacket.__name__ in _MOVES:
            return self._marked(func(*args, **(kwargs or {})), True)
        parts = [[self._part(x, i) for x in leaves] for i in range(self._batch)]
        results = [_run(func, spec, part) for part in parts]
        if self._is_split:
            out = torch.cat(results, dim=max(self._dim(x) for x in tensors if self._is_batched(x)))
            if func._schema.is_mutable:
                out = args[0].copy_(out)
        else:
            out = func(*args, **(kwargs or {}))
            self._note(func, parts[0], results, out)
        return self._marked(out, True)

    def _dim(self, x: Tensor) -> int:
        """Along which the images lie: behind the one step that a conditioning of one step has."""
        return int(x.ndim > 1 and x.shape[0] == 1 != self._batch)

    def _is_batched(self, x: object) -> bool:
        return isinstance(x, Tensor) and _address(x) in self._batched

    def _marked(self, out: Any, is_batched: bool) -> Any:
        """The result, remembered as one with images or without: memory is used again."""
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor):
                (self._batched.add if is_batched else self._batched.discard)(_address(x))
        return out

    def _part(self, x: Any, image: int) -> Any:
        if self._is_batched(x):
            return alone(self._rows(x, image))
        # One vector for all images, seen as a row of each.
        return x[:1] if isinstance(x, Tensor) and x.ndim and x.stride(0) == 0 else x

    def _rows(self, x: Tensor, image: int) -> Tensor:
        dim = self._dim(x)
        rows = x.shape[dim] // self._batch
        return x.narrow(dim, image * rows, rows)

    def _note(self, func: Any, part: Sequence[Any], found: Sequence[Tensor], out: Tensor) -> None:
        shapes = ", ".join(str(list(x.shape)) for x in part if isinstance(x, Tensor))
        name = func.name().removeprefix("aten::")
        finding = self.findings.setdefault((name, shapes), Finding(name, shapes))
        finding.count += 1
        if self._place not in finding.places:
            finding.places.append(self._place)
        differ = [(one != self._rows(out, i)).double().mean().item() for i, one in enumerate(found)]
        share = sum(differ) / self._batch
        if share:
            finding.share[self._batch] = max(finding.share.get(self._batch, 0.0), share)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def alone(x: Tensor) -> Tensor:
    """A copy of x at an address of its own, with x's strides where these do not overlap."""
    if 0 in x.stride():
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _run(func: Any, spec: Any, leaves: list[Any]) -> Any:
    args, kwargs = tree_unflatten(leaves, spec)
    return func(*args, **kwargs)


@dataclass(frozen=True)
class Given:
    """A step's inputs, those of `batch` different images."""

    sample: Tensor
    timesteps: Tensor
    context: Tensor

    @classmethod
    def of(cls, config: UNetConfig, batch: int, latent: int, dtype: torch.dtype, device: str) -> Given:
        generator = torch.Generator().manual_seed(0)
        drawn = partial(torch.randn, generator=generator)
        sample = drawn(batch, config.in_channels, latent, latent).to(device, dtype)
        timesteps = torch.linspace(1, 999, batch, device=device)
        return cls(sample, timesteps, drawn(batch, 77, config.context_dim).to(device, dtype))

    def image(self, i: int) -> Given:
        return Given(*(x[i : i + 1].clone() for x in (self.sample, self.timesteps, self.context)))


def step(unet: UNet, given: Given) -> Tensor:
    out: Tensor = unet(given.sample, given.timesteps, given.context)
    return out


def differing_images(unet: UNet, given: Given) -> int:
    """How many images' results in the batch have other bits than alone."""
    whole = step(unet, given)
    return sum(not torch.equal(whole[i : i + 1], step(unet, given.image(i))) for i in range(len(whole)))


def differing_calls(unet: UNet, given: Mapping[int, Given]) -> list[Finding]:
    """The calls of a step, those at several batches as one."""
    found: dict[tuple[str, str], Finding] = {}
    for batch, of in given.items():
        with CallByCall(unet, batch, [of.sample, of.timesteps, of.context]) as calls:
            step(unet, of)
        for key, finding in calls.findings.items():
            found.setdefault(key, finding).share.update(finding.share)
    return list(found.values())


def prices(plain: UNet, given: Given, repeats: int) -> dict[str, list[float]]:
    """ms of a step in turn: plain, the whole evaluation image by image, each call image by image.

    All under a dispatch mode, which costs each call some Python; that of the last way also picks the parts.
    """
    invariant = plain.with_backend("auto" if given.sample.is_cuda else "torch", batch_invariant=True)
    batched = [given.sample, given.timesteps, given.context]

    def by_call() -> None:
        with CallByCall(plain, len(given.sample), batched, is_split=True):
            step(plain, given)

    def under_a_mode(unet: UNet) -> None:
        with _Nothing():
            step(unet, given)

    ways: dict[str, Callable[[], None]] = {
        "plain": partial(under_a_mode, plain),
        "image by image": partial(under_a_mode, invariant),
        "call by call": by_call,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if given.sample.is_cuda:
                torch.cuda.synchronize()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def found_of(size: str, dtype: str, latent: int, device: str, repeats: int) -> dict[str, Any]:
    """What a size in a dtype has to say."""
    with torch.random.fork_rng():
        unet = UNet(FAMILY[size], backend="torch" if device == "cpu" else "auto")
        randomize(unet, 0)
        unet = unet.to(device, DTYPES[dtype]).eval()
    given = {batch: Given.of(unet.config, batch, latent, DTYPES[dtype], device) for batch in BATCHES}
    invariant = unet.with_backend("torch" if device == "cpu" else "auto", batch_invariant=True)
    calls = differing_calls(unet, given)
    return {
        "size": size,
        "dtype": dtype,
        "latent": latent,
        "images": {batch: differing_images(unet, of) for batch, of in given.items()},
        "images_with_the_mode": {batch: differing_images(invariant, of) for batch, of in given.items()},
        "calls": sum(call.count for call in calls),
        "differing": [asdict(call) for call in calls if call.share],
        "same": sorted({call.name for call in calls} - {call.name for call in calls if call.share}),
        "ms": prices(unet, given[BATCHES[-2]], repeats) if repeats else {},
    }


def _count(text: str, least: int = 0) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is not at least {least}")
    return number


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="39M", choices=list(FAMILY))
    parser.add_argument("--latent", type=partial(_count, least=1), default=32)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=_count, default=0, help="of the steps that are timed; 0 times none")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    steps = [
        found_of(given.size, dtype, given.latent, given.device, given.repeats)
        for dtype in known_names("dtype", given.dtype.split(","), tuple(DTYPES))
    ]
    environment = collect_environment(given.device).model_dump(mode="json")
    found = {"batches": BATCHES, "steps": steps, "threads": torch.get_num_threads(), "environment": environment}
    if given.out is not None:
        write_whole(given.out, (json.dumps(found) + "\n").encode())
    print(table(found))


if __name__ == "__main__":
    main()
