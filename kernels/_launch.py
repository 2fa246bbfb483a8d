"""Launches as values, and the table of tuned launch configurations.

An operator's plan is a pure function from tensors (on any device, "meta" too) to `Launch` values. A GPU runs them;
without one they are compiled and inspected. Configurations are frozen dataclasses: those measured on this GPU come
from tuned/<gpu>.json (written by bench/tune.py), others from the default function beside each kernel. The same
table tells for which calls torch's own operator was faster. Nothing is tuned while a program runs, so that nothing
synchronizes inside a capture.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

TUNED_FOLDER = Path(__file__).with_name("tuned")
Config = TypeVar("Config")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Chip:
    """What a default configuration depends on: the GPU's name, its number of multiprocessors, its architecture."""

    name: str
    multiprocessors: int
    arch: str = "sm_90"

    @property
    def file_name(self) -> str:
        """The stem of its tuned table: "NVIDIA H200" -> "nvidia-h200"."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


# Rough, for choosing where nothing was measured: what a launch costs the GPU before and after its work.
LAUNCH_NS = 2500.0

# Stands for the device where there is none: under the interpreter and on "meta".
NO_GPU = Chip("no gpu", 132)
_planned_chip: ContextVar[Chip] = ContextVar("_planned_chip", default=NO_GPU)


@dataclass(frozen=True)
class Launch:
    """One launch of `kernel` over `programs` programs in one dimension (so no grid limit but 2^31 - 1).

    arguments     by name: tensors, numbers, compile-time constants and None
    operator      whose kernel it is: of the two launches of a `linear` the first may be layer_norm's
    role          what it computes, where its operator's name does not tell: "group_norm_statistics",
                  "cross-attention", "layer_norm + linear + geglu"
    flops         of its matmuls, a multiply-add being two
    exponentials  of its softmax
    updated       the arguments that it reads and writes
    pdl           whether it is a dependent launch (_dependent.py), which its kernel has to be made for
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any] = field(repr=False)
    num_warps: int = 4
    num_stages: int = 1
    operator: str = ""
    role: str = ""
    flops: int = 0
    exponentials: int = 0
    updated: tuple[str, ...] = ()
    pdl: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What triton takes beside the arguments. Not every backend of it knows `launch_pdl`."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"launch_pdl": True} if self.pdl else options

    @property
    def name(self) -> str:
        """The kernel's own name."""
        name: str = self.kernel.__name__
        return name

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among its arguments, by name."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor once, of one that is updated twice: the least that it moves."""
        distinct = {id(tensor): tensor for tensor in self.tensors.values()}.values()
        return sum(map(nbytes, [*distinct, *(self.arguments[name] for name in self.updated)]))

    def run(self) -> None:
        """For tools and tests: launch on the current device and stream. An operator's call uses `_recipes`."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def nbytes(tensor: Tensor) -> int:
    """Bytes of memory that a tensor has elements in: an expanded dimension (stride 0) counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.itemsize


@dataclass(frozen=True)
class Operator:
    """An operator and its parts. Parts from `check` on take a call, a value that holds the arguments once.

    call          the public function
    reference     the same in torch, float32 inside
    bind          the call of these arguments, without `backend`: the class of the operator's calls
    check         raises ValueError for a call whose shapes, dtypes or devices do not fit
    plan          (the result, not yet computed, and the launches that compute it). `config=` is of `candidates`,
                  by default the one tuned for `chip=`, or the default one. Takes tensors of any device, "meta"
                  too, and launches nothing
    candidates    the launch configurations worth trying (frozen dataclasses of numbers)
    tuning_key    what a tuned configuration is looked up by
    unsupported_reasons  every reason why the Triton kernels cannot serve a call; empty when they can
    torchs_own    `call` by an operator of torch's that may be the faster one, which "auto" then takes; None where
                  torch has no such operator
    predicted_ns  (with, without): what a call is predicted to take on a chip with what it merges, and without;
                  None where no model tells
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    bind: Callable[..., Any]
    check: Callable[[Any], None]
    plan: Callable[..., tuple[Any, list[Launch]]]
    candidates: Callable[[Any], list[Any]]
    tuning_key: Callable[[Any], str]
    unsupported_reasons: Callable[[Any], list[str]]
    torchs_own: Callable[..., Any] | None = None
    predicted_ns: Callable[[Any, Chip], tuple[float, float]] | None = None


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """For tools and tests: run launches in order on `device`."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for launch in launches:
                launch.run()
        return
    for launch in launches:
        launch.run()


def constant_to_a_compiler(function: Function) -> Function:
    """The function, marked: a compiler that traces takes its answer and does not look inside.

    The mark of `torch.compiler.assume_constant_result`, which imports a second's worth of torch to set it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_to_a_compiler
def chip_of(device: torch.device) -> Chip:
    """The chip of a device; asked once. Of anything but a CUDA device `NO_GPU`, or that of `planned_for`."""
    return _cuda_chip(device.index) if device.type == "cuda" else _planned_chip.get()


@contextlib.contextmanager
def planned_for(chip: Chip) -> Iterator[None]:
    """Inside, plans of tensors that are on no GPU ("meta") are those of `chip`, its tuned table included."""
    token = _planned_chip.set(chip)
    try:
        yield
    finally:
        _planned_chip.reset(token)


@functools.cache
def _cuda_chip(index: int | None) -> Chip:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    arch = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
    return Chip(properties.name, properties.multi_processor_count, arch)


def tuned(kernel: str, key: str, chip: Chip, config: type[Config]) -> Config | None:
    """The configuration measured to be fastest for this kernel and key on this chip; None where none was.

    None too where the default was. A 16-bit call that nobody measured takes what was measured of the same call in
    the other 16-bit dtype (`in_other_16_bits`).
    """
    configs = _table(TUNED_FOLDER, chip).configs.get(kernel, {})
    if configs and key not in configs:
        key = in_other_16_bits(key) or key
    fields = configs.get(key)
    return None if fields is None else config(**fields)


def fastest(
    kernel: str, chip: Chip, key: Callable[[], str], *, unmeasured: Literal["torch", "triton"] = "triton"
) -> Literal["torch", "triton"]:
    """Whose result was measured to come first on this chip; `unmeasured` where nothing was.

    A 16-bit call that nobody measured follows the other 16-bit dtype, as in `tuned`. `key` is called only where
    the table can tell: making a key takes microseconds of a call.
    """
    table = _table(TUNED_FOLDER, chip)
    configs, torch_keys = table.configs.get(kernel, {}), table.torch.get(kernel, frozenset())
    if not torch_keys and (unmeasured == "triton" or not configs):
        return unmeasured
    own = key()
    for looked_up in (own, in_other_16_bits(own)):
        if looked_up in torch_keys:
            return "torch"
        if looked_up in configs:
            return "triton"
    return unmeasured


_OTHER_16_BITS = {"bfloat16": "float16", "float16": "bfloat16"}


def in_other_16_bits(key: str) -> str | None:
    """The tuning key of the same call in float16 for one in bfloat16, and the reverse; None for other dtypes.

    The same bytes move, the tensor cores take both at one rate, and a tile needs the same shared memory. Registers
    may differ, so that the code of each dtype has to be inspected for spills and serialized wgmma
    (profiling/static/tuned.py). The time was measured in one dtype.
    """
    words = key.split(" ")
    swapped = " ".join(_OTHER_16_BITS.get(word, word) for word in words)
    return None if swapped == key else swapped


@dataclass(frozen=True)
class _Table:
    """configs: {kernel: {key: fields of its configuration, None for the default}}, of what was measured.

    torch: {kernel: keys where torch's was faster}.
    """

    configs: Mapping[str, Mapping[str, Mapping[str, Any] | None]]
    torch: Mapping[str, frozenset[str]]


def tuned_table(chip: Chip) -> Path:
    """Where the tuned table of a chip is, or would be."""
    return TUNED_FOLDER / f"{chip.file_name}.json"


@functools.cache
def _table(folder: Path, chip: Chip) -> _Table:
    """The table of a chip; empty where no file is."""
    path = folder / f"{chip.file_name}.json"
    if not path.exists():
        return _Table({}, {})
    document = json.loads(path.read_text())
    torch_keys = {kernel: frozenset(keys) for kernel, keys in document.get("torch", {}).items()}
    return _Table(document["kernels"], torch_keys)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def dtype_name(x: Tensor) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(x.dtype).removeprefix("torch.")
