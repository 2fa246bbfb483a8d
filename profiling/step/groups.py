"""The group of launches that a kernel belongs to, by the name that a profiler reports.

Names are those of our kernels, of torch's (ATen and inductor), cuBLAS and cuDNN on NVIDIA GPUs. The first pattern
that fits decides: attention of cuDNN is no convolution, an implicit GEMM of cuDNN no linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from ..measure.recorded import KernelTime
from .launches import GROUPS, LaunchGroup

Other = Literal["other"]
OTHER: Other = "other"

_PATTERNS: tuple[tuple[LaunchGroup, str], ...] = (
    # Inductor names a kernel by all that it merges: what a pass computes comes before what it copies.
    ("linear", r"^triton_tem_.*mm"),
    ("convolution", r"^triton_tem_.*convolution"),
    ("group norm", r"^triton_(poi|per|red).*(group_norm|silu)"),
    ("layer norm", r"^triton_(poi|per|red).*layer_norm"),
    ("GEGLU", r"^triton_(poi|per|red).*gelu"),
    ("elementwise and residual", r"^triton_(poi|per|red)"),
    ("sampler", r"^sampler_update_kernel"),
    ("attention", r"attention|flash_|fmha|sdpa|softmax"),
    ("group norm", r"^group_norm|group_?norm|RowwiseMoments|ComputeFusedParams|silu"),
    ("linear", r"^((norm_)?linear|transformer_(front|tail))_kernel"),
    ("convolution", r"^conv3x3_"),
    ("layer norm", r"^layer_norm_kernel|layer_?norm"),
    ("GEGLU", r"^geglu_(float8_)?kernel|gelu"),
    ("elementwise and residual", r"^residual_add_kernel"),
    ("copies", r"memcpy|memset|nchwToNhwc|nhwcToNchw|copy|CatArray|upsample|index_?(select|elementwise)|gather"),
    ("convolution", r"fprop|dgrad|conv|winograd|cudnn"),
    ("linear", r"gemm|nvjet|cutlass|cublas|splitK|_mm_|gemv"),
    ("elementwise and residual", r"elementwise|reduce|arange|distribution"),
)
_COMPILED = tuple((group, re.compile(pattern, re.IGNORECASE)) for group, pattern in _PATTERNS)


def group_of(name: str) -> LaunchGroup | Other:
    """The group of a kernel; "other" for an unknown name."""
    return next((group for group, pattern in _COMPILED if pattern.search(name)), OTHER)


def by_group(kernels: Iterable[KernelTime]) -> dict[LaunchGroup | Other, tuple[float, float]]:
    """(launches, milliseconds) of a step by group, in the order of the inventory; groups without any left out."""
    found: dict[LaunchGroup | Other, tuple[float, float]] = dict.fromkeys((*GROUPS, OTHER), (0.0, 0.0))
    for kernel in kernels:
        launches, ms = found[group_of(kernel.name)]
        found[group_of(kernel.name)] = (launches + kernel.launches, ms + kernel.ms)
    return {group: total for group, total in found.items() if total != (0.0, 0.0)}
