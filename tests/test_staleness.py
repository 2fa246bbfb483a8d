"""Kept constants and a kept conditioning are refused once the weights they were made from have changed."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ldmperf.model import Conditioning, UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("_one_thread")

SMALL = {"norm_groups": 4, "context_dim": 12, "layers_per_block": 1}
CONFIGS = {
    "attention": UNetConfig((16, 32), (2, 4), (True, False), **SMALL),
    "no-middle": UNetConfig((16, 16), (2, 2), (True, True), has_middle=False, **SMALL),
    "sdxl": UNetConfig(
        (16, 32), (2, 4), (False, True), transformer_layers=2, added_time_dim=4, added_dim=14, **SMALL
    ),
    "classes": UNetConfig(
        (16, 32),
        (2, 4),
        (True, False),
        only_cross_attention=True,
        num_class_embeds=5,
        time_cond_proj_dim=3,
        **SMALL,
    ),
}
ADDED = {
    "sdxl": lambda: {"text_embeds": CONTEXT[:, 0, :6], "time_ids": torch.tensor([[64, 9], [7, 0]])},
    "classes": lambda: {"class_labels": [3, 0], "timestep_cond": CONTEXT[:, 1, :3]},
}
SAMPLE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))


def network(name: str = "attention") -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIGS[name], backend="torch").eval().requires_grad_(False)


def values(conditioning: Conditioning) -> list[torch.Tensor]:
    return [conditioning.shifts, *conditioning.context, conditioning.constants]


def is_refused(unet: UNet, conditioning: Conditioning) -> bool:
    message = ""
    try:
        unet.denoise(SAMPLE, conditioning, 0)
    except ValueError as error:
        message = str(error)
    assert not message or ("as they are now" in message and "\n" not in message)
    return bool(message)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_conditioning_is_refused_just_where_it_would_be_another(name: str) -> None:
    """Every parameter is written in turn: those that `condition` reads make it stale, and no other."""
    unet = network(name)
    condition = functools.partial(unet.condition, [500.0, 3.0], CONTEXT, **ADDED.get(name, dict)())
    stale = 0
    fresh, fresh_constants = condition(), unet.constants()
    for parameter_name, parameter in unet.named_parameters():
        kept, constants = fresh, fresh_constants
        parameter.add_(0.5)
        fresh, fresh_constants = condition(), unet.constants()
        differs = any(not torch.equal(a, b) for a, b in zip(values(kept), values(fresh), strict=True))
        assert is_refused(unet, kept) == differs, parameter_name
        # What a step asks first; the step itself takes long.
        fresh.check()
        if not torch.equal(constants.values, fresh_constants.values):
            with pytest.raises(ValueError, match=r"the constants are not .* make them anew with UNet\.constants"):
                condition(constants=constants)
        stale += differs
    assert not is_refused(unet, fresh)
    assert 20 < stale < len(list(unet.parameters())) - 20


def assign(unet: UNet) -> None:
    unet.load_state_dict({name: value.clone() for name, value in unet.state_dict().items()}, assign=True)


def swap(unet: UNet) -> None:
    unet.up[0].transformers = nn.ModuleList(unet.up[0].transformers)


def swap_deep(unet: UNet) -> None:
    unet.down[0].transformers[0].proj_out = copy.deepcopy(unet.down[0].transformers[0].proj_out)


def added(unet: UNet) -> None:
    unet.down[0].transformers[0].adapter = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda unet: unet.to(torch.float64), "parameters were moved"),
        (assign, r"time_embedding\.linear_1\.weight was replaced"),
        (swap, "a module was replaced"),
        (swap_deep, "a module was replaced"),
        (added, "a module was replaced"),
        (lambda unet: unet.load_state_dict(unet.state_dict()), r"time_embedding\.linear_1\.weight was written"),
        (lambda unet: torch._foreach_mul_(list(unet.parameters()), 2.0), r"weight was written"),
        (
            lambda unet: unet.down[0].transformers[0].blocks[0].to_out.bias.zero_(),
            r"blocks\.0\.to_out\.bias was written",
        ),
    ],
)
def test_what_changed_is_told(change: Callable[[UNet], object], told: str) -> None:
    unet = network()
    constants, kept = unet.constants(), unet.condition([1.0], CONTEXT)
    unet.denoise(SAMPLE, kept.padded(4), 0)
    change(unet)
    for use in (
        lambda: unet.denoise(SAMPLE, kept, 0),
        lambda: unet.denoise(SAMPLE, kept.padded(4), torch.tensor([0])),
        lambda: unet.condition([1.0], CONTEXT, constants=constants),
    ):
        with pytest.raises(ValueError, match=told):
            use()
    # What is made next is good again, and what was kept is not.
    unet.denoise(SAMPLE.to(unet.dtype), unet.condition([1.0], CONTEXT, constants=unet.constants()), 0)
    with pytest.raises(ValueError, match="its weights have changed"):
        unet.denoise(SAMPLE, kept, 0)


def test_networks_on_the_same_memory_see_each_others_writes() -> None:
    unet = network()
    other = unet.with_backend("torch")
    kept = other.condition([1.0], CONTEXT)
    # The other one's values are the other one's too.
    unet.denoise(SAMPLE, kept, 0)
    with torch.inference_mode():
        unet.conv_in.bias.add_(1.0)
    assert is_refused(other, kept)
    assert is_refused(unet, kept)


def test_one_snapshot_serves_until_the_weights_change() -> None:
    unet = network()
    first = unet.constants()
    snapshot = unet._remembered.snapshot
    second = unet.condition([1.0], CONTEXT, constants=first)
    unet.condition([2.0], CONTEXT)
    assert unet._remembered.snapshot is snapshot
    unet.up[0].resblocks[0].conv1.weight.add_(1.0)
    assert not is_refused(unet, second)
    unet.conv_in.bias.add_(1.0)
    unet.constants()
    assert unet._remembered.snapshot is not snapshot


def test_a_forward_takes_no_snapshot() -> None:
    unet = network()
    unet(SAMPLE, 5.0, CONTEXT)
    assert unet._remembered.snapshot is None


def test_what_is_kept_does_not_keep_the_network() -> None:
    unet = network()
    kept, constants = unet.condition([1.0], CONTEXT), unet.constants()
    gone = weakref.ref(unet.conv_in.bias)
    del unet
    gc.collect()
    assert gone() is None
    kept.check()
    constants.check()


def test_copies_and_pickles() -> None:
    unet = network()
    kept = unet.condition([1.0], CONTEXT)
    copied, pickled = copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))
    other = copy.deepcopy(unet)
    assert other._remembered.snapshot is None
    own = other.condition([1.0], CONTEXT)
    unet.conv_in.bias.add_(1.0)
    assert is_refused(unet, copied)
    assert not is_refused(other, own)
    # A pickle may be read where there is no such network.
    assert not is_refused(unet, pickled)


def test_weights_of_inference_mode_are_used_without_a_count() -> None:
    with torch.inference_mode():
        unet = network()
        kept = unet.condition([1.0], CONTEXT, constants=unet.constants())
        unet.conv_in.bias.add_(1.0)
        assert not is_refused(unet, kept)
        assign(unet)
        assert is_refused(unet, kept)


def test_inside_torch_compile_nothing_is_looked_at() -> None:
    unet = network()
    kept = unet.condition([1.0], CONTEXT)
    compiled = torch.compile(unet.denoise, fullgraph=True, backend="eager")
    expected = unet.denoise(SAMPLE, kept, 0)
    assert torch.allclose(compiled(SAMPLE, kept, 0), expected, atol=1e-6)
    whole = torch.compile(unet.condition, fullgraph=True, backend="eager")([1.0], CONTEXT)
    assert whole.made_from is None
