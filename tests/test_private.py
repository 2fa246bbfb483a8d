"""Nothing that a caller may still hold is overwritten, and gradients are those of the plain network."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from ldmperf.model import UNet, UNetConfig, diffusers_config, diffusers_state_dict
from ldmperf.model.blocks import Resample, ResBlock, Transformer, TransformerBlock
from ldmperf.model.deferred import missing_in_tokens

pytestmark = pytest.mark.usefixtures("_one_thread")

SMALL = {"norm_groups": 4, "context_dim": 12, "layers_per_block": 1}
CONFIGS = {
    "plain": UNetConfig((16, 32), (2, 4), (True, False), **SMALL),
    "deep": UNetConfig(
        (16, 24), (2, 3), (False, True), transformer_layers=(1, 2), added_time_dim=4, added_dim=14, **SMALL
    ),
}
# The least that has skips, and several blocks.
TINY = UNetConfig(
    (8,), (2,), (True,), has_middle=False, transformer_layers=2, added_time_dim=4, added_dim=14, **SMALL
)
# Modules that a network calls, and that a user may therefore look at or replace.
BLOCKS = (ResBlock, Transformer, TransformerBlock, Resample)


@functools.cache
def pair(name: str) -> tuple[UNet, dict[str, Tensor], Tensor]:
    """A network in float64, and diffusers' gradients and output for `arguments`."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    ours = UNet(config, backend="torch").double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = UNet2DConditionModel(**diffusers_config(config)).double()
    theirs.load_state_dict(diffusers_state_dict(ours))
    sample, context, added = arguments(name)
    out = theirs(sample, 7.0, context, added_cond_kwargs=added).sample
    out.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    return ours, gradients, out.detach()


def arguments(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    sample, context = draw(2, 4, 6, 5).contiguous(memory_format=torch.channels_last), draw(2, 3, 12)
    added = {"text_embeds": draw(2, 6), "time_ids": 100 * draw(2, 2).abs()} if name == "deep" else {}
    return sample, context, added


def gradients_of(unet: UNet) -> dict[str, Tensor]:
    """Ours under diffusers' names."""
    with torch.device("meta"):
        other = UNet(unet.config)
    # A wrapper adds to the names of parameters, not to their order.
    found = zip(other.state_dict(), unet.parameters(), strict=True)
    other.load_state_dict(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in found}, assign=True
    )
    return diffusers_state_dict(other)


def assert_plain(unet: UNet, name: str, run: Callable[..., Tensor]) -> None:
    """`run` of the network's arguments gives diffusers' output and gradients, and writes none of the arguments."""
    _, gradients, expected = pair(name)
    sample, context, added = arguments(name)
    before = [tensor.clone() for tensor in (sample, context, *added.values())]
    unet.zero_grad()
    out = run(sample, context, **added)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    out.square().sum().backward()
    assert all(map(torch.equal, (sample, context, *added.values()), before))
    for key, gradient in gradients_of(unet).items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-8, atol=1e-9, msg=key)


class Kept:
    """Keeps every tensor that it is shown, and a copy of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def keep(self, values: Any) -> None:
        for value in values if isinstance(values, tuple | list) else [values]:
            if isinstance(value, Tensor):
                self.seen.append((value, value.detach().clone()))

    def hook(self, module: nn.Module, given: Any, out: Any) -> None:
        self.keep(given)
        self.keep(out)

    def assert_unchanged(self) -> None:
        assert self.seen
        assert all(torch.equal(tensor, copy) for tensor, copy in self.seen)


# Methods that a call runs, by the class or base class that they are replaced in.
METHODS: dict[str, Callable[[nn.Module], type[nn.Module]]] = {
    "forward": type,
    "_call_impl": lambda module: nn.Module,
    "__call__": lambda module: nn.Module,
    "own __call__": type,
}
WAYS = (
    *("hook", "pre-hook", "forward", "wrapper", "class", "global hook", "global pre-hook", "function mode"),
    *(f"replaced {method}" for method in METHODS),
)


@contextmanager
def looked_at(unet: UNet, name: str, way: str, kept: Kept) -> Iterator[None]:
    """Someone keeps what the module `name` of the network is given or returns."""
    module = unet.get_submodule(name)
    parent = unet.get_submodule(name.rpartition(".")[0])
    undo: Callable[[], object]
    if way == "hook":
        undo = module.register_forward_hook(kept.hook).remove
    elif way == "pre-hook":
        undo = module.register_forward_pre_hook(lambda module, given: kept.keep(given)).remove
    elif way == "global hook":
        undo = register_module_forward_hook(kept.hook).remove
    elif way == "global pre-hook":
        undo = register_module_forward_pre_hook(lambda module, given: kept.keep(given)).remove
    elif way == "forward":
        plain = module.forward

        def forward(*given: Any, **named: Any) -> Any:
            out = plain(*given, **named)
            kept.hook(module, given, out)
            return out

        module.forward = forward  # type: ignore[method-assign]
        undo = functools.partial(delattr, module, "forward")
    elif way == "function mode":
        mode = Watching(kept)
        mode.__enter__()
        undo = functools.partial(mode.__exit__, None, None, None)
    elif way.startswith("replaced "):
        undo = replaced(METHODS[way.removeprefix("replaced ")](module), way.split()[-1], kept)
    elif way == "wrapper":
        setattr(parent, name.rpartition(".")[2], Wrapper(module, kept))
        undo = functools.partial(setattr, parent, name.rpartition(".")[2], module)
    else:
        own = type(module)

        class Watched(own):  # type: ignore[misc, valid-type]
            def forward(self, *given: Any, **named: Any) -> Any:
                out = super().forward(*given, **named)
                kept.hook(self, given, out)
                return out

        module.__class__ = Watched
        undo = functools.partial(setattr, module, "__class__", own)
    try:
        yield
    finally:
        undo()


def replaced(cls: type[nn.Module], method: str, kept: Kept) -> Callable[[], None]:
    """A method of a class is another that keeps what passes; returns what undoes it."""
    plain, is_own = getattr(cls, method), method in vars(cls)

    def watched(self: nn.Module, *given: Any, **named: Any) -> Any:
        out = plain(self, *given, **named)
        kept.hook(self, given, out)
        return out

    setattr(cls, method, watched)
    return functools.partial(setattr, cls, method, plain) if is_own else functools.partial(delattr, cls, method)


class Watching(TorchFunctionMode):
    """Keeps what torch's functions return."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is F.conv2d:
            self.kept.keep(out)
        return out


class Wrapper(nn.Module):
    """A module in another's place that passes on what it is asked."""

    def __init__(self, inner: nn.Module, kept: Kept) -> None:
        super().__init__()
        self.inner = inner
        self.kept = kept

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *given: Any, **named: Any) -> Any:
        out = self.inner(*given, **named)
        self.kept.hook(self, given, out)
        return out


def called(unet: UNet) -> list[str]:
    """The names of the modules that a step calls."""
    kinds = (*BLOCKS, nn.GroupNorm)
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, kinds) or name.endswith("proj_in") or name == "conv_out"
    ]


def step(unet: UNet, name: str) -> Tensor:
    sample, context, added = arguments(name)
    conditioning = unet.condition([7.0], context, **added)
    kept = Kept()
    kept.keep([sample, conditioning.shifts, conditioning.constants, *conditioning.context])
    out = unet.denoise(sample, conditioning, 0)
    kept.assert_unchanged()
    pointers = {tensor.untyped_storage().data_ptr() for tensor, _ in kept.seen}
    assert out.untyped_storage().data_ptr() not in pointers
    return out


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_anyone_keeps_of_a_module_is_not_overwritten(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    unet, _, expected = pair(name)
    watched = data.draw(st.dictionaries(st.sampled_from(called(unet)), st.sampled_from(WAYS), max_size=4))
    mode = data.draw(st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]))
    kept = Kept()
    with mode():
        # Whoever looks may come later: the network has run before.
        torch.testing.assert_close(step(unet, name), expected, rtol=1e-9, atol=1e-9)
        with all_looked_at(watched, unet, kept):
            torch.testing.assert_close(step(unet, name), expected, rtol=1e-9, atol=1e-9)
    if watched:
        kept.assert_unchanged()


@contextmanager
def all_looked_at(watched: dict[str, str], unet: UNet, kept: Kept) -> Iterator[None]:
    with ExitStack() as stack:
        for name in inner_first(watched):
            stack.enter_context(looked_at(unet, name, watched[name], kept))
        yield


def inner_first(names: Iterable[str]) -> list[str]:
    """A module in another's place changes what is found below it."""
    return sorted(names, key=lambda name: -name.count("."))


class InPlace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sums = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sums += function is torch.ops.aten.addmm_.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_sums_in_place_just_while_nobody_looks(way: str) -> None:
    unet, _, _ = pair("plain")

    def sums() -> int:
        with torch.no_grad(), InPlace() as counted:
            step(unet, "plain")
        return counted.sums

    private = sums()
    assert private > 10
    with looked_at(unet, "down.0.transformers.0.blocks.0", way, Kept()):
        assert sums() == 0
    # A default device is a function mode too, and keeps nothing.
    with torch.device("cpu"):
        assert sums() == private
    with InPlace() as counted:
        step(unet, "plain")
    assert counted.sums == 0


@pytest.mark.parametrize("reset", ["_forward_hooks", "_forward_pre_hooks"])
def test_a_hook_is_seen_in_a_table_that_was_replaced(reset: str) -> None:
    torch.manual_seed(0)
    unet = UNet(CONFIGS["plain"], backend="torch").double()
    with torch.no_grad():
        step(unet, "plain")
        block = unet.down[0].transformers[0].blocks[0]
        setattr(block, reset, type(getattr(block, reset))())
        kept = Kept()
        block.register_forward_hook(kept.hook)
        block.register_forward_pre_hook(lambda module, given: kept.keep(given))
        step(unet, "plain")
    kept.assert_unchanged()


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_module_used_as_one_writes_nothing_that_it_is_given(name: str, kind: type[nn.Module]) -> None:
    """Called once more with what a step gave it, and as a user does, without `in_place`, in every grad mode."""
    unet, _, _ = pair(name)
    module = next(module for module in unet.modules() if isinstance(module, kind))
    calls: list[tuple[Any, ...]] = []
    handle = module.register_forward_pre_hook(lambda module, given: calls.append(given))
    with torch.no_grad():
        step(unet, name)
    handle.remove()
    kept = Kept()
    kept.keep(calls[0])
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            module(*calls[0])
            module(*(calls[0] if kind is Resample else calls[0][:-1]))
        kept.assert_unchanged()


# A whole network that is run again leaves out the records of its blocks, which torch remarks.
ignored = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
CHECKPOINTS = ("reentrant", "not reentrant", "reentrant wrapper", "wrapper")


@contextmanager
def checkpointed(unet: UNet, name: str, kind: str) -> Iterator[None]:
    """The module `name` is run again in the backward pass."""
    module = unet.get_submodule(name)
    if "wrapper" in kind:
        implementation = CheckpointImpl.REENTRANT if kind.startswith("re") else CheckpointImpl.NO_REENTRANT
        path, _, last = name.rpartition(".")
        place, wrapper = (unet.get_submodule(path), last), checkpoint_wrapper(module, implementation)
    else:
        again = functools.partial(checkpoint, module.forward, use_reentrant=kind == "reentrant")
        place, wrapper = (module, "forward"), again
    setattr(*place, wrapper)
    try:
        yield
    finally:
        if "wrapper" in kind:
            setattr(*place, module)
        else:
            delattr(*place)


@ignored
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_gradients_under_checkpointing_are_those_of_the_plain_network(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    unet, _, _ = pair(name)
    blocks = [n for n, m in unet.named_modules() if isinstance(m, BLOCKS)]
    chosen = data.draw(st.dictionaries(st.sampled_from(blocks), st.sampled_from(CHECKPOINTS), max_size=5))
    whole = data.draw(st.sampled_from([None, True, False]))

    def run(sample: Tensor, context: Tensor, **added: Tensor) -> Tensor:
        def call(sample: Tensor, context: Tensor, *values: Tensor) -> Tensor:
            out: Tensor = unet(sample, 7.0, context, **dict(zip(added, values, strict=True)))
            return out

        if whole is None:
            return call(sample, context, *added.values())
        # Reentrant checkpointing records nothing without an input that needs a gradient.
        given = sample.clone().requires_grad_()
        out: Tensor = checkpoint(call, given, context, *added.values(), use_reentrant=whole)
        return out

    with all_checkpointed(chosen, unet):
        assert_plain(unet, name, run)


@contextmanager
def all_checkpointed(chosen: dict[str, str], unet: UNet) -> Iterator[None]:
    with ExitStack() as stack:
        for name in inner_first(chosen):
            stack.enter_context(checkpointed(unet, name, chosen[name]))
        yield


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_in_checkpointed_segments_have_the_gradients_of_blocks_in_a_row(reentrant: bool) -> None:
    unet, _, _ = pair("deep")
    transformer = unet.up[0].transformers[0]
    x = torch.randn(2, 30, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for run in (
        lambda blocks, x: functools.reduce(lambda y, one: one(y), blocks, x),
        lambda blocks, x: checkpoint_sequential(blocks, 2, x, use_reentrant=reentrant),
    ):
        unet.zero_grad()
        keys = [block.project_context(arguments("deep")[1])[-1] for block in transformer.blocks]
        at_norms = [None, *missing_in_tokens(transformer)]
        blocks = [
            functools.partial(call, block, keys[i], *at_norms[3 * i : 3 * i + 3])
            for i, block in enumerate(transformer.blocks)
        ]
        given = x.clone().requires_grad_()
        features = run(blocks, given)
        features.square().sum().backward()
        assert torch.equal(given, x)
        found.append([features, given.grad, *(p.grad for p in transformer.parameters() if p.grad is not None)])
    assert len(found[0]) > 20
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-10)


def call(
    block: nn.Module, keys_values: Tensor, before: Any, attended: Tensor, crossed: Tensor, x: Tensor
) -> Tensor:
    out: Tensor = block(x, keys_values, before, attended, crossed)
    return out


def test_a_graph_is_that_of_the_network() -> None:
    """Of torch.compile and torch.export, with a hook on a block and without."""
    torch.manual_seed(0)
    unet = UNet(TINY, backend="torch").double()
    sample, context, added = arguments("deep")
    t = torch.tensor([7.0])
    kept: list[Tensor] = []
    with torch.no_grad():
        expected = unet(sample, t, context, **added)
        exported = torch.export.export(unet, (sample, t, context), added).module()
        torch.testing.assert_close(exported(sample, t, context, **added), expected, rtol=1e-9, atol=1e-9)
        unet.up[0].transformers[0].blocks[0].register_forward_hook(lambda module, given, out: kept.append(out))
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(sample, t, context, **added), expected, rtol=1e-9, atol=1e-9)
        (seen,) = kept
        unet(sample, t, context, **added)
        torch.testing.assert_close(seen, kept[1], rtol=1e-9, atol=1e-9)


def test_watching_does_not_keep_the_network() -> None:
    unet = UNet(CONFIGS["plain"], backend="torch").double()
    with torch.no_grad():
        step(unet, "plain")
    gc.disable()
    try:
        gone = weakref.ref(unet)
        del unet
        assert gone() is None
    finally:
        gc.enable()
