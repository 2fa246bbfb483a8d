"""Whole pipelines as cases of a profile: what runs, what is checked, and where each part of a call ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ldmperf.model import RELEASED, Autoencoder, AutoencoderConfig, UNet
from ldmperf.profiling import Case, Record, profile
from ldmperf.profiling.compare.metrics import METRICS
from ldmperf.profiling.figures import overview
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.pipelines import part_marks
from ldmperf.profiling.pipelines.components import PIPELINES, Components, NumberTokenizer, PipelineShape
from ldmperf.profiling.pipelines.part_marks import PARTS
from ldmperf.profiling.pipelines.pipeline_backends import OurPipelineBackend
from ldmperf.profiling.pipelines.pipeline_problem import PipelineProblem
from ldmperf.profiling.report import markdown_table
from ldmperf.profiling.rivals.decoding import decoder_case
from ldmperf.profiling.rivals.subjects import all_subjects
from ldmperf.profiling.trajectory.case import PIPELINE_BACKENDS, PIPELINE_NAMES
from ldmperf.profiling.trajectory.network import Networks
from ldmperf.profiling.trajectory.presets import select_cases

pytestmark = pytest.mark.usefixtures("_one_thread")

_UNET = dataclasses.replace(
    RELEASED["SD1.5"],
    block_channels=(16, 32),
    num_heads=(2, 2),
    attention=(True, False),
    transformer_layers=(1, 1),
    only_cross_attention=(False, False),
    layers_per_block=1,
    norm_groups=8,
    context_dim=16,
)
TINY = PipelineShape(
    _UNET,
    {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
    },
    AutoencoderConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4),
)


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PIPELINES, "tiny", TINY)
        yield


def tiny_case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "unet": "tiny", "task": "pipeline", "steps": 2, "latent_height": 8, "latent_width": 8,
        "context_tokens": 16, "backend": "pipe",
    }  # fmt: skip
    return Case(**(fields | changes))


def problem_of(case: Case) -> PipelineProblem:
    problem, _ = Networks(all_subjects()).problem(case)
    assert isinstance(problem, PipelineProblem)
    return problem


@pytest.fixture(scope="module")
def records(_tiny: None) -> dict[str, Record]:
    """Every backend, two images at once."""
    cases = [tiny_case(backend=name, batch=2) for name in PIPELINE_BACKENDS]
    made = profile(cases, rule=RepetitionRule(2, 0.0), subjects=all_subjects())
    return {record.case.backend: record for record in made}


def test_every_backend_gives_the_images_of_the_other_implementation(records: dict[str, Record]) -> None:
    no_gpu = {"pipe-compile", "sample-graph"}
    assert {name for name, record in records.items() if record.status == "unsupported"} == no_gpu
    for name in set(PIPELINE_BACKENDS) - no_gpu:
        record = records[name]
        assert record.status == "ok", record.message
        assert record.correctness is not None
        assert record.correctness.reference.split()[0] == (
            "pipe" if "sample" in name or "rebuilt" in name else "sample"
        )
        assert 0 < (record.correctness.error_after or 0) < 1e-5


def test_the_parts_of_every_sample_are_all_of_it(records: dict[str, Record]) -> None:
    for record in records.values():
        if record.status != "ok":
            assert record.parts is None
            continue
        assert record.parts is not None
        assert record.wall_ms is not None
        parts = [getattr(record.parts, part).samples for part in PARTS]
        for whole, *of_whole in zip(record.wall_ms.samples, *parts, strict=True):
            assert min(of_whole) > 0
            # The clock of the whole is read just outside.
            assert sum(of_whole) <= whole
        assert record.ms_per_step == record.parts.steps.p50 / 2
        for name in ("text_ms", "steps_ms", "decode_ms"):
            figure = METRICS[name].figure(record)
            assert figure is not None
            assert figure.samples == getattr(record.parts, name.removesuffix("_ms")).samples


# A module of each part, whose calls take a second where a test's clock says so.
SLOW = {
    "text": ("CLIPTextTransformer", "CLIPEncoder"),
    "steps": ("UNet2DConditionModel", "TimestepEmbedding", "Transformer"),
    "decode": ("Decoder", "Coder"),
}


@pytest.mark.parametrize("name", ["pipe", "sample"])
@pytest.mark.parametrize("slow", SLOW)
def test_what_a_part_takes_is_told_by_its_name(name: str, slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that stands still but in one part."""
    problem, now = problem_of(tiny_case()), 0.0

    def called(module: nn.Module, given: object) -> None:
        nonlocal now
        now += type(module).__name__ in SLOW[slow]

    monkeypatch.setattr(part_marks, "time", SimpleNamespace(perf_counter=lambda: now))
    trajectory: Any = all_subjects()["pipeline"].backends[name].build(problem)
    with register_module_forward_pre_hook(called):
        trajectory(problem.inputs(0))
    found = dict(trajectory.parts)
    assert found.pop(slow) > 0
    assert set(found.values()) == {0.0}


def test_a_graphed_step_gives_the_images_of_the_eager_one(run_again: Any) -> None:
    problem = problem_of(tiny_case(batch=2))
    eager, graphed = OurPipelineBackend().build(problem), OurPipelineBackend(graphs=run_again).build(problem)
    for number in (0, 1):
        assert graphed(problem.inputs(number)).equal(eager(problem.inputs(number)))


def test_every_backend_runs_on_the_same_weights_and_leaves_them() -> None:
    problem = problem_of(tiny_case())
    before = {name: value.clone() for name, value in problem.network.state_dict().items()}
    pipe = problem.network.pipeline("ddim")
    for theirs, ours in (
        (pipe.vae.decoder, problem.network.autoencoder.decoder),
        (pipe.unet, problem.network.unet),
    ):
        assert theirs.conv_in.weight.data_ptr() == ours.conv_in.weight.data_ptr()
    assert pipe.text_encoder is not problem.network.text
    for its, own in zip(pipe.text_encoder.parameters(), problem.network.text.parameters(), strict=True):
        assert its.data_ptr() == own.data_ptr()
    for backend in all_subjects()["pipeline"].backends.values():
        with suppress(Unsupported):
            backend.build(problem)(problem.inputs(0))
    assert not any("ldmperf" in type(module).__module__ for module in problem.network.text.modules())
    assert all(value.equal(before[name]) for name, value in problem.network.state_dict().items())


def test_a_wrong_decoder_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(self: Components, sampler: str) -> Any:
        pipe = pipeline(self, sampler)
        pipe.vae.register_to_config(scaling_factor=0.19)
        return pipe

    pipeline = Components.pipeline
    monkeypatch.setattr(Components, "pipeline", built)
    cases = [tiny_case(backend=name) for name in ("pipe", "sample")]
    made = profile(cases, rule=RepetitionRule(2, 0.0), subjects=all_subjects())
    assert [(record.status, record.wall_ms, record.parts) for record in made] == [("incorrect", None, None)] * 2


def test_prompts_are_read_as_clip_reads_texts() -> None:
    """Start, words, end; the end fills up; what is too long is cut, its end kept."""
    tokens = NumberTokenizer(SimpleNamespace(max_position_embeddings=5, eos_token_id=63))
    assert tokens(["7", "", "1 2 3 4 5"], padding="max_length").input_ids.tolist() == [
        [62, 7, 63, 63, 63],
        [62, 63, 63, 63, 63],
        [62, 1, 2, 3, 63],
    ]
    assert tokens("7").input_ids.tolist() == [[62, 7, 63]]


def test_the_shape_is_that_of_stable_diffusion() -> None:
    """Parameters that its releases have: text encoder, UNet, autoencoder."""
    with torch.device("meta"):
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**PIPELINES["SD1.5"].text))
        networks = (text, UNet(PIPELINES["SD1.5"].unet), Autoencoder(PIPELINES["SD1.5"].autoencoder))
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [123_060_480, 859_520_964, 83_653_863]


def test_options_choose_pipelines() -> None:
    (case, *others) = select_cases("pipelines", {})
    assert case.key.startswith("unet=SD1.5 task=pipeline sampler=ddim steps=20 batch=1 guidance=7.5 dtype=float16")
    assert tuple(of.backend for of in (case, *others)) == PIPELINE_BACKENDS
    made = select_cases("cpu", {"task": ["pipeline"], "size": ["SD1.5"], "steps": ["2"]})
    assert tuple(of.backend for of in made) == PIPELINE_BACKENDS
    for task, backend in (("pipeline", "torch"), ("t2i", "pipe"), ("t2i,pipeline", "pipe")):
        with pytest.raises(CaseError, match=rf"--backend: {backend} does not run task \w+; choose from "):
            select_cases("cpu", {"task": [task], "backend": [backend]})
    for choices in ({}, {"size": ["39M"]}, {"size": ["SD1.5,SDXL"]}):
        with pytest.raises(CaseError, match=r"--task pipeline: no pipeline of \w+; give --size SD1\.5"):
            select_cases("cpu", {"task": ["pipeline"], **choices})
    assert set(PIPELINES) - {"tiny"} == set(PIPELINE_NAMES)
    with pytest.raises(Unsupported, match=r"no pipeline of 39M; choose --size SD1\.5"):
        problem_of(tiny_case(unet="39M"))
    with pytest.raises(Unsupported, match="ddpm draws some"):
        problem_of(tiny_case(sampler="ddpm"))
    assert decoder_case(case) is None


def test_reports_have_a_table_of_their_own(records: dict[str, Record]) -> None:
    shown = overview(list(records.values()))
    assert not shown.rows
    assert len(shown.pipelines) == len(PIPELINE_BACKENDS)
    lines = markdown_table(shown).splitlines()
    (title,) = (line for line in lines if line.startswith("Pipelines ("))
    assert "float32, from a prompt to an image, ddim, 2 steps, batch 2, guidance 7.5, latent 8x8" in title
    heads = next(line for line in lines if line.startswith("| pipeline |")).split(" | ")
    assert [head for head in heads if head in PARTS] == list(PARTS)
    (pipe,) = (line.split(" | ") for line in lines if "| pipe |" in line)
    wall, parts = records["pipe"].wall_ms, records["pipe"].parts
    assert wall is not None
    assert parts is not None
    assert float(pipe[heads.index("ms")].split("\\")[0]) == pytest.approx(wall.p50, rel=0.01)
    assert float(pipe[heads.index("decode")]) == pytest.approx(parts.decode.p50, rel=0.01)
    assert pipe[heads.index("speed")] == "1.00x"


def test_an_older_record_has_no_parts(make_record: Any) -> None:
    record = make_record()
    line = record.model_dump(mode="json")
    del line["parts"]
    assert Record.model_validate_json(json.dumps(line)) == record
    assert METRICS["text_ms"].figure(record) is None


def test_each_implementation_is_checked_against_the_other() -> None:
    problem: Any = SimpleNamespace(case=SimpleNamespace(dtype="float16"))
    (ours, *_), theirs = (PipelineProblem.references(problem, name) for name in ("sample", "pipe"))
    assert ours == ("pipe", torch.float32)
    assert theirs == (("sample", torch.float32),)
