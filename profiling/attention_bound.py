"""The least time of attention, from two units alone: the products on the matrix unit and the exponentials.

For one head of Nq queries and Nk keys: 2 Nq Nk D multiply-adds, D padded to what a matrix instruction takes, and
Nq Nk exponentials. The two units work beside each other, so the bound is the longer of the two times; a kernel
that evaluates some exponentials as a polynomial on the FMA units leaves that many fewer to the exponential unit.
Rows that fill a tile, masks, memory and everything else that a kernel does are not in it: nothing is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .static.machines import MACHINES, Machine

SM_90 = MACHINES["sm_90"]
# Multiply-adds of a 16-bit matrix instruction come in steps of so many along the dimension that is summed over.
_MATRIX_STEP = 16
# A configuration says how many of every so many exponentials are a polynomial.
POLYNOMIAL_OF = 8


def padded_head_dim(head_dim: int) -> int:
    """The head dimension that the matrix unit computes: the next multiple of 16."""
    return -(-head_dim // _MATRIX_STEP) * _MATRIX_STEP


def flops(heads: int, queries: int, keys: int, head_dim: int) -> int:
    """Of both products, without padding: 4 Nq Nk D a head, `heads` those of all images; a multiply-add is two."""
    return 4 * heads * queries * keys * head_dim


def matrix_cycles(queries: int, keys: int, padded: int, machine: Machine = SM_90) -> float:
    """Cycles of one multiprocessor's matrix unit for both products of one head (or tile) in a 16-bit dtype."""
    return 2 * queries * keys * padded / machine.lanes["matrix"]


def exponential_cycles(queries: int, keys: int, polynomial: int = 0, machine: Machine = SM_90) -> float:
    """Cycles of one multiprocessor's exponential unit for one head (or tile).

    `polynomial` of every 8 exponentials are not its work. Raises ValueError unless 0 <= polynomial <= 8.
    """
    return queries * keys * _on_the_unit(polynomial) / machine.lanes["exponential"]


def bound_cycles(
    queries: int, keys: int, head_dim: int, polynomial: int = 0, machine: Machine = SM_90
) -> tuple[float, Literal["matrix", "exponential"]]:
    """The longer of the two times of one head (or tile) on one multiprocessor, and whose it is."""
    matrix = matrix_cycles(queries, keys, padded_head_dim(head_dim), machine)
    exponential = exponential_cycles(queries, keys, polynomial, machine)
    return (matrix, "matrix") if matrix >= exponential else (exponential, "exponential")


@dataclass(frozen=True)
class Rates:
    """What a chip does a second: `matrix_tflops` as a large matrix product measured it, in 1e12 FLOP.

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
    """The two times in ms; `ms` is the longer."""

    matrix_ms: float
    exponential_ms: float

    @property
    def ms(self) -> float:
        return max(self.matrix_ms, self.exponential_ms)

    @property
    def unit(self) -> Literal["matrix", "exponential"]:
        return "matrix" if self.matrix_ms >= self.exponential_ms else "exponential"


def attention_bound(
    heads: int, queries: int, keys: int, head_dim: int, rates: Rates, polynomial: int = 0
) -> Bound:
    """The bound of a whole call; `heads` are those of all images together."""
    return Bound(
        matrix_ms=flops(heads, queries, keys, padded_head_dim(head_dim)) / (rates.matrix_tflops * 1e9),
        exponential_ms=heads * queries * keys * _on_the_unit(polynomial) / rates.exponentials_per_ms,
    )


def _on_the_unit(polynomial: int) -> float:
    """The share of the exponentials that the exponential unit evaluates."""
    if not 0 <= polynomial <= POLYNOMIAL_OF:
        raise ValueError(f"polynomial must be 0 to {POLYNOMIAL_OF} of every {POLYNOMIAL_OF}; got {polynomial}")
    return (POLYNOMIAL_OF - polynomial) / POLYNOMIAL_OF
