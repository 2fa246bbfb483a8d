"""Modules in place of torch's and diffusers': they load the same state dict, and give the same results.

    python examples/modules.py

Needs diffusers, to compare with it. A network with these modules loads the checkpoints that it had before. For a
network of diffusers itself one line does it all: examples/drop_in.py.
"""

import torch
from diffusers.models import activations, attention_processor
from torch import nn

from ldmperf.kernels import GEGLU, Attention, GroupNormSiLU


class Before(nn.Module):
    """A residual block and a transformer block without their convolutions, of torch's and diffusers' modules."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(8, 64)
        self.attention = attention_processor.Attention(64, cross_attention_dim=32, heads=4, dim_head=16)
        self.feed_forward = nn.Sequential(activations.GEGLU(64, 128), nn.Linear(128, 64))

    def forward(self, image, text, time):
        image = nn.functional.silu(self.norm(image + time[:, :, None, None]))
        tokens = image.flatten(2).transpose(1, 2)
        return self.feed_forward(tokens + self.attention(tokens, text))


class After(nn.Module):
    """The same of ours: the norm takes in the time embedding and the SiLU."""

    def __init__(self):
        super().__init__()
        self.norm = GroupNormSiLU(8, 64)
        self.attention = Attention(64, cross_attention_dim=32, heads=4, dim_head=16)
        self.feed_forward = nn.Sequential(GEGLU(64, 128), nn.Linear(128, 64))

    def forward(self, image, text, time):
        tokens = self.norm(image, time).flatten(2).transpose(1, 2)
        return self.feed_forward(tokens + self.attention(tokens, text))


def main():
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    before, after = Before(), After()
    after.load_state_dict(before.state_dict())
    image = torch.randn(2, 64, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    text, time = torch.randn(2, 77, 32), torch.randn(2, 64)

    names = ["output", "gradient of the image", *(f"gradient of {name}" for name, _ in after.named_parameters())]
    ours, torchs = (results(network, image, text, time) for network in (after, before))
    for name, our, theirs in zip(names, ours, torchs, strict=True):
        error = ((our - theirs).norm() / theirs.norm()).item()
        print(f"{name:<40} relative error {error:.0e}")
        assert error < 1e-4


def results(network, image, text, time):
    """The output, and the gradients of its mean square."""
    out = network(image, text, time)
    return [out, *torch.autograd.grad(out.square().mean(), [image, *network.parameters()])]


if __name__ == "__main__":
    main()
