"""Cases: keys, presets, and the sweep from options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ldmperf.model import FAMILY, RELEASED
from ldmperf.profiling import Case
from ldmperf.profiling.options import CaseError, split_values
from ldmperf.profiling.trajectory.case import BACKENDS, RELEASED_NAMES, RUNGS
from ldmperf.profiling.trajectory.case_options import OPTIONS, Choices, split_paths
from ldmperf.profiling.trajectory.presets import PRESETS, check_devices, select_cases
from ldmperf.profiling.trajectory.rungs import all_backends
from ldmperf.samplers import SAMPLERS


def test_the_key_of_schema_1_never_changes() -> None:
    case = Case(unet="39M", steps=3)
    assert case.key == (
        "unet=39M task=t2i sampler=ddim steps=3 batch=1 guidance=7.5 dtype=float32 device=cpu "
        "latent=64x64 tokens=77 seed=0 backend=torch"
    )


def test_keys_tell_apart_what_is_not_equal() -> None:
    base = Case(unet="39M")
    others = [
        base.model_copy(update=change)
        for change in (
            {"unet": "83M"}, {"weights_sha256": "0" * 64}, {"task": "sr"},
            {"sampler": "ddpm"}, {"steps": 5}, {"batch": 2},
            {"guidance_scale": 2.0}, {"dtype": "float16"}, {"device": "cuda"}, {"latent_height": 32},
            {"latent_width": 32}, {"context_tokens": 154}, {"seed": 1}, {"backend": "diffusers"},
        )
    ]  # fmt: skip
    assert len(others) == len(Case.model_fields)
    assert len({case.key for case in [base, *others]}) == len(others) + 1
    # The backend alone is not in the group's key.
    assert len({case.group_key for case in [base, *others]}) == len(others)
    assert len({base, *others, Case(unet="39M")}) == len(others) + 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": 1001}, {"batch": 0}, {"guidance_scale": 0.5}, {"guidance_scale": float("nan")},
        {"dtype": "int8"}, {"device": "tpu"}, {"task": "video"}, {"unet": ""}, {"size": "39M"},
    ],
)  # fmt: skip
def test_impossible_cases_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Case(**({"unet": "39M"} | wrong))


def test_guidance_doubles_the_model_batch() -> None:
    assert Case(unet="39M", batch=3).model_batch == 6
    assert Case(unet="39M", batch=3, guidance_scale=1.0).model_batch == 3


def test_the_backends_named_are_those_there_are() -> None:
    assert tuple(all_backends()) == BACKENDS


def test_presets_cover_the_family() -> None:
    cpu = select_cases("cpu", Choices())
    assert {case.unet for case in cpu} == {"39M", "83M", "145M"}
    assert {case.backend for case in cpu} == {"torch", "diffusers"}
    assert {(case.sampler, case.guidance_scale, case.dtype, case.batch) for case in cpu} == {
        ("ddim", 7.5, "float32", 1)
    }
    assert len({case.steps for case in cpu if case.unet == "39M"}) >= 3
    gpu = [case for sweep in PRESETS["gpu"].sweeps for case in sweep.cases()]
    assert {case.unet for case in gpu} == set(FAMILY)
    assert {case.batch for case in gpu} == {1, 8}
    assert {(case.steps, case.dtype, case.device) for case in gpu} == {(50, "bfloat16", "cuda")}
    assert {case.backend for case in gpu} == {"graph", "torch", "diffusers"}
    assert len(gpu) == len(set(gpu)) == 11 * 2 * 3
    telling, all_of_it = (
        [case for sweep in PRESETS[name].sweeps for case in sweep.cases()] for name in ("family", "family-all")
    )
    # Cut short anywhere it has the ends of the curve before its middle.
    sizes = [case.unet for case in telling[: 2 * 11 : 2]]
    assert sizes[:5] == ["866M", "39M", "5B", "318M", "2B"]
    assert [case.unet for case in telling[1 : 2 * 11 : 2]] == sizes
    assert len(set(sizes)) == len(FAMILY)
    assert set(sizes) == {case.unet for case in all_of_it} == set(FAMILY)
    assert list(dict.fromkeys(case.unet for case in all_of_it)) == sizes
    assert set(telling) < set(all_of_it)
    assert {(case.batch, case.sampler, case.steps) for case in all_of_it} == {
        (batch, sampler, steps)
        for batch in (1, 4, 16)
        for sampler in ("ddim", "ddpm", "dpmpp_2m")
        for steps in (4, 20, 50)
    }
    assert len(set(all_of_it)) == 11 * 27 * 2
    ladder = [case for sweep in PRESETS["ladder"].sweeps for case in sweep.cases()]
    assert [case.backend for case in ladder[: len(RUNGS)]] == list(RUNGS)
    assert {(case.batch, case.steps, case.guided, case.dtype) for case in ladder} == {(1, 20, True, "bfloat16")}
    assert len(ladder) == len(set(ladder)) == 4 * len(RUNGS)


def test_the_drop_in_is_measured_beside_what_it_replaces_at_the_sizes_that_releases_were_made_for() -> None:
    assert tuple(RELEASED) == RELEASED_NAMES
    cases = [case for sweep in PRESETS["drop-in"].sweeps for case in sweep.cases()]
    assert [(case.unet, case.latent_height, case.backend) for case in cases] == [
        (unet, latent, backend)
        for unet, latent in (("SD1.5", 64), ("SDXL", 128))
        for backend in ("diffusers", "diffusers-accelerated", "graph")
    ]
    # Each network's cases are one group, measured in turn on the same weights and inputs.
    assert len({case.group_key for case in cases}) == 2
    assert not any(case.is_checkpoint for case in cases)


def test_a_preset_for_a_gpu_says_that_none_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for preset in ("gpu", "ladder", "family", "family-all", "drop-in"):
        cases = select_cases(preset, Choices())
        with pytest.raises(CaseError, match=f"--preset {preset} needs a GPU and cuda is not here"):
            check_devices(preset, cases)
        check_devices(preset, select_cases(preset, Choices(device=["cpu"])))
    for choices in (Choices(), Choices(device=["cpu"])):
        with pytest.raises(CaseError, match=r"--preset pipelines .*--task pipeline --size SD1\.5 --device cpu"):
            check_devices("pipelines", select_cases("pipelines", choices))
    check_devices("pipelines", select_cases("pipelines", Choices(device=["cpu"], dtype=["float32"])))
    check_devices("cpu", select_cases("cpu", Choices()))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_devices("ladder", select_cases("ladder", Choices(dtype=["float16"])))


def test_options_replace_the_presets_lists_and_multiply() -> None:
    cases = select_cases(
        "cpu", Choices(size=["39M, 866M", "5B"], steps=["4,20"], sampler=["ddim", "ddpm"], backend=["torch"])
    )
    assert len(cases) == len(set(cases)) == 3 * 2 * 2
    assert {case.unet for case in cases} == {"39M", "866M", "5B"}
    assert {(case.sampler, case.steps) for case in cases} == {
        ("ddim", 4), ("ddim", 20), ("ddpm", 4), ("ddpm", 20)
    }  # fmt: skip


def test_super_resolution_samples_without_guidance_unless_told() -> None:
    both = select_cases("cpu", Choices(size=["39M"], task=["t2i,sr"], steps=["3"]))
    assert {(case.task, case.guidance_scale) for case in both} == {("t2i", 7.5), ("sr", 1.0)}
    told = select_cases("cpu", Choices(size=["39M"], task=["sr"], steps=["3"], guidance=["2"]))
    assert {case.guidance_scale for case in told} == {2.0}


def test_latent_sizes_are_a_list_of_the_sweep() -> None:
    cases = select_cases("cpu", Choices(size=["39M"], latent=["64x96,128", "64"], steps=["2"], backend=["torch"]))
    assert [(case.latent_height, case.latent_width) for case in cases] == [(64, 96), (128, 128), (64, 64)]


def test_context_lengths_and_seeds_are_lists_of_the_sweep() -> None:
    """Seeds vary slower than lengths: a size's weights are made anew for each."""
    cases = select_cases("cpu", Choices(size=["39M"], tokens=["1,154"], seed=["0", f"{2**64 - 1}"], steps=["2"]))
    assert [(case.seed, case.context_tokens, case.backend) for case in cases] == [
        (seed, tokens, backend)
        for seed in (0, 2**64 - 1)
        for tokens in (1, 154)
        for backend in ("torch", "diffusers")
    ]
    assert {(case.context_tokens, case.seed) for case in select_cases("cpu", Choices(size=["39M"]))} == {(77, 0)}


PATHS = st.sampled_from(["a", "b", "a,b", "b,a", "a,", ",b", "a,,b", "b,a,b"])


@given(files=st.sets(PATHS, max_size=4), value=st.lists(PATHS, min_size=1, max_size=2).map(",".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_paths_are_split_at_commas_that_are_in_none_of_them(
    tmp_path_factory: pytest.TempPathFactory, files: set[str], value: str
) -> None:
    folder, before = tmp_path_factory.mktemp("files"), Path.cwd()
    for name in files:
        (folder / name).touch()
    os.chdir(folder)
    try:
        found = split_paths([value, value])
    finally:
        os.chdir(before)
    assert found == found[: len(found) // 2] * 2
    assert split_values(found) == split_values([value, value])
    assert value not in files or found == [value, value]
    assert all(path in files or "," not in path for path in found)
    assert any("," in name for name in files) or found == split_values([value, value])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/models--some-org--sdxl-base/snapshots/462165984030d82259a11f4367a4", "some-org/sdxl-base"),
        ("hub/models--gpt2/snapshots/0123abc/unet", "gpt2/unet"),
        ("hub/models--a--b/snapshots/0123abc/unet/diffusion_pytorch_model.safetensors",
         "a/b/unet/diffusion_pytorch_model.safetensors"),
        ("hub/models--a--b/snapshots/0123abc/sd.safetensors", "sd.safetensors"),
        ("snapshots/mine", "mine"),
    ],
)  # fmt: skip
def test_a_snapshot_in_the_cache_of_hugging_face_has_the_repositorys_name(path: str, name: str) -> None:
    assert Case(unet=f"/{path}").label == name


def test_a_checkpoint_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    cases = select_cases("cpu", Choices(unet=["mine"], steps=["2"], backend=["torch"]))
    assert [(case.unet, case.label, case.is_checkpoint) for case in cases] == [
        (str(tmp_path / "mine"), "mine", True)
    ]
    (tmp_path / "mine,too").mkdir()
    cases = select_cases("cpu", Choices(unet=["mine,too, mine", "~/mine"], steps=["2"], backend=["torch"]))
    assert [case.label for case in cases] == ["mine,too", "mine"]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (Choices(size=["7M"]), "39M, 83M"),
        (Choices(sampler=["dimm"]), ", ".join(SAMPLERS)),
        (Choices(steps=["0"]), "from 1 to 1000"),
        (Choices(steps=["two"]), "from 1 to 1000"),
        (Choices(batch=["-1"]), "from 1 to"),
        (Choices(guidance=["nan"]), "at least 1"),
        (Choices(dtype=["int8"]), "float32, bfloat16, float16"),
        (Choices(device=["tpu"]), "cpu, cuda"),
        (Choices(device=["cuda:99"]), "choose cpu"),
        (Choices(backend=["tensorrt"]), ", ".join(BACKENDS)),
        (Choices(task=["video"]), "t2i, sr"),
        (Choices(latent=["64x64x64"]), "height x width"),
        (Choices(latent=["64x"]), "from 1 to 4096"),
        (Choices(latent=["0x64"]), "from 1 to 4096"),
        (Choices(tokens=["0"]), "from 1 to 1048576"),
        (Choices(tokens=["77.0"]), "from 1 to 1048576"),
        (Choices(seed=["-1"]), "from 0 to 18446744073709551615"),
        (Choices(seed=[f"{2**64}"]), "from 0 to 18446744073709551615"),
        (Choices(unet=["/nowhere"]), "/nowhere"),
        (Choices(unet=["/,/nowhere"]), "/nowhere"),
    ],
)
def test_a_wrong_value_is_one_line_that_lists_the_valid_ones(choices: Choices, said: str) -> None:
    with pytest.raises(CaseError) as caught:
        select_cases("cpu", choices)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_short_dtype_names() -> None:
    cases = select_cases("cpu", Choices(size=["39M"], steps=["2"], dtype=["bf16,fp32"], backend=["torch"]))
    assert {case.dtype for case in cases} == {"bfloat16", "float32"}


@pytest.mark.parametrize("option", list(OPTIONS))
def test_an_option_without_a_value_is_refused_and_not_left_out(option: str) -> None:
    with pytest.raises(CaseError, match=f"--{option}: no value given"):
        select_cases("cpu", Choices(**{option: ("",)}))
