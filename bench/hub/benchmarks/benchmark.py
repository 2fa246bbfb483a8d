"""`kernels benchmark`: operators beside plain torch, at a shallow and a deep level of a UNet.

The shapes are those of Stable Diffusion 1.5 at 512 px with guidance, in float16. On a CPU they have an eighth of
the height and width, in float32.
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark
from torch import Tensor


class Level:
    """Workloads `shallow` (64x64, 320 channels) and `deep` (16x16, 1280 channels), of 8 heads each."""

    seed = 0

    def randn(self, *shape: int) -> Tensor:
        dtype = torch.float32 if self.device == "cpu" else torch.float16
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def setup_shallow(self) -> None:
        self.tensors(64, 320)

    def setup_deep(self) -> None:
        self.tensors(16, 1280)

    def tensors(self, size: int, channels: int) -> None:
        size = size // 8 if self.device == "cpu" else size
        self.image = self.randn(2, channels, size, size).contiguous(memory_format=torch.channels_last)
        self.tokens = self.randn(2, size * size, channels)
        self.qkv = self.randn(2, size * size, 3, 8, channels // 8)
        self.gated = self.randn(2, size * size, 8 * channels)
        self.vector, self.shift = self.randn(channels), self.randn(2, channels)


class GroupNormSiLU(Level, Benchmark):
    """silu(group_norm(x + shift)), the second norm of a residual block."""

    def benchmark_shallow(self) -> None:
        vector = self.vector
        self.out = self.kernel.group_norm_silu(self.image, 32, vector, vector, eps=1e-5, x_bias=self.shift)

    def verify_shallow(self) -> Tensor:
        shifted = self.image + self.shift[:, :, None, None]
        return F.silu(F.group_norm(shifted, 32, self.vector, self.vector, 1e-5))

    benchmark_deep, verify_deep = benchmark_shallow, verify_shallow


class LayerNormResidual(Level, Benchmark):
    """layer_norm(x + residual), of which the kernel gives the sum too."""

    def benchmark_shallow(self) -> None:
        normalized, _ = self.kernel.layer_norm(self.tokens, self.vector, self.vector, residual=self.tokens)
        self.out = normalized

    def verify_shallow(self) -> Tensor:
        return F.layer_norm(self.tokens + self.tokens, self.vector.shape, self.vector, self.vector)

    benchmark_deep, verify_deep = benchmark_shallow, verify_shallow


class GEGLU(Level, Benchmark):
    """value * gelu(gate), the halves of the last dimension."""

    def benchmark_shallow(self) -> None:
        self.out = self.kernel.geglu(self.gated)

    def verify_shallow(self) -> Tensor:
        value, gate = self.gated.chunk(2, dim=-1)
        return value * F.gelu(gate)

    benchmark_deep, verify_deep = benchmark_shallow, verify_shallow


class Attention(Level, Benchmark):
    """Self-attention over slices of a packed projection."""

    def benchmark_shallow(self) -> None:
        self.out = self.kernel.attention(*self.qkv.unbind(2))

    def verify_shallow(self) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in self.qkv.unbind(2))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    benchmark_deep, verify_deep = benchmark_shallow, verify_shallow
