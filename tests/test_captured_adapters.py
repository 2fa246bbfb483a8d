"""A diffusers UNet under `GraphedSampler`: adapters loaded, swapped, scaled, merged and removed between runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from ldmperf.model.dropin import accelerate
from ldmperf.samplers import GraphedSampler, NoiseSchedule, initial_noise, make_plan, sample
from ldmperf.samplers.reads import Watch

from .adapters import CONTEXT_DIM, IMAGE_DIM, ip_adapter, lora, tiny_unet
from .tapes import Tapes, graphed

pytestmark = [
    pytest.mark.usefixtures("_one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter b was active which is now deleted:UserWarning"),
]

PLAN = make_plan("ddim", NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"}), 2)
NOISE = initial_noise([1], (4, 8, 8)).double()
FEW = ("to_q", "to_out.0", "conv1", "time_emb_proj")


class Case:
    """A UNet and its sampler. `run` compares a run with the eager loop and returns whether it captured anew."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.added: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(3)
        text = torch.randn(1, 3, CONTEXT_DIM, generator=generator, dtype=torch.float64)
        # Room for plans of 128 steps: one capture serves them all.
        times = torch.zeros(128)
        times[: len(PLAN.steps)] = torch.tensor(PLAN.timesteps)
        self.conditioning = (times, text)
        self.sampler, self.graphs = graphed(self.denoise)
        self.captured = 0
        self.results: list[Tensor] = []

    def denoise(self, x: Tensor, conditioning: tuple[Tensor, Tensor], step: Tensor) -> Tensor:
        times, text = conditioning
        added = {"image_embeds": [self.added["image"]]} if self.added else None
        output: Tensor = self.unet(x, times.index_select(0, step), text, added_cond_kwargs=added).sample
        return output

    @torch.no_grad()
    def run(self) -> bool:
        result = self.sampler(self.conditioning, PLAN, NOISE)
        expected = sample(
            lambda x, step: self.denoise(x, self.conditioning, torch.tensor([step.index])),
            PLAN,
            NOISE,
            backend="torch",
        )
        assert torch.equal(result, expected)
        self.results.append(result)
        before, self.captured = self.captured, self.graphs.captured
        return self.captured > before

    def after(self, change: Callable[[], Any]) -> tuple[bool, bool]:
        """Whether the run after a change captured anew, and whether it has another result."""
        change()
        captured = self.run()
        return captured, not torch.equal(*self.results[-2:])


ANEW, REPLAYED, NOTHING = (True, True), (False, True), (False, False)


def test_lora_of_peft() -> None:
    unet = tiny_unet()
    case = Case(unet)
    assert case.run()
    plain = case.results[0]
    first, second, wider = lora(unet, 1, FEW), lora(unet, 2, FEW), lora(unet, 3, FEW, rank=3)

    def load(weights: dict[str, Tensor], name: str, hotswap: bool = False) -> Callable[[], Any]:
        return lambda: unet.load_lora_adapter(dict(weights), prefix=None, adapter_name=name, hotswap=hotswap)

    assert case.after(load(first, "a")) == ANEW
    assert case.after(lambda: None) == NOTHING
    # Values are written into the adapter's memory, and the scaling is set to the same number.
    assert case.after(load(second, "a", hotswap=True)) == REPLAYED
    # Another rank takes other memory.
    assert case.after(load(wider, "a", hotswap=True)) == ANEW
    assert case.after(lambda: unet.set_adapters("a", 0.5)) == ANEW
    assert case.after(lambda: unet.set_adapters("a", 0.5)) == NOTHING
    assert case.after(load(first, "b")) == ANEW
    assert case.after(lambda: unet.set_adapters(["a", "b"], [0.5, 0.7])) == ANEW
    assert case.after(lambda: unet.set_adapter("b")) == ANEW
    assert case.after(unet.disable_lora) == ANEW
    torch.testing.assert_close(case.results[-1], plain, rtol=0, atol=0)
    assert case.after(unet.enable_lora) == ANEW
    only_b = case.results[-1]
    # Merged weights are those of both: a merged layer skips the adapters, which the old capture would add again.
    assert case.after(lambda: unet.fuse_lora(adapter_names=["a"]))[0]
    assert case.after(unet.unfuse_lora)[0]
    torch.testing.assert_close(case.results[-1], only_b)
    assert case.after(lambda: unet.delete_adapters("b")) == ANEW
    assert case.after(unet.unload_lora) == ANEW
    torch.testing.assert_close(case.results[-1], plain)


def test_a_scaling_that_hotswaps_write_is_a_tensor_that_replays_read() -> None:
    """As `enable_lora_hotswap` prepares it: no swap of up to this rank leads to a new capture."""
    unet = tiny_unet()
    case = Case(unet)
    unet.enable_lora_hotswap(target_rank=4)
    unet.load_lora_adapter(lora(unet, 1, FEW), prefix=None, adapter_name="a")
    assert case.run()
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert isinstance(layer.scaling["a"], Tensor)
    for seed, rank in ((2, 4), (3, 1)):
        weights = lora(unet, seed, FEW, rank=rank)
        swap = partial(unet.load_lora_adapter, weights, prefix=None, adapter_name="a", hotswap=True)
        assert case.after(swap) == REPLAYED
    # Another scaling is written into the tensor: alpha / rank.
    metadata = {**unet.peft_config["a"].to_dict(), "r": 1, "lora_alpha": 3}
    assert case.after(partial(swap, metadata=metadata)) == REPLAYED
    assert layer.scaling["a"] == 3.0


def test_dora_reads_the_weights_that_it_adapts() -> None:
    unet = tiny_unet()
    case = Case(unet)
    case.run()
    weights = lora(unet, 1, ("to_q", "ff.net.2"), dora=True)
    assert case.after(lambda: unet.load_lora_adapter(weights, prefix=None, adapter_name="a")) == ANEW
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.lora_variant
    assert case.after(lambda: layer.base_layer.weight.mul_(1.5)) == REPLAYED
    assert case.after(lambda: unet.set_adapters("a", 0.25)) == ANEW


def test_ip_adapter() -> None:
    unet = tiny_unet()
    case = Case(unet)
    case.run()

    def load() -> None:
        unet._load_ip_adapter_weights([ip_adapter(unet, 1)], low_cpu_mem_usage=False)
        case.added["image"] = torch.linspace(-1, 1, IMAGE_DIM, dtype=torch.float64).reshape(1, 1, -1)

    def scale(value: float) -> None:
        """As the pipeline's set_ip_adapter_scale."""
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale[0] = value

    def unload() -> None:
        """As the pipeline's unload_ip_adapter."""
        unet.encoder_hid_proj = None
        unet.config.encoder_hid_dim_type = None
        unet.set_attn_processor(AttnProcessor())
        case.added.clear()

    assert case.after(load) == ANEW
    assert case.after(lambda: scale(0.5)) == ANEW
    assert case.after(lambda: scale(0.5)) == NOTHING
    assert case.after(unload)[0]


def test_what_else_diffusers_sets_on_a_unet() -> None:
    unet = tiny_unet()
    case = Case(unet)
    case.run()
    # AttnProcessor, AttnProcessor2_0 and sliced attention differ by roundings alone.
    for change in (
        lambda: unet.set_attn_processor(AttnProcessor()),
        lambda: unet.set_attention_slice(1),
        unet.set_default_attn_processor,
        unet.fuse_qkv_projections,
        unet.unfuse_qkv_projections,
    ):
        assert case.after(change)[0]
    # The tape cannot replay FreeU's Fourier filter, which makes a tensor below torch's dispatcher.
    for change in (
        lambda: unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2),
        lambda: unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.4),
        unet.disable_freeu,
        unet.enable_gradient_checkpointing,
        lambda: setattr(unet.config, "encoder_hid_dim_type", "other"),
    ):
        watch = Watch([unet])
        assert watch.is_same([unet])
        change()
        assert not watch.is_same([unet])


def test_the_drop_in_and_its_undo() -> None:
    unet = tiny_unet()
    unet.load_lora_adapter(lora(unet, 1, FEW), prefix=None, adapter_name="a")
    case = Case(unet)
    case.run()
    with accelerate(unet, backend="torch") as report:
        assert case.run()
        assert case.after(lambda: accelerate(unet, backend="torch")) == NOTHING
        assert case.after(lambda: unet.set_adapters("a", 0.5)) == ANEW
        weight = unet.up_blocks[0].resnets[0].conv2.weight
        assert case.after(lambda: weight.mul_(1.5)) == REPLAYED
    kernels = case.results[-1]
    assert case.run()
    assert not report.replaced
    torch.testing.assert_close(case.results[-1], kernels)


def test_parameters_of_a_pipeline_are_asked_for() -> None:
    """A pipeline is no module: what it holds is not found in a function that reads it."""

    class Pipeline:
        unet = tiny_unet()

    pipe = Pipeline()
    times, text = Case(pipe.unet).conditioning

    def denoise(x: Tensor, conditioning: Any, step: Tensor) -> Tensor:
        output: Tensor = pipe.unet(x, times.index_select(0, step), text).sample
        return output

    sampler, _ = graphed(denoise)
    with pytest.raises(ValueError, match="pass these to GraphedSampler as modules="):
        sampler((), PLAN, NOISE)
    sampler, _ = graphed(denoise, modules=pipe.unet)
    sampler((), PLAN, NOISE)


def test_what_the_page_shows() -> None:
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "set_adapters" in block)
    unet = tiny_unet()
    unet.load_lora_adapter(lora(unet, 1, FEW), prefix=None, adapter_name="style")
    graphs = Tapes()
    names: dict[str, Any] = {
        "unet": unet,
        "torch": torch,
        "plan": PLAN,
        "noise": NOISE,
        "text": torch.linspace(-1, 1, 2 * 3 * CONTEXT_DIM, dtype=torch.float64).reshape(2, 3, -1),
        "GraphedSampler": partial(GraphedSampler, backend="torch", graphs=graphs),
    }
    exec(compile(code, "performance.md", "exec"), names)
    assert graphs.captured == 2
    with torch.no_grad():
        expected = sample(
            lambda x, step: unet(x, step.timestep, names["text"]).sample,
            PLAN,
            NOISE,
            guidance_scale=7.5,
            backend="torch",
        )
    torch.testing.assert_close(names["latents"], expected)
