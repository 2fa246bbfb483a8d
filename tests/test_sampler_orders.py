"""Convergence where the solution is known: data x_0 ~ N(mu, s^2), whose exact network is affine in x.

The marginals stay Gaussian, so the probability-flow ODE keeps (x - alpha mu) / hypot(alpha s, sigma) constant.
A plan is affine too: what it makes of any noise is a product of small matrices, computed here in float64 without
running it. So the errors and the variances below are exact, not sampled.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmperf.samplers import NoiseSchedule, initial_noise, make_plan, sample

SIGMA_MIN, SIGMA_MAX = 0.01, 20.0


def fine_schedule(num_train_timesteps):
    """Geometric in sigma, from SIGMA_MIN to SIGMA_MAX."""
    sigmas = np.exp(np.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), num_train_timesteps))
    return NoiseSchedule((1 / (1 + sigmas**2)).astype(np.float32))


# linspace's intervals divide 3840 exactly, leading's points divide 3840: every step has the same length.
LINSPACE, LEADING = fine_schedule(3841), fine_schedule(3840)


@dataclass(frozen=True)
class Gaussian:
    """mu and s of the data."""

    mu: float
    s: float

    def affine(self, schedule, timestep):
        """(g, c) of the exact network eps(x) = g x + c at a timestep, x = alpha x_0 + sigma eps."""
        alpha, sigma = levels(schedule, timestep)
        gain = sigma / (alpha**2 * self.s**2 + sigma**2)
        return gain, -gain * alpha * self.mu

    def flow(self, start, end):
        """(k, b) of the exact solution x_end = k x_start + b between two (alpha, sigma)."""
        spread = [math.hypot(alpha * self.s, sigma) for alpha, sigma in (start, end)]
        k = spread[1] / spread[0]
        return k, (end[0] - k * start[0]) * self.mu


def levels(schedule, timestep):
    low = min(int(timestep), schedule.num_train_timesteps - 2)
    below, above = schedule.sigmas[low : low + 2].tolist()
    ratio = below + (timestep - low) * (above - below)
    alpha = 1 / math.hypot(ratio, 1)
    return alpha, ratio * alpha


def outcome(plan, problem):
    """(k, b, variance): the plan makes k noise + b of its initial noise, and adds noise of that variance."""
    count = plan.num_registers
    gains, offsets, covariance = np.eye(count), np.zeros(count), np.zeros((count, count))
    for step in plan.steps:
        g, c = problem.affine(plan.schedule, step.timestep)
        network = np.zeros(count)
        network[0] = g * step.c_in
        matrix = step.U[:, :count] + np.outer(step.U[:, count], network)
        gains, offsets = matrix @ gains, matrix @ offsets + c * step.U[:, count]
        covariance = matrix @ covariance @ matrix.T + np.outer(step.U[:, -1], step.U[:, -1])
    return gains[0, 0] * plan.init_noise_sigma, offsets[0], covariance[0, 0]


def global_error(plan, problem, ends_at_zero):
    """Relative distance between the plan's affine map and the exact flow, from its first level to its last."""
    k, b, variance = outcome(plan, problem)
    assert variance == 0.0
    end = (1.0, 0.0) if ends_at_zero else levels(plan.schedule, 0)
    exact_k, exact_b = problem.flow(levels(plan.schedule, plan.steps[0].timestep), end)
    # The Euler family holds x / alpha: it starts from noise / c_in of the first step, and ends divided by alpha.
    exact_k *= plan.steps[0].c_in * plan.init_noise_sigma
    alpha_end = end[0] if plan.name in ("euler", "heun") else 1.0
    exact = np.array([exact_k, exact_b]) / alpha_end
    return float(np.linalg.norm(np.array([k, b]) - exact) / np.linalg.norm(exact))


PROBLEMS = st.builds(Gaussian, mu=st.floats(-1.5, 1.5), s=st.floats(0.35, 0.8))
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
# (sampler, schedule, options, order): the order of the whole run, with its low-order start.
ORDERS = {
    "ddim": ("ddim", LEADING, {"set_alpha_to_one": False}, 1),
    "euler": ("euler", LINSPACE, {"final_sigmas_type": "sigma_min"}, 1),
    "heun": ("heun", LINSPACE, {}, 2),
    "2m order 1": ("dpmpp_2m", LINSPACE, {"solver_order": 1, **TO_SIGMA_MIN}, 1),
    "2m midpoint": ("dpmpp_2m", LINSPACE, TO_SIGMA_MIN, 2),
    "2m heun": ("dpmpp_2m", LINSPACE, {"solver_type": "heun", **TO_SIGMA_MIN}, 2),
    "2m dpmsolver": ("dpmpp_2m", LINSPACE, {"algorithm_type": "dpmsolver", **TO_SIGMA_MIN}, 2),
    # Both its Euler start and its halved second-order term (see dpm_solver.py) leave an error of h^2.
    "2m order 3": ("dpmpp_2m", LINSPACE, {"solver_order": 3, **TO_SIGMA_MIN}, 2),
    "2s": ("dpmpp_2s", LINSPACE, TO_SIGMA_MIN, 2),
    "2s heun": ("dpmpp_2s", LINSPACE, {"solver_type": "heun", **TO_SIGMA_MIN}, 2),
    "2s order 3": ("dpmpp_2s", LINSPACE, {"solver_order": 3, **TO_SIGMA_MIN}, 3),
    "2s order 3 heun": ("dpmpp_2s", LINSPACE, {"solver_order": 3, "solver_type": "heun", **TO_SIGMA_MIN}, 3),
    # The corrector adds one to the order.
    "unipc 1": ("unipc", LINSPACE, {"solver_order": 1, **TO_SIGMA_MIN}, 2),
    "unipc 2": ("unipc", LINSPACE, {"solver_order": 2, **TO_SIGMA_MIN}, 3),
    "unipc 2 bh1": ("unipc", LINSPACE, {"solver_order": 2, "solver_type": "bh1", **TO_SIGMA_MIN}, 3),
    "unipc 2 eps": ("unipc", LINSPACE, {"solver_order": 2, "predict_x0": False, **TO_SIGMA_MIN}, 3),
    "unipc 3": ("unipc", LINSPACE, {"solver_order": 3, **TO_SIGMA_MIN}, 3),
    "unip 2": ("unipc", LINSPACE, {"disable_corrector": list(range(400)), **TO_SIGMA_MIN}, 2),
    "pndm": ("pndm", LEADING, {}, 2),
    "plms": ("pndm", LEADING, {"skip_prk_steps": True}, 2),
}


@pytest.mark.parametrize("case", ORDERS)
@given(problem=PROBLEMS)
@settings(max_examples=5, deadline=None, derandomize=True)
def test_deterministic_solvers_converge_at_their_order(case, problem):
    name, schedule, options, order = ORDERS[case]
    coarse, fine = (30, 120) if options.get("solver_order") == 3 else (40, 160)
    errors = [
        global_error(make_plan(name, schedule, k, **options), problem, ends_at_zero=name == "heun")
        for k in (coarse, fine)
    ]
    # To sigma = 0 Heun's last step is Euler's, whose error of SIGMA_MIN^2 is no matter of the step.
    assert errors[1] < errors[0] * 4.0 ** -(order - 0.25) or errors[1] < 1e-6 + (2e-4 if name == "heun" else 0)
    assert errors[1] < {1: 3e-2, 2: 2e-3, 3: 4e-4}[order]


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"solver_order": 2}, 2),
        ({"solver_order": 2, "solver_type": "heun"}, 2),
        ({"solver_order": 3}, 2),
        ({"solver_order": 2, "algorithm_type": "dpmsolver"}, 2),
        ({"solver_order": 3, "algorithm_type": "dpmsolver"}, 2),
    ],
)
def test_a_multistep_step_has_its_local_order(options, order):
    """One step amid a run, from the exact solution and exact memory: an error of h^(order + 1)."""
    problem = Gaussian(0.7, 0.6)
    errors = []
    for num_steps in (48, 96, 192):
        plan = make_plan("dpmpp_2m", LINSPACE, num_steps, **options, **TO_SIGMA_MIN)
        middle = num_steps // 2
        points = [levels(LINSPACE, plan.steps[index].timestep) for index in range(middle - 2, middle + 2)]
        trajectory = [1.3]
        for start, end in itertools.pairwise(points):
            k, b = problem.flow(start, end)
            trajectory.append(k * trajectory[-1] + b)
        memory = []
        for (alpha, sigma), x, step in zip(points, trajectory, plan.steps[middle - 2 :], strict=False):
            g, c = problem.affine(LINSPACE, step.timestep)
            eps = g * x + c
            memory.insert(0, eps if options.get("algorithm_type") == "dpmsolver" else (x - sigma * eps) / alpha)
            output = eps
            if step.index == middle:
                break
        registers = [trajectory[2], *memory[1:]][: plan.num_registers]
        new = plan.steps[middle].U[0] @ np.array([*registers, output, 0.0])
        errors.append(abs(new - trajectory[3]))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) > order + 1 - 0.3, errors


SDE = {"algorithm_type": "sde-dpmsolver++"}
STOCHASTIC = [
    ("ddpm", {}),
    ("ddpm", {"variance_type": "fixed_large"}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5}),
    ("euler_a", {}),
    ("dpmpp_2m", {**SDE, "solver_order": 1}),
    ("dpmpp_2m", SDE),
    ("dpmpp_2m", {**SDE, "solver_type": "heun"}),
    ("dpmpp_2m", {**SDE, "solver_order": 3}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2s", SDE),
    ("dpmpp_2s", {**SDE, "solver_type": "heun"}),
    ("dpmpp_2s", {**SDE, "solver_order": 3}),
]


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
@given(problem=PROBLEMS)
@settings(max_examples=3, deadline=None, derandomize=True)
def test_stochastic_solvers_reproduce_the_distribution(name, options, problem):
    """The mean is right, and the standard deviation converges to that of the data."""
    wrong = []
    for num_steps in (60, 240):
        k, mean, variance = outcome(make_plan(name, LEADING, num_steps, **options), problem)
        assert variance > 0.0
        assert abs(mean - problem.mu) < 0.01 * (1 + abs(problem.mu))
        wrong.append(abs(math.sqrt(k**2 + variance) / problem.s - 1))
    assert wrong[1] < 0.05
    assert wrong[1] < 0.6 * wrong[0] or wrong[1] < 2e-3


def test_diffusers_sde_of_third_order_and_solver_type_heun_does_not_converge():
    """Kept equal to diffusers, and known: a sign in its third-order weight (see dpm_solver.py)."""
    options = {**SDE, "solver_order": 3, "solver_type": "heun"}
    k, _, variance = outcome(make_plan("dpmpp_2s", LEADING, 320, **options), Gaussian(0.7, 0.6))
    assert math.sqrt(k**2 + variance) > 2 * 0.6


@pytest.mark.parametrize("name", ["ddpm", "euler_a", "dpmpp_2m"])
def test_samples_have_the_distribution_of_the_data(name):
    """The whole of it: Philox noise through `sample`, in float32."""
    problem = Gaussian(0.7, 0.6)
    options = SDE if name == "dpmpp_2m" else {}
    plan = make_plan(name, LEADING, 40, **options)

    def network(x, step):
        g, c = problem.affine(LEADING, step.timestep)
        return g * x + c

    seeds = range(8)
    latents = sample(network, plan, initial_noise(seeds, (4, 32, 32)), seeds=list(seeds)).double()
    k, mean, variance = outcome(plan, problem)
    expected = math.sqrt(k**2 + variance)
    count = latents.numel()
    assert float(latents.mean()) == pytest.approx(mean, abs=5 * expected / count**0.5)
    assert float(latents.std()) == pytest.approx(expected, rel=5 / (2 * count) ** 0.5)
    normalized = ((latents - latents.mean()) / latents.std()).flatten()
    assert abs(float((normalized**3).mean())) < 5 * (15 / count) ** 0.5
    assert abs(float((normalized**4).mean()) - 3) < 5 * (96 / count) ** 0.5
    assert torch.isfinite(latents).all()
