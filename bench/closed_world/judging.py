"""Samples judged, as records."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmperf.profiling.measure.environment import Environment, collect_environment
from ldmperf.profiling.measure.recorded import utc_now
from ldmperf.profiling.quality import Estimate, QualityCase, QualityRecord

from .data import Source
from .family import World
from .judge import load_judge
from .metrics import Reference, proportion
from .scenes import FACTORS

# Of what real samples the distances are.
_REAL_SEED, _REAL_SAMPLES = 31, 10_000
RESAMPLES = 200


class Judging:
    """The judge of a world with the real samples that others are compared with. `device`: of the generators."""

    def __init__(self, world: World, judge: Path, run_id: str, device: str = "cpu") -> None:
        self.world, self._run_id = world, run_id
        self._judge = load_judge(judge, world)
        real = Source(world, _REAL_SEED).read(0, _REAL_SAMPLES)
        features = self._judge.answers(real.latents, real.factors).features
        self._reference = Reference(features.double().numpy(), real.latents.flatten(1).double().numpy())
        self._environment: Environment = collect_environment(device)

    def record(
        self,
        case: QualityCase,
        latents: Tensor,
        factors: Tensor,
        *,
        resamples: int = RESAMPLES,
        **known: Any,
    ) -> QualityRecord:
        """The record of samples [n, 4, h, w] whose captions have those factors; `known`: its other fields."""
        started = utc_now()
        answers = self._judge.answers(latents, factors)
        try:
            found = self._reference.distances(
                answers.features.double().numpy(), latents.double().numpy(), resamples=resamples
            )
        except ValueError as failure:
            # Samples that are not finite, or far beyond all real ones: what this network gives here.
            return self._made(case, started, **known, status="error", message=str(failure))
        found["alignment"] = proportion(answers.right.numpy(), resamples)
        estimates = {name: _estimate(*estimated) for name, estimated in found.items()}
        shares = answers.right.double().mean(0).tolist()
        return self._made(
            case,
            started,
            **known,
            **estimates,
            factors=dict(zip(FACTORS, shares, strict=True)),
            all_right=float(answers.right.all(1).double().mean()),
        )

    def _made(self, case: QualityCase, started: datetime, **fields: Any) -> QualityRecord:
        return QualityRecord(
            run_id=self._run_id,
            case_key=case.key,
            case=case,
            environment=self._environment,
            started_at=started,
            **fields,
        )


def _estimate(value: float, replicates: Sequence[float]) -> Estimate:
    """With replicates of five digits, more than they tell."""
    return Estimate(value=value, replicates=tuple(float(f"{one:.5g}") for one in replicates))
