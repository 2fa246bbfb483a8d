"""Three kernels put into a diffusers UNet by hand: the 28 lines that `ldmperf.model.dropin.accelerate` replaces.

They serve Stable Diffusion's UNet as it is loaded, in inference: no mask, no adapter, no hook, no way back.
docs/drop-in.md has them beside the one line. Needs diffusers. On a CPU the kernels' references run.

    python examples/by_hand.py
"""

from types import MethodType

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D

from ldmperf.kernels import attention, geglu, group_norm_silu


class Processor:
    def __call__(self, attn, tokens, encoder_hidden_states=None, attention_mask=None, temb=None):
        if attention_mask is not None:
            raise NotImplementedError("a mask")
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(tokens), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        return attn.to_out[0](attention(q, k, v, scale=attn.scale).flatten(2))


def norm_silu(norm, x, **options):
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **options)


def resnet(block, x, temb):
    h = block.conv1(norm_silu(block.norm1, x))
    h = norm_silu(block.norm2, h, x_bias=block.time_emb_proj(block.nonlinearity(temb)))
    h = block.conv2(h)
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def by_hand(unet):
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(Processor())
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.forward = MethodType(resnet, module)
        elif isinstance(module, GEGLU):
            module.forward = MethodType(lambda gate, x: geglu(gate.proj(x)), module)


# The lines end here.
@torch.inference_mode()
def main():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    before = unet(x, 500, text).sample
    by_hand(unet)
    error = (unet(x, 500, text).sample - before).norm() / before.norm()
    print(f"relative error: {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
