"""Addresses past 2^31 elements: no 32-bit operation on the way to one overflows, shown on Triton's IR."""

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from ldmperf.kernels import OPERATORS, Launch
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import compile_launch
from ldmperf.profiling.static.offsets import address_count, int32_overflows
from ldmperf.profiling.static.shapes import SHAPES, Shape

# Tensors past 2^31 elements: many images, one large image, long rows of few channels.
MANY, LARGE = {"batch": 160, "height": 512, "width": 512}, {"batch": 2, "height": 8192, "width": 8192}
HUGE = {
    "attention": [
        Shape(batch=4096, height=64, width=64, head_dim=40),
        Shape(batch=1, height=8192, width=8192, head_dim=8),
        Shape(batch=4096, height=64, width=64, head_dim=40, context=77),
        Shape(batch=1, height=8192, width=8192, head_dim=8, context=77),
    ],
    "group_norm_silu": [
        Shape(**MANY, channels=128),
        Shape(**LARGE, channels=64),
        Shape(batch=8, height=4096, width=4096, channels=32),
        Shape(**MANY, channels=64, skip_channels=64),
        Shape(**LARGE, channels=64, skip_channels=64),
        Shape(batch=1, height=2, width=2, channels=2**30, groups=2**18),
    ],
    "layer_norm": [
        Shape(batch=64, height=512, width=512, channels=320),
        Shape(batch=1, height=2**15, width=2**14),
    ],
    "linear": [
        Shape(batch=128, height=512, width=512, channels=64),
        Shape(height=32767, width=16384, channels=32, features=32),
        Shape(batch=32, height=512, width=512, channels=640, features=320),
    ],
    "geglu": [Shape(batch=64, height=512, width=512, channels=1280), Shape(height=65535, width=16383, channels=8)],
    "residual_add": [Shape(**MANY, channels=128), Shape(**LARGE, channels=64)],
    "sampler_update": [
        Shape(batch=4096, height=512, width=512, channels=4),
        Shape(batch=1, height=32768, width=32768, channels=4),
    ],
}
LAYOUTS = ("as the step has it", "contiguous", "sliced")


def huge_arguments(operator, shape, layout):
    """Arguments of an operator; "contiguous" images instead of channels-last ones, "sliced" out of larger ones."""
    build, _, _ = SHAPES[operator]
    arguments = build(shape)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 3 or name == "table":
            continue
        if layout == "contiguous":
            arguments[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        elif layout == "sliced":
            cut = value.dim() - (2 if value.dim() == 3 else 1)
            sizes = [size + (axis == cut) for axis, size in enumerate(value.shape)]
            order = sorted(range(value.dim()), key=lambda axis: -value.stride(axis))
            larger = torch.empty([sizes[axis] for axis in order], dtype=value.dtype, device="meta")
            larger = larger.permute([order.index(axis) for axis in range(value.dim())])
            arguments[name] = larger.narrow(cut, 0, value.shape[cut])
    return arguments


def huge_calls():
    for operator in OPERATORS:
        for shape in HUGE[operator]:
            for layout in LAYOUTS:
                yield operator, huge_arguments(operator, shape, layout)
    small = huge_arguments("residual_add", Shape(batch=2, height=4096, width=4096, channels=64), LAYOUTS[0])
    for width in (8192, 8191):
        yield "residual_add", small | {"size": (8192, width)}
    # Registers whose stride fits 32 bits, and its multiples do not.
    shape = Shape(batch=1, height=20_000, width=20_000, channels=4)
    registers = torch.empty(5, 1, 20_000, 20_000, 4, device="meta").permute(0, 1, 4, 2, 3)
    update = huge_arguments("sampler_update", shape, LAYOUTS[0])
    yield "sampler_update", update | {"registers": registers, "table": torch.empty(50, 5, 7, device="meta")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "offsets-cache"))


def overflows(launch):
    """Of a launch compiled for sm_90; every pointer of the IR has been looked at."""
    ttir = compile_launch(launch, MACHINES["sm_90"]).asm["ttir"]
    assert address_count(ttir) > 0
    return int32_overflows(ttir, launch.arguments, launch.programs)


@pytest.mark.parametrize(("operator", "arguments"), list(huge_calls()))
def test_no_address_overflows_past_2_31_elements(operator, arguments):
    result, launches = OPERATORS[operator].plan(OPERATORS[operator].bind(**arguments))
    sizes = [value.numel() for value in (*arguments.values(), result) if isinstance(value, torch.Tensor)]
    assert launches
    assert max(sizes) > 2**31
    for launch in launches:
        assert overflows(launch) == []


@triton.jit
def copy_kernel(x_ptr, out_ptr, rows, columns, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    start = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(out_ptr + row.to(tl.int64) * columns + offs, tl.load(x_ptr + start + offs, mask=offs < columns))


@triton.jit
def loop_kernel(x_ptr, out_ptr, rows, columns, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows):
        start = row.to(tl.int64) * stride if WIDE else row * stride
        total += tl.load(x_ptr + start + offs)
    tl.store(out_ptr + offs, total)


@pytest.mark.parametrize("kernel", [copy_kernel, loop_kernel])
@pytest.mark.parametrize(
    ("rows", "wide", "overflow"), [(2**20, False, True), (2**20, True, False), (2**18, False, 0)]
)
def test_the_overflow_of_a_kernel_without_64_bit_offsets_is_found(kernel, rows, wide, overflow):
    x = torch.empty(rows, 4096, device="meta")
    arguments = {
        "x_ptr": x,
        "out_ptr": x,
        "rows": rows,
        "columns": 4096,
        "stride": 4096,
        "WIDE": wide,
        "BLOCK": 1024,
    }
    found = overflows(Launch(kernel, rows, arguments))
    assert bool(found) == bool(overflow)
    if found:
        assert "arith.muli" in found[0]
        assert str(4096 * (2**20 - 1)) in found[0]


def test_division_and_remainder_bound_a_range():
    ttir = """
  tt.func public @k(%p: !tt.ptr<f32>, %n: i32) {
    %c3_i32 = arith.constant 3 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc("a"("f.py":1:2)))
    %a = arith.divsi %pid, %c3_i32 : i32
    %b = arith.remsi %pid, %n : i32
    %c = arith.muli %a, %b : i32 loc(#loc3)
    %q = tt.addptr %p, %c : !tt.ptr<f32>, i32
"""
    assert int32_overflows(ttir, {"n": 1000}, 3 * 2**20) == []
    (line,) = int32_overflows(ttir, {"n": 2**12}, 3 * 2**20)
    assert line.startswith("%c = arith.muli")
    assert str((2**20 - 1) * (2**12 - 1)) in line
