"""bench/batch_invariance.py: what it calls different is different, and its prices are those of what they name."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import batch_invariance
import pytest
import torch
from batch_invariance import CallByCall, Given, alone
from batch_invariance_table import table
from test_batch_invariance import CONFIGS, Chooses, network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.model import UNet


def given_of(unet: UNet, batch: int) -> Given:
    return Given.of(unet.config, batch, 4, torch.float64, "cpu")


@torch.inference_mode()
def test_the_tool_names_the_calls_that_are_made_to_differ() -> None:
    plain = network("plain", torch.float64, batch_invariant=False)
    given = {batch: batch_invariance.Given.of(plain.config, batch, 4, torch.float64, "cpu") for batch in (1, 2, 3)}
    with Chooses(["conv2d"]):
        calls = batch_invariance.differing_calls(plain, given)
        differing = [call for call in calls if call.name == "conv2d"]
        assert all(set(call.share) == {2, 3} for call in differing), differing
        places = {place for call in differing for place in call.places}
        assert places == {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Conv2d)}
        assert sum(call.count for call in differing) == len(places)
        assert not [call for call in calls if call.name == "ldmperf::residual_add" and call.share]
        assert batch_invariance.differing_images(plain, given[3]) == 3
        invariant = plain.with_backend("torch", batch_invariant=True)
        assert batch_invariance.differing_images(invariant, given[3]) == 0


@torch.inference_mode()
def test_every_image_is_looked_at() -> None:
    """All images of a batch have other bits: all are counted, and all elements."""
    plain = network("plain", torch.float64, batch_invariant=False)
    with Chooses(["conv2d"]):
        calls = batch_invariance.differing_calls(plain, {3: given_of(plain, 3)})
    differing = [call for call in calls if call.name == "conv2d"]
    assert differing
    assert all(call.share[3] > 0.9 for call in differing)


def test_images_differ_from_each_other() -> None:
    given = given_of(network("plain", torch.float64), 3)
    first, second = given.image(0), given.image(1)
    for name in ("sample", "timesteps", "context"):
        assert not torch.equal(getattr(first, name), getattr(second, name)), name
        assert torch.equal(getattr(second, name), getattr(given, name)[1:2])


def test_a_part_lies_in_memory_of_its_own_with_its_strides() -> None:
    """So that neither its place nor its neighbours decide."""
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    found = alone(x[1:2])
    assert found.equal(x[1:2])
    assert found.stride() == x[1:2].stride()
    assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert alone(x[1:2, :1].expand(1, 4, 5, 6)).equal(x[1:2, :1].expand(1, 4, 5, 6))


class Alters(TorchDispatchMode):
    """A library whose sine of a whole batch has so many other elements, call by call."""

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__()
        self.elements = list(elements)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "sin" and len(out) > 1:
            out.view(-1)[: self.elements.pop(0)] += 1
        return out


@torch.inference_mode()
def test_the_largest_share_counts() -> None:
    x = torch.randn(4, 10)
    with Alters([20, 10, 0]), CallByCall(nn.Linear(1, 1), 4, [x]) as calls:
        for _ in range(3):
            x.sin()
    (finding,) = calls.findings.values()
    assert (finding.name, finding.shapes, finding.count, finding.share) == ("sin", "[1, 10]", 3, {4: 0.5})


@torch.inference_mode()
def test_a_step_call_by_call_goes_on_with_each_images_own() -> None:
    """What the price of that way is the price of."""
    plain = network("plain", torch.float64, batch_invariant=False)
    given = given_of(plain, 3)
    with Chooses(["conv2d"]):
        expected = [batch_invariance.step(plain, given.image(i)) for i in range(3)]
        with CallByCall(plain, 3, [given.sample, given.timesteps, given.context], is_split=True) as calls:
            found = batch_invariance.step(plain, given)
        assert not torch.equal(batch_invariance.step(plain, given), found)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-11, atol=1e-11)
    assert not calls.findings


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[tuple[bool, str, int]]]:
    """What is told of a tiny network whose convolutions see the batch, and the steps that were run for it.

    A step: whether its network has the mode, the dispatch mode that it ran under, and its batch. On a clock that
    goes on by 2 ms each time it is read.
    """
    ran: list[tuple[bool, str, int]] = []
    step, now = batch_invariance.step, iter(range(1000))

    def recorded(unet: UNet, given: Given) -> Tensor:
        current = torch.utils._python_dispatch._get_current_dispatch_mode()
        is_split = isinstance(current, CallByCall) and current._is_split
        ran.append((unet.batch_invariant, type(current).__name__ + " split" * is_split, len(given.sample)))
        return step(unet, given)

    monkeypatch.setattr(batch_invariance, "FAMILY", {"tiny": CONFIGS["plain"]})
    monkeypatch.setattr(batch_invariance, "BATCHES", (1, 2, 3, 5))
    monkeypatch.setattr(batch_invariance, "step", recorded)
    monkeypatch.setattr(batch_invariance, "time", SimpleNamespace(perf_counter=lambda: 2e-3 * next(now)))
    with torch.inference_mode(), Chooses(["conv2d"]):
        told = batch_invariance.found_of("tiny", "float32", 4, "cpu", repeats=2)
    return told, ran


def test_what_is_told_of_a_network(found: tuple[dict[str, Any], Any]) -> None:
    told, _ = found
    assert told["images"] == {1: 0, 2: 2, 3: 3, 5: 5}
    assert told["images_with_the_mode"] == dict.fromkeys((1, 2, 3, 5), 0)
    differing = {call["name"] for call in told["differing"]}
    assert "conv2d" in differing
    assert not differing & set(told["same"])
    # Every operator that computes was asked.
    asked = {name.removeprefix("ldmperf::") for name in (*differing, *told["same"])}
    assert asked >= {"addmm_", "attention", "geglu", "group_norm_silu", "layer_norm", "linear", "residual_add"}
    assert told["calls"] >= sum(call["count"] for call in told["differing"])


def test_prices_are_of_the_ways_that_they_name(found: tuple[dict[str, Any], list[tuple[bool, str, int]]]) -> None:
    """In turn, at the last batch but one, the first round untimed."""
    told, ran = found
    ways = ((False, "_Nothing", 3), (True, "_Nothing", 3), (False, "CallByCall split", 3))
    assert tuple(ran[-9:]) == ways * 3
    assert list(told["ms"]) == ["plain", "image by image", "call by call"]
    for times in told["ms"].values():
        assert times == pytest.approx([2.0, 2.0])


def test_tables_of_found_calls() -> None:
    def call(name: str, count: int, share: dict[str, float], place: str) -> dict[str, Any]:
        return {"name": name, "shapes": f"[1, {count}]", "count": count, "places": [place], "share": share}

    one = {
        "dtype": "float32",
        "calls": 30,
        "differing": [
            call("conv2d", 3, {"2": 0.001, "8": 0.25}, "conv_in"),
            call("linear", 4, {"3": 0.5}, "proj"),
            call("conv2d", 5, {"3": 0.125}, "conv_out"),
        ],
        "images": {"1": 0, "2": 2, "4": 3},
        "images_with_the_mode": {"1": 0, "2": 0, "4": 0},
        "same": ["ldmperf::attention", "add"],
        "ms": {"plain": [1.0, 7.0, 3.0], "image by image": [8.0, 9.0, 10.0]},
    }
    lines = table({"batches": [1, 2, 4, 6], "steps": [one]}).splitlines()
    assert lines[2] == "| float32 | `conv2d` | 8 | 2, 3, 8 | up to 25% | [1, 3] at `conv_in` |"
    assert lines[3] == "| float32 | `linear` | 4 | 3 | up to 50% | [1, 4] at `proj` |"
    for words in (
        "of 30 calls that compute 12 are of a name and shapes with which some differ",
        "other bits than alone: 2 of 2, 3 of 4; in the mode 0 of 2, 0 of 4",
        "same at every batch: add, attention.",
        "A step of 4 images, median of 3 in turn, under a dispatch mode: plain 3 ms, image by image 9 ms.",
    ):
        assert words in lines[-1], words


@pytest.mark.parametrize("given", [("--repeats", "-1"), ("--latent", "0"), ("--latent", "x")])
def test_counts_that_are_none_are_refused(given: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        batch_invariance.main(given)
    assert f"argument {given[0]}" in capsys.readouterr().err
