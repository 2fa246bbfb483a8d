"""The operators as functions, each compared with the torch code whose place it takes. Needs torch alone.

    python examples/functions.py

On a GPU the kernels run where they can serve, on a CPU their references; either way gradients, autocast and
torch.compile work. What to write for each layer of diffusers: docs/kernels.md.
"""

import torch
import torch.nn.functional as F

from ldmperf.kernels import attention, geglu, group_norm_silu, layer_norm, linear, residual_add


def compare(what, ours, torchs):
    error = ((ours - torchs).norm() / torchs.norm()).item()
    print(f"{what:<42} relative error {error:.0e}")
    assert error < 1e-4


@torch.inference_mode()
def main():
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    image, skip = (torch.randn(2, 64, 16, 16).contiguous(memory_format=torch.channels_last) for _ in range(2))
    tokens, text = torch.randn(2, 256, 64), torch.randn(2, 77, 64)
    weight, bias = torch.randn(64), torch.randn(64)

    # A residual block: the time embedding is added before the norm, the convolution's bias in the residual sum.
    time = torch.randn(2, 64)
    compare(
        "group_norm_silu, after a time embedding",
        group_norm_silu(image, 32, weight, bias, eps=1e-5, x_bias=time),
        F.silu(F.group_norm(image + time[:, :, None, None], 32, weight, bias, eps=1e-5)),
    )
    compare(
        "group_norm_silu of an image and its skip",
        group_norm_silu(image, 32, skip=skip),
        F.silu(F.group_norm(torch.cat([image, skip], dim=1), 32)),
    )
    compare(
        "residual_add, enlarged",
        residual_add(image, skip, bias, size=(32, 32)),
        F.interpolate(image + skip + bias[:, None, None], scale_factor=2.0),
    )

    # Attention: tokens before heads, as projections write them. Slices of a packed projection are read in place.
    q, k, v = torch.randn(2, 256, 3, 8, 8).unbind(2)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    compare("attention", attention(q, k, v), theirs)
    keys = text.unflatten(-1, (8, 8))
    mask = torch.arange(77) < torch.tensor([[20], [77]])
    theirs = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, keys, keys)), attn_mask=mask[:, None, None]
    ).transpose(1, 2)
    compare("attention over a text, padding masked", attention(q, keys, keys, key_mask=mask), theirs)

    # A feed-forward: the residual sum and its norm in one pass, then the matmul and its gate.
    normalized, total = layer_norm(tokens, weight, bias, residual=tokens)
    compare("layer_norm of a sum", normalized, F.layer_norm(tokens + tokens, (64,), weight, bias))
    compare("the sum", total, tokens + tokens)
    up = torch.randn(512, 64)
    value, gate = F.linear(normalized, up).chunk(2, dim=-1)
    compare("linear with its gate", linear(normalized, up, activation="geglu"), value * F.gelu(gate))
    compare("geglu alone", geglu(F.linear(normalized, up)), value * F.gelu(gate))


if __name__ == "__main__":
    main()
