"""A whole diffusers UNet and VAE on the kernels, in the interpreter, against diffusers' own in float64."""

from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import Attention
from dropin_checks import floats, output
from dropin_models import make_unet, make_vae, model_inputs
from torch import nn

from ldmperf.kernels import _recipes
from ldmperf.model.dropin import accelerate

# Two levels of two resolutions, transformers in one of them.
UNET = {
    "sample_size": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "sample_size": 4,
}


@pytest.mark.parametrize(
    ("make", "config", "dtype"),
    [(make_unet, UNET, torch.float32), (make_vae, VAE, torch.float16)],
    ids=["unet", "vae"],
)
def test_a_model_runs_on_the_kernels(make, config, dtype, kit, monkeypatch):
    launched = Counter()
    run = _recipes._BoundLaunch.run

    def noted(self, tensors):
        name = self.kernel.__name__.removesuffix("_kernel")
        launched[name.removeprefix("short_")] += 1
        run(self, tensors)

    monkeypatch.setattr(_recipes._BoundLaunch, "run", noted)
    model = make(config, dtype)
    inputs = model_inputs(model, size=4)
    own = output(model, inputs)
    with accelerate(model, backend="triton") as report:
        result = output(model, inputs)
        kinds = Counter(entry.kind for entry in report.replaced)
    exact = output(nn.Module.to(model, torch.float64), floats(inputs, torch.float64))
    kit.judge(result, exact, own, dtype, factor=1.5)
    # One norm of the pair of norm and SiLU at each end, one of each attention over images.
    ends = sum(path.endswith("conv_act") for path, _ in model.named_modules())
    within = sum(isinstance(m, Attention) and m.group_norm is not None for m in model.modules())
    assert launched["group_norm"] == 2 * kinds["resnet"] + kinds["norm"] - ends + within
    assert launched["residual_add"] >= kinds["resnet"]
    assert launched["layer_norm"] == 3 * kinds["transformer block"]
    assert launched["attention"] == kinds["attention"]
    assert launched["linear"] == kinds["geglu"]
