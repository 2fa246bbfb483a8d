"""Rivals: their networks against diffusers' own pipelines and published sizes, and as cases like all others."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from ldmperf.profiling import Case, Record, load_records, profile
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.measure.turn import TURNS
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.rivals import decoding
from ldmperf.profiling.rivals.decoding import decoder_case
from ldmperf.profiling.rivals.kind import RivalInputs
from ldmperf.profiling.rivals.masked_transformer import MaskedTransformer, along_directions
from ldmperf.profiling.rivals.rival import (
    DECODERS,
    KINDS,
    RIVAL_BACKENDS,
    RIVALS,
    GanShape,
    Rival,
    TransformerShape,
    VaeDecoderShape,
    VqDecoderShape,
)
from ldmperf.profiling.rivals.rival_backends import RivalBackend, rival_backends
from ldmperf.profiling.rivals.rival_problem import RivalProblem, kind_of
from ldmperf.profiling.rivals.rival_selection import cases_beside, rival_names
from ldmperf.profiling.rivals.subjects import RivalSubject, all_subjects
from ldmperf.profiling.sweep.child_end import ParentPipe
from ldmperf.profiling.sweep.events import Event
from ldmperf.profiling.sweep.group_child import measure_group
from ldmperf.profiling.sweep.group_task import GroupTask
from ldmperf.profiling.sweep.local import Workers
from ldmperf.profiling.trajectory.backend import Trajectory
from ldmperf.profiling.trajectory.network import Networks

pytestmark = pytest.mark.usefixtures("_one_thread")

TINY = {
    "vae-decoder-tiny": Rival("vae-decoder", VaeDecoderShape((16, 32, 32, 32), 1, 8)),
    "gan-tiny": Rival("gan", GanShape(1024, 32, 32, 2)),
    "masked-transformer-tiny": Rival(
        "masked-transformer",
        TransformerShape(64, 2, 2, 96, 32, 2, 1, text_dim=32, codebook=120, vocabulary=128),
        4,
        10.0,
        "tokens",
        "vq-decoder-tiny",
    ),
}
TINY_DECODERS = {"vq-decoder-tiny": Rival("vq-decoder", VqDecoderShape((16, 16, 16, 16, 16), 1, 8, 8, 120))}
ONCE = RepetitionRule(1, 0.0)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny sizes beside the real ones, and a tiny decoder of the family's latents."""
    for name, rival in TINY.items():
        monkeypatch.setitem(RIVALS, name, rival)  # type: ignore[arg-type]
    for name, rival in (TINY_DECODERS | TINY).items():
        monkeypatch.setitem(DECODERS, name, rival)  # type: ignore[arg-type]
    monkeypatch.setattr(decoding, "LATENT_DECODER", "vae-decoder-tiny")


class _Ear:
    """In place of a child's end of the pipe: keeps what is said."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def say(self, message: object) -> None:
        self.heard.append(message)


def in_this_process(task: GroupTask) -> Generator[Event, None, None]:
    """Does a task where the tiny rivals are known."""
    ear = _Ear()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TURNS, "on_wait", TURNS.on_wait)
        measure_group(cast(ParentPipe, ear), task)
    yield from (message for message in ear.heard if isinstance(message, get_args(Event)))


HERE = Workers(in_this_process)


def rival_case(name: str, **changes: Any) -> Case:
    rival = RIVALS.get(name) or DECODERS[name]
    fields: dict[str, Any] = {
        "unet": name, "task": "rival", "sampler": "none", "steps": rival.steps, "backend": "eager",
        "guidance_scale": rival.guidance_scale or 1.0, "context_tokens": 7 if rival.guidance_scale else 0,
        "latent_height": 8, "latent_width": 8, "batch": 2,
    }  # fmt: skip
    return Case(**(fields | changes))


def problem_of(case: Case) -> RivalProblem:
    problem, _ = Networks(all_subjects()).problem(case)
    assert isinstance(problem, RivalProblem)
    return problem


def test_every_kind_has_two_sizes_of_the_parameters_in_their_names() -> None:
    """Counted on meta; Stable Diffusion's decoder has 49.5M, aMUSEd-512 608M."""
    real = {name: rival for name, rival in RIVALS.items() if name not in TINY}
    assert {kind: sum(rival.kind == kind for rival in real.values()) for kind in KINDS} == dict.fromkeys(KINDS, 2)
    counts = {}
    for name in (*real, "vq-decoder-88M"):
        case = rival_case(name, latent_height=64, latent_width=64, batch=1)
        with torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in kind_of(case).network(case).parameters())
        assert abs(counts[name] / 1e6 - int(name.rpartition("-")[2].removesuffix("M"))) < 0.6
        assert 30e6 < counts[name] < 866e6
    assert counts["vae-decoder-50M"] == 49_490_199
    assert counts["masked-transformer-608M"] == 608_257_792


def test_flops_are_counted_for_one_image_alone_without_guidance() -> None:
    """2 FLOPs for each multiply-add: SD's decoder of a 64x64 latent takes 2.5 TFLOP, counted by itself."""
    subject = RivalSubject()
    alone = subject.gflop(rival_case("vae-decoder-50M", latent_height=64, latent_width=64, batch=1))
    assert alone == pytest.approx(2514.519, rel=1e-5)
    for name in TINY:
        case = rival_case(name, batch=1, guidance_scale=1.0)
        wide = case.model_copy(update={"batch": 3, "dtype": "bfloat16", "seed": 5})
        assert subject.gflop(case) == subject.gflop(wide) == problem_of(wide).gflop
        assert (subject.gflop(case) or 0) > 0
    assert subject.gflop(rival_case("gan-tiny", latent_width=16)) is None


def test_what_a_floor_rests_on_is_of_the_whole_batch_with_guidance() -> None:
    """FLOPs and weights of convolutions and of all else; in what nobody undercuts convolutions at a quarter."""
    for name in TINY:
        problem = problem_of(rival_case(name, batch=3))
        convolutions, others = problem.step_parts()
        samples = problem.case.model_batch
        assert samples == 3 * (2 if name.startswith("masked") else 1)
        flops = convolutions.launch.flops + others.launch.flops
        assert flops == pytest.approx(samples * problem.gflop * 1e9)
        assert convolutions.least_flops == convolutions.launch.flops / 4
        assert others.least_flops == others.launch.flops
        assert convolutions.launch.flops > 0
        # All weights but those of embeddings, of which few rows are read.
        embedded = sum(m.weight.numel() for m in problem.network.modules() if isinstance(m, torch.nn.Embedding))
        nbytes = convolutions.launch.nbytes + others.launch.nbytes
        assert nbytes == 4 * (problem.parameters - embedded)
        assert 0 < convolutions.launch.nbytes < nbytes
    # The mapping network and the styles are linear layers; the rest of a GAN convolves.
    gan = problem_of(rival_case("gan-tiny", batch=1))
    linear = [module for module in gan.network.modules() if isinstance(module, torch.nn.Linear)]
    assert gan.step_parts()[1].launch.flops >= sum(2 * layer.weight.numel() for layer in linear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_a_rival_is_measured_and_checked_as_every_case_is(name: str, dtype: str) -> None:
    case = rival_case(name, dtype=dtype)
    (record,) = profile([case], rule=RepetitionRule(2, 0.0), subjects=all_subjects())
    assert record.status == "ok", record.message
    assert record.correctness is not None
    assert record.correctness.reference == ("eager float64" if dtype == "float32" else "eager float32")
    # Rounding shows: a thing compared with itself would give exactly zero.
    assert 0 < (record.correctness.error_before or 0) < record.correctness.tolerance
    assert record.correctness.error_after == record.correctness.error_before
    assert record.wall_ms is not None
    assert (record.wall_ms.n, record.evaluations) == (2, TINY[name].steps)
    assert record.parameters == sum(parameter.numel() for parameter in problem_of(case).network.parameters())


@pytest.mark.parametrize("name", TINY)
def test_results_are_of_order_one_and_depend_on_the_inputs(name: str) -> None:
    problem = problem_of(rival_case(name))
    trajectory = RivalBackend().build(problem)
    result = trajectory(problem.check_inputs())
    assert 0.1 < float(result.float().std()) < 20
    assert torch.equal(trajectory(problem.check_inputs()), result)
    first, second = trajectory(problem.inputs(0)), trajectory(problem.inputs(1))
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    # Each image of a batch has its own.
    assert not torch.equal(first[0], first[1])


@dataclass
class Spoiled:
    """The eager backend on a network with one parameter changed."""

    change: Callable[[Tensor], Tensor]
    which: int
    implementation = "eager"

    def build(self, problem: RivalProblem) -> Trajectory:
        network = copy.deepcopy(problem.network)
        parameter = list(network.parameters())[self.which]
        parameter.data = self.change(parameter.data)
        return RivalBackend().build(problem.with_network(network))


@pytest.mark.parametrize("which", [0, -1], ids=["first weights", "last weights"])
@pytest.mark.parametrize("name", TINY)
def test_a_wrong_weight_is_incorrect_and_has_no_time(name: str, which: int) -> None:
    backends = {"eager": RivalBackend(), "spoiled": Spoiled(lambda weight: weight.roll(1, 0), which)}
    case = rival_case(name, backend="spoiled")
    (record,) = profile([case], rule=ONCE, subjects=all_subjects(), backends=backends)
    assert (record.status, record.wall_ms) == ("incorrect", None)


def test_the_compiled_backends_need_a_gpu_and_say_so() -> None:
    assert tuple(rival_backends()) == RIVAL_BACKENDS
    cases = [rival_case("gan-tiny", backend=backend) for backend in RIVAL_BACKENDS]
    records = {r.case.backend: r for r in profile(cases, rule=ONCE, subjects=all_subjects())}
    assert [records[name].status for name in RIVAL_BACKENDS] == ["ok", "unsupported", "unsupported"]
    assert "needs a CUDA device" in (records["compile-max"].message or "")
    assert "conv_1x1_as_mm=True" in records["compile-max"].settings


@pytest.mark.parametrize("name", ["gan-tiny", "masked-transformer-tiny"])
def test_a_network_is_one_graph_for_torch_compile(name: str) -> None:
    """fullgraph raises at a break; the same trajectory, its network traced, gives the same numbers."""
    problem = problem_of(rival_case(name))
    traced = torch.compile(problem.network, backend="eager", fullgraph=True, dynamic=False)
    inputs = problem.check_inputs()
    with torch.no_grad():
        result = problem.kind.trajectory(traced, problem.case)(inputs)
    torch.testing.assert_close(result, RivalBackend().build(problem)(inputs), rtol=1e-4, atol=1e-4)


def test_the_masked_transformer_draws_the_tokens_of_diffusers_own_pipeline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pipeline's own loop, which takes of transformers, not installed here, the names of two classes alone."""
    import diffusers

    names = SimpleNamespace(CLIPTextModelWithProjection=object, CLIPTokenizer=object)
    monkeypatch.setitem(sys.modules, "transformers", names)  # type: ignore[arg-type]
    source = importlib.import_module("diffusers.pipelines.deprecated.amused.pipeline_amused")
    case = rival_case("masked-transformer-tiny", batch=2)
    problem = problem_of(case)
    kind = problem.kind
    assert isinstance(kind, MaskedTransformer)
    inputs = problem.inputs(3)
    pipeline = SimpleNamespace(
        transformer=problem.network.network,
        scheduler=diffusers.AmusedScheduler(mask_token_id=kind.mask_token),
        vae_scale_factor=16,
        _execution_device="cpu",
        progress_bar=lambda total: nullcontext(SimpleNamespace(update=lambda: None)),
        maybe_free_model_hooks=lambda: None,
    )
    (no_text, text), (no_pooled, pooled) = (
        inputs.arguments[name].chunk(2) for name in ("encoder_hidden_states", "pooled_text_emb")
    )
    theirs = source.AmusedPipeline.__call__(
        pipeline, prompt_embeds=pooled, encoder_hidden_states=text, negative_prompt_embeds=no_pooled,
        negative_encoder_hidden_states=no_text, height=64, width=64, num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale, output_type="latent",
        generator=torch.Generator().manual_seed(inputs.seeds[0]),
    ).images  # fmt: skip
    ours = RivalBackend().build(problem)(inputs)
    assert torch.equal(ours, theirs)
    assert int(ours.max()) < kind.shape.codebook


def test_the_check_of_a_masked_transformer_masks_as_its_schedule_does() -> None:
    case = rival_case("masked-transformer-tiny", latent_height=128, latent_width=128, steps=12)
    kind = kind_of(case)
    tokens = kind.tokens(case)
    assert tokens is not None
    shares = [float((tokens(step) == 127).float().mean()) for step in range(case.steps)]
    assert shares[0] == 1.0
    expected = torch.cos(0.5 * torch.pi * torch.arange(12) / 12)
    torch.testing.assert_close(torch.tensor(shares), expected, atol=0.02, rtol=0)
    assert torch.equal(tokens(3), tokens(3))


def test_the_directions_show_an_error_in_any_logit() -> None:
    logits = torch.randn(1, 8192, 2, 2, dtype=torch.float64)
    other = logits.clone()
    other[:, 5000] += 10.0
    near = along_directions(other) - along_directions(logits)
    # A random projection keeps lengths: the relative error is that of the logits themselves.
    measured = float(near.square().mean().sqrt() / along_directions(logits).square().mean().sqrt())
    exact = float((other - logits).square().mean().sqrt() / logits.square().mean().sqrt())
    assert measured == pytest.approx(exact, rel=0.3)


def test_decoders_are_those_of_diffusers_autoencoders() -> None:
    import diffusers

    for name, autoencoder in (
        ("vae-decoder-tiny", diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=8)),
        ("vq-decoder-tiny", diffusers.VQModel(
            block_out_channels=(16,) * 5, down_block_types=("DownEncoderBlock2D",) * 5,
            up_block_types=("UpDecoderBlock2D",) * 5, layers_per_block=1, latent_channels=8, num_vq_embeddings=120,
            norm_num_groups=8, mid_block_add_attention=False, lookup_from_codebook=True)),
    ):  # fmt: skip
        problem = problem_of(rival_case(name))
        weights = problem.network.state_dict()
        renamed = {k.replace("embedding.", "quantize.embedding."): v for k, v in weights.items()}
        missing, unexpected = autoencoder.load_state_dict(renamed, strict=False)
        assert not unexpected
        assert all(key.startswith(("encoder.", "quant_conv.")) for key in missing)
        inputs = problem.inputs(0)
        (given,) = inputs.arguments.values()
        options = {"force_not_quantize": True, "shape": (*given.shape, 8)} if name.startswith("vq") else {}
        with torch.no_grad():
            theirs = autoencoder.eval().decode(given, **options).sample
        assert theirs.shape == (2, 3, 64, 64)
        torch.testing.assert_close(RivalBackend().build(problem)(inputs), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "latent", "words"),
    [
        ("gan-tiny", (8, 16), "square images"),
        ("gan-tiny", (12, 12), "power of two"),
        ("masked-transformer-tiny", (6, 8), "multiples of 32 pixels"),
        ("gan-1T", (8, 8), "no rival 'gan-1T'"),
    ],
)
def test_an_image_that_a_rival_cannot_make_is_unsupported(name: str, latent: tuple[int, int], words: str) -> None:
    fields = {
        "unet": name,
        "task": "rival",
        "sampler": "none",
        "steps": 1,
        "backend": "eager",
        "guidance_scale": 1.0,
    }
    case = Case(**fields, latent_height=latent[0], latent_width=latent[1])
    (record,) = profile([case], rule=ONCE, subjects=all_subjects())
    assert record.status == "unsupported"
    assert words in (record.message or "")


def test_without_diffusers_its_rivals_are_unsupported_and_the_gan_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    records = profile([rival_case(name) for name in TINY], rule=ONCE, subjects=all_subjects())
    found = {record.case.unet: (record.status, record.message) for record in records}
    assert found["gan-tiny"] == ("ok", None)
    for name in ("vae-decoder-tiny", "masked-transformer-tiny"):
        assert found[name][0] == "unsupported"
        assert "pip install" in (found[name][1] or "")
    with pytest.raises(CaseError, match="--with-decoder: diffusers is not installed"):
        decoding.check_decoders()


def test_a_rival_without_its_subject_is_unsupported() -> None:
    (record,) = profile([rival_case("gan-tiny")], rule=ONCE, backends=dict(rival_backends()))
    assert record.status == "unsupported"


def test_inputs_widen_their_real_numbers_alone() -> None:
    inputs = RivalInputs({"z": torch.zeros(1), "input_ids": torch.zeros(1, dtype=torch.long)}, (0,))
    widened = inputs.to(torch.float64).arguments
    assert (widened["z"].dtype, widened["input_ids"].dtype) == (torch.float64, torch.long)


def test_kinds_stand_for_their_sizes_and_sizes_for_themselves() -> None:
    assert rival_names(["gan-397M,gan-30M", "gan-30M"]) == ("gan-397M", "gan-30M")
    assert rival_names(["gan"])[:2] == ("gan-30M", "gan-397M")
    for wrong, words in (([""], "no value given"), (["vae"], "no rival 'vae'")):
        with pytest.raises(CaseError, match=words):
            rival_names(wrong)


def test_rivals_take_the_conditions_and_no_steps_of_the_sweep() -> None:
    choices = {
        "size": ["39M"], "steps": ["4,50"], "batch": ["1,2"], "dtype": ["bf16"], "tokens": ["77,154"],
        "guidance": ["1,3"], "rival": ["gan-30M,masked-transformer-47M"],
    }  # fmt: skip
    cases = cases_beside("cpu", choices, is_preset_given=False)
    family = [case for case in cases if case.task != "rival"]
    assert {(case.unet, case.steps) for case in family} == {("39M", 4), ("39M", 50)}
    gan = [case for case in cases if case.unet == "gan-30M"]
    assert [(c.batch, c.steps, c.guidance_scale, c.context_tokens, c.backend) for c in gan] == [
        (1, 1, 1.0, 0, "eager"), (2, 1, 1.0, 0, "eager"),
    ]  # fmt: skip
    masked = [case for case in cases if case.unet.startswith("masked")]
    assert {(c.batch, c.steps, c.guidance_scale, c.context_tokens) for c in masked} == {
        (batch, 12, scale, tokens) for batch in (1, 2) for scale in (1.0, 3.0) for tokens in (77, 154)
    }
    assert {case.dtype for case in cases} == {"bfloat16"}
    assert len({case.key for case in cases}) == len(cases)


def test_rivals_alone_leave_the_family_out_and_refuse_its_options() -> None:
    alone = cases_beside("cpu", {"rival": ["gan"]}, is_preset_given=False)
    assert {case.task for case in alone} == {"rival"}
    assert {case.task for case in cases_beside("cpu", {"rival": ["gan"]}, is_preset_given=True)} == {
        "t2i",
        "rival",
    }
    (masked,) = cases_beside("cpu", {"rival": ["masked-transformer-608M"]}, is_preset_given=False)
    assert (masked.steps, masked.guidance_scale, masked.context_tokens) == (12, 10.0, 77)
    for option in ("steps", "sampler", "task", "backend"):
        value = {"steps": "3", "sampler": "ddim", "task": "sr", "backend": "torch"}[option]
        with pytest.raises(CaseError, match=f"--{option}: rivals do not take it"):
            cases_beside("cpu", {"rival": ["gan"], option: [value]}, is_preset_given=False)
    with pytest.raises(CaseError, match="--rival-backend: no rival is measured"):
        cases_beside("cpu", {"rival-backend": ["eager"]}, is_preset_given=False)


def test_on_a_gpu_the_compiled_backend_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cases = cases_beside("gpu", {"rival": ["gan-30M"], "batch": ["1"]}, is_preset_given=False)
    assert [case.backend for case in cases] == ["eager", "compile"]


def test_only_a_rival_has_no_text() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Case(unet="39M", context_tokens=0)


def decoded(case: Case, **options: Any) -> Record:
    (record,) = profile(
        [case], rule=RepetitionRule(2, 0.0), subjects=all_subjects(), decoder=decoder_case, **options
    )
    assert record.status == "ok", record.message
    return record


def family_case(checkpoint: Path, **changes: Any) -> Case:
    fields: dict[str, Any] = {"unet": str(checkpoint), "steps": 1, "latent_height": 8, "latent_width": 8}
    return Case(**(fields | changes))


def test_the_decoder_is_timed_where_a_sample_is_no_image(tiny_checkpoint: Path) -> None:
    family = decoded(family_case(tiny_checkpoint))
    assert family.decoder_ms is not None
    assert family.decoder_ms.n == 2
    assert decoded(rival_case("masked-transformer-tiny", batch=1)).decoder_ms is not None
    assert decoded(rival_case("gan-tiny")).decoder_ms is None
    assert decoder_case(Case(unet="39M", batch=3, dtype="float16")) == rival_case(
        "vae-decoder-tiny", batch=3, dtype="float16", latent_height=64, latent_width=64
    )


def test_a_decode_is_measured_once_for_all_cases_that_share_it(tiny_checkpoint: Path) -> None:
    cases = [family_case(tiny_checkpoint, steps=steps, batch=batch) for steps, batch in ((1, 1), (2, 1), (1, 2))]
    first, second, wider = profile(cases, rule=ONCE, subjects=all_subjects(), decoder=decoder_case)
    assert first.decoder_ms == second.decoder_ms
    assert first.decoder_ms != wider.decoder_ms


def test_a_wrong_decoder_has_no_time(tiny_checkpoint: Path) -> None:
    class Wrong(RivalSubject):
        @property
        def backends(self) -> dict[str, Any]:
            # Right for its reference, whose network is wider.
            return {"eager": OffByTwo()}

    class OffByTwo(RivalBackend):
        def build(self, problem: RivalProblem) -> Trajectory:
            right = super().build(problem)
            is_wide = next(problem.network.parameters()).dtype == torch.float64
            return right if is_wide else lambda inputs: 2 * right(inputs)

    given = {**all_subjects(), "rival": Wrong()}
    with pytest.warns(UserWarning, match="no time of vae-decoder-tiny: incorrect"):
        (record,) = profile([family_case(tiny_checkpoint)], rule=ONCE, subjects=given, decoder=decoder_case)
    assert (record.status, record.decoder_ms) == ("ok", None)


def test_the_command_measures_rivals_beside_the_family_and_goes_on(
    run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    beside = ("--rival", ",".join(TINY), "--with-decoder", "--latent", "8", "--min-count", "1", "--out", tmp_path)
    done = run("profile", "--unet", tiny_checkpoint, "--steps", "1", "--backend", "torch", *beside, workers=HERE)
    assert done.code == 0, done.err
    assert "Rivals beside the family" in done.out
    assert "decoder" in done.out
    (folder,) = tmp_path.iterdir()
    records, rejected = load_records(folder)
    assert (len(records), rejected) == (4, 0)
    assert json.loads((folder / "run.json").read_text())["with_decoder"] is True
    assert ">Rivals</h2>" in (folder / "report.html").read_text()
    # Gone on with after a stop, decoders and all.
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(line for line in lines if '"task":"rival"' in line))
    again = run("profile", "--resume", folder, workers=HERE)
    assert again.code == 0, again.err
    assert next(r for r in load_records(folder)[0] if r.case.task == "t2i").decoder_ms is not None


def test_the_command_with_rivals_alone_reports_them_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    alone = ("--rival", "gan-tiny", "--latent", "8", "--min-count", "1", "--out", tmp_path)
    done = run("profile", *alone, workers=HERE)
    assert done.code == 0, done.err
    assert "gan-tiny" in done.out
    assert "cost" not in done.out
    (folder,) = tmp_path.iterdir()
    assert "Cost per size" not in (folder / "report.html").read_text()
    refused = run("profile", "--resume", folder, "--with-decoder")
    assert refused.code == 2
    assert "begun without --with-decoder" in refused.err
