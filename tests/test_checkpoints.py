"""Checkpoints by their weights: names and digests, and nothing of where they lie."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.profiling import profile
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.options import CaseError
from ldmperf.profiling.trajectory import checkpoints
from ldmperf.profiling.trajectory.case import Case, path_text
from ldmperf.profiling.trajectory.case_options import Choices
from ldmperf.profiling.trajectory.checkpoints import check_unchanged, identified, weights_sha256
from ldmperf.profiling.trajectory.presets import select_cases


def of_path(path: Path, **changes: object) -> Case:
    return Case(unet=path_text(path), **changes)


def test_a_file_in_the_cache_of_hugging_face_keeps_its_name(tmp_path: Path) -> None:
    """There a name is a link to a blob, whose name is a digest without a suffix."""
    blob = tmp_path / "blobs" / ("5" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"tensors")
    link = tmp_path / "snapshots" / "1a2b" / "x.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    (case,) = identified(select_cases("cpu", Choices(unet=[str(link)], steps=["1"], backend=["torch"])))
    assert (case.path, case.label) == (link, "x.safetensors")
    assert case.weights_sha256 == hashlib.sha256(b"tensors").hexdigest()


def test_two_dots_mean_what_they_mean_to_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "far" / "mine.safetensors").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path)
    for text, path in (("link/../mine.safetensors", "far/mine.safetensors"), ("far/away/..", "far")):
        (case,) = select_cases("cpu", Choices(unet=[text], steps=["1"], backend=["torch"]))
        assert case.path == tmp_path / path


@pytest.mark.parametrize("text", ["x" * 5000, "~no-such-user-here/x", "loop"])
def test_a_path_that_cannot_be_is_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CaseError, match=r"--unet: nothing at .*; give a diffusers folder"):
        select_cases("cpu", Choices(unet=[text]))


@pytest.mark.parametrize(
    ("files", "counted"),
    [
        ({"diffusion_pytorch_model.safetensors": b"a", "diffusion_pytorch_model.fp16.safetensors": b"b"}, b"a"),
        ({f"diffusion_pytorch_model-{n:05}-of-00002.safetensors": bytes([n]) for n in (2, 1)}, b"\x01\x02"),
        ({"unet/diffusion_pytorch_model.safetensors": b"u", "vae/x.safetensors": b"v"}, b"u"),
        # A whole model beside the folders of its pipeline.
        ({"all.safetensors": b"all", "unet/diffusion_pytorch_model.fp16.safetensors": b"u"}, b"u"),
        ({"mine.safetensors": b"m"}, b"m"),
    ],
)
def test_a_folders_digest_is_that_of_its_tensor_files_in_a_row(
    tmp_path: Path, files: dict[str, bytes], counted: bytes
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "unet" if (tmp_path / "unet").exists() else tmp_path
    (folder / "config.json").write_text("{}")
    assert weights_sha256(tmp_path) == hashlib.sha256(counted).hexdigest()
    # A shard stands for its set.
    if len(files) == 2 and len(counted) == 2:
        assert weights_sha256(tmp_path / next(iter(files))) == hashlib.sha256(counted).hexdigest()


def test_a_large_file_is_read_once_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"abc" * 2**20)
    monkeypatch.setattr(checkpoints, "QUIET_BYTES", 2**20)
    said: list[str] = []
    cases = identified([of_path(path, steps=n) for n in (1, 2)], said.append)
    assert {case.weights_sha256 for case in cases} == {hashlib.sha256(path.read_bytes()).hexdigest()}
    check_unchanged(identified(cases, said.append), said.append)
    (line,) = said
    assert line.startswith("x.safetensors: reading 0.0 GB")


def test_what_cannot_be_read_names_the_option_that_gave_it(tmp_path: Path) -> None:
    for options, named in (((), "--unet: "), ((None, "--pipeline"), "--pipeline: ")):
        with pytest.raises(CaseError, match=f"^{named}") as caught:
            weights_sha256(tmp_path / "none.safetensors", *options)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (tmp_path / "pickled" / "config.json").write_text("{}")
    for path, said in (
        (tmp_path / "pickled", "no .safetensors file"),
        (tmp_path / "none", "no such file or folder"),
    ):
        with pytest.raises(CaseError, match=said) as caught:
            identified([of_path(path)])
        assert "\n" not in str(caught.value)


def test_a_changed_checkpoint_is_not_the_one_that_a_run_began_with(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"one")
    cases = identified([of_path(path), Case(unet="39M")])
    check_unchanged(cases)
    path.write_bytes(b"two")
    with pytest.raises(CaseError, match=r"x\.safetensors has changed since the run began; start a new run"):
        check_unchanged(cases)
    path.unlink()
    with pytest.raises(CaseError, match="no such file or folder"):
        check_unchanged(cases)


def test_two_checkpoints_of_one_name_are_two(tmp_path: Path) -> None:
    for folder, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.safetensors").write_bytes(content)
    paths = [tmp_path / folder / "x.safetensors" for folder in "abc"]
    first, second = identified([of_path(path) for path in paths[:2]])
    assert first.label == second.label == "x.safetensors"
    assert len({first.key, second.key}) == len({first.case_id, second.case_id}) == 2
    # A copy under the same name: a record could not tell which of them it is of.
    with pytest.raises(CaseError, match="have the same name and the same weights; leave one out"):
        identified([of_path(paths[0]), of_path(paths[2])])
    # The same path twice is one case.
    assert identified([of_path(paths[0])] * 2) == [first]


def test_a_name_that_every_checkpoint_has_comes_with_the_folder_above_it() -> None:
    names = {
        "/m/my-model/unet": "my-model/unet",
        "/m/my-model/unet/diffusion_pytorch_model.fp16.safetensors": (
            "my-model/unet/diffusion_pytorch_model.fp16.safetensors"
        ),
        "/m/my-model": "my-model",
        "/unet": "unet",
        "/": "/",
    }
    for path, name in names.items():
        assert Case(unet=path).label == name
        recorded = Case(unet=path, weights_sha256="0" * 64).as_recorded()
        assert (recorded.unet, recorded.label, recorded.is_checkpoint) == (name, name, True)


def test_the_id_of_a_case_never_changes() -> None:
    """Dashboards keep it: it is the same on every commit."""
    family = Case(unet="39M", steps=3)
    mine = Case(unet="/a/x.safetensors", weights_sha256="0123456789abcdef" * 4, device="cuda:1", dtype="bfloat16")
    assert (family.case_id, mine.case_id) == ("23508ecc72e0f673", "3dd2449acc7f29d8")
    elsewhere = mine.model_copy(update={"unet": "/b/y/renamed.safetensors", "device": "cuda"})
    assert elsewhere.case_id == mine.case_id == mine.as_recorded().case_id
    changes: list[dict[str, object]] = [{"weights_sha256": "f" * 64}, {"device": "cpu"}, {"backend": "graph"}]
    changes += [{"seed": 1}, {"steps": 4}, {"guidance_scale": 7.5000001}]
    assert len({mine.case_id, *(mine.model_copy(update=change).case_id for change in changes)}) == 7


NAMES = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    # Bytes that need be no UTF-8.
    st.binary(min_size=1, max_size=20).map(
        lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_").decode("latin1")
    ),
    st.sampled_from(["file:", "39M", "[red]x[/]", "a\nb", "\x1b[2J", "é", "x weights=0", " "]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, raw=st.booleans())
def test_a_checkpoint_of_any_name_is_found_named_and_recorded(
    tmp_path_factory: pytest.TempPathFactory, name: str, raw: bool
) -> None:
    encoded = name.encode("latin1") if raw and all(ord(c) < 256 for c in name) else name.encode()
    if encoded in (b".", b".."):
        return
    path = tmp_path_factory.getbasetemp() / os.fsdecode(encoded)
    try:
        path.write_bytes(encoded)
    except OSError:
        # Longer than the file system allows, or a folder of this name.
        return
    try:
        (case,) = identified(select_cases("cpu", Choices(unet=[str(path)], steps=["1"], backend=["torch"])))
    finally:
        path.unlink()
    assert case.path == path
    assert Case.model_validate_json(case.model_dump_json()) == case
    recorded = case.as_recorded()
    assert recorded.is_checkpoint
    assert recorded.key == case.key
    assert recorded.case_id == case.case_id
    assert str(tmp_path_factory.getbasetemp()) not in recorded.model_dump_json()
    assert recorded.label == encoded.decode(errors="backslashreplace")


def test_records_know_no_path(tmp_path: Path) -> None:
    """Even of a checkpoint that fails with a message that names it."""
    for name in (b"no-tensors.safetensors", b"\xff[x]\n.safetensors"):
        path = tmp_path / os.fsdecode(name)
        path.write_bytes(b"none")
        (record,) = profile([of_path(path, steps=1)], rule=RepetitionRule(1, 0.0))
        assert record.status == "error"
        assert record.message is not None
        assert os.fsdecode(name).split("\n")[0].replace("\udcff", r"\udcff") in record.message
        assert str(tmp_path) not in record.model_dump_json()
