"""triton where it is installed; without it kernels are defined, never compiled, and calls give the reason."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None
try:
    from triton.language.extra.cuda import gdc_launch_dependents as gdc_launch_dependents
    from triton.language.extra.cuda import gdc_wait as gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None

tl: Any = None if triton is None else triton.language
jit: Any = (lambda function: function) if triton is None else triton.jit


_NO_TRITON = "triton is not installed: pip install triton"
# The types of devices that compiled kernels run on.
DEVICES = ("cuda",)
# The dtypes that kernels load and store; they compute in float32.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreted(kernel: Any) -> bool:
    """Whether `kernel`, a function under `jit`, runs in triton's interpreter, by TRITON_INTERPRET=1 at import."""
    return triton is not None and not isinstance(kernel, triton.JITFunction)


def debugs() -> bool | None:
    """Whether triton compiles kernels for debugging, which it asks at every launch.

    None where something instruments kernels: the next launch may then be of another kernel.
    """
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    if compilation.instrumentation_mode or runtime.add_stages_inspection_hook is not None:
        return None
    return bool(runtime.debug)


@functools.cache
def dependent_launch_misfit() -> str | None:
    """Why this triton cannot launch a kernel while the one before it runs; None if it can."""
    if triton is None:
        return _NO_TRITON
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return "triton has no backend for NVIDIA"
    if gdc_wait is None or "launch_pdl" not in CUDAOptions.__dataclass_fields__:
        return f"triton {triton.__version__} has no launch_pdl: pip install -U triton"
    return None


def device_reasons(kernel: Any, tensor: Tensor) -> list[str]:
    """Why `kernel`, a function under `jit`, cannot run on the device of `tensor`; empty if it can."""
    if triton is None:
        return [_NO_TRITON]
    if not is_interpreted(kernel) and tensor.device.type not in DEVICES:
        return [f"the tensors are on {tensor.device}: Triton kernels need a GPU, or TRITON_INTERPRET=1 at import"]
    return []


def of_layout(reasons: list[str], kernel: Any, tensor: Tensor) -> list[str]:
    """The reasons that hold on a GPU too, of tensors that stand for such on "meta"; elsewhere all."""
    return (
        [reason for reason in reasons if reason not in device_reasons(kernel, tensor)]
        if tensor.is_meta
        else reasons
    )


def dtype_reasons(**tensors: Tensor | None) -> list[str]:
    """One reason for each tensor of a dtype that kernels do not take."""
    return [
        f"{name} is {tensor.dtype}: kernels take float32, bfloat16 and float16"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES
    ]


def contiguity_reasons(**tensors: Tensor | None) -> list[str]:
    """One reason for each tensor that a kernel reads as plain memory and that is not."""
    return [
        f"{name} is not contiguous"
        for name, tensor in tensors.items()
        if tensor is not None and not tensor.is_contiguous()
    ]
