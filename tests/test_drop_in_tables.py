"""What accelerate changes in an evaluation, counted: against counts made by hand, and the committed page."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from drop_in import H100, H200, LATENTS, LAYERS, REST, Launched, evaluation, sums, with_tables

PAGE = (Path(__file__).parents[1] / "docs" / "diffusers-kernels.md").read_text(encoding="utf-8")
# ResNet blocks, transformer blocks, transformers and convolutions of a network.
NETWORKS = {"SD1.5": (22, 16, 16, 98), "SDXL": (17, 70, 11, 51)}
each_network = pytest.mark.parametrize("network", LATENTS)


def count(launched: tuple[Launched, ...], *names: str) -> int:
    return sum(one.launch.name in names for one in launched)


def test_the_page_is_what_make_inventory_writes() -> None:
    told = re.search(r"from diffusers (\S+) and torch (\S+);", PAGE)
    assert told is not None
    installed = (version("diffusers"), version("torch").split("+")[0])
    if told.groups() != installed:
        pytest.skip(f"the page was made with diffusers and torch {told.groups()}, here are {installed}")
    assert with_tables(PAGE) == PAGE


@each_network
def test_the_network_computes_the_same_and_moves_less(network: str) -> None:
    found = evaluation(network)
    resnets, blocks, transformers, convolutions = NETWORKS[network]
    for launched in (found.before, found.norm_alone, found.after, found.kernel_attention):
        assert count(launched, "convolution") == convolutions
        work = [sum(one.launch.flops for one in launched), sum(one.launch.exponentials for one in launched)]
        assert work == [
            sum(one.launch.flops for one in found.before),
            sum(one.launch.exponentials for one in found.before),
        ]
    # By the formulas: two norms in a ResNet block, one in a transformer, one before the output.
    norms = 2 * resnets + transformers + 1
    assert count(found.before, "group norm: apply") == norms
    assert count(found.after, "group_norm", "group_norm_apply") == norms
    assert count(found.norm_alone, "group_norm", "group_norm_apply") == norms
    assert count(found.before, "GELU") == blocks
    assert count(found.after, "geglu", "linear + geglu") == blocks
    assert count(found.after, "GELU", "group norm: apply") == 0
    biases = [one.layer for one in found.after if one.launch.name == "bias of a convolution"]
    assert "ResnetBlock2D" not in biases
    assert count(found.after, "residual_add") == resnets
    # Each layer of a block is divided by 1 once.
    divided = [one for one in found.before if one.launch.name == "div" and one.layer != REST]
    assert len(divided) == resnets + 2 * blocks
    assert not [one for one in found.after if one.launch.name == "div" and one.layer != REST]
    for before, after in ((found.before, found.norm_alone), (found.norm_alone, found.after)):
        assert sums(after).launches < sums(before).launches
        assert sums(after).nbytes < sums(before).nbytes
        assert sums(after).h200 < sums(before).h200


@each_network
def test_layers_share_the_whole_out(network: str) -> None:
    for launched in (evaluation(network).before, evaluation(network).after):
        parts = [sums(launched, lambda one, layer=layer: one.layer == layer) for layer in (*LAYERS, REST)]
        assert sum(part.launches for part in parts) == len(launched)
        assert all(part.launches for part in parts)
        assert sum(part.nbytes for part in parts) == sum(one.launch.nbytes for one in launched)


def test_a_gate_moves_what_its_formula_says() -> None:
    """SDXL's widest: 4096 tokens of two samples, 640 channels to 2 x 2560, float16, kernel and matmul merged."""
    rows, channels, width = 2 * 4096, 640, 2560
    gates = [one.launch for one in evaluation("SDXL").after if one.launch.name == "linear + geglu"]
    assert {gate.nbytes for gate in gates} == {
        2 * (rows * channels + 2 * width * channels + 2 * width + rows * width)
    }
    before = [one.launch for one in evaluation("SDXL").before if one.launch.name == "GELU"]
    assert max(launch.nbytes for launch in before) == 2 * 2 * rows * width


def test_an_h100_differs_in_its_memory_alone() -> None:
    assert H100.bytes_per_s == pytest.approx(H200.bytes_per_s * 3.35 / 4.8)
    assert (H100.flop_per_s, H100.exponentials_per_s) == (H200.flop_per_s, H200.exponentials_per_s)


def test_the_list_has_the_shares_of_the_tables() -> None:
    """The ranked list is typed; its shares are the tables', of an H200."""
    tables = dict(zip(LATENTS, re.split(r"\n### ", PAGE)[1:], strict=True))

    def change(network: str, row: str) -> float:
        (cells,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", tables[network], re.MULTILINE)
        return float(cells.split("|")[6].strip().removesuffix(" %"))

    rows = {
        "`GEGLU`": "`GEGLU`",
        "`ResnetBlock2D`": "`ResnetBlock2D`",
        "division by 1 left out": "no kernel: divisions by 1 left out",
        "`nn.GroupNorm`": "every `nn.GroupNorm`, and nothing else",
        "`BasicTransformerBlock`": "`BasicTransformerBlock`",
    }
    for title, row in rows.items():
        (shares,) = re.findall(
            rf"^\| \d \| \*\*{re.escape(title)}\*\*.*?\| ([\d.]+ % \| [\d.]+) % \|", PAGE, re.MULTILINE
        )
        assert [float(share) for share in shares.split(" % | ")] == [-change(network, row) for network in LATENTS]
    (shares,) = re.findall(r"^\| 6 \| \*\*attention\*\* \| ([\d.]+ % \| [\d.]+) % \|", PAGE, re.MULTILINE)
    both = ("the same with our attention", "**all of them: `accelerate`**")
    found = [change(network, both[1]) - change(network, both[0]) for network in LATENTS]
    assert [float(share) for share in shares.split(" % | ")] == pytest.approx(found, abs=0.05)
