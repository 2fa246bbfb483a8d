"""All that is told of one compiled launch: resources, occupancy, instruction mix and the prediction from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

from ldmperf.kernels import Launch

from ..machines import Machine
from .amd import AmdResources, amd_resources
from .compile import Compiled, Specialization, compile_launch
from .loop_order import ATTENTION, LoopOrder, loop_order
from .occupancy import Occupancy, occupancy
from .prediction import Prediction, Traffic, asked_bytes, predict
from .ptx import Access, global_accesses
from .ptxas import serializations
from .sass import (
    Instruction,
    Region,
    Resources,
    disassemble,
    hot_region,
    instructions_of,
    resource_usage,
    resources,
)
from .score_tile import ScoreTile, beside_its_bound, score_tile
from .units import Mix, mix


@dataclass(frozen=True)
class NvidiaCode:
    """What machine code of an NVIDIA architecture shows.

    accesses    global accesses of the PTX, by argument
    serialized  ptxas' codes C75xx: each asynchronous matmul waits for the one before
    order       of the hot loop; None without asynchronous matmuls in a loop
    """

    resources: Resources
    occupancy: Occupancy
    region: Region
    instructions: int
    mix: Mix
    accesses: tuple[Access, ...]
    prediction: Prediction
    serialized: tuple[str, ...]
    order: LoopOrder | None


@dataclass(frozen=True)
class Inspection:
    """A launch compiled for a machine; one of `nvidia` and `amd` is there. `tile`: of an attention kernel."""

    launch: Launch
    compiled: Compiled
    nvidia: NvidiaCode | None = None
    amd: AmdResources | None = None
    tile: ScoreTile | None = None

    @property
    def code(self) -> str:
        """The machine code: SASS, or an AMD chip's assembly."""
        asm = self.compiled.asm
        return asm["amdgcn"] if self.nvidia is None else disassemble(asm["cubin"])

    @property
    def faults(self) -> list[str]:
        """What no kernel may have: spills, local memory, a stack, serialized matmuls, more than the chip has."""
        machine, found = self.compiled.machine, []
        if self.compiled.shared > machine.shared_per_block:
            found.append(f"{self.compiled.shared} bytes of shared memory are more than {machine.shared_per_block}")
        counts: dict[str, int] = {}
        if self.nvidia is not None:
            code = self.nvidia.resources
            counts = {
                "spill loads": code.spill_loads,
                "spill stores": code.spill_stores,
                "bytes of stack": code.stack,
                "bytes of local memory": code.local,
            }
            if self.nvidia.occupancy.programs == 0:
                found.append(f"no program fits, for {self.nvidia.occupancy.limit}")
            found += [
                f"ptxas {remark}: wgmma serialized, each instruction waits for the one before"
                for remark in self.nvidia.serialized
            ]
        if self.amd is not None:
            counts = {
                "vector register spills": self.amd.vgpr_spills,
                # Without scratch they are kept in lanes of a vector register, not in memory.
                "scalar register spills": self.amd.sgpr_spills if self.amd.scratch else 0,
                "bytes of scratch": self.amd.scratch,
            }
            if self.amd.vgprs > machine.max_registers:
                found.append(f"{self.amd.vgprs} registers are more than {machine.max_registers}")
        return found + [f"{count} {what}" for what, count in counts.items() if count]

    @property
    def beside_its_bound(self) -> dict[str, Any] | None:
        """Of an attention kernel on a chip whose units are modelled: its tile, the bound, the distance from it."""
        if self.tile is None or self.nvidia is None:
            return None
        passes = 1 if self.nvidia.region.loop else self.tile.passes
        told = beside_its_bound(self.tile, self.compiled.machine, self.nvidia.prediction.cycles, passes)
        return told | {"overlap": self.overlap}

    @property
    def overlap(self) -> dict[str, int] | None:
        """Exponentials issued between attention's q k^T and its wait, and all; None without wgmma."""
        if self.tile is None or self.nvidia is None or self.nvidia.order is None:
            return None
        beside, total = self.nvidia.order.overlap
        return {"beside_scores": beside, "exponentials": total}

    @property
    def order(self) -> dict[str, Any] | None:
        """The hot loop's order as plain values, attention's matmuls by their names."""
        if self.nvidia is None or self.nvidia.order is None:
            return None
        return self.nvidia.order.named(ATTENTION if self.tile is not None else {})

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is predicted stands under `prediction`."""
        machine = self.compiled.machine
        told = launch_as_json(self.launch, self.compiled.specialization, machine)
        told |= {"shared_bytes": self.compiled.shared, "faults": self.faults}
        if self.amd is not None:
            return told | {"resources": dataclasses.asdict(self.amd)}
        if self.nvidia is None:
            return told
        code = self.nvidia
        if self.beside_its_bound is not None:
            told["attention"] = self.beside_its_bound
        return told | {
            "resources": dataclasses.asdict(code.resources),
            "occupancy": dataclasses.asdict(code.occupancy),
            "instructions": code.instructions,
            "region": {
                "loop": code.region.loop,
                "instructions": len(code.region),
                "mix": code.mix.by_class,
                "moves": code.mix.moves,
                "spills": sum(instruction.opcode in ("LDL", "STL") for instruction in code.region.instructions),
                "global_widths": code.mix.global_widths,
                "matrix": code.mix.matrix,
                "order": self.order,
            },
            "serialized": list(code.serialized),
            "global_accesses": [dataclasses.asdict(access) for access in code.accesses],
            "prediction": {
                "chip": machine.chip,
                "cycles": {unit: round(cycles, 2) for unit, cycles in code.prediction.cycles.items()},
                "per": code.prediction.per_pass,
                "memory_bytes": round(code.prediction.memory_bytes, 1),
                "bound": code.prediction.bound,
            },
        }


def launch_as_json(launch: Launch, specialization: Specialization, machine: Machine) -> dict[str, Any]:
    """What is compiled, as plain values."""
    return {
        "kernel": specialization.kernel,
        "specialization": specialization.key,
        "arch": machine.arch,
        "programs": launch.programs,
        "num_warps": specialization.num_warps,
        "constants": {name: str(value) for name, value in specialization.constants},
        "tensor_bytes": {name: value.numel() * value.element_size() for name, value in launch.tensors.items()},
    }


def inspect_launch(launch: Launch, machine: Machine) -> Inspection:
    """Compile a launch and read its code. Raises what the compiler raises."""
    return inspect_launches([(launch, machine)])[0]


def inspect_launches(launches: Sequence[tuple[Launch, Machine]]) -> list[Inspection]:
    """The same of several: the code of all of them is disassembled at once, which is quicker.

    What Triton's cache has of them is compiled anew where it cannot be read, as after a crash or on a full disk.
    """
    try:
        return _read([(launch, compile_launch(launch, machine)) for launch, machine in launches])
    except (LookupError, SubprocessError, ValueError):
        return _read([(launch, compile_launch(launch, machine, anew=True)) for launch, machine in launches])


def _read(compiled: Sequence[tuple[Launch, Compiled]]) -> list[Inspection]:
    of_target: dict[str, list[int]] = {}
    for i, (_, code) in enumerate(compiled):
        if code.machine.backend == "cuda":
            of_target.setdefault(_ptx_target(code.asm["ptx"]), []).append(i)
    instructions: dict[int, list[Instruction]] = {}
    for target, places in of_target.items():
        cubins = [compiled[i][1].asm["cubin"] for i in places]
        instructions |= zip(places, instructions_of(cubins, target), strict=True)
    return [_inspected(launch, code, instructions.get(i)) for i, (launch, code) in enumerate(compiled)]


def _ptx_target(ptx: str) -> str:
    found = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if found is None:
        raise ValueError("the PTX names no target")
    return found[1]


def _inspected(launch: Launch, compiled: Compiled, instructions: list[Instruction] | None) -> Inspection:
    machine = compiled.machine
    if instructions is None:
        return Inspection(launch, compiled, amd=amd_resources(compiled.asm["amdgcn"]), tile=score_tile(launch))
    used = resources(resource_usage(compiled.asm["cubin"]), instructions)
    region = hot_region(instructions)
    warps = launch.num_warps
    tile = score_tile(launch)
    constants = {name for name, _ in compiled.specialization.constants}
    parameters = [(name, kind) for name, kind in compiled.specialization.signature if name not in constants]
    code = NvidiaCode(
        used,
        occupancy(machine, registers=used.registers, shared=compiled.shared, num_warps=warps),
        region,
        sum(instruction.opcode != "NOP" for instruction in instructions),
        mix(region.instructions),
        tuple(global_accesses(compiled.asm["ptx"], parameters)),
        predict(machine, region.instructions, warps, _traffic(launch, machine, region, tile)),
        serializations(compiled),
        loop_order(region),
    )
    return Inspection(launch, compiled, nvidia=code, tile=tile)


def _traffic(launch: Launch, machine: Machine, region: Region, tile: ScoreTile | None) -> Traffic | None:
    """What the region moves; None for a loop whose instructions tell it."""
    per = "a pass of the loop by one program" if region.loop else "one program"
    if tile is not None:
        passes = 1 if region.loop else tile.passes
        return Traffic(tile.memory_bytes * passes, tile.l2_bytes * passes, per)
    if launch.operator == "linear":
        # The programs of a matmul read the same rows and weights: once from memory, every time through L2.
        asked = launch.num_warps * machine.warp_size * asked_bytes(region.instructions)
        passes = matmul_passes(launch) if region.loop else 1
        return Traffic(launch.nbytes / max(launch.programs * passes, 1), float(asked), per)
    return None if region.loop else Traffic(launch.nbytes / max(launch.programs, 1), None, per)


def matmul_passes(launch: Launch) -> int:
    """Passes of a program's loop in a matmul: over tiles of columns, or of channels."""
    arguments = launch.arguments
    passes: int = arguments.get("tiles_n") or -(-arguments["channels"] // arguments["BLOCK_K"])
    return passes
