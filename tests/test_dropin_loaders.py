"""Adapters on accelerated UNets by diffusers' loaders, IP-Adapter, processors of others, other kinds of peft."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0, SlicedAttnProcessor
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor

from ldmperf.model.dropin import accelerate, undo

from .adapters import CONTEXT_DIM, IMAGE_DIM, ip_adapter, lora, tiny_unet

pytestmark = [
    pytest.mark.usefixtures("_one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

NOISE = torch.linspace(-2, 2, 2 * 4 * 8 * 8, dtype=torch.float64).reshape(2, 4, 8, 8).sin()
TEXT = torch.linspace(-1, 1, 2 * 3 * CONTEXT_DIM, dtype=torch.float64).reshape(2, 3, -1).sin()
FIRST, LAST = "down_blocks.0.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.0.transformer_blocks.0"


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def output(unet: Any, **options: Any) -> Tensor:
    out: Tensor = unet(NOISE, 500, TEXT, return_dict=False, **options)[0]
    return out


def pipeline() -> Any:
    """A StableDiffusionPipeline that has a UNet alone, and gets prompts and gives latents."""
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **options: Any) -> Tensor:
    out: Tensor = pipe(
        prompt_embeds=TEXT[:1],
        negative_prompt_embeds=TEXT[1:],
        num_inference_steps=1,
        output_type="latent",
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images
    return out


def in_pipeline(seed: int) -> Callable[[Any], Any]:
    def load(pipe: Any) -> None:
        weights = {f"unet.{name}": tensor for name, tensor in lora(pipe.unet, seed).items()}
        pipe.load_lora_weights(weights, adapter_name=f"adapter{seed}")

    return load


ROW: list[Callable[[Any], Any]] = [
    in_pipeline(1),
    lambda pipe: pipe.set_adapters("adapter1", 0.4),
    in_pipeline(2),
    lambda pipe: pipe.set_adapters(["adapter1", "adapter2"], [0.4, -0.7]),
    lambda pipe: pipe.fuse_lora(components=["unet"], adapter_names=["adapter2"]),
    lambda pipe: pipe.unfuse_lora(components=["unet"]),
    lambda pipe: pipe.disable_lora(),
    lambda pipe: pipe.enable_lora(),
    lambda pipe: pipe.delete_adapters("adapter1"),
    lambda pipe: pipe.unload_lora_weights(),
]


@pytest.mark.parametrize("at", [0, 5])
def test_lora_through_a_pipeline(at: int) -> None:
    """Accelerated before and after; undone, and accelerated again, in the middle of the rest."""
    pipe, twin = pipeline(), pipeline()
    before = latents(twin)
    for number, change in enumerate(ROW):
        if number == at:
            report = accelerate(pipe, backend="torch")
        if number == at + 3:
            report.undo()
            accelerate(pipe, geglu=False, backend="torch")
        change(pipe)
        change(twin)
        close(latents(pipe), latents(twin))
        if number == 3:
            with torch.no_grad():
                scaled, expected = (output(p.unet, cross_attention_kwargs={"scale": 0.5}) for p in (pipe, twin))
                close(scaled, expected)
                assert not torch.allclose(expected, output(twin.unet))
    close(latents(pipe), before)
    # Loading replaces no module that a stand-in took over: unloaded, all are the kernels' still.
    resnets = [entry for entry in accelerate(pipe, backend="torch").replaced if entry.kind == "resnet"]
    assert len(resnets) == sum(type(module).__name__ == "ResnetBlock2D" for module in pipe.unet.modules())


@pytest.mark.parametrize("first", ["accelerate", "load"])
def test_ip_adapter(first: str) -> None:
    pipe, twin = pipeline(), pipeline()
    image = {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 2 * IMAGE_DIM).double().reshape(2, 1, -1)]}

    def load(pipe: Any) -> None:
        weights = ip_adapter(pipe.unet, 1)
        pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
        pipe.unet.double()

    load(twin)
    if first == "load":
        load(pipe)
    processors = dict(pipe.unet.attn_processors)
    report = accelerate(pipe, backend="torch")
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    if first == "accelerate":
        load(pipe)
    of_text = {f"unet.{name.removesuffix('.processor')}" for name in processors if "attn2" in name}
    of_image = {f"unet.{name.removesuffix('.processor')}" for name in processors if "attn1" in name}

    def attentions(entries: Any) -> set[str]:
        return {entry.path for entry in entries if entry.class_name == "Attention"}

    left = [entry for entry in report.left if "IPAdapterAttnProcessor2_0" in entry.reason]
    assert attentions(left) == of_text
    assert attentions(report.replaced) == of_image
    full = latents(pipe, **image)
    close(full, latents(twin, **image))
    for each in (pipe, twin):
        each.set_ip_adapter_scale(0.3)
    close(latents(pipe, **image), latents(twin, **image))
    assert not torch.allclose(latents(pipe, **image), full)
    report.undo()
    close(latents(pipe, **image), latents(twin, **image))
    report = accelerate(pipe, backend="torch")
    for each in (pipe, twin):
        each.unload_ip_adapter()
    close(latents(pipe), latents(twin))
    assert attentions(report.replaced) == of_text | of_image


@torch.no_grad()
def test_processors_of_others_are_called_and_listed() -> None:
    unet, twin = tiny_unet(), tiny_unet()
    for each in (unet, twin):
        torch.manual_seed(1)
        attn = each.get_submodule(FIRST).attn2
        custom = CustomDiffusionAttnProcessor2_0(hidden_size=8, cross_attention_dim=CONTEXT_DIM).double()
        attn.set_processor(custom)
        each.get_submodule(LAST).attn1.set_processor(SlicedAttnProcessor(1))
    processors = dict(unet.attn_processors)
    report = accelerate(unet, backend="torch")
    reasons = {entry.path: entry.reason for entry in report.left if entry.class_name == "Attention"}
    assert reasons == {
        f"{FIRST}.attn2": "its processor is CustomDiffusionAttnProcessor2_0",
        f"{LAST}.attn1": "its processor is SlicedAttnProcessor",
    }
    close(output(unet), output(twin))
    report.undo()
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    close(output(unet), output(twin))


def test_gradients_of_an_adapter() -> None:
    unet, twin = tiny_unet(), tiny_unet()
    accelerate(unet, backend="torch")
    gradients = []
    for each in (unet, twin):
        each.load_lora_adapter(lora(each, 1), prefix=None, adapter_name="a")
        output(each).square().mean().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert len(theirs) == 2 * 59
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(ours[name], gradient)


LAYERS = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv2", "conv_shortcut"]
OTHERS = {
    "LoHa": LoHaConfig(r=2, target_modules=LAYERS, init_weights=False),
    "LoKr": LoKrConfig(r=2, target_modules=LAYERS, init_weights=False),
    "IA3": IA3Config(
        target_modules=["to_k", "ff.net.2"], feedforward_modules=["ff.net.2"], init_ia3_weights=False
    ),
    "norms": LNTuningConfig(target_modules=["norm1", "norm3"]),
    "copies of norms": LoraConfig(
        target_modules=LAYERS, init_lora_weights=False, modules_to_save=["conv_norm_out", "norm1", "norm2", "norm"]
    ),
}


@pytest.mark.parametrize("first", ["accelerate", "adapter"])
@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_other_adapters_of_peft(kind: str, first: str) -> None:
    unet, twin, plain = tiny_unet(), tiny_unet(), tiny_unet()
    if first == "accelerate":
        accelerate(unet, backend="torch")
    for each in (unet, twin):
        torch.manual_seed(1)
        inject_adapter_in_model(deepcopy(OTHERS[kind]), each, "a").double()
        for name, parameter in each.named_parameters():
            if ".a." in name:
                parameter.mul_(1.5)
    accelerate(unet, backend="torch")
    expected = output(twin)
    assert not torch.allclose(expected, output(plain))
    close(output(unet), expected)
    undo(unet)
    assert torch.equal(output(unet), expected)
