"""The launches that quantize rows to float8: compiled for an H100 without spills, and executed without a GPU."""

import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from ldmperf.kernels import OPERATORS, KernelUnsupported, float8_rows, geglu, layer_norm, planned_for
from ldmperf.kernels._launch import Chip
from ldmperf.profiling.emulator.emulation import emulated
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import compile_launch
from ldmperf.profiling.static.inspection import inspect_launches

H100 = Chip("NVIDIA H100", 132, "sm_90")
# Rows and channels of the levels of 866M, 2B and 5B whose layers are quantized, at latents of 64x64 with guidance.
LEVELS = [(8192, 512), (8192, 768), (2048, 640), (2048, 1536), (512, 1280), (512, 2048), (512, 3072), (128, 3072)]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton-cache")))
        yield


def launches(rows, channels, dtype=torch.bfloat16):
    """Of a block's norm and its gate."""

    def meta(*size):
        return torch.empty(size, dtype=dtype, device="meta")

    vector = meta(channels)
    calls = {
        "layer_norm": (meta(2, rows // 2, channels), vector, vector, 1e-5, vector, None, True),
        "geglu": (meta(2, rows // 2, 8 * channels), meta(8 * channels), True),
    }
    with planned_for(H100):
        for name, arguments in calls.items():
            (launch,) = OPERATORS[name].plan(OPERATORS[name].bind(*arguments))[1]
            yield launch


@pytest.mark.parametrize(("rows", "channels"), LEVELS)
def test_the_launches_of_a_level_have_no_spills_and_convert_two_numbers_at_once(rows, channels):
    for inspection in inspect_launches([(one, MACHINES["sm_90"]) for one in launches(rows, channels)]):
        assert inspection.faults == []
        assert "cvt.rn.satfinite.e4m3x2.f32" in inspection.compiled.asm["ptx"]
        # 8 numbers of a thread, or 16, are as many bytes of float8.
        assert re.search(r"st\.global\.v[24]\.b32", inspection.compiled.asm["ptx"])


def test_an_older_chip_has_no_such_code():
    for launch in launches(512, 1280):
        with pytest.raises(Exception, match="fp8e4nv not supported in this architecture"):
            compile_launch(launch, MACHINES["sm_80"])


def near(result, exact):
    """Whether each number is as near as 3 bits of mantissa and the row's scale allow."""
    quantized, scale = result
    rows = exact.reshape(scale.shape[0], -1)
    wanted = float8_rows(exact.float())[1]
    torch.testing.assert_close(scale, wanted, rtol=1e-4, atol=0)
    off = (quantized.double().view_as(rows) * scale.double() - rows).abs()
    return bool((off <= torch.maximum(rows.abs() / 16, scale.double() / 1024) * (1 + 1e-3)).all())


@pytest.mark.parametrize("channels", [512, 640, 1280])
def test_rows_are_quantized_by_the_compiled_code(channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, channels, generator=generator).bfloat16()
    weight, bias, x_bias = torch.randn(3, channels, generator=generator).bfloat16()
    gates = torch.randn(1, 3, 8 * channels, generator=generator).bfloat16()
    with emulated("sm_90", strict=True) as emulation:
        normed = layer_norm(x, weight, bias, x_bias=x_bias, float8=True, backend="triton")
        gated = geglu(gates, float8=True, backend="triton")
        emulation.check_written(normed[1], gated[1])
    wide = x.double() + x_bias.double()
    assert near(normed, F.layer_norm(wide, (channels,), weight.double(), bias.double()))
    value, gate = gates.double().chunk(2, dim=-1)
    assert near(gated, value * F.gelu(gate))


def test_an_older_chip_is_refused():
    with emulated("sm_80"), pytest.raises(KernelUnsupported, match="sm_80 has no conversion to float8"):
        geglu(torch.zeros(1, 64), float8=True, backend="triton")
