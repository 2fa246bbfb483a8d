"""GPUs: the limits and rates of the chips that kernels are compiled for, and the least time of attention there.

The bound of attention is the longer time of two units that work side by side, for one head's Nq queries, Nk keys:
    matrix unit       2 Nq Nk D multiply-adds, D padded to what a matrix instruction takes
    exponential unit  Nq Nk exponentials, less those that a kernel evaluates as a polynomial on the FMA units
Partly filled tiles, masks and memory are not in the bound: nothing is faster.

Sources. Limits: CUDA C++ programming guide, "Technical Specifications per Compute Capability", and the CUDA
occupancy calculator (allocation granularity); AMD Instinct MI300 ISA guide for gfx942.
Lanes: the guide's table "Throughput of Native Arithmetic Instructions" (results per clock and multiprocessor).
The table does not split every pipe: where it lacks an opcode, the unit below says what is assumed.
Memory and clock: data sheets of the chip named, its peak bandwidth and boost clock; no measurement.
L2: the A100's whitepaper gives 5120 bytes read a clock. None is published for the H200; the same is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["matrix", "exponential"]


@dataclass(frozen=True)
class Machine:
    """A compile target. `lanes`: results per clock and multiprocessor of each unit; empty where not modelled."""

    arch: str
    backend: str
    capability: int | str
    shared_per_block: int
    shared_per_multiprocessor: int
    warp_size: int = 32
    max_registers: int = 255
    chip: str = ""
    multiprocessors: int = 0
    clock_ghz: float = 0.0
    memory_tb_per_s: float = 0.0
    l2_bytes_per_clock: float = 0.0
    max_warps: int = 64
    max_blocks: int = 32
    registers_per_multiprocessor: int = 65536
    lanes: Mapping[str, float] = field(default_factory=dict)

    @property
    def memory_bytes_per_cycle(self) -> float:
        """A multiprocessor's share of the memory bandwidth at the boost clock."""
        return self.memory_tb_per_s * 1e3 / (self.clock_ghz * self.multiprocessors)

    @property
    def l2_bytes_per_cycle(self) -> float:
        """A multiprocessor's share of what L2 hands out a clock."""
        return self.l2_bytes_per_clock / self.multiprocessors


# Lanes by unit, in the names that docs/attention.md has too.
# issue          four schedulers, one warp instruction a clock each.
# FMA            32-bit add, multiply, multiply-add; HFMA2 as one lane (two results).
# integer FMA    32-bit multiply-add (IMAD, also as a move), on one half of the FMA pipe where that has two.
# ALU            integer add, logic, shift, compare, select, minimum; table: 64 for each of these.
# exponential    MUFU: exponential, reciprocal, square root; conversions that are not packed (I2F, F2I, F2F) are
#                assumed to share its 16 lanes.
# conversion     F2FP, packing two floats to half precision: "all other type conversions".
# load/store     load and store instructions and shuffles: 32 lanes address a clock.
# shared memory  bytes between registers and L1 or shared memory, a clock; assumed to be shared by the operands
#                that a warp group's matmul reads from shared memory.
# matrix         multiply-adds of 16-bit tensor-core instructions (dense peak over chips and clock); of TF32, half.
#                Every shape at the full rate: HGMMA of few columns and, on sm_90, HMMA may reach less of it.
_COMMON = {
    "issue": 128.0,
    "ALU": 64.0,
    "exponential": 16.0,
    "conversion": 64.0,
    "load/store": 32.0,
    "shared memory": 128.0,
}
_SM_80 = _COMMON | {"FMA": 64.0, "integer FMA": 64.0, "matrix": 1024.0}
_SM_90 = _COMMON | {"FMA": 128.0, "integer FMA": 64.0, "matrix": 2048.0}

MACHINES: Mapping[str, Machine] = {
    machine.arch: machine
    for machine in (
        Machine(
            "sm_80",
            "cuda",
            80,
            shared_per_block=163 * 1024,
            shared_per_multiprocessor=164 * 1024,
            chip="A100 SXM 80 GB",
            multiprocessors=108,
            clock_ghz=1.41,
            memory_tb_per_s=2.039,
            l2_bytes_per_clock=5120.0,
            lanes=_SM_80,
        ),
        Machine(
            "sm_90",
            "cuda",
            90,
            shared_per_block=227 * 1024,
            shared_per_multiprocessor=228 * 1024,
            chip="H200 SXM",
            multiprocessors=132,
            clock_ghz=1.98,
            memory_tb_per_s=4.8,
            l2_bytes_per_clock=5120.0,
            lanes=_SM_90,
        ),
        # Registers: 512 vector registers (256 of them accumulation registers) of a wavefront; no occupancy and no
        # pipes are modelled.
        Machine(
            "gfx942",
            "hip",
            "gfx942",
            shared_per_block=64 * 1024,
            shared_per_multiprocessor=64 * 1024,
            warp_size=64,
            max_registers=512,
            chip="MI300X",
            multiprocessors=304,
        ),
    )
}

SM_90 = MACHINES["sm_90"]

# What an H200 reaches in practice: 85% of its sheet's bandwidth, 75% of its sheet's 16-bit FLOP, 16 exponentials a
# clock and multiprocessor at the clock of those FLOP (1.83 GHz). All else here is of sheets.
BYTES_PER_S = 4.07e12
FLOP_PER_S = 742e12
EXPONENTIALS_PER_S = 3.87e12

# Multiply-adds of a 16-bit matrix instruction come in steps of so many along the dimension that is summed over.
_MATRIX_STEP = 16
# A configuration says how many of every so many exponentials are a polynomial.
POLYNOMIAL_OF = 8


def padded_head_dim(head_dim: int) -> int:
    """The head dimension that the matrix unit computes: the next multiple of 16."""
    return -(-head_dim // _MATRIX_STEP) * _MATRIX_STEP


def matrix_cycles(queries: int, keys: int, padded: int, machine: Machine = SM_90) -> float:
    """Cycles of one multiprocessor's matrix unit for both matmuls of one head (or tile) in a 16-bit dtype."""
    return 2 * queries * keys * padded / machine.lanes["matrix"]


def exponential_cycles(queries: int, keys: int, polynomial: int = 0, machine: Machine = SM_90) -> float:
    """Cycles of one multiprocessor's exponential unit for one head (or tile).

    `polynomial` of every 8 exponentials are not its work. Raises ValueError unless 0 <= polynomial <= 8.
    """
    return queries * keys * _on_the_unit(polynomial) / machine.lanes["exponential"]


def bound_cycles(
    queries: int, keys: int, head_dim: int, polynomial: int = 0, machine: Machine = SM_90
) -> tuple[float, Unit]:
    """The longer of the two times of one head (or tile) on one multiprocessor, and whose it is."""
    matrix = matrix_cycles(queries, keys, padded_head_dim(head_dim), machine)
    exponential = exponential_cycles(queries, keys, polynomial, machine)
    return (matrix, "matrix") if matrix >= exponential else (exponential, "exponential")


@dataclass(frozen=True)
class Rates:
    """What a chip does a second: `matrix_tflops` as a large matmul measured it, in 1e12 FLOP.

    The exponential unit's rate is by design: 16 a clock and multiprocessor, at the clock given.
    """

    matrix_tflops: float
    multiprocessors: int
    clock_ghz: float

    @property
    def exponentials_per_ms(self) -> float:
        return SM_90.lanes["exponential"] * self.multiprocessors * self.clock_ghz * 1e6


@dataclass(frozen=True)
class Bound:
    """The two times in ms; `ms` is the longer, that of `unit`."""

    matrix_ms: float
    exponential_ms: float

    @property
    def ms(self) -> float:
        return max(self.matrix_ms, self.exponential_ms)

    @property
    def unit(self) -> Unit:
        return "matrix" if self.matrix_ms >= self.exponential_ms else "exponential"


def attention_bound(
    heads: int, queries: int, keys: int, head_dim: int, rates: Rates, polynomial: int = 0
) -> Bound:
    """The bound of a whole call; `heads` are those of all images together."""
    scores = heads * queries * keys
    return Bound(
        matrix_ms=4 * scores * padded_head_dim(head_dim) / (rates.matrix_tflops * 1e9),
        exponential_ms=scores * _on_the_unit(polynomial) / rates.exponentials_per_ms,
    )


def _on_the_unit(polynomial: int) -> float:
    """The share of the exponentials that the exponential unit evaluates."""
    if not 0 <= polynomial <= POLYNOMIAL_OF:
        raise ValueError(f"polynomial must be 0 to {POLYNOMIAL_OF} of every {POLYNOMIAL_OF}; got {polynomial}")
    return (POLYNOMIAL_OF - polynomial) / POLYNOMIAL_OF
