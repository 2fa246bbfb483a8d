"""accelerate() beside the options of diffusers' models: arguments of a call, slices, fused projections."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from dropin_checks import SAME, close, floats, objects, our_calls, output, relative_rms
from dropin_models import UNETS, make, make_unet, make_vae, model_inputs, unet_and_inputs
from torch import nn

from ldmperf.model.dropin import accelerate

pytestmark = pytest.mark.usefixtures("_one_thread")
SMALL = UNETS["bk_sdm_small"]


@pytest.mark.parametrize(
    "more",
    [
        {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])},
        {"encoder_attention_mask": torch.tensor([[True, True, False, False, False]] * 2)},
        {"cross_attention_kwargs": {}},
        {"cross_attention_kwargs": {"ip_adapter_masks": None}},
        {"timestep": 7},
        {"timestep": 3.5},
    ],
)
def test_arguments(more):
    unet, inputs = unet_and_inputs()
    inputs |= more
    expected = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        assert close(unet, inputs, expected)


def test_self_attention_mask():
    """One of the keys of every level, so all of one level."""
    unet = make_unet(SMALL | {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "block_out_channels": (32, 32)})
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight.data.mul_(3)
    inputs = model_inputs(unet, size=1) | {"attention_mask": torch.tensor([[1], [1]])}
    expected = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        assert close(unet, inputs, expected)


def test_guidance_doubles_the_batch():
    unet, inputs = unet_and_inputs()
    doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
    doubled["encoder_hidden_states"][:2] = 0
    expected = output(unet, doubled)
    with accelerate(unet, backend="torch"):
        assert close(unet, doubled, expected)
        assert close(unet, inputs, expected[2:])


def test_residuals_of_a_controlnet_and_of_an_adapter():
    unet, inputs = unet_and_inputs()
    unet = make_unet("bk_sdm_base")
    shapes = [(32, 8), (32, 8), (32, 4), (64, 4)]
    control = {
        "down_block_additional_residuals": tuple(torch.randn(2, c, s, s) for c, s in shapes),
        "mid_block_additional_residual": torch.randn(2, 64, 4, 4),
    }
    adapter = {"down_intrablock_additional_residuals": [torch.randn(2, 32, 8, 8), torch.randn(2, 64, 4, 4)]}
    for more in (control, adapter):
        expected = output(unet, inputs | copy.deepcopy(more))
        with accelerate(unet, backend="torch"):
            assert close(unet, inputs | copy.deepcopy(more), expected)


@pytest.mark.parametrize("size", [(5, 7), (8, 12), 1])
def test_odd_sizes(size):
    unet = make_unet(SMALL)
    inputs = model_inputs(unet, size=size)
    expected = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        assert close(unet, inputs, expected)


def test_few_tokens_are_no_cause_for_a_warning(recwarn):
    """The operator warns of q, k and v with fewer tokens than heads: those here are in the right layout."""
    importlib.import_module("ldmperf.kernels.attention")._warn_of_layout.cache_clear()
    unet = make_unet(SMALL)
    with accelerate(unet, backend="torch"):
        output(unet, model_inputs(unet, size=1))
    assert not [str(warning.message) for warning in recwarn if "fewer tokens" in str(warning.message)]


def test_a_batch_past_64():
    """There diffusers copies before it upsamples."""
    unet = make("resnet_resamples")
    inputs = model_inputs(unet, batch=65, size=2)
    expected = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        assert close(unet, inputs, expected)


def test_channels_last():
    unet, inputs = unet_and_inputs()
    unet.to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    expected = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        result = output(unet, inputs)
    assert relative_rms(result, expected) < SAME[torch.float32]
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_under_autocast():
    unet, inputs = unet_and_inputs()
    exact = output(unet, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(unet, inputs)
        with accelerate(unet, backend="torch"):
            result = output(unet, inputs)
    assert result.dtype == expected.dtype
    assert relative_rms(result, exact) <= 1.25 * relative_rms(expected, exact)


def test_norms_kept_in_float32():
    """As people do for a half-precision network: output no worse than diffusers' own."""
    unet = make_unet(SMALL, torch.bfloat16)
    inputs = model_inputs(unet)
    exact = output(nn.Module.to(copy.deepcopy(unet), torch.float32), floats(inputs, torch.float32))
    for module in unet.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.Module.to(module, torch.float32)
    own = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        result = output(unet, inputs)
    assert result.dtype == own.dtype
    assert relative_rms(result, exact) <= 1.25 * relative_rms(own, exact)


def test_dropout_in_training():
    """The same random numbers at the same places."""
    unet, twin = (make_unet(SMALL | {"dropout": 0.3}).train() for _ in range(2))
    inputs = model_inputs(unet)
    results = []
    with accelerate(unet, backend="torch"):
        for model in (unet, twin):
            torch.manual_seed(1)
            results.append(output(model, inputs))
    assert relative_rms(*results) < SAME[torch.float32]


def test_chunked_feed_forward():
    unet, inputs = unet_and_inputs()
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for size, dim in ((1, 0), (4, 1)):
        for block in blocks:
            block.set_chunk_feed_forward(size, dim)
        expected = output(unet, inputs)
        with accelerate(unet, backend="torch"):
            assert close(unet, inputs, expected)
    blocks[0].set_chunk_feed_forward(3, 1)
    with pytest.raises(ValueError, match="chunk"):
        output(unet, inputs)
    with accelerate(unet, backend="torch"), pytest.raises(ValueError, match="chunk"):
        output(unet, inputs)


def test_freeu():
    unet, inputs = unet_and_inputs()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    expected = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        assert close(unet, inputs, expected)


def test_attention_slicing_before():
    unet, inputs = unet_and_inputs()
    plain = output(unet, inputs)
    unet.set_attention_slice(1)
    things = objects(unet)
    with accelerate(unet, backend="torch") as report:
        assert "attention" not in {entry.kind for entry in report.replaced}
        sliced = {entry.path for entry in report.left if "SlicedAttnProcessor" in entry.reason}
        assert {name.removesuffix(".processor") for name in unet.attn_processors} <= sliced
        assert close(unet, inputs, plain)
        assert "attention" not in our_calls(unet, inputs)
    assert objects(unet) == things


def test_attention_slicing_after():
    unet, inputs = unet_and_inputs()
    plain = output(unet, inputs)
    report = accelerate(unet, backend="torch")
    assert "attention" in {entry.kind for entry in report.replaced}
    unet.set_attention_slice("auto")
    assert "attention" not in {entry.kind for entry in report.replaced}
    assert any("SlicedAttnProcessor" in entry.reason for entry in report.left)
    assert "attention" not in our_calls(unet, inputs)
    assert close(unet, inputs, plain)
    sliced = dict(unet.attn_processors)
    report.undo()
    assert unet.attn_processors == sliced
    assert not our_calls(unet, inputs)
    assert close(unet, inputs, plain)
    unet.set_attention_slice(None)
    assert torch.equal(output(unet, inputs), plain)


def test_fused_projections_before():
    unet, inputs = unet_and_inputs()
    plain = output(unet, inputs)
    unet.fuse_qkv_projections()
    fused, things = output(unet, inputs), objects(unet)
    with accelerate(unet, backend="torch"):
        assert our_calls(unet, inputs)["attention"]
        assert close(unet, inputs, plain)
    assert objects(unet) == things
    assert torch.equal(output(unet, inputs), fused)


@pytest.mark.parametrize("unfuse_first", [True, False])
def test_fused_projections_after(unfuse_first):
    (unet, inputs), (twin, _) = unet_and_inputs(), unet_and_inputs()
    plain = output(unet, inputs)
    report = accelerate(unet, backend="torch")
    unet.fuse_qkv_projections()
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"FusedAttnProcessor2_0"}
    assert our_calls(unet, inputs)["attention"]
    assert close(unet, inputs, plain)
    steps = [report.undo, unet.unfuse_qkv_projections]
    for step in reversed(steps) if unfuse_first else steps:
        step()
        assert close(unet, inputs, plain)
    assert torch.equal(output(unet, inputs), plain)
    twin.fuse_qkv_projections()
    twin.unfuse_qkv_projections()
    assert names(unet) == names(twin)


def names(unet: Any) -> list[tuple[str, type, list[str]]]:
    return [(path, type(module), sorted(vars(module))) for path, module in unet.named_modules()]


def test_set_attention_backend_changes_nothing_and_ours_does():
    unet, inputs = unet_and_inputs()
    plain = output(unet, inputs)
    active = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        unet.set_attention_backend("_native_math")
        assert not any(hasattr(processor, "_attention_backend") for processor in unet.attn_processors.values())
        assert torch.equal(output(unet, inputs), plain)
        with accelerate(unet, backend="torch"):
            assert our_calls(unet, inputs)["attention"] == len(unet.attn_processors)
            assert close(unet, inputs, plain)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


def test_vae_tiles_and_slices():
    vae = make_vae("vae")
    image = model_inputs(vae, size=20)["sample"]
    latents = torch.randn(2, 4, 10, 10)

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            encoded = vae.encode(image).latent_dist.mode()
            return [encoded, vae.decode(latents).sample]

    for option in ("enable_slicing", "enable_tiling"):
        getattr(vae, option)()
        expected = results()
        with accelerate(vae, backend="torch"):
            for result, wanted in zip(results(), expected, strict=True):
                assert relative_rms(result, wanted) < SAME[torch.float32]
        assert all(torch.equal(result, wanted) for result, wanted in zip(results(), expected, strict=True))
