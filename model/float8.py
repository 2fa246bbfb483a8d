"""Linear layers in float8: rows that our norms and gates quantize as they write them, by weights quantized once.

torch's scaled matmul has a scale for each row of either operand and gives bfloat16. Twice the rate of bfloat16's
tensor cores pays where they bound a matmul. With K input features that takes more than K = rate / bandwidth
multiply-adds for each result of two bytes: of an H200 1,480 TFLOP/s in float8 (twice the 742 taken for bfloat16)
over 4.07 TB/s, K = 364. Below, writing the result does. So levels of fewer than `FLOAT8_CHANNELS` channels stay as
they are, and so do convolutions and the projections after an attention, whose inputs come from no norm of ours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.kernels import chip_of, float8_rows

# The narrowest level that is quantized.
FLOAT8_CHANNELS = 512
# What torch wants both sizes of a float8 weight on a GPU to be multiples of.
FLOAT8_MULTIPLE = 16


class Float8Linear(nn.Module):
    """A linear layer [N, K] of float8 rows, without its bias, which whoever reads the result adds.

    weight  float8_e4m3fn [N, K], a buffer: rounded from the layer that it stands for
    scale   float32 [1, N], a buffer: of each row of the weight
    bias    that layer's own parameter, or None
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        weight, scale = float8_rows(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.view(1, -1))
        self.register_parameter("bias", layer.bias)
        self._rounded = Unwritten(layer.weight)

    def check(self) -> None:
        """ValueError where the weight that this one was rounded from has been written since."""
        if not torch.compiler.is_compiling() and not self._rounded.holds():
            raise ValueError(
                "float8 weights are not those of the network's weights as they are now (a weight was written): "
                "call with_float8() again"
            )

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x float8_e4m3fn [..., K], scale float32 [rows, 1] -> bfloat16 [..., N]."""
        self.check()
        by_row = F.ScalingType.RowWise
        out = F.scaled_mm(
            x.flatten(0, -2), self.weight.t(), scale, by_row, self.scale, by_row, output_dtype=torch.bfloat16
        )
        return out.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the buffers; a change of dtype is not for them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Unwritten:
    """Whether a tensor's memory is as it was, by torch's counter of writes; keeps none of the memory.

    It misses what that counter misses (see `Snapshot`). A copy knows of no tensor, as its own is another.
    """

    __slots__ = ("_counter", "_version")

    def __init__(self, tensor: Tensor | None = None) -> None:
        self._counter: Tensor | None = None
        self._version = 0
        if tensor is not None and not tensor.is_inference():
            self._version = tensor._version
            # A view has the counter of what it views, and keeps it when it is given other memory.
            self._counter = tensor.detach()
            self._counter.data = tensor.new_empty(0)

    def holds(self) -> bool:
        return self._counter is None or self._counter._version == self._version

    def __reduce__(self) -> tuple[type[Unwritten], tuple[()]]:
        return Unwritten, ()


def float8_misfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a network there cannot multiply in float8, in a line that says what to do; None if it can."""
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"float8 matmuls give bfloat16, and the network is {name}: convert it to bfloat16 first"
    if device.type in ("cuda", "meta"):
        chip = chip_of(device)
        if not chip.arch.startswith("sm_"):
            return f"{chip.name}: AMD's float8 is another format, which is not implemented; use bfloat16"
        if int(chip.arch.removeprefix("sm_")) < 89:
            return f"{chip.name} has no float8: it takes compute capability 8.9 or later"
    key = {"cuda": "CUDA", "cpu": "CPU", "meta": "Meta"}.get(device.type)
    if (
        key is None
        or not hasattr(F, "scaled_mm")
        or not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", key)
    ):
        return f"torch {torch.__version__} has no scaled matmul on {device.type}: use a GPU, or a later torch"
    return None


def refuse_float8(network: nn.Module, what: str) -> None:
    """ValueError for a float8 copy."""
    if any(isinstance(module, Float8Linear) for module in network.modules()):
        raise ValueError(f"{what} is for the network that with_float8() was called on, not for its float8 copy")
