"""The rungs of the ladder: each gives what the reference rung gives, or says in one line why it cannot run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.kernels import Chip, dependent_launches, dependent_launches_enabled, planned_for
from ldmperf.model import Choices, UNet, load_unet
from ldmperf.profiling import Case, profile
from ldmperf.profiling.measure.error import relative_rms
from ldmperf.profiling.measure.graph_memory import unused_in_pools
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.peer import SCHEDULER_CONFIG, diffusers_unet
from ldmperf.profiling.step.recording import operator_of
from ldmperf.profiling.trajectory.case import BACKENDS, IDEAS
from ldmperf.profiling.trajectory.network import make_network
from ldmperf.profiling.trajectory.ours import GraphBackend, GraphTrajectory, OurBackend
from ldmperf.profiling.trajectory.rungs import all_backends
from ldmperf.profiling.trajectory.theirs import accelerated, fuse_projections
from ldmperf.profiling.trajectory.unet_problem import UNetProblem
from ldmperf.samplers import Graphs, NoiseSchedule, make_plan

pytestmark = pytest.mark.usefixtures("_one_thread")


def problem(checkpoint: Path, **changes: Any) -> UNetProblem:
    case = Case(**({"unet": str(checkpoint), "steps": 3, "latent_height": 16, "latent_width": 16} | changes))
    plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
    return UNetProblem(case, load_unet(checkpoint, backend="torch"), plan, SCHEDULER_CONFIG)


@pytest.mark.parametrize(
    "changes", [{}, {"sampler": "ddpm"}, {"sampler": "dpmpp_2m", "batch": 2}, {"guidance_scale": 1.0}]
)
def test_graph_has_the_bits_of_the_eager_loop_and_hoisting_changes_rounding_alone(
    tiny_checkpoint: Path, changes: dict[str, Any], run_again: Graphs
) -> None:
    given = problem(tiny_checkpoint, **changes)
    captured = run_again.captured
    eager = OurBackend("torch").build(given)
    unhoisted = OurBackend("torch", is_hoisted=False).build(given)
    graphed = cast(GraphTrajectory, GraphBackend(run_again, "torch").build(given))
    for inputs in (given.check_inputs(), given.inputs(0), given.inputs(1)):
        expected = eager(inputs)
        assert torch.equal(graphed(inputs), expected)
        assert relative_rms(unhoisted(inputs), expected) < 1e-5
    # Injected noise, of the check of a stochastic sampler, is read by launches of its own.
    assert run_again.captured - captured == (2 if given.plan.stochastic else 1)
    assert set(graphed.phases) == {"graph_warmup_ms", "capture_ms"}
    assert graphed.phases["graph_warmup_ms"] > 0


def test_graph_has_the_bits_of_the_eager_loop_with_what_sdxl_adds(tiny_sdxl: Path, run_again: Graphs) -> None:
    given = problem(tiny_sdxl)
    eager, graphed = OurBackend("torch").build(given), GraphBackend(run_again, "torch").build(given)
    inputs = given.inputs(0)
    other = replace(inputs, added={name: value + 1.0 for name, value in inputs.added.items()})
    for each in (inputs, other):
        assert torch.equal(graphed(each), eager(each))
    assert not torch.equal(eager(inputs), eager(other))


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 50), ("dpmpp_2m", 20)])
def test_in_bfloat16_latents_end_no_further_from_float32_than_one_and_a_half_times_diffusers(
    sampler: str, steps: int
) -> None:
    """With guidance; a network of the family, its convolutions and products those of the CPU."""
    case = Case(unet="39M", sampler=sampler, steps=steps, dtype="bfloat16", latent_height=8, latent_width=8)
    plan = make_plan(sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
    network = make_network(case)
    given = UNetProblem(case, network, plan, SCHEDULER_CONFIG)
    inputs = given.check_inputs()
    ours, theirs = (all_backends()[name].build(given)(inputs).float() for name in ("torch", "diffusers"))
    wide = case.model_copy(update={"dtype": "float32"})
    exact = all_backends()["diffusers"].build(UNetProblem(wide, network.float(), plan, SCHEDULER_CONFIG))
    expected = exact(inputs.to(torch.float32))
    error, own = (relative_rms(latents, expected) for latents in (ours, theirs))
    assert 0 < error <= 1.5 * own, (error, own)


def test_graph_reads_the_low_resolution_latents_where_they_are_now(run_again: Graphs) -> None:
    case = Case(unet="39M", task="sr", steps=1, guidance_scale=3.0, latent_height=8, latent_width=8)

    plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
    given = UNetProblem(case, make_network(case), plan, SCHEDULER_CONFIG)
    eager, graphed = OurBackend("torch").build(given), GraphBackend(run_again, "torch").build(given)
    for number in (0, 1):
        assert torch.equal(graphed(given.inputs(number)), eager(given.inputs(number)))


def test_on_a_cpu_every_rung_is_a_row_and_those_that_cannot_run_say_why(tiny_checkpoint: Path) -> None:
    assert tuple(all_backends()) == BACKENDS
    case = problem(tiny_checkpoint, steps=1).case
    cases = [case.model_copy(update={"backend": name}) for name in BACKENDS]
    records = {record.case.backend: record for record in profile(cases, rule=RepetitionRule(1, 0.0))}
    run_here = ("torch", "torch-invariant", "diffusers", "diffusers-accelerated")
    assert {name: record.status for name, record in records.items()} == {
        name: "ok" if name in run_here else "unsupported" for name in BACKENDS
    }
    # The accelerated network is diffusers' code, so that ours in float32 is what it is checked against.
    checked = {name: records[name].correctness for name in run_here}
    told = {name: correctness.reference for name, correctness in checked.items() if correctness is not None}
    expected = dict.fromkeys(run_here[:2], "diffusers float32") | dict.fromkeys(run_here[2:], "torch float32")
    assert told == expected
    assert records["diffusers-accelerated"].settings == ("accelerate",)
    said = {name: record.message or "" for name, record in records.items()}
    assert "needs a CUDA device" in said["diffusers-compile"]
    assert "max-autotune" in said["diffusers-compile-max"]
    assert "group_norm_silu" in said["triton"]
    assert "group_norm_silu" in said["triton+hoist"]
    assert said["graph"].startswith("CUDA graphs need a CUDA device")
    assert said["graph+separate"].startswith("CUDA graphs need a CUDA device")
    assert said["graph+pdl"].startswith("CUDA graphs need a CUDA device")
    assert said["graph-invariant"].startswith("CUDA graphs need a CUDA device")
    assert "group_norm_silu" in said["triton-invariant"]
    assert said["graph+fp8"].startswith("CUDA graphs need a CUDA device")
    assert said["triton+fp8"].startswith("this backend takes networks of 320 channels or more")
    assert all("\n" not in message for message in said.values())
    assert records["torch"].trace is None
    assert records["torch"].host_gap is None


def test_what_a_graph_took_to_make_is_in_its_record(tiny_checkpoint: Path, run_again: Graphs) -> None:
    case = problem(tiny_checkpoint, steps=1, backend="graph").case
    backends = all_backends() | {"graph": GraphBackend(run_again, "torch")}
    (record,) = profile([case], rule=RepetitionRule(1, 0.0), backends=backends)
    assert record.status == "ok", record.message
    assert record.phases.graph_warmup_ms is not None
    assert record.phases.capture_ms is not None


class OperatorNames(TorchDispatchMode):
    """The operators of ours that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names |= {name for name in [operator_of(func)] if name is not None}
        return func(*args, **(kwargs or {}))


def test_the_accelerated_network_runs_our_operators_and_diffusers_own_does_not(tiny_checkpoint: Path) -> None:
    given = problem(tiny_checkpoint, steps=1)
    inputs = given.inputs(0)

    def ours(name: str) -> set[str]:
        trajectory = all_backends()[name].build(given)
        with OperatorNames() as seen:
            trajectory(inputs)
        return seen.names

    expected = {"attention", "group_norm_silu", "layer_norm", "geglu", "residual_add"}
    assert ours("diffusers-accelerated") >= expected
    assert ours("diffusers") == set()
    # Built beside each other, they share weights, and no class.
    names = ("diffusers", "diffusers-accelerated", "diffusers")
    first, accelerated, again = (all_backends()[name].build(given)(inputs) for name in names)
    assert torch.equal(first, again)
    assert 0 < relative_rms(accelerated, first) < 1e-5


@pytest.mark.parametrize("is_accelerated", [False, True])
def test_diffusers_network_compiles_as_one_graph(tiny_checkpoint: Path, is_accelerated: bool) -> None:
    """What fullgraph asks of it, without the compiler that a GPU has."""
    given = problem(tiny_checkpoint)
    unet = diffusers_unet(given.unet)
    fuse_projections(unet)
    if is_accelerated:
        accelerated(unet)
    compiled = torch.compile(unet, fullgraph=True, dynamic=False, backend="eager")
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 5, given.unet.config.context_dim)
    with torch.no_grad():
        for timestep in (torch.tensor(981), torch.tensor(1)):
            found = compiled(x, timestep, encoder_hidden_states=context, return_dict=False)[0]
            expected = unet(x, timestep, encoder_hidden_states=context, return_dict=False)[0]
            assert relative_rms(found, expected) < 1e-5


def test_a_compiled_peer_needs_a_gpu(tiny_checkpoint: Path) -> None:
    given = problem(tiny_checkpoint)
    compiled = ("diffusers-compile", "diffusers-accelerated-compile", "diffusers-compile-max")
    for name in (*compiled, "graph+separate", "graph", "graph+pdl"):
        with pytest.raises(Unsupported, match="CUDA"):
            all_backends()[name].build(replace(given))


def test_the_graphs_differ_in_what_is_merged_alone(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, run_again: Graphs
) -> None:
    """`graph+separate` tells what `graph` owes to merges: the same kernels and capture, the rest by torch."""
    asked: list[Choices] = []
    real = UNet.with_backend

    def with_backend(unet: UNet, *, batch_invariant: bool, **choices: str) -> UNet:
        assert not batch_invariant
        asked.append(Choices(**choices))
        return real(unet, **choices, batch_invariant=batch_invariant)

    monkeypatch.setattr(UNet, "with_backend", with_backend)
    given = problem(tiny_checkpoint)
    names = ("graph+separate", *IDEAS, "graph")
    for name in names:
        backend = all_backends()[name]
        assert isinstance(backend, GraphBackend)
        replace(backend, graphs=run_again).build(given)
    separate, *ideas, graph = asked
    assert separate == Choices("triton", "torch", "torch", "torch", "torch")
    assert graph == Choices("triton")
    # Each differs from it by the choice in its name.
    for name, choices in zip(IDEAS, ideas, strict=True):
        assert choices == separate._replace(**{name.removeprefix("graph+"): "triton"})


def test_the_rung_of_dependent_launches_captures_inside_their_context(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, run_again: Graphs
) -> None:
    seen: list[bool] = []
    real = UNet.denoise

    def denoise(unet: UNet, *arguments: Any) -> Tensor:
        seen.append(dependent_launches_enabled())
        return real(unet, *arguments)

    monkeypatch.setattr(UNet, "denoise", denoise)
    given = problem(tiny_checkpoint)
    results = []
    for dependent in (False, True):
        backend = GraphBackend(run_again, "torch", dependent=dependent)
        with dependent_launches(not dependent):
            results.append(backend.build(given)(given.inputs(0)))
        assert set(seen) == {dependent}
        seen.clear()
    assert torch.equal(*results)
    rung = all_backends()["graph+pdl"]
    assert rung == replace(cast(GraphBackend, all_backends()["graph"]), dependent=True)


def test_the_rung_of_dependent_launches_needs_a_chip_that_has_them(
    tiny_checkpoint: Path, run_again: Graphs
) -> None:
    backend = GraphBackend(run_again, "torch", dependent=True)
    with planned_for(Chip("NVIDIA A100", 108, "sm_80")), pytest.raises(Unsupported) as raised:
        backend.build(problem(tiny_checkpoint))
    assert str(raised.value) == "NVIDIA A100 is sm_80: dependent launches need NVIDIA's sm_90 or newer"


def test_memory_set_aside_for_graphs_is_that_of_their_pools_alone() -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 10},
        {"segment_pool_id": (0, 1), "total_size": 500, "allocated_size": 100},
        {"segment_pool_id": (0, 2), "total_size": 70, "allocated_size": 0},
        {"total_size": 9, "allocated_size": 0},
    ]
    assert unused_in_pools(segments) == 400 + 70
