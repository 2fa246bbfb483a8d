"""Triton's launches on an emulated GPU: what a kernel is passed, the driver that Triton sees, what is refused."""

import contextlib
import re
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from emulator_kit import ptx
from hypothesis import given
from hypothesis import strategies as st

import ldmperf.kernels
from ldmperf.kernels import KernelUnsupported
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.options import CaseError

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import driver

from ldmperf.profiling.emulator.emulated_driver import scalar_bits
from ldmperf.profiling.emulator.emulation import FindingsError, emulated
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.program import UnknownInstruction, parse_ptx


@triton.jit
def where_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out_ptr + place, x + 100 * y + 10000 * z)


@triton.jit
def scalars_kernel(
    out_ptr, b, i8: tl.int8, i16: tl.int16, i32, i64: tl.int64, u8: tl.uint8, u64: tl.uint64,
    f32, f16: tl.float16, bf16: tl.bfloat16, f64: tl.float64,
):  # fmt: skip
    tl.store(out_ptr, b.to(tl.float64))
    tl.store(out_ptr + 1, i8.to(tl.float64))
    tl.store(out_ptr + 2, i16.to(tl.float64))
    tl.store(out_ptr + 3, i32.to(tl.float64))
    tl.store(out_ptr + 4, i64.to(tl.float64))
    tl.store(out_ptr + 5, u8.to(tl.float64))
    tl.store(out_ptr + 6, u64.to(tl.float64))
    tl.store(out_ptr + 7, f32.to(tl.float64))
    tl.store(out_ptr + 8, f16.to(tl.float64))
    tl.store(out_ptr + 9, bf16.to(tl.float64))
    tl.store(out_ptr + 10, f64)


@triton.jit
def tuples_kernel(out_ptr, pair, CONSTANTS: tl.constexpr, nothing, last=7):
    if nothing is None:
        tl.store(out_ptr, tl.load(pair[0]) * pair[1][0] + CONSTANTS[1] + last)


@triton.jit(do_not_specialize=["n"])
def unspecialized_kernel(out_ptr, n):
    tl.store(out_ptr, n)


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x, mask=offs < n)


@triton.jit
def exp_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.exp(tl.load(x_ptr + offs)))


@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 32}, num_warps=2)], key=["n"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})
@triton.jit
def tuned_kernel(out_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """out[0]: how often it ran in each program of block 32, out[1]: of 64; out[2]: whether it was even."""
    tl.atomic_add(out_ptr + BLOCK // 32 - 1, 1)
    tl.store(out_ptr + 2, EVEN)


@triton.jit(noinline=True)
def _doubled(x):
    return 2 * x


@triton.jit
def calling_kernel(out_ptr):
    tl.store(out_ptr, _doubled(tl.load(out_ptr)))


@triton.jit
def printing_kernel(out_ptr):
    tl.device_print("out", tl.load(out_ptr))


@triton.jit
def asserting_kernel(out_ptr, n):
    tl.device_assert(n > 3, "small")
    tl.store(out_ptr, n)


@triton.jit
def described_kernel(descriptor, out_ptr):
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], descriptor.load([0, 0]))


@triton.jit
def locking_kernel(out_ptr, lock_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(out_ptr + offs, tl.load(out_ptr + offs) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def chain_kernel(out_ptr, done_ptr, programs):
    pid = tl.program_id(0)
    if pid < programs - 1:
        while tl.load(done_ptr + pid + 1, volatile=True) == 0:
            pass
    tl.store(out_ptr + pid, programs - pid)
    tl.atomic_add(done_ptr + pid, 1)


@pytest.fixture
def sm_90():
    with emulated("sm_90") as emulation:
        yield emulation
        emulation.raise_findings()


def places(x, y=1, z=1):
    return [i + 100 * j + 10000 * k for k in range(z) for j in range(y) for i in range(x)]


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 4), (1, 1, 300)])
def test_programs_of_one_to_three_dimensions(arch, size):
    with emulated(arch, strict=True) as emulation:
        for grid in (size, lambda meta: size, [*size]):
            out = torch.empty(int(np.prod(size)), dtype=torch.int32)
            where_kernel[grid](out)
            assert out.tolist() == places(*size)
    assert (emulation.launches, emulation.kernels) == (3, {"where_kernel"})
    assert emulation.instructions > 3 * 128 * len(out)


def test_scalars_of_every_type(sm_90):
    out = torch.zeros(11, dtype=torch.float64)
    scalars_kernel[(1,)](out, True, -5, -300, -70000, 2**40 + 1, 200, 2**63 + 2048, 1.1, 1.1, 1.1, 1.1)
    exact = [1, -5, -300, -70000, 2**40 + 1, 200, 2**63 + 2048]
    # float16 to nearest; bfloat16 is 1.1's upper 16 bits, as Triton's launcher packs it.
    halves = [float(np.float16(1.1)), 1 + 12 / 128]
    assert out.tolist() == [*exact, float(np.float32(1.1)), *halves, 1.1]


def test_large_and_special_integers(sm_90):
    """1 is a constant, multiples of 16 are marked, past 32 bits they are passed in 64."""
    out = torch.zeros(1, dtype=torch.int64)
    for n in (0, 1, 16, -1, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63)):
        unspecialized_kernel[(1,)](out, n)
        assert out.item() == n
        x = torch.arange(4)
        copy_kernel[(1,)](x, y := torch.zeros_like(x), min(max(n, 0), 4), BLOCK=4)
        assert y.tolist() == x.tolist()[: min(max(n, 0), 4)] + [0] * (4 - min(max(n, 0), 4))


def test_tuples_none_and_defaults(sm_90):
    out = torch.zeros(1)
    tuples_kernel[(1,)](out, (torch.tensor([3.0]), (2.5,)), (7, 8), None)
    assert out.item() == 3 * 2.5 + 8 + 7
    tuples_kernel[(1,)](out, nothing=None, last=1, CONSTANTS=(0, 0), pair=(torch.tensor([4.0]), (0.5, out)))
    assert out.item() == 3


_RANGES = {f"{sign}{bits}": (bits, sign == "i") for sign in "iu" for bits in (8, 16, 32, 64)}


@given(st.sampled_from(sorted(_RANGES)), st.data())
def test_integers_are_packed_as_two_complement(kind, data):
    bits, signed = _RANGES[kind]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    value = data.draw(st.integers(low, high - 1))
    packed = scalar_bits(kind, value)
    assert packed.shape == (1,)
    assert packed.tobytes() == value.to_bytes(bits // 8, "little", signed=signed)
    for outside in (low - 1, high):
        with pytest.raises(CaseError, match=f"{outside} is no {kind}"):
            scalar_bits(kind, outside)


@given(st.floats(width=32))
def test_floats_are_packed_by_their_bits(value):
    assert scalar_bits("fp64", value).tobytes() == struct.pack("<d", value)
    single = np.float32(value)
    assert scalar_bits("fp32", value).tobytes() == single.tobytes()
    assert scalar_bits("bf16", value).tobytes() == single.tobytes()[2:]
    if not abs(value) >= 65520:
        assert scalar_bits("fp16", value).view(np.float16)[0] == np.float16(value) or np.isnan(value)


def test_a_tensor_may_be_several_arguments_and_a_view(sm_90):
    x = torch.arange(10.0)
    copy_kernel[(1,)](x[2:], x, 1, BLOCK=1)
    assert x.tolist() == [2, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    whole = torch.full((3, 8), 5.0)
    copy_kernel[(1,)](x, whole[1], 8, BLOCK=8)
    assert whole.tolist() == [[5.0] * 8, x[:8].tolist(), [5.0] * 8]


def test_what_is_stored_to_is_watched_when_it_is_read():
    """Elements move on by one: threads and programs read what those before them store."""
    x = torch.arange(64.0)
    with emulated("sm_90") as emulation, emulation.expecting("race", "race of programs") as found:
        copy_kernel[(4,)](x, x[1:], 63, BLOCK=16)
    assert "write of what another program reads" in "".join(finding.detail for finding in found)


def test_reinterpreted_tensors():
    bits = torch.tensor([0.5, 1.5, -2.0], dtype=torch.float32).view(torch.int32)
    with emulated("sm_80", strict=True):
        out = torch.empty(3, dtype=torch.float64)
        copy_kernel[(1,)](triton.reinterpret(bits, tl.float32), out, 3, BLOCK=4)
    assert out.tolist() == [0.5, 1.5, -2.0]


# ------------------------------------------------------------ autotuning, warmup, hooks


def test_an_autotuned_kernel_runs_once_in_each_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned_kernel, "cache_results", True)
    for arch in ("sm_90", "sm_80"):
        with emulated(arch) as emulation:
            for launches in (3, 4, 7):
                out = torch.zeros(3, dtype=torch.int32)
                tuned_kernel[lambda meta: (meta["BLOCK"],)](out, 96 if launches < 7 else 64)
                # The first, of 64, is taken; of the third call the key is another.
                assert emulation.launches == launches
                assert out.tolist() == [32 * (launches != 4), 64 * (1 + (launches != 4)), launches == 7]
    # Neither a later GPU nor a later process takes a choice that nobody timed.
    assert tuned_kernel.cache == {}
    assert "do_bench" not in vars(tuned_kernel)
    assert not list(tmp_path.rglob("*.autotune.json"))


def test_a_finding_in_any_configuration_is_raised():
    kernel = triton.autotune([triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 64})], key=[])(exp_kernel)
    with emulated("sm_90", strict=True):
        x = torch.ones(8)
        with pytest.raises(FindingsError, match=r"out of bounds: exp_kernel at test_emulated_driver.py:\d+"):
            kernel[(1,)](x, torch.empty(8))


def test_an_autotuner_that_was_given_times_runs_each_once_too(sm_90):
    configurations = [triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 16})]
    with pytest.warns(DeprecationWarning, match="warmup, rep"):
        kernel = triton.autotune(configurations, key=[], warmup=5, rep=10)(exp_kernel)
    kernel[(1,)](torch.zeros(16), out := torch.zeros(16))
    assert (sm_90.launches, out.tolist()) == (3, [1.0] * 16)


def test_a_kernel_compiled_ahead_tells_its_registers_and_is_launched(tmp_path):
    with emulated("sm_80", strict=True) as emulation:
        launch_ahead(emulation, tmp_path)


def launch_ahead(emulation, folder):
    x, out = torch.randn(64), torch.empty(64)
    kernel = copy_kernel.warmup(x, out, 64, BLOCK=64, grid=(1,), num_warps=2)
    assert emulation.launches == 0
    kernel._init_handles()
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
    command = [tools / "ptxas", "-v", "-arch=sm_80", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert kernel.n_regs == int(re.search(r"Used (\d+) registers", told)[1])
    assert kernel.n_spills == 0
    kernel[(1, 1, 1)](x, out, 64, 64)
    assert torch.equal(out, x)
    with pytest.raises(CaseError, match="copy_kernel takes 4 arguments, constants too; 3 were passed"):
        kernel[(1, 1, 1)](x, out, 64)


def test_a_kernel_is_read_once_from_its_cache(sm_90, tmp_path, monkeypatch):
    """An operator makes its launcher anew after the first call; Triton's cache may be another by then."""
    x, out = torch.randn(8), torch.empty(8)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "first"))
    kernel = copy_kernel.warmup(x, out, 8, BLOCK=8, grid=(1,), num_warps=1)
    kernel._init_handles()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "second"))
    kernel._init_handles()
    copy_kernel[(1,)](x, out, 8, BLOCK=8, num_warps=1)
    assert torch.equal(out, x)


def test_hooks_are_called_and_no_program_runs_nothing(sm_90):
    calls = []
    entered, left = (lambda data: calls.append(("in", data.get()["name"])), lambda data: calls.append("out"))
    hooks = triton.knobs.runtime
    hooks.launch_enter_hook.add(entered)
    hooks.launch_exit_hook.add(left)
    try:
        where_kernel[(0, 3)](torch.zeros(1, dtype=torch.int32))
        assert (sm_90.launches, calls) == (0, [("in", "where_kernel"), "out"])
    finally:
        hooks.launch_enter_hook.remove(entered)
        hooks.launch_exit_hook.remove(left)


# ------------------------------------------------------------ the driver


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_the_driver_describes_the_machine(arch):
    machine = MACHINES[arch]
    with emulated(arch):
        active = driver.active
        assert active.get_active_torch_device() == torch.device("cpu")
        target = active.get_current_target()
        assert (target.backend, target.arch, target.warp_size) == ("cuda", machine.capability, 32)
        properties = active.utils.get_device_properties(active.get_active_torch_device().index)
        assert properties["multiprocessor_count"] == machine.multiprocessors
        assert properties["max_num_regs"] == 65536
        assert properties["max_shared_mem"] == machine.shared_per_block
        assert properties["warpSize"] == 32
        assert ldmperf.kernels.chip_of(torch.device("cpu")).arch == arch
        with pytest.raises(CaseError, match="tells no time"):
            triton.testing.do_bench(lambda: None)


def test_each_architecture_has_its_own_code():
    seen = []
    x = torch.ones(8)
    for arch in ("sm_90", "sm_80", "sm_90"):
        with emulated(arch, edit=lambda ptx: seen.append(re.search(r"\.target (\w+)", ptx)[1]) or ptx):
            exp_kernel[(1,)](x, torch.empty(8), BLOCK=8)
    assert seen == ["sm_90a", "sm_80", "sm_90a"]


def run_nested():
    """Raises KeyError out of an emulation, in which another ends by an error of its own."""
    x = torch.ones(8)
    with emulated("sm_90") as outer:
        exp_kernel[(1,)](x, torch.empty(8), BLOCK=8)
        with contextlib.suppress(ZeroDivisionError), emulated("sm_80") as inner:
            assert driver.active.get_current_target().arch == 80
            exp_kernel[(1,)](x, torch.empty(8), BLOCK=8)
            exp_kernel[(1,)](x, torch.empty(8), BLOCK=8)
            raise ZeroDivisionError
        assert driver.active.get_current_target().arch == 90
        assert (outer.launches, inner.launches) == (1, 2)
        raise KeyError


def test_contexts_nest_and_leave_what_was_there(monkeypatch):
    for before in (None, SimpleNamespace()):
        monkeypatch.setattr(driver, "_active", before)
        monkeypatch.setattr(driver, "_default", None)
        empty, devices = torch.empty, ldmperf.kernels._triton.DEVICES
        with pytest.raises(KeyError):
            run_nested()
        assert (driver._active, driver._default) == (before, None)
        assert (torch.empty, ldmperf.kernels._triton.DEVICES) == (empty, devices)
        assert ldmperf.kernels.chip_of(torch.device("cpu")).name == "no gpu"


def test_a_kernel_is_launched_only_where_a_gpu_is_emulated(monkeypatch):
    x, out = torch.ones(8), torch.empty(8)
    with emulated("sm_90"):
        kernel = exp_kernel.warmup(x, out, BLOCK=8, grid=(1,))
        kernel._init_handles()
        launch = kernel.run
    monkeypatch.setattr(driver, "_active", SimpleNamespace())
    with pytest.raises(CaseError, match="exp_kernel was compiled for an emulated GPU"):
        launch(1, 1, 1, 0, kernel.function, None, None, None, None, x, out, 8)


# ------------------------------------------------------------ what is refused


def test_architectures_and_the_interpreter(monkeypatch):
    for arch in ("sm_70", "gfx942", ""):
        with pytest.raises(CaseError, match="is not emulated; there are sm_80, sm_90"), emulated(arch):
            pass
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(CaseError, match="TRITON_INTERPRET=1 interprets kernels"), emulated("sm_90"):
        pass


def test_arguments_that_no_launch_takes(sm_90):
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(CaseError, match="out_ptr takes a CPU tensor; it is on meta"):
        where_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device="meta"))
    address = SimpleNamespace(dtype=torch.int32, data_ptr=lambda: 4096)
    with pytest.raises(CaseError, match="out_ptr takes a CPU tensor; it was passed namespace"):
        where_kernel[(1,)](address)
    for grid in ((1, 65536), (1, 1, 65536), (2**31,)):
        with pytest.raises(CaseError, match="larger than a GPU launches"):
            where_kernel[grid](out)
    assert sm_90.launches == 0


def test_what_is_not_emulated_is_named(sm_90):
    out = torch.zeros(16, 16)
    with pytest.raises(UnknownInstruction, match=r"calling_kernel calls \S*_doubled\S*, and functions are not"):
        calling_kernel[(1,)](out)
    with pytest.raises(UnknownInstruction, match="printing_kernel calls vprintf"):
        printing_kernel[(1,)](out)
    asserting_kernel[(1,)](out, 5)
    assert out[0, 0] == 5
    with pytest.raises(UnknownInstruction, match="asserting_kernel calls __assertfail"):
        asserting_kernel[(1,)](out, 5, debug=True)
    with pytest.raises(UnknownInstruction, match="exp_kernel: clusters of 2 programs"):
        exp_kernel[(1,)](out, out, BLOCK=8, num_ctas=2)
    descriptor = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor(torch.ones(16, 16), [16, 16])
    with pytest.raises(UnknownInstruction, match=r"descriptor is a tensor descriptor \(TMA\)"):
        described_kernel[(1,)](descriptor, out)
    with (
        emulated("sm_90", edit=lambda ptx: ptx.replace("ex2.approx", "sin.doubtful")),
        pytest.raises(UnknownInstruction, match=r"exp_kernel has what is not emulated: .*sin.doubtful"),
    ):
        exp_kernel[(1,)](out, out, BLOCK=8)


# ------------------------------------------------------------ findings


def test_inline_assembly_comes_from_the_line_before_it():
    """triton 3.8 writes lines into it, which are those of what comes after."""
    body = """
	.loc	1 8 9                           // kernel.py:8:9
	// begin inline asm
	mov.u32 %r1, 0x0;
	.loc	1 9 9                           // kernel.py:9:9
	mov.u32 %r2, 0x0;

	// end inline asm
	mov.u32 %r3, 0x0;
	.loc	1 10 9                          // kernel.py:10:9
	ret;"""
    told = [i.source for i in parse_ptx(ptx(body)).instructions]
    assert told == ["kernel.py:8:9"] * 3 + ["kernel.py:10:9"]


def copy_too_much(size=1000):
    """Copies 1024 elements of `size`."""
    x = torch.ones(size)
    copy_kernel[(8,)](x, torch.empty(size), 1024, BLOCK=128)


def test_findings_are_collected_or_raised_at_the_launch():
    with emulated("sm_90") as emulation:
        copy_too_much()
        assert emulation.findings.kinds == {"out of bounds"}
        (reading, writing) = emulation.findings
        assert (reading.count, writing.count) == (24, 24)
        assert reading.kernel == "copy_kernel"
        assert reading.source.startswith("test_emulated_driver.py:")
        with pytest.raises(FindingsError, match="read of 4 bytes by thread 104 of program 7"):
            emulation.raise_findings()
        emulation.raise_findings()
        assert emulation.raised == 2
    with emulated("sm_90", strict=True) as emulation, pytest.raises(FindingsError, match="out of bounds") as found:
        copy_too_much()
    assert str(found.value).count("\n") == 1


def test_expected_findings():
    with emulated("sm_90", strict=True) as emulation:
        with emulation.expecting("out of bounds") as found:
            copy_too_much()
        assert len(found) == 2
        with pytest.raises(FindingsError, match="race: expected, and not found"), emulation.expecting("race"):
            copy_too_much(1024)
        with pytest.raises(FindingsError, match=r"^out of bounds: copy_kernel"), emulation.expecting():
            copy_too_much()
        with pytest.raises(ValueError, match="no kind of finding: racing"), emulation.expecting("racing"):
            pass
        with pytest.raises(KeyError), emulation.expecting("race"):
            raise KeyError
        with pytest.raises(FindingsError):
            copy_too_much()


def test_results_that_were_never_written():
    with emulated("sm_90", strict=True) as emulation:
        out = torch.empty(100)
        copy_kernel[(1,)](torch.ones(100), out, 90, BLOCK=128)
        emulation.check_written(out[:90])
        with pytest.raises(FindingsError, match=r"unwritten result: copy_kernel .*10 times"):
            emulation.check_written(out)
        with emulation.expecting("uninitialised"):
            copy_kernel[(1,)](out, torch.empty(100), 100, BLOCK=128)
        out[90:] = 0
        copy_kernel[(1,)](out, torch.empty(100), 100, BLOCK=128)
        emulation.uninitialised(out)
        with emulation.expecting("uninitialised"):
            copy_kernel[(1,)](out, torch.empty(100), 100, BLOCK=128)


def test_programs_that_wait_for_a_lock():
    """Each holds it in turn; that a lock orders them is not understood."""
    with emulated("sm_90") as emulation, emulation.expecting("race of programs"):
        out, lock = torch.zeros(64), torch.zeros(1, dtype=torch.int32)
        locking_kernel[(6,)](out, lock, BLOCK=64)
    assert out.tolist() == [6.0] * 64
    assert lock.item() == 0


def test_programs_that_wait_for_the_next_one(sm_90):
    """By loads alone, not by an exchange as of a lock."""
    out = torch.zeros(4)
    chain_kernel[(4,)](out, torch.zeros(4, dtype=torch.int32), 4, num_warps=1)
    assert out.tolist() == [4, 3, 2, 1]
    assert not sm_90.findings


def test_numerics_are_those_asked_for():
    x = torch.linspace(-4, 4, 64)
    outs = []
    for perturb in (None, None, 1, 2):
        with emulated("sm_90", numerics=Numerics(perturb=perturb), strict=True):
            exp_kernel[(1,)](x, out := torch.empty(64), BLOCK=64)
        outs.append(out)
        assert ((out.double() - x.double().exp()) / x.double().exp()).abs().max() < 1e-6
    assert torch.equal(outs[0], outs[1])
    assert not any(torch.equal(outs[a], outs[b]) for a, b in ((0, 2), (0, 3), (2, 3)))


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_operators_of_ldmperf_take_cpu_tensors(arch):
    x = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    with emulated(arch, strict=True) as emulation:
        out = ldmperf.kernels.geglu(x, backend="triton")
    assert emulation.launches == 1
    value, gate = x.double().chunk(2, dim=-1)
    exact = value * torch.nn.functional.gelu(gate)
    assert (out - exact).norm() < 1e-6 * exact.norm()
    with pytest.raises(KernelUnsupported):
        ldmperf.kernels.geglu(x, backend="triton")
