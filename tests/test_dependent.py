"""Dependent launches: where they are asked for, what is planned then, and what the machine code does first."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmperf.kernels import (
    OPERATORS,
    Chip,
    Launch,
    _dependent,
    _recipes,
    _triton,
    dependent_launch_reasons,
    dependent_launches,
    dependent_launches_enabled,
    planned_for,
)
from ldmperf.kernels._dependent import launches_dependently

pytest.importorskip("triton")

import triton

from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import Compiled, compile_launch
from ldmperf.profiling.static.ptxas import serializations
from ldmperf.profiling.static.sass import disassemble, parse, resources
from ldmperf.profiling.static.shapes import SHAPES, Shape
from ldmperf.profiling.step.calls import family_calls

HOPPER = Chip("NVIDIA H200", 132, "sm_90")
SM_90 = MACHINES["sm_90"]


# ---------------------------------------------------------------- where


def test_off_unless_asked_and_what_is_innermost_holds() -> None:
    assert not dependent_launches_enabled()
    with dependent_launches():
        assert dependent_launches_enabled()
        with dependent_launches(False):
            assert not dependent_launches_enabled()
        assert dependent_launches_enabled()
        with pytest.raises(KeyError), dependent_launches(False):
            raise KeyError
        assert dependent_launches_enabled()
    assert not dependent_launches_enabled()


def test_another_thread_is_outside() -> None:
    seen: list[bool] = []
    with dependent_launches():
        thread = threading.Thread(target=lambda: seen.append(dependent_launches_enabled()))
        thread.start()
        thread.join()
    assert seen == [False]


@pytest.mark.parametrize("arch", ["sm_90", "sm_90a", "sm_100", "sm_103a", "sm_120"])
def test_chips_that_have_them(arch: str) -> None:
    assert dependent_launch_reasons(Chip("a chip", 1, arch)) == []


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "gfx942", "gfx90a"])
def test_chips_that_do_not(arch: str) -> None:
    (reason,) = dependent_launch_reasons(Chip("a chip", 1, arch))
    assert reason == f"a chip is {arch}: dependent launches need NVIDIA's sm_90 or newer"
    with dependent_launches():
        assert not launches_dependently(Chip("a chip", 1, arch))


def test_a_triton_that_has_no_such_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "gdc_wait", None)
    monkeypatch.setattr(_dependent, "dependent_launch_misfit", _triton.dependent_launch_misfit.__wrapped__)
    (reason,) = dependent_launch_reasons(HOPPER)
    assert reason == f"triton {triton.__version__} has no launch_pdl: pip install -U triton"
    monkeypatch.setattr(_triton, "triton", None)
    assert dependent_launch_reasons(HOPPER) == ["triton is not installed: pip install triton"]


def test_the_interpreter_runs_one_launch_after_another() -> None:
    code = """
import torch
from ldmperf.kernels import Chip, dependent_launch_reasons, dependent_launches, geglu
(reason,) = dependent_launch_reasons(Chip("a chip", 1, "sm_90"))
assert reason == "triton's interpreter runs one launch after another: unset TRITON_INTERPRET", reason
x = torch.randn(3, 128)
with dependent_launches():
    found = geglu(x, backend="triton")
torch.testing.assert_close(found, geglu(x, backend="torch"))
"""
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path), "HOME": str(Path.home())}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------- what is planned


def calls() -> Iterator[Any]:
    """(operator, call) of every kernel: the defaults of `ldmperf inspect`, and the smallest and a large size."""
    for operator in OPERATORS.values():
        build, _, defaults = SHAPES[operator.name]
        yield operator, operator.bind(**build(Shape(**defaults)))
    for size in ("39M", "866M"):
        for call in family_calls(size, 2, "bfloat16"):
            yield OPERATORS[call.operator], call.bound("meta")


def launches(*, dependent: bool) -> list[Launch]:
    """Those of `calls` on Hopper; of a kernel the first of each size."""
    found: dict[Any, Launch] = {}
    with planned_for(HOPPER), dependent_launches(dependent):
        for operator, call in calls():
            for launch in operator.plan(call)[1]:
                tile = tuple(launch.arguments.get(name) for name in ("HEAD_DIM", "CHANNELS", "BLOCK_K", "GATED"))
                found.setdefault((launch.name, tile), launch)
    return list(found.values())


def test_all_launches_of_a_plan_are_dependent_or_none() -> None:
    on, off = launches(dependent=True), launches(dependent=False)
    kernels = {launch.name for launch in on}
    assert len(kernels) >= 10
    assert kernels == {launch.name for launch in off}
    for launch in on:
        assert launch.pdl
        assert launch.arguments["PDL"] is True
        assert launch.options["launch_pdl"] == 1
    for launch in off:
        assert not launch.pdl
        assert launch.arguments["PDL"] is False
        # AMD's backend, and old releases, do not know the option.
        assert set(launch.options) == {"num_warps", "num_stages"}
    with planned_for(Chip("NVIDIA A100", 108, "sm_80")), dependent_launches():
        assert not any(launch.pdl for operator, call in calls() for launch in operator.plan(call)[1])


def test_a_plan_made_inside_is_not_used_outside() -> None:
    made: list[bool] = []

    @_recipes.ByLayout
    def planned(x: torch.Tensor) -> bool:
        made.append(dependent_launches_enabled())
        return made[-1]

    x = torch.empty(4)
    for _ in range(2):
        assert not planned(x)
        with dependent_launches():
            assert planned(x)
    assert made == [False, True]


def test_a_kept_launch_has_the_option() -> None:
    x = torch.empty(4, 128, device="meta")
    geglu = OPERATORS["geglu"]
    with planned_for(HOPPER):
        for dependent in (False, True):
            with dependent_launches(dependent):
                planned = geglu.plan(geglu.bind(x))
            (bound,) = _recipes.recipe([x], *planned).launches
            assert bound.options.get("launch_pdl", False) == dependent


# ---------------------------------------------------------------- the code

# Instructions that access global memory. A prefetch (CCTL) brings nothing into a register.
_MEMORY = re.compile(r"LD|LDG\w*|LDGSTS\w*|ST|STG\w*|ATOM\w*|RED\w*|UTMA\w*|UBLK\w*|SUATOM\w*")
_CONTROL = ("BRA", "BRX", "JMP", "CALL", "RET", "EXIT")
_PTX_ACCESS = re.compile(r"\b(ld|st|atom|red|cp)\.\S*(global|async|bulk)")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Launch, Compiled, str]]:
    """The dependent launches, with their PTX and the text of their machine code; in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton-cache")))
        codes = [(launch, compile_launch(launch, SM_90)) for launch in launches(dependent=True)]
        return [(launch, code, disassemble(code.asm["cubin"])) for launch, code in codes]


def early(lines: list[str]) -> list[str]:
    """The global accesses of PTX before its wait, which comes once and before any branch."""
    (place,) = [number for number, line in enumerate(lines) if "griddepcontrol.wait" in line]
    body = next(number for number, line in enumerate(lines) if line.startswith("{"))
    before = [line.partition("//")[0] for line in lines[body:place]]
    assert not any(re.search(r"\b(bra|ret|exit)\b", line) for line in before)
    return [line for line in before if _PTX_ACCESS.search(line)]


def test_no_kernel_accesses_memory_before_it_waits(compiled: list[tuple[Launch, Compiled, str]]) -> None:
    for launch, code, text in compiled:
        assert early(code.asm["ptx"].splitlines()) == [], launch
        assert code.asm["ptx"].count("griddepcontrol.launch_dependents") == 1
        opcodes = [instruction.opcode for instruction in parse(text)]
        (wait,) = [number for number, opcode in enumerate(opcodes) if opcode == "ACQBULK"]
        assert opcodes.index("PREEXIT") < wait
        assert opcodes.count("PREEXIT") == 1
        before = opcodes[:wait]
        assert not [opcode for opcode in before if _MEMORY.fullmatch(opcode)], launch
        assert not [opcode for opcode in before if opcode.startswith(_CONTROL)], launch
        assert any(_MEMORY.fullmatch(opcode) for opcode in opcodes[wait:])


def test_it_costs_no_spills_and_serializes_no_matmuls(compiled: list[tuple[Launch, Compiled, str]]) -> None:
    for launch, code, text in compiled:
        used = resources(text, parse(text))
        assert (used.stack, used.local, used.spill_loads, used.spill_stores) == (0, 0, 0, 0), launch
        if launch.flops:
            assert serializations(code) == (), launch


def test_transformers_ask_for_their_weights_before_the_wait(compiled: list[tuple[Launch, Compiled, str]]) -> None:
    asked = set()
    for launch, code, _ in compiled:
        ptx = code.asm["ptx"]
        if "prefetch.global.L2" in ptx:
            assert ptx.rindex("prefetch.global.L2") < ptx.index("griddepcontrol.wait")
            asked.add(launch.name)
    assert asked == {"transformer_front_kernel", "transformer_tail_kernel"}


def test_other_launches_have_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    operator = OPERATORS["layer_norm"]
    build, _, defaults = SHAPES["layer_norm"]
    with planned_for(HOPPER):
        (launch,) = operator.plan(operator.bind(**build(Shape(**defaults))))[1]
    ptx = compile_launch(launch, SM_90).asm["ptx"]
    assert "griddepcontrol" not in ptx
    assert "prefetch" not in ptx
