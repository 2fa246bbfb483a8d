"""Dependent launches in the emulator: what a thread may not do before it has waited for the launches before."""

import emulator_kit as kit
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ldmperf.kernels import OPERATORS, dependent_launches
from ldmperf.kernels._dependent import launch_dependents, wait_for_primary
from ldmperf.profiling.emulator.emulation import emulated
from ldmperf.profiling.emulator.execution import code_of, run
from ldmperf.profiling.emulator.findings import Findings
from ldmperf.profiling.emulator.global_memory import GlobalMemory
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.operator_inputs import made_inputs
from ldmperf.profiling.emulator.program import UnknownInstruction
from ldmperf.profiling.emulator.tallies import Tallies
from ldmperf.profiling.emulator.threads import LaunchGrid
from ldmperf.profiling.static.shapes import Shape

WAIT, LOAD, STORE = "griddepcontrol.wait;", "ld.global.b32 %r9, [%rd9];", "st.global.b32 [%rd9], %r1;"
LAUNCH = "griddepcontrol.launch_dependents;"
COPY = "cp.async.ca.shared.global [%r4], [%rd9], 0x4; cp.async.commit_group; cp.async.wait_group 0;"
# %r1 is the thread's number, %p1 true of the first warp, %rd9 the address of the thread's own word.
HEAD = """
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	setp.lt.u32 %p1, %r1, 32;
	mad.lo.s32 %r3, %r2, 64, %r1;
	shl.b32 %r4, %r1, 2;
	ld.param.b64 %rd1, [kernel_param_0];
	mul.wide.u32 %rd8, %r3, 4;
	add.s64 %rd9, %rd1, %rd8;
"""
PROGRAMS, THREADS = 3, 64


def launched(body, *, dependent=True):
    """The findings of statements that 3 programs of 64 threads run, each thread with a word of its own."""
    words = torch.arange(PROGRAMS * THREADS, dtype=torch.int32)
    code = code_of(kit.ptx(f"{HEAD}{body}\n\tret;", THREADS, ["u64"]))
    memory = GlobalMemory([words], [True], 4, ["words_ptr"])
    values = {"kernel_param_0": np.array([memory.address(words)], np.uint64)}
    findings = Findings("kernel")
    grid = LaunchGrid((PROGRAMS, 1, 1), values, 1024, dependent)
    run(code, grid, memory, findings, Tallies(code.program), Numerics())
    return findings


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (WAIT + LOAD + STORE, set()),
        (LAUNCH + WAIT + LOAD + LAUNCH + WAIT + STORE, set()),
        (WAIT + COPY, set()),
        (LOAD + WAIT, {"early read"}),
        (COPY + WAIT, {"early read"}),
        ("ld.global.nc.b32 %r9, [%rd9];" + WAIT, {"early read"}),
        (STORE + WAIT, {"early write"}),
        ("red.global.add.u32 [%rd9], 1;" + WAIT, {"early write"}),
        ("atom.global.add.u32 %r9, [%rd9], 1;" + WAIT, {"early write"}),
        # Shared memory is a program's own, and parameters are the launch's.
        ("st.shared.b32 [%r4], %r1; ld.shared.b32 %r9, [%r4]; ld.param.b64 %rd1, [kernel_param_0];" + WAIT, set()),
        # What no lane reads is not read.
        ("setp.gt.u32 %p2, %r1, 99; @%p2 " + LOAD + WAIT, set()),
        # It brings a line to a cache, which is no read.
        ("prefetch.global.L2 [%rd9];" + WAIT, set()),
        ("", {"no wait"}),
        (LAUNCH, {"no wait"}),
        (LOAD, {"early read", "no wait"}),
        # Each thread waits for itself: no barrier hands on that another has.
        ("@%p1 griddepcontrol.wait; bar.sync 0;" + LOAD, {"early read"}),
        ("@%p1 griddepcontrol.wait; @%p1 " + LOAD, set()),
        # A program is complete only when all its threads are: one that waits holds up the whole launch.
        ("setp.eq.u32 %p2, %r2, 1; @%p2 ret;" + WAIT + LOAD, {"no wait"}),
    ],
)
def test_what_a_thread_does_before_it_waits(body, kinds):
    assert launched(body).kinds == kinds


@pytest.mark.parametrize("body", ["", LOAD, STORE, LAUNCH + LOAD + WAIT + STORE, COPY])
def test_another_launch_begins_when_all_before_it_have_ended(body):
    assert not launched(body, dependent=False).kinds


def test_a_finding_tells_the_argument_and_how_many():
    (found,) = launched("@%p1 " + LOAD + WAIT)
    assert (found.kind, found.count) == ("early read", PROGRAMS * 32)
    assert found.detail == "read by thread 0 of program 0 at words_ptr + 0 of shape [192]"
    (found,) = launched("setp.eq.u32 %p2, %r2, 1; @%p2 ret;" + WAIT)
    assert (found.kind, found.count) == ("no wait", 1)


def test_a_prefetch_outside_is_told():
    (found,) = launched("add.s64 %rd9, %rd9, 4096; prefetch.global.L2 [%rd9];" + WAIT)
    assert found.kind == "out of bounds"


@pytest.mark.parametrize("text", ["griddepcontrol;", "griddepcontrol.wait.more;", "prefetch.global.L1 [%rd9];"])
def test_other_forms_are_not_known(text):
    with pytest.raises(UnknownInstruction):
        launched(text)


# ---------------------------------------------------------------- kernels as Triton compiles them


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton-cache")))
        yield


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr):
    """out = x + y; EARLY: x is loaded before the wait."""
    launch_dependents(PDL)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        x = tl.load(x_ptr + offs, mask=offs < n)
    wait_for_primary(PDL)
    if not EARLY:
        x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


def added(*, early, pdl, launch_pdl):
    """What add_kernel makes of 1000 numbers, with this constant, launched so."""
    x, y = torch.randn(2, 1000)
    out = torch.empty(1000)
    add_kernel[(4,)](x, y, out, 1000, BLOCK=256, EARLY=early, PDL=pdl, launch_pdl=launch_pdl)
    return out, x + y


def test_a_load_before_the_wait_is_found_at_its_line():
    with emulated("sm_90") as emulation:
        added(early=True, pdl=True, launch_pdl=True)
    (found,) = emulation.findings
    assert found.kind == "early read"
    assert found.code == "x = tl.load(x_ptr + offs, mask=offs < n)"
    assert "at x_ptr + " in found.detail


def test_a_kernel_that_is_not_made_for_it_is_found():
    with emulated("sm_90") as emulation:
        added(early=False, pdl=False, launch_pdl=True)
    assert emulation.findings.kinds == {"early read", "early write", "no wait"}


@pytest.mark.parametrize(
    ("early", "pdl", "launch_pdl"), [(False, True, True), (True, True, False), (True, False, False)]
)
def test_kernels_that_wait_or_need_not(early, pdl, launch_pdl):
    with emulated("sm_90", strict=True):
        out, expected = added(early=early, pdl=pdl, launch_pdl=launch_pdl)
    assert torch.equal(out, expected)


# Shapes, and the kernels that they take.
SHAPES = {
    "attention": (
        [
            {"heads": 1, "height": 12, "width": 12, "head_dim": 40},
            {"heads": 1, "height": 12, "width": 12, "head_dim": 64, "mask": 1},
            {"heads": 2, "height": 6, "width": 6, "head_dim": 40, "context": 77},
        ],
        {"attention_kernel", "short_attention_kernel"},
    ),
    "group_norm_silu": (
        [
            {"channels": 64, "height": 6, "width": 6},
            {"channels": 64, "height": 48, "width": 48},
            {"channels": 64, "height": 48, "width": 48, "statistics": 1},
        ],
        {
            "group_norm_kernel",
            "group_norm_statistics_kernel",
            "group_norm_apply_kernel",
            "group_norm_given_kernel",
        },
    ),
    "linear": (
        [{"channels": 64, "height": 6, "width": 6}, {"channels": 640, "height": 4, "width": 4}],
        {"norm_linear_kernel", "linear_kernel", "layer_norm_kernel"},
    ),
    "conv3x3": (
        [{"channels": 64, "height": 6, "width": 6}, {"channels": 256, "height": 6, "width": 6}],
        {"conv3x3_kernel", "conv3x3_reduce_kernel"},
    ),
    "transformer_tail": (
        [{"channels": 64, "height": 6, "width": 6, "heads": 8, "context": 77}],
        {"transformer_tail_kernel"},
    ),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_wait_and_have_the_same_bits(operator):
    shapes, kernels = SHAPES.get(operator, ([{"channels": 64, "height": 6, "width": 6}], {f"{operator}_kernel"}))
    seen = set()
    for fields in shapes:
        shape = Shape(torch.bfloat16, batch=1, **fields)
        off, on = (results_of(operator, shape, seen, dependent=dependent) for dependent in (False, True))
        assert off
        assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))
    assert seen == kernels


def results_of(operator, shape, seen, *, dependent):
    """The results of a call of this shape, whose kernels are added to `seen`. FindingsError for a finding."""
    inputs = made_inputs(operator, shape, "random")
    with emulated("sm_90", strict=True) as emulation, dependent_launches(dependent):
        emulation.uninitialised(*inputs.written)
        returned, launches = OPERATORS[operator].plan(OPERATORS[operator].bind(**inputs.arguments))
        for launch in launches:
            assert launch.pdl == dependent
            seen.add(launch.name)
            launch.run()
        results = list(inputs.results(returned).values())
        emulation.check_written(*results)
    return results
