"""Mutations of checkpoints, and what a load of one may cost, for the loaders of all networks."""

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

    def __init__(self, monkeypatch, load):
        self.load_network = load
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
            return self.load_network(path, **options)
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
    *("../x.safetensors", f"{NAME}.safetensors", "UNet2DModel", "DownBlock2D", ["DownBlock2D"], "text_time"),
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


def mutated_file(draw, content, metadata_key, raw_config):
    """A .safetensors file with another header, or another configuration in its metadata, or damaged anywhere."""
    end = 8 + int.from_bytes(content[:8], "little")
    if not draw(st.booleans()):
        # Mostly in the header, which is short.
        return damaged(draw, content[:end]) + content[end:] if draw(st.integers(0, 4)) else damaged(draw, content)
    raw = json.loads(content[8:end])
    if draw(st.integers(0, 2)) == 0:
        raw["__metadata__"][metadata_key] = as_text(changed(draw, raw_config)).decode()
    else:
        raw = changed(draw, raw)
    header = as_text(raw)
    return len(header).to_bytes(8, "little") + header + content[end:]
