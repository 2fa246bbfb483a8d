"""What loading and saving have in common, whatever the network: arguments, shapes, dtypes, and one whole file."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .fields import shown
from .files import CheckpointError, some
from .keys import Slot

# Of a .safetensors header.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Network = TypeVar("Network", bound=nn.Module)


def check_path(path: object) -> None:
    """Raises ValueError for what names no file."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be a str or a Path; got {shown(path)}: give a checkpoint's file or folder")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype that no checkpoint is loaded in."""
    if isinstance(dtype, str):
        raise ValueError(f"dtype must be torch's own, as torch.float16; got the string {shown(dtype)}")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES.values()))}; got {dtype}")


def check_device(device: torch.device | str) -> None:
    """Raises ValueError for a device that is not there."""
    try:
        torch.empty(0, device=torch.device(device))
    # AssertionError: a torch without CUDA.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"device {shown(device)} is not there: {str(error).splitlines()[0][:200]}; give 'cpu', or 'cuda' on a "
            "machine with a GPU that torch sees"
        ) from error


def shortage(tensors: int, parameters: int, shapes: Iterable[tuple[int, ...]]) -> str:
    """How few tensors of these shapes there are, or parameters in them; empty where it is half or more."""
    held = [math.prod(shape) for shape in shapes]
    if tensors <= 2 * len(held) and parameters <= 2 * sum(held):
        return ""
    needed = f"{_digits(tensors)} with {_digits(parameters)}"
    return f"{len(held)} with {sum(held)} parameters instead of at least {needed}"


def _digits(count: int) -> str:
    # Python refuses to print integers of thousands of digits.
    return str(count) if count < 10**18 else "10^18 and more"


def mismatch(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """How the shapes of a file differ from those of a network, by their names there; empty where they do not."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{key} {list(found[key])} instead of {list(shape)}"
            for key, shape in sorted(expected.items())
            if key in found and found[key] != shape
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names)


def filled(
    network: Network,
    slots: Iterable[Slot],
    stored: Sequence[Any],
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Network:
    """The network, so far on the meta device, with the values of lazy slices, one for each slot.

    The file's dtypes are checked whatever is wanted. Raises `CheckpointError` before memory is taken.
    """
    slots = list(slots)
    allocate(network, _one_dtype(path, slots, stored, dtype), device)
    for view, tensor in zip(views(network, slots).values(), stored, strict=True):
        # On the meta device there is nothing to copy to: gigabytes would be read for it.
        if not view.is_meta:
            view.copy_(tensor[:].reshape(view.shape))
    return network.eval().requires_grad_(False)


def allocate(network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Gives a network on the meta device memory of this dtype on that device, not initialised."""
    state = {
        name: torch.empty_like(parameter, dtype=dtype, device=device)
        for name, parameter in network.state_dict().items()
    }
    network.load_state_dict(state, assign=True)


def views(network: nn.Module, slots: Iterable[Slot]) -> dict[str, Tensor]:
    """The parts of the network's parameters under the names and in the shapes of the slots."""
    state = network.state_dict()
    return {slot.key: state[slot.parameter].narrow(0, slot.start, slot.rows).view(slot.shape) for slot in slots}


def write(
    path: str | Path, state: Mapping[str, Tensor], metadata_key: str, config: object, dtype: torch.dtype | None
) -> None:
    """One .safetensors file of the state, with the configuration as JSON in its metadata: whole or absent."""
    check_dtype(dtype)
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    # Parts of one parameter share its memory, and convolutions are channels-last: the file has neither.
    copies = {
        key: value.detach().to("cpu", dtype or value.dtype, copy=True, memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(copies, unfinished, {"format": "pt", metadata_key: json.dumps(config)})
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _one_dtype(path: Path, slots: list[Slot], stored: Sequence[Any], wanted: torch.dtype | None) -> torch.dtype:
    names = [tensor.get_dtype() for tensor in stored]
    # Quantized weights need their scales, which other tensors hold: a cast alone is wrong.
    if unknown := [f"{slot.key} ({name})" for slot, name in zip(slots, names, strict=True) if name not in DTYPES]:
        raise CheckpointError(
            f"{path}: not a float dtype in {some(unknown)}; only {', '.join(DTYPES)} are read: convert the file"
        )
    if wanted is None and len(set(names)) > 1:
        raise CheckpointError(f"{path}: mixed dtypes {', '.join(sorted(set(names)))}; pass dtype=")
    return wanted or DTYPES[names[0]]
