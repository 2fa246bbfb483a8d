"""`Step`, and `Tableau`, in which builders write their formulas.

A sampler is linear in its registers, so every quantity of a formula (x, a prediction, a derivative) is a vector of
coefficients over [registers..., model output, noise]. A `Tableau` hands out the unit vectors; the formulas of the
paper combine them; the new registers, stacked, are the matrix `U` of a step.
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from .schedule import FloatArray
from .values import Copied, shown

# The registers may be float32: the root leaves room for what a coefficient multiplies.
_LARGEST = math.sqrt(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Step(Copied):
    """One model evaluation and the update that follows it.

    index     position in the plan
    timestep  the network's timestep, a host float; may be fractional
    c_in      the network's input is c_in * registers[0]; the kernel's input_scale of row k is c_in of step k + 1
    U         [R, R + 2] float64, read-only, maps [registers..., model output, noise] to the new registers
    alpha     registers[0] before the step is alpha x_0 + sigma eps; in the Euler family alpha is 1
    sigma     the noise level of registers[0] before the step
    """

    index: int
    timestep: float
    c_in: float
    U: FloatArray
    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        matrix = np.array(self.U, dtype=np.float64)
        matrix.flags.writeable = False
        object.__setattr__(self, "U", matrix)

    @functools.cached_property
    def adds_noise(self) -> bool:
        """Whether the noise has a coefficient other than zero."""
        return bool((self.U[:, -1] != 0.0).any())


class Tableau:
    """A plan under construction: steps over named registers, of which the first is x, the current sample."""

    def __init__(self, *registers: str, init_noise_sigma: float = 1.0) -> None:
        self.registers = registers
        self.init_noise_sigma = init_noise_sigma
        self.steps: list[Step] = []

    def unit_vectors(self) -> list[FloatArray]:
        """One vector per register, then the model output's and the noise's."""
        return list(np.eye(len(self.registers) + 2))

    def step(
        self, timestep: float, level: tuple[float, float], *, c_in: float = 1.0, **registers: FloatArray
    ) -> None:
        """Append a step, at `level` = (alpha, sigma), that sets the named registers and keeps the others.

        Raises ValueError for a coefficient that is not finite, or so large that latents in float32 would not be.
        """
        kept = dict(zip(self.registers, self.unit_vectors(), strict=False))
        rows = np.stack([registers.pop(name, kept[name]) for name in self.registers])
        if registers:
            raise KeyError(f"no such register: {', '.join(registers)}")
        scalars = [timestep, c_in, self.init_noise_sigma]
        if not ((np.abs(rows) <= _LARGEST).all() and (np.abs(scalars) <= _LARGEST).all()):
            raise ValueError(
                f"step {len(self.steps)} at timestep {timestep:g} has no finite coefficients: "
                "choose fewer steps, another timestep_spacing or final_sigmas_type, or sigma_min > 0"
            )
        alpha, sigma = map(float, level)
        self.steps.append(Step(len(self.steps), float(timestep), float(c_in), rows, alpha, sigma))

    def finish(self) -> tuple[Step, ...]:
        """The steps without the registers that x never depends on, which would only cost memory traffic."""
        reads = np.any([step.U[:, :-2] != 0.0 for step in self.steps], axis=0)
        live = np.arange(len(self.registers)) == 0
        while not np.array_equal(live, grown := live | reads[live].any(0)):
            live = grown
        columns = np.append(live, [True, True])
        return tuple(replace(step, U=step.U[live][:, columns]) for step in self.steps)


def predict(
    prediction_type: str, sample: FloatArray, model_output: FloatArray, alpha: float, sigma: float
) -> tuple[FloatArray, FloatArray]:
    """(x_0, eps) of a network's output, where the network saw `sample` = alpha x_0 + sigma eps.

    Source: Salimans and Ho, arXiv 2202.00512, section 4 and appendix D.
    """
    if prediction_type == "sample":
        return model_output, (sample - alpha * model_output) / sigma
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * model_output, alpha * model_output + sigma * sample
    return (sample - sigma * model_output) / alpha, model_output


def choose(name: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError, naming the option, unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={shown(value)} is not supported; choose one of {listed}")
