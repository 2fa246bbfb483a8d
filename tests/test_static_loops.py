"""The order of a loop with asynchronous products, ptxas' remarks on it, and the arithmetic of compiled code."""

from __future__ import annotations

import io
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

pytest.importorskip("triton")

from ldmperf.kernels.attention import MAX_SCALE
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import compile_launch
from ldmperf.profiling.static.display import print_inspection
from ldmperf.profiling.static.inspection import inspect_launch
from ldmperf.profiling.static.loop_order import Beside, loop_order, order_text
from ldmperf.profiling.static.planned import planned
from ldmperf.profiling.static.ptxas import serializations
from ldmperf.profiling.static.sass import Region, parse
from ldmperf.profiling.static.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[1]
SCORES, SCORES_LAST = "HGMMA.64x64x16 R24, gdesc[UR12], R24", "HGMMA.64x64x16 R24, gdesc[UR12], R24, gsb0"
VALUES_LAST = "HGMMA.64x64x16 R56, R80, gdesc[UR8].tnspB, R56, gsb0"
WAIT, WAIT_1, EXP = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MUFU.EX2 R4, R5"


def order_of(*lines, loop=True):
    text = "\n".join(f"        /*{16 * i:04x}*/        {line} ;" for i, line in enumerate(lines))
    return loop_order(Region(tuple(parse(text)), loop))


def test_a_loop_that_waits_right_away_overlaps_nothing():
    order = order_of(SCORES, SCORES_LAST, WAIT, EXP, EXP, "FADD R1, R1, R1", VALUES_LAST, "BAR.SYNC 0x0")
    assert order.steps == (
        ("product", 2),
        ("wait", 1),
        ("exponential", 2),
        ("product from registers", 1),
        ("barrier", 1),
    )
    assert order.overlap == (0, 2)
    # The values' product is under way during the barrier, and, once around, the wait itself.
    assert order.beside["product from registers"].exponentials == 0
    assert order.instructions == 5
    assert order_text(order.steps).startswith("product x2, wait, exponential x2, ")


def test_what_stands_before_the_wait_overlaps():
    order = order_of(SCORES, EXP, SCORES_LAST, EXP, EXP, WAIT, EXP, VALUES_LAST)
    assert order.overlap == (3, 4)
    assert order.beside["product"] == Beside(3, 3)
    # Issued at the end of a pass, waited for in the next.
    assert order.beside["product from registers"] == Beside(3, 3)


def test_a_wait_may_leave_the_younger_products_under_way():
    """Scores are issued, then values; a wait for all but one waits for the scores alone."""
    order = order_of(SCORES_LAST, VALUES_LAST, EXP, WAIT_1, EXP, EXP, WAIT, EXP)
    assert order.overlap == (1, 4)
    assert order.beside["product from registers"].exponentials == 3
    assert order.steps[3] == ("wait for all but 1", 1)


def test_a_serialized_loop_waits_after_every_instruction():
    order = order_of(SCORES_LAST, WAIT, SCORES_LAST, EXP, WAIT, EXP, VALUES_LAST, WAIT)
    assert order.overlap == (1, 2)
    assert [name for name, _ in order.steps].count("wait") == 3


def test_only_loops_with_asynchronous_products_have_an_order():
    assert order_of(SCORES_LAST, WAIT, loop=False) is None
    assert order_of("HMMA.16816.F32.BF16 R4, R80, R26, R4", EXP) is None
    # Other special functions are no exponentials.
    assert order_of(SCORES_LAST, "MUFU.RCP R4, R5", WAIT).exponentials == 0


def launch_of(arch="sm_90", config=None, tf32=False, **numbers):
    machine = MACHINES[arch]
    call = SHAPES["attention"][0](Shape(**numbers))
    (launch,) = planned("attention", call | {"tf32": tf32}, machine, config)
    return launch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "loops-cache"))


def test_ptxas_tells_of_a_serialized_loop_and_inspect_tells_it_on():
    """The copy through PTX is what the loop needs; without it ptxas serializes, which triton hides."""
    machine = MACHINES["sm_90"]
    launch = launch_of(head_dim=160)
    assert launch.arguments["PTX_COPY"]
    assert inspect_launch(launch, machine).faults == []
    inspection = inspect_launch(replace(launch, arguments=launch.arguments | {"PTX_COPY": False}), machine)
    assert inspection.nvidia.serialized == ("C7514",)
    told = inspection.as_json()
    assert told["serialized"] == ["C7514"]
    assert any("C7514" in fault for fault in told["faults"])
    assert told["attention"]["overlap"]["exponentials"] > 0
    # As many waits as matrix instructions of a warp group.
    counts = {
        name: sum(count for step, count in told["region"]["order"]["steps"] if step == name)
        for name in ("q k^T", "p v", "wait")
    }
    assert counts["wait"] == counts["q k^T"] + counts["p v"]
    printed = io.StringIO()
    print_inspection(inspection, Console(file=printed, width=250))
    assert "FAULT         ptxas C7514: wgmma serialized" in printed.getvalue()
    assert "order         " in printed.getvalue()
    assert "exponentials, " in printed.getvalue()


def test_ptxas_is_asked_only_of_wgmma(monkeypatch):
    monkeypatch.setattr("ldmperf.profiling.static.ptxas._log", lambda compiled: pytest.fail("it ran"))
    assert serializations(compile_launch(launch_of("sm_80", head_dim=8), MACHINES["sm_80"])) == ()


def exponents(ptx):
    """By what instruction the argument of each exponential is made."""
    made = {}
    for line in ptx.splitlines():
        found = re.match(r"\s*(?:@%p\d+ )?([a-z0-9_.]+)\s+(%\w+),", line)
        if found:
            made[found[2]] = found[1]
    return [made[argument] for argument in re.findall(r"ex2\.approx\S*\s+%\w+,\s*(%\w+);", ptx)]


def test_compiled_exponents_are_one_multiply_add_with_its_rounding():
    """Which the interpreter does not have: see the next test for what follows."""
    for arch in ("sm_80", "sm_90"):
        found = exponents(compile_launch(launch_of(arch, head_dim=8), MACHINES[arch]).asm["ptx"])
        # Of each tile the scores' by multiply-adds, the maxima's by subtractions.
        assert set(found) == {"fma.rn.f32", "sub.f32"}
        assert found.count("fma.rn.f32") > 8 * found.count("sub.f32")


def fused_weights(s, scale, dtype):
    """softmax(scale s) [keys] float32 scores as compiled code computes it: m rounded, s * scale - m not."""
    scale_log2 = torch.tensor(scale * 1.4426950408889634, dtype=torch.float32)
    m = s.max() * scale_log2
    # Exact in float64 but for the last rounding: 24 + 24 bits.
    p = torch.exp2((s.double() * scale_log2.double() - m.double()).float()).to(dtype).float()
    return p / p.sum()


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.floats(0, 8).map(lambda exponent: 10**exponent),
)
def test_logits_up_to_1e8_keep_the_softmax_exact(seed, dtype, largest):
    """A rounded maximum is a common factor of the row, 2^-8 to 2^8 at 1e8: inside float16's range."""
    s = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    scale = largest / float(s.abs().max())
    exact = torch.softmax(s.double() * scale, 0)
    # In float32 a scale of its own is rounded too: by the half of a unit in the last place of the largest logit.
    found = fused_weights(s, scale, dtype).double()
    eps = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}[dtype]
    tolerance = eps + 3 * largest * 2.0**-24
    assert found.isfinite().all()
    assert (found - exact).abs().max() <= min(tolerance, 1.0)
    if largest > 1e7:
        # One key has all the weight, unless two are a rounding apart.
        gap = s.sort().values[-2:].diff().item() * scale
        assert gap < 30 or found[s.argmax()] == 1.0


def test_far_larger_logits_become_nan():
    """Why the claim ends at 1e8, and why larger scales are refused."""
    s = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))

    def nan_rows(largest, dtype):
        rows = (fused_weights(row, largest / float(s.abs().max()), dtype).isnan().any() for row in s)
        return sum(bool(row) for row in rows)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert nan_rows(1e8, dtype) == 0
        assert nan_rows(1e12, dtype) > 30
    assert nan_rows(2e9, torch.float16) > 0
    assert nan_rows(1e9, torch.bfloat16) == 0
    assert 1e8 / MAX_SCALE > 1000


TF32_BITS = 10


def truncated(x):
    """float32 with the 13 low bits of the mantissa cleared, as a tensor core reads an operand in TF32."""
    return (x.view(torch.int32) & ~(2 ** (23 - TF32_BITS) - 1)).view(torch.float32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("context", [0, 77])
def test_tf32_truncates_its_operands(arch, context):
    """No instruction rounds to TF32 (cvt.rna.tf32.f32) in front of the products, which drop the low 13 bits."""
    launch = launch_of(arch, tf32=True, dtype=torch.float32, head_dim=8, context=context)
    ptx = compile_launch(launch, MACHINES[arch]).asm["ptx"]
    assert re.search(r"(mma\.sync|wgmma\.mma_async)\S*\.tf32\.tf32", ptx)
    assert not re.search(r"cvt\S*\.tf32", ptx)


@pytest.mark.parametrize("dim", [8, 40, 160])
def test_the_error_of_truncated_operands(dim):
    """Up to 2^-10 of each operand, toward zero: relative RMS errors as docs/attention.md tells them."""
    q, k, v = torch.randn(3, 4, 256, dim, generator=torch.Generator().manual_seed(dim))

    def attend(q, k, v, p_of):
        s = q.double() @ k.double().mT * dim**-0.5
        p = torch.exp2((s - s.amax(-1, keepdim=True)) * 1.4426950408889634).float()
        return p_of(p).double() @ v.double() / p.double().sum(-1, keepdim=True)

    exact = attend(q, k, v, lambda p: p)
    found = attend(truncated(q), truncated(k), truncated(v), truncated)
    error = float((found - exact).norm() / exact.norm())
    assert 1e-3 < error < 2e-3


def test_steps_are_condensed_between_waits():
    condensed = runpy.run_path(str(ROOT / "bench" / "attention_static.py"))["condensed"]
    ahead = [
        ["barrier", 1],
        ["q k^T", 2],
        ["exponential", 9],
        ["q k^T", 6],
        ["wait", 1],
        ["p v", 8],
        ["barrier", 1],
    ]
    assert condensed(ahead) == "q k^T x8 with exponential x9, wait, p v x8"
    plain = [
        ["q k^T", 4],
        ["wait", 1],
        ["q k^T", 1],
        ["wait", 1],
        ["exponential", 6],
        ["mma.sync", 1],
        ["exponential", 2],
        ["p v", 3],
    ]
    assert condensed(plain) == "q k^T x4, wait, q k^T, wait, exponential x8 with mma.sync, p v x3"
