"""Which calls are measured, the most important first: a run that is stopped has those."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ldmperf.kernels import OPERATORS
from ldmperf.model import FAMILY

from ..options import DType
from ..step.call import OperatorCall
from ..step.calls import attention_calls, family_calls, vae_calls

VAE = "vae"
SIZES = (*FAMILY, VAE)
BATCHES = (2, 16)
# Height and width, and text tokens.
LATENTS, CONTEXTS = ((64, 64),), (77,)
# Of the family's attention at 64x64 latents: one level of the UNet each.
TOKENS = (4096, 1024, 256, 64)
# Stable Diffusion's own size, then the ends of the family, then what lies between.
_FIRST_SIZES = ("866M", "39M", "5B", "318M", "2B")


@dataclass(frozen=True)
class Job:
    """A call to measure, and the size and batch of the step that it comes from."""

    size: str
    batch: int
    call: OperatorCall


def steps_in_order(sizes: Sequence[str], batches: Sequence[int]) -> list[tuple[str, int]]:
    """(size, batch) by importance: two sizes at the least batch, the first at all, the VAE, then the rest."""
    family = [size for size in sizes if size != VAE]
    first = [size for size in _FIRST_SIZES if size in family]
    rest = [size for size in family if size not in first]
    ordered = [*((size, batches[0]) for size in first[:2])]
    ordered += [(size, batch) for size in first[:1] for batch in batches[1:]]
    ordered += [(VAE, 1)] if VAE in sizes else []
    ordered += itertools.product(first, batches)
    ordered += [(size, batch) for batch in batches for size in rest]
    return list(dict.fromkeys(ordered))


def by_importance(calls: Iterable[OperatorCall]) -> list[OperatorCall]:
    """The operators in turn, of each the calls that move most in a step first."""
    by_operator: dict[str, list[OperatorCall]] = {}
    for call in calls:
        by_operator.setdefault(call.operator, []).append(call)
    lines = [sorted(line, key=lambda call: -call.count * call.bytes_moved) for line in by_operator.values()]
    return [call for turn in itertools.zip_longest(*lines) for call in turn if call is not None]


def jobs(
    operators: Sequence[str],
    sizes: Sequence[str],
    batches: Sequence[int],
    dtype: DType,
    latents: Sequence[tuple[int, int]] = LATENTS,
    contexts: Sequence[int] = CONTEXTS,
) -> Iterator[Job]:
    """Every distinct call of these operators, once, in the order to measure them; found as they are asked for."""
    seen: set[str] = set()
    steps = steps_in_order(sizes, batches)
    for (size, batch), latent, tokens in itertools.product(steps, latents, contexts):
        calls = vae_calls(dtype) if size == VAE else family_calls(size, batch, dtype, latent, tokens)
        for call in by_importance(call for call in calls if call.operator in operators):
            if call.key not in seen:
                seen.add(call.key)
                yield Job(size, batch, call)


def head_dim_jobs(
    head_dims: Sequence[int], tokens: Sequence[int], batches: Sequence[int], dtype: DType
) -> Iterator[Job]:
    """Attention of 8 heads by size: the longest sequences on themselves first, of each the largest batch."""
    longest_first, largest_first = sorted(tokens, reverse=True), sorted(batches, reverse=True)
    for number in range(2):
        for queries, batch, head_dim in itertools.product(longest_first, largest_first, head_dims):
            call = attention_calls(head_dim, queries, batch, dtype)[number]
            yield Job(f"head_dim {head_dim}", batch, call)


def first_of_each_key(found: Iterable[Job]) -> Iterator[tuple[str, Job]]:
    """(tuning key, call): of an operator's calls with one key the first, which is the most important."""
    seen: set[tuple[str, str]] = set()
    for job in found:
        operator = OPERATORS[job.call.operator]
        key = operator.tuning_key(job.call.bound("meta"))
        if (operator.name, key) not in seen:
            seen.add((operator.name, key))
            yield key, job
