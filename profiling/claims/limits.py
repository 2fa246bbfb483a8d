"""The limits that verdicts are judged by, each with its reason."""

from __future__ import annotations

from typing import Final

# A time or an energy over what FLOPs say, or the reverse, as a factor. Neighbouring sizes of the paper are 1.2
# apart or more (0.83 and 1.00): within the square root of that, rounded, none is taken for its neighbour.
COST_FACTOR: Final = 1.10
# Half of the last digit of the paper's normalized cost: 0.07 is 0.065 to 0.075. The 866M has 1 by definition.
ROUNDING: Final = 0.005
# A trajectory's distance from the line, relative to its time: a step in twenty, the middle of the paper's budgets.
LINE_DEVIATION: Final = 0.05
# Three points are the fewest that a line can miss.
FEWEST_STEP_COUNTS: Final = 3
# arXiv 2511.17031: FLOPs predict energy "with R² above 0.9". Two points are always on a line.
ENERGY_R2: Final = 0.9
FEWEST_ENERGIES: Final = 3
# The paper has no number for slow. After a second a wait breaks a user's flow of thought (Nielsen, Usability
# Engineering, 1993, chapter 5).
SLOW_MS: Final = 1000.0
# Largest factor between parameter counts that are alike: neighbours from 39M to 866M are up to 2.2 apart, so a
# rival between two of them is at most the square root of that away from one.
LIKE_PARAMETERS: Final = 1.5

# The paper's facts that rules look up.
REFERENCE: Final = "866M"
BUDGET_STEPS: Final = (3, 6, 10, 14, 20, 50)
RELAXED_STEPS: Final = 50
# Undistilled 83M against distilled 866M: at 4 steps, which 83M matches at normalized cost 7 to 8.
DISTILLED_STEPS: Final = 4
DISTILLED_RIVAL: Final = "83M"
DISTILLED_COSTS: Final = (7.0, 8.0)
# Super-resolution: small wins up to here.
SR_STEPS: Final = 20

# Quality in a closed world: budgets, in steps of the largest network. The paper's is the first of BUDGET_STEPS.
QUALITY_BUDGETS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50)
# Networks whose order is the same under two samplers, of the pairs that noise does not explain: with one in ten
# otherwise the trend is the same to the eye.
SAME_ORDER: Final = 0.9
# The paper's guidance rates reach from the first to the second; fewer rates than the third show no range.
GUIDANCE_RANGE: Final = (1.5, 8.0)
FEWEST_RATES: Final = 3
# Two networks are always on a line.
FEWEST_NETWORKS: Final = 3
