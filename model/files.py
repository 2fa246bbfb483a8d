"""The files of a checkpoint: which ones a path stands for, their headers, and their faults.

Headers are read, data is not: a tensor is a lazy slice of its file.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .fields import UnsupportedConfig
from .kinds import UNET, NetworkKind

# The name that diffusers gives to weights; a variant ("diffusion_pytorch_model.fp16") has one more word.
WEIGHTS_NAME = "diffusion_pytorch_model"
# Configurations have some kilobytes, the index of the largest UNets some hundred. More is another kind of file.
LARGEST_CONFIG = 1 << 20
LARGEST_INDEX = 1 << 24

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})((?:\.[^.]+)?)\.safetensors", re.ASCII | re.DOTALL)
_INDEX = re.compile(r"(.+)\.safetensors\.index((?:\.[^.]+)?)\.json", re.DOTALL)
_UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload", ".download")
# The first bytes of other kinds of file, and the advice for each.
_OTHER_KINDS = (
    (rb"version https://git-lfs", "a git-lfs pointer to the file; run `git lfs pull` in its repository"),
    (rb"PK\x03\x04", "a zip archive, as torch.save writes; save the weights as .safetensors"),
    (rb"\x80[\x02-\x05]", "a Python pickle, as torch.save wrote; save the weights as .safetensors"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|7z\xbc\xaf", "a compressed archive; unpack it"),
    (rb"GGUF", "a GGUF file, whose weights are quantized; take the .safetensors file"),
    (rb"(?i)\s*<(!doctype|html|head|\?xml)", "a web page; download the file itself (does it need a login?)"),
    (rb"\s*[\[{]", "JSON text; give the .safetensors file, its index file or the folder"),
    (rb"\0{64}", "zeros where the header belongs: an unfinished download; download it again"),
    (rb"$", "an empty file; download or copy it again"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. The message is one line: the file, what is wrong, what to do next."""

    def __init__(self, message: str) -> None:
        # Names of tensors and fields come from the file: they may hold newlines, and be as long as it.
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message[:100_000])
        super().__init__(text if len(text) <= 2000 else f"{text[:1200]} ... {text[-700:]}")


class UnsupportedCheckpoint(CheckpointError, UnsupportedConfig):
    """A checkpoint whose configuration this network does not implement."""


@dataclass(frozen=True)
class Source:
    """The files that a path stands for.

    files: one whole file or all shards of one set. weight_map: the index file's, from tensor to file name.
    config_file: the config.json beside the files, if there is one. is_folder: the path named a folder.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    config_file: Path | None
    is_folder: bool


def find(path: Path, kind: NetworkKind) -> Source:
    """The files behind a folder, a .safetensors file, a shard or an index file."""
    if os.path.isfile(path):
        beside = path.parent / "config.json"
        files: tuple[Path, ...]
        weight_map: dict[str, str] | None
        if _INDEX.fullmatch(path.name):
            weight_map = _read_index(path)
            files = _listed(path, weight_map)
        elif shard := _SHARD.fullmatch(path.name):
            files, weight_map = _shards(_sets(path.parent)[shard[1] + shard[4]])
        else:
            files, weight_map = (path,), None
        return Source(files, weight_map, beside if os.path.isfile(beside) else None, is_folder=False)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such file or folder; give a diffusers folder or a .safetensors file")
    folder = _folder(path, kind)
    files, weight_map = _weights(folder, kind)
    return Source(files, weight_map, folder / "config.json", is_folder=True)


def checkpoint_files(path: str | Path) -> tuple[Path, ...]:
    """The files that `load_unet` reads for a path, by name. Raises `CheckpointError` where there are none."""
    return find(Path(path), UNET).files


def read_json(file: Path, most: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes."""
    try:
        with open(file, "rb") as opened:
            # `read` takes a buffer of the size that it is given.
            content = opened.read(min(os.fstat(opened.fileno()).st_size, most) + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: not readable: {error.strerror}; check its permissions") from error
    return parse_json(content, str(file), most)


def parse_json(content: bytes, place: str, most: int = LARGEST_CONFIG) -> dict[str, Any]:
    """`read_json` of bytes; `place` is named in errors."""
    if len(content) > most:
        raise CheckpointError(f"{place}: more than {most >> 20} MB, which no diffusers file of this name has")
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{place}: {_OTHER_KINDS[0][1]}")
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        # Neither UnicodeDecodeError nor JSONDecodeError: Python's advice on long integers is for programmers.
        why = "an integer of thousands of digits" if type(error) is ValueError else error
        raise CheckpointError(f"{place}: not readable as JSON: {why}; download or write it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{place}: not a JSON object; download or write it again")
    return raw


def open_all(source: Source, stack: ExitStack) -> tuple[dict[str, Any], dict[str, str]]:
    """Every tensor of the files as a lazy slice, and the metadata of their headers."""
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    homes: dict[str, str] = {}
    for file in source.files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            metadata |= handle.metadata() or {}
            for key in handle.keys():  # noqa: SIM118
                if key in tensors:
                    raise CheckpointError(
                        f"{file}: {key} is in another file of the folder too; remove stale shards"
                    )
                tensors[key] = handle.get_slice(key)
                homes[key] = file.name
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: {_what_it_is(file)} ({error})") from error
    if source.weight_map is not None and homes != source.weight_map:
        wrong = sorted(key for key, _ in homes.items() ^ source.weight_map.items())
        raise CheckpointError(
            f"{source.files[0].parent}: the index file is not that of the shards: they differ in "
            f"{some(dict.fromkeys(wrong))}; download both again"
        )
    return tensors, metadata


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 120 else name[:120] + "..." for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _what_it_is(file: Path) -> str:
    """The kind of a file that safetensors cannot read, and the advice for it."""
    try:
        str(file).encode()
        with open(file, "rb") as opened:
            head = opened.read(64)
    except UnicodeEncodeError:
        return "safetensors opens no path that is not UTF-8; rename the file or its folder"
    except OSError:
        return "not readable; check its permissions"
    if file.suffix in _UNFINISHED or os.path.exists(f"{file}.aria2"):
        return "an unfinished download; let it finish or download it again"
    for pattern, text in _OTHER_KINDS:
        if re.match(pattern, head):
            return f"not weights but {text}" if head else text
    if file.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return "only .safetensors files are read; save the weights as .safetensors"
    return "not a readable .safetensors file: truncated or damaged; download or copy it again"


def _folder(path: Path, kind: NetworkKind) -> Path:
    own, nested = path / "config.json", path / kind.folder / "config.json"
    if os.path.isfile(nested):
        try:
            is_its_own = os.path.isfile(own) and kind.is_config(read_json(own))
        except CheckpointError:
            is_its_own = False
        # A pipeline's folder may have a config.json that belongs to no network: diffusers does not read it.
        return path if is_its_own else nested.parent
    if os.path.isfile(own):
        return path
    raise CheckpointError(
        f"{path}: no config.json here or in a folder {kind.folder}: not written by diffusers' save_pretrained; "
        f"give the {kind.name}'s folder or a .safetensors file by its path"
    )


@dataclass
class _Set:
    """Files of a folder that hold the same weights: whole or in shards, with the index of the shards."""

    whole: Path | None = None
    shards: list[tuple[Path, int, int]] = field(default_factory=list)
    indexes: list[Path] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        """The paths that name the set, the simplest first."""
        return [*([self.whole] if self.whole else []), *self.indexes, *(file for file, _, _ in self.shards)]


def _sets(folder: Path) -> dict[str, _Set]:
    """The sets of a folder by name: `diffusion_pytorch_model`, then its variants, then others."""
    sets: dict[str, _Set] = {}
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: not readable: {error.strerror}; check its permissions") from error
    for file in files:
        if not os.path.isfile(file):
            continue
        if shard := _SHARD.fullmatch(file.name):
            # The variant stands before the number in newer diffusers, behind it in older ones.
            found = sets.setdefault(shard[1] + shard[4], _Set())
            found.shards.append((file, int(shard[2]), int(shard[3])))
        elif index := _INDEX.fullmatch(file.name):
            sets.setdefault(index[1] + index[2], _Set()).indexes.append(file)
        elif file.suffix == ".safetensors":
            sets.setdefault(file.stem, _Set()).whole = file
    return sets


def _weights(folder: Path, kind: NetworkKind) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weights of a folder: the plain ones, or a variant (.fp16 and the like) where it stands alone."""
    sets = _sets(folder)
    # An index without any of its shards comes along when a variant is downloaded.
    there = {name: found for name, found in sets.items() if found.whole or found.shards} or sets
    there = {name: found for name, found in there.items() if name.startswith(WEIGHTS_NAME)} or there
    if not there:
        raise CheckpointError(
            f"{folder}: no .safetensors file (pickle weights are not read; save them with "
            f"{kind.class_name}.from_pretrained(folder).save_pretrained(folder))"
        )
    if WEIGHTS_NAME not in there and len(there) > 1:
        names = some(found.paths[0].name for found in there.values())
        raise CheckpointError(f"{folder}: several sets of weights; give one by its path: {names}")
    chosen = there.get(WEIGHTS_NAME) or next(iter(there.values()))
    return ((chosen.whole,), None) if chosen.whole else _shards(chosen)


def _shards(found: _Set) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """All shards of a set: those of its index file, or as many as their names say."""
    if len(found.indexes) > 1:
        names = some(file.name for file in found.indexes)
        raise CheckpointError(f"{found.indexes[0].parent}: give one index file by its path: {names}")
    if found.indexes:
        index = found.indexes[0]
        weight_map = _read_index(index)
        files = _listed(index, weight_map)
        if stale := [file.name for file, _, _ in found.shards if file not in files]:
            raise CheckpointError(
                f"{index}: does not list {some(stale)}; remove stale shards or give the index file by its path"
            )
        return files, weight_map
    first, _, count = found.shards[0]
    if any(of != count for _, _, of in found.shards):
        names = some(file.name for file, _, _ in found.shards)
        raise CheckpointError(f"{first.parent}: shards of more than one set: {names}; remove stale shards")
    numbers = Counter(number for _, number, _ in found.shards)
    missing = [f"{number:05d}" for number in range(1, count + 1) if number not in numbers]
    if missing:
        raise CheckpointError(f"{first}: of {count} shards, {some(missing)} missing; download the whole set")
    if twice := [file.name for file, number, _ in found.shards if numbers[number] > 1 or not number <= count]:
        raise CheckpointError(f"{first.parent}: too many shards: {some(twice)}; remove stale shards")
    return tuple(file for file, _, _ in found.shards), None


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index, LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it, from tensors to files; download it again")
    names = set(map(str, weight_map.values()))
    # A name with a folder in it would lead out of the checkpoint.
    odd = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
    if odd or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: lists what is no .safetensors file of its folder: {some(odd or names)}")
    return weight_map


def _listed(index: Path, weight_map: Mapping[str, str]) -> tuple[Path, ...]:
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    missing = [file.name for file in files if not os.path.isfile(file)]
    if missing:
        raise CheckpointError(f"{index}: of {len(files)} shards, {some(missing)} missing; download the whole set")
    return files
