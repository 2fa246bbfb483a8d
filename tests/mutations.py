"""Mutated JSON, headers and tensors of checkpoints, and a watch on what loading them costs."""

import json
import math
import tracemalloc

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ldmperf.model import CheckpointError

NAME = "diffusion_pytorch_model"
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Quiet(dict):
    """hypothesis prints what an example was given."""

    def __repr__(self):
        return "state"


class Bytes(bytes):
    """The same for bytes."""

    def __repr__(self):
        return "content"


class Work:
    """Counts what a load does: modules that are built, bytes of parameters, the peak of Python's memory."""

    def __init__(self, monkeypatch, loader):
        self.loader = loader
        self.modules = self.parameter_bytes = self.peak = self.loads = 0
        init, empty_like = torch.nn.Module.__init__, torch.empty_like

        def counted_init(module, *args, **kwargs):
            self.modules += 1
            init(module, *args, **kwargs)

        def counted_empty_like(tensor, **options):
            self.parameter_bytes += tensor.numel() * torch.finfo(options["dtype"]).bits // 8
            return empty_like(tensor, **options)

        monkeypatch.setattr(torch.nn.Module, "__init__", counted_init)
        monkeypatch.setattr(torch, "empty_like", counted_empty_like)

    def load(self, path, **options):
        """The network, or None with a checked message."""
        self.modules = self.parameter_bytes = self.peak = 0
        # Every fourth time: to trace memory makes a load several times slower.
        self.loads += 1
        if self.loads % 4 == 1:
            tracemalloc.start()
        try:
            return self.loader(path, **options)
        except CheckpointError as error:
            message = str(error)
            assert message.isprintable()
            assert len(message) <= 2500
            assert self.parameter_bytes == 0
            return None
        finally:
            if tracemalloc.is_tracing():
                self.peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()


def assert_bounded(work, tensors, size):
    """Work goes with the tensors that are there, memory with the size of the files."""
    assert work.modules <= 4 * tensors + 20
    assert work.parameter_bytes <= size
    # Python's objects for JSON and modules are larger than what they stand for, by a factor that is no input's.
    assert work.peak <= 50 * size + 10_000 * tensors


# A number of so many digits, or a list so deep, is put in as text: Python's own JSON writes neither.
DIGITS, DEEP = "@digits@", "@deep@"
NASTY = (
    *(0, -1, 1, 2, 3, 4, 8, 16, 10_000, 2**30, 2**31, 2**62, 2**63, 2**64, 10**30, 1e308, -0.0, 0.5),
    *(math.nan, math.inf, True, False, None, "", "x", "\n\x1b", "F16", "F32", "I32", "BF16", "F8_E4M3", "\udcff"),
    *([], {}, [8], [2], [0], [8, 8], [2**30, 2**30], [True], [[8]], [None], {"a": 1}, [8] * 1000),
    *(
        "../x.safetensors",
        f"{NAME}.safetensors",
        "UNet2DModel",
        "DownBlock2D",
        ["DownBlock2D"],
        "text_time",
    ),
    *(DIGITS, DEEP),
)


def as_text(raw):
    text = json.dumps(raw)
    return text.replace(f'"{DIGITS}"', "9" * 4000).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).encode()


def places(raw, path=()):
    """Every place in a JSON value."""
    yield path
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(draw, raw):
    """A copy of a JSON value with one to three places replaced, removed, renamed or exchanged."""
    for _ in range(draw(st.integers(1, 3))):
        # A copy each time: no value may come to hold itself.
        raw = json.loads(json.dumps(raw))
        found = [path for path in places(raw) if path]
        if not found:
            break
        *path, key = draw(st.sampled_from(found))
        parent = raw
        for step in path:
            parent = parent[step]
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "exchange", "add")))
        if how == "replace":
            parent[key] = draw(st.sampled_from(NASTY))
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            other = draw(st.sampled_from(sorted(parent)))
            if how == "exchange":
                parent[key], parent[other] = parent[other], parent[key]
            elif how == "rename":
                parent[draw(st.sampled_from((other, f"{key}x", "", "module." + key)))] = parent.pop(key)
            else:
                parent[draw(st.sampled_from((f"{key}x", "\n", "dropout", "decay")))] = parent[key]
    return raw


def damaged(draw, content):
    """Bytes with one changed, some left out, or cut short."""
    content = bytearray(content)
    position = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(("flip", "cut", "leave out")))
    if how == "flip":
        content[position] ^= draw(st.integers(1, 255))
    elif how == "cut":
        del content[position:]
    else:
        del content[position : position + draw(st.integers(1, 40))]
    return bytes(content)


def mutated_text(draw, raw):
    return as_text(changed(draw, raw)) if draw(st.integers(0, 4)) else damaged(draw, as_text(raw))


def mutated_header(draw, content, metadata_key, raw_config):
    """A .safetensors file with another header, or another configuration in its metadata."""
    end = 8 + int.from_bytes(content[:8], "little")
    if not draw(st.booleans()):
        return damaged(draw, content[:end]) + content[end:]
    raw = json.loads(content[8:end])
    if draw(st.integers(0, 2)) == 0:
        raw["__metadata__"][metadata_key] = as_text(changed(draw, raw_config)).decode()
    else:
        raw = changed(draw, raw)
    header = as_text(raw)
    return len(header).to_bytes(8, "little") + header + content[end:]


# Of the same size, so that a file may say one and hold the other.
ALIKE = {"F32": ("I32", "U32", "F32"), "F16": ("BF16", "I16", "F16"), "F64": ("I64", "U64", "F64")}
WIDTH = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, 1e38, 2.0**-149)


def mutated_tensors(draw, state, metadata):
    """The bytes of a .safetensors file of `state`, one to three of whose tensors are wrong in some way.

    Nothing checks that a file of another's making is in order, so the header is written by hand.
    """
    entries = [[key, "F32", list(value.shape), value.numpy().tobytes()] for key, value in state.items()]
    last = ""
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(entries) - 1))
        key, dtype, shape, values = entries[index]
        how = draw(st.sampled_from((*_OF_A_TENSOR, *_OF_THE_FILE)))
        if how == "relabel":
            entries[index][1] = draw(st.sampled_from(ALIKE.get(dtype, (dtype,))))
        elif how == "cast" and dtype == "F32":
            wanted = draw(st.sampled_from((torch.float64, torch.float16, torch.bfloat16)))
            cast = torch.frombuffer(bytearray(values), dtype=torch.float32).to(wanted) if values else None
            if cast is not None:
                name = {torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}[wanted]
                entries[index][1:] = [name, shape, cast.view(torch.uint8).numpy().tobytes()]
        elif how == "reshape":
            entries[index][2] = draw(st.sampled_from((shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)])))
        elif how == "huge":
            entries[index][2] = draw(st.sampled_from(([2**62], [2**40, *shape], [*shape, 2**63], [10**30])))
        elif how == "empty":
            entries[index][2:] = [[0, *shape[1:]], b""]
        elif how == "scalar":
            entries[index][2:] = [[], values[: WIDTH[dtype]]]
        elif how == "number" and dtype == "F32" and values:
            number = torch.tensor([draw(st.sampled_from(NUMBERS))]).numpy().tobytes()
            entries[index][3] = number + values[4:]
        elif how == "bits" and values:
            at = draw(st.integers(0, len(values) - 1))
            entries[index][3] = values[:at] + bytes([values[at] ^ draw(st.integers(1, 255))]) + values[at + 1 :]
        elif how == "exchange":
            other = draw(st.integers(0, len(entries) - 1))
            entries[index][0], entries[other][0] = entries[other][0], key
        elif how == "copy":
            entries.append([draw(st.sampled_from((key, f"{key}.again", f"unet.{key}"))), dtype, shape, values])
        elif how == "leave out":
            del entries[index]
        elif how in _OF_THE_FILE:
            last = how
    return _file(draw, entries, metadata, last)


_OF_A_TENSOR = (
    *("relabel", "cast", "reshape", "huge", "empty", "scalar", "number", "bits", "exchange", "copy", "leave out"),
)
_OF_THE_FILE = (
    "overlap",
    "gap",
    "backwards",
    "beyond",
    "negative",
    "trailing",
    "spaces",
    "short",
    "length",
    "order",
)


def _file(draw, entries, metadata, last):
    parts, end = [], 0
    at = draw(st.integers(0, max(len(entries) - 1, 0)))
    for number, (key, dtype, shape, values) in enumerate(entries):
        start, end = end, end + len(values)
        offsets = [start, end]
        if number == at and last in ("overlap", "gap", "backwards", "beyond", "negative"):
            offsets = {
                "overlap": [max(start - 4, 0), end],
                "gap": [start + 4, end],
                "backwards": [end, start],
                "beyond": [start, end + 2**40],
                "negative": [start - end, start],
            }[last]
        told = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        # By hand: a name may come twice.
        parts.append(f"{json.dumps(key)}: {json.dumps(told)}")
    if last == "order":
        parts.reverse()
    parts.insert(0, f'"__metadata__": {json.dumps(metadata)}')
    header = ("{" + ", ".join(parts) + "}").encode() + b" " * (99 if last == "spaces" else 0)
    data = b"".join(values for *_, values in entries)
    data = data + b"\0" * 8 if last == "trailing" else data[:-4] if last == "short" else data
    length = len(header) + (draw(st.sampled_from((-1, 1, 2**40, 2**63))) if last == "length" else 0)
    return length.to_bytes(8, "little") + header + data
