"""The kernels under autocast: the dtype and, to rounding, the values of the torch backend."""

import pytest
import torch

from ldmperf.kernels import attention, conv3x3, geglu, group_norm_silu, layer_norm, linear, residual_add

CALLS = {
    "attention": (attention, [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)], {}),
    "linear": (linear, [(2, 5, 16), (6, 16), (6,)], {"activation": "geglu"}),
    "layer_norm": (
        lambda x, r, w, b, **o: layer_norm(x, w, b, residual=r, **o)[0],
        [(5, 8), (5, 8), (8,), (8,)],
        {},
    ),
    "group_norm_silu": (lambda x, k, **o: group_norm_silu(x, 4, skip=k, **o), [(2, 5, 4, 6), (2, 3, 4, 6)], {}),
    "residual_add": (residual_add, [(2, 3, 4, 6), (2, 3, 4, 6)], {"size": (8, 12)}),
    "conv3x3": (
        lambda x, w, b, **o: conv3x3(*(t.contiguous(memory_format=torch.channels_last) for t in (x, w)), b, **o),
        [(1, 16, 4, 6), (16, 16, 3, 3), (16,)],
        {},
    ),
    "geglu": (geglu, [(5, 8)], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_follows_the_rule_of_the_torch_backend(kit, name):
    call, shapes, options = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(shape, generator=generator) for shape in shapes]
    if name != "geglu":
        arguments[1] = arguments[1].half()
    with torch.autocast("cpu", torch.float16):
        kernel, reference = (call(*arguments, **options, backend=backend) for backend in ("triton", "torch"))
    assert kernel.dtype == reference.dtype
    assert kit.relative_rms(kernel, reference.double()) < 2e-3
