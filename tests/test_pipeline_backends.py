"""The backends of whole pipelines: that each runs what its name says, and is refused where it would not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from tapes import Tapes
from test_pipelines import TINY, problem_of, tiny_case

from ldmperf.model import UNet
from ldmperf.model.dropin import PipelineAutoencoder, PipelineUNet, PlanScheduler, rebuild
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.pipelines import pipeline_backends
from ldmperf.profiling.pipelines.components import PIPELINES, Components
from ldmperf.profiling.pipelines.part_marks import PARTS, PartMarks
from ldmperf.profiling.pipelines.pipeline_backends import OurPipelineBackend, PipelineBackend
from ldmperf.profiling.rivals.subjects import all_subjects
from ldmperf.profiling.trajectory.backend import Phased
from ldmperf.profiling.trajectory.network import Networks
from ldmperf.samplers import CudaGraphs

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PIPELINES, "tiny", TINY)
        yield


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines of diffusers that backends have made."""
    made: list[Any] = []
    pipeline = Components.pipeline

    def recorded(self: Components, sampler: str) -> Any:
        made.append(pipeline(self, sampler))
        return made[-1]

    monkeypatch.setattr(Components, "pipeline", recorded)
    return made


OURS = (PipelineUNet, PipelineAutoencoder, PlanScheduler)


def ours_of(pipe: Any) -> list[bool]:
    """Whether UNet, autoencoder and scheduler are ours."""
    parts = zip((pipe.unet, pipe.vae, pipe.scheduler), OURS, strict=True)
    return [isinstance(part, kind) for part, kind in parts]


def test_a_pipeline_is_what_its_backend_is_called(pipes: list[Any]) -> None:
    problem, backends = problem_of(tiny_case()), all_subjects()["pipeline"].backends
    for name in ("pipe", "pipe-accelerated", "pipe-rebuilt"):
        backends[name].build(problem)
    plain, accelerated, rebuilt = pipes
    assert [ours_of(pipe) for pipe in pipes] == [[False] * 3, [False] * 3, [True] * 3]

    def ours(pipe: Any) -> set[str]:
        networks = {"unet": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder}
        return {
            name
            for name, network in networks.items()
            if any("ldmperf" in type(module).__module__ for module in network.modules())
        }

    assert ours(plain) == set()
    assert {"unet", "vae"} <= ours(accelerated)
    assert ours(rebuilt) == {"unet", "vae"}
    assert [backends[name].settings for name in ("pipe", "pipe-accelerated", "pipe-rebuilt")] == [
        (),
        ("accelerate",),
        ("rebuild",),
    ]


def test_what_stays_diffusers_has_no_time_under_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(tiny_case())

    def refused(scheduler: Any, **options: Any) -> Any:
        raise ValueError("no plan for this scheduler")

    with monkeypatch.context() as patch:
        patch.setattr(PlanScheduler, "from_scheduler", refused)
        with pytest.raises(Unsupported, match=r"rebuild left the scheduler, .*: no plan for this scheduler"):
            PipelineBackend("rebuild").build(problem)
    monkeypatch.setattr("ldmperf.model.dropin.accelerate", lambda pipe: SimpleNamespace(replaced=()))
    with pytest.raises(Unsupported, match="accelerate replaced nothing"):
        PipelineBackend("accelerate").build(problem)


def test_a_record_tells_whether_evaluations_were_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where replays do not pay, or nothing can be captured, `rebuild` runs eagerly: no phase of a capture."""
    problem = problem_of(tiny_case(steps=8))
    for replay_ms, phases in ((4.0, {"graph_warmup_ms", "capture_ms"}), (40.0, set())):
        tapes = Tapes()
        tapes.replay_ms = replay_ms
        with monkeypatch.context() as patch:
            patch.setattr("ldmperf.model.dropin.rebuild", partial(rebuild, graphs=tapes))
            rebuilt = PipelineBackend("rebuild").build(problem)
        rebuilt(problem.inputs(0))
        assert isinstance(rebuilt, Phased)
        assert rebuilt.phases.keys() == phases
    graphed = OurPipelineBackend("torch", Tapes()).build(problem)
    graphed(problem.inputs(0))
    assert isinstance(graphed, Phased)
    assert graphed.phases.keys() == {"graph_warmup_ms", "capture_ms"}
    for backend in (PipelineBackend("rebuild"), PipelineBackend(), OurPipelineBackend()):
        trajectory = backend.build(problem)
        trajectory(problem.inputs(0))
        assert isinstance(trajectory, Phased)
        assert trajectory.phases == {}


def test_unet_and_decoder_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the projections were fused, as the compiled peers of a trajectory have it."""
    done: list[tuple[str, Any]] = []

    def compiled(module: Any, mode: str) -> Any:
        done.append((mode, module))
        return module

    monkeypatch.setattr(pipeline_backends, "compiled", compiled)
    monkeypatch.setattr(pipeline_backends, "fuse_projections", lambda unet: done.append(("fused", unet)))
    pipe = problem_of(tiny_case()).network.pipeline("ddim")
    unet, decode = pipe.unet, pipe.vae.decode
    pipeline_backends._changed(pipe, "compile")
    assert done == [("fused", unet), ("reduce-overhead", unet), ("reduce-overhead", decode)]
    settings = PipelineBackend("compile").settings
    assert settings[:2] == ("fuse_qkv_projections", "fullgraph")
    assert "triton.cudagraphs=True" in settings


def test_networks_run_on_the_operators_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = all_subjects()["pipeline"].backends["sample-graph"]
    assert isinstance(graphed, OurPipelineBackend)
    assert (graphed.operators, type(graphed.graphs)) == ("triton", CudaGraphs)
    asked: list[tuple[str, ...]] = []
    with_backend, decoder_on = UNet.with_backend, Components.decoder_on

    def unet_on(self: UNet, backend: str, products: str = "auto", **options: Any) -> UNet:
        asked.append(("unet", backend, products))
        return with_backend(self, backend, products, **options)

    def decoder(self: Components, operators: str) -> Any:
        asked.append(("decoder", operators))
        return decoder_on(self, operators)

    monkeypatch.setattr(UNet, "with_backend", unet_on)
    monkeypatch.setattr(Components, "decoder_on", decoder)
    problem = problem_of(tiny_case())
    OurPipelineBackend().build(problem)
    assert not asked
    OurPipelineBackend("triton").build(problem)
    assert asked == [("unet", "triton", "auto"), ("decoder", "triton")]


def test_a_decoder_on_other_operators_has_them_and_the_same_memory() -> None:
    network = problem_of(tiny_case()).network
    other = network.decoder_on("triton")
    for name, value in network.autoencoder.state_dict().items():
        assert other.state_dict()[name].data_ptr() == value.data_ptr()
    backends = {module.backend for module in other.modules() if hasattr(module, "backend")}
    assert backends == {"triton"}
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert not other.training


def test_a_call_without_an_end_of_a_part_tells_no_parts() -> None:
    """Those of the call before are not told again."""
    marks = PartMarks(torch.device("cpu"))
    marks.start()
    for part in PARTS:
        marks.end(part)
    assert set(marks.parts) == set(PARTS)
    marks.start()
    marks.end("rest")
    with pytest.raises(KeyError, match="text"):
        _ = marks.parts


def test_the_last_end_of_a_part_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers encodes prompts and negative prompts one after the other."""
    now = iter((1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    monkeypatch.setattr(
        "ldmperf.profiling.pipelines.part_marks.time", SimpleNamespace(perf_counter=lambda: next(now))
    )
    marks = PartMarks(torch.device("cpu"))
    marks.start()
    for part in ("text", *PARTS):
        marks.end(part)
    assert marks.parts == {"text": 3e3, "steps": 4e3, "decode": 8e3, "rest": 16e3}


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_prompt_of_no_words_is_refused(tokens: int) -> None:
    with pytest.raises(Unsupported, match="give --tokens 3 at least"):
        problem_of(tiny_case(context_tokens=tokens))


def test_every_round_has_prompts_and_noise_of_its_own() -> None:
    problem = problem_of(tiny_case(batch=2, context_tokens=3))
    rounds = [problem.check_inputs(), problem.inputs(0), problem.inputs(1), problem.inputs(1, seed=9)]
    assert len({inputs.prompts for inputs in rounds}) == len(rounds)
    noises = [noise for inputs in rounds for noise in inputs.noise]
    assert not any(one.equal(other) for i, one in enumerate(noises) for other in noises[:i])
    (first, second), again = rounds[1].prompts, problem.inputs(0)
    assert first != second
    assert again.prompts == rounds[1].prompts
    assert again.noise.equal(rounds[1].noise)
    assert again.to(torch.float16).noise.dtype == torch.float32
    assert again.to(torch.float64).noise.dtype == torch.float64


def test_weights_are_of_the_cases_seed_and_network() -> None:
    """No network has what another draws first, and nothing stays as it was made."""

    def drawn(seed: int) -> list[torch.Tensor]:
        """What each network's first matrix was drawn as, from -1 to 1."""
        network = problem_of(tiny_case(seed=seed)).network
        networks = (network.text, network.unet, network.autoencoder)
        firsts = [next(p for p in one.parameters() if p.ndim >= 2) for one in networks]
        return [first.as_strided((64,), (1,)) / (3.0 / first[0].numel()) ** 0.5 for first in firsts]

    found = [*drawn(3), *drawn(10)]
    for i, one in enumerate(found):
        assert 0.9 < one.abs().max() <= 1.0 + 1e-6
        assert not any(one.allclose(other) for other in found[:i])


def test_what_is_counted() -> None:
    problem = problem_of(tiny_case())
    networks = (problem.network.text, problem.network.unet, problem.network.autoencoder)
    assert problem.parameters == sum(p.numel() for network in networks for p in network.parameters())
    assert problem_of(tiny_case(context_tokens=32)).gflop > problem.gflop


def test_cases_share_a_network_but_not_with_another_length_of_text() -> None:
    """A text encoder has a position for each token."""
    networks = Networks(all_subjects())
    found: list[Any] = [
        networks.problem(tiny_case(**changes))[0].network for changes in ({}, {"steps": 1}, {"context_tokens": 32})
    ]
    assert found[0] is found[1]
    assert [one.text.config.max_position_embeddings for one in found] == [16, 16, 32]


def test_backends_have_the_conditions_of_a_user(pipes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers' pipeline is called with, and what it starts from."""
    problem = problem_of(tiny_case(dtype="bfloat16", guidance_scale=3.0))
    trajectory = PipelineBackend().build(problem)
    (pipe,) = pipes
    given: dict[str, Any] = {}
    call = type(pipe).__call__

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        given.update(inspect.signature(call).bind(self, *args, **options).arguments)
        return call(self, *args, **options)

    monkeypatch.setattr(type(pipe), "__call__", recorded)
    inputs = problem.inputs(0)
    images = trajectory(inputs)
    assert tuple(given["prompt"]) == inputs.prompts
    assert (given["num_inference_steps"], given["guidance_scale"]) == (2, 3.0)
    assert given["latents"].dtype == torch.bfloat16
    assert given["latents"].equal(inputs.noise.bfloat16())
    assert -1.0 <= images.min() < 0.0 < images.max() <= 1.0
