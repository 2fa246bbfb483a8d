"""Named ranges: they change no bit and no operator, every block has one, and nothing stays hooked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules

from ldmperf.model import FAMILY, UNet, UNetConfig
from ldmperf.profiling import Case
from ldmperf.profiling.step.classes import is_operator
from ldmperf.profiling.trajectory.attribution import attributed, attributed_case
from ldmperf.profiling.trajectory.backend import Backend, Problem
from ldmperf.profiling.trajectory.case import BACKENDS, IDEAS
from ldmperf.profiling.trajectory.network import make_network, make_problem
from ldmperf.profiling.trajectory.ours import OurBackend
from ldmperf.profiling.trajectory.places import place_of
from ldmperf.profiling.trajectory.ranges import EvaluationWatch, RangedUNet, Ranges, ranged, ranged_trajectory
from ldmperf.profiling.trajectory.theirs import DiffusersBackend

pytestmark = pytest.mark.usefixtures("_one_thread")

STEPS = 2
TRACED: dict[str, Backend] = {
    "torch": OurBackend("torch"),
    "unhoisted": OurBackend("torch", is_hoisted=False),
    "diffusers": DiffusersBackend(),
    "accelerated": DiffusersBackend(is_accelerated=True),
}
# diffusers' code: with our kernels, which take a layer along where nobody looks at it.
THEIRS = ("diffusers", "accelerated")
PARTS = ("proj_in", "self-attention", "cross-attention", "feed-forward", "proj_out")


def tiny_problem(checkpoint: Path, **changes: Any) -> Problem:
    fields = {"unet": str(checkpoint), "steps": STEPS, "latent_height": 8, "latent_width": 8} | changes
    case = Case(**fields)
    return make_problem(case, make_network(case))


def attention(name: str, blocks: int = 1) -> set[str]:
    """The ranges of a transformer."""
    numbered = {f"{name}.{part}" for part in PARTS}
    return {name} | numbered | {f"{name}.{i}.{part}" for i in range(1, blocks) for part in PARTS[1:4]}


# Of the two tiny checkpoints, by their configurations in conftest.py.
TINY_BLOCKS = {
    *("conv_in", "down.0", "down.0.resnets.0", "down.0.downsample", "down.1", "down.1.resnets.0"),
    *("down.1.downsample", "down.2", "down.2.resnets.0", *attention("down.2.attentions.0")),
    *("mid", "mid.resnets.0", *attention("mid.attentions.0"), "mid.resnets.1"),
    *("up.0", "up.0.resnets.0", "up.0.resnets.1", "up.0.upsample"),
    *attention("up.0.attentions.0"),
    *attention("up.0.attentions.1"),
    *("up.1", "up.1.resnets.0", "up.1.resnets.1", "up.1.upsample", "up.2", "up.2.resnets.0", "up.2.resnets.1"),
    *("norm_out", "conv_out", "sampler"),
}
SDXL_BLOCKS = {
    *("conv_in", "down.0", "down.0.resnets.0", "down.0.downsample", "down.1", "down.1.resnets.0"),
    *attention("down.1.attentions.0", 2),
    *("mid", "mid.resnets.0", *attention("mid.attentions.0", 2), "mid.resnets.1"),
    *("up.0", "up.0.resnets.0", "up.0.resnets.1", "up.0.upsample"),
    *attention("up.0.attentions.0", 2),
    *attention("up.0.attentions.1", 2),
    *("up.1", "up.1.resnets.0", "up.1.resnets.1", "norm_out", "conv_out", "sampler"),
}


class Opened:
    """Stands for NVTX: the ranges that were opened, each with those around it."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.paths: list[tuple[str, ...]] = []

    def range_push(self, msg: str) -> None:
        self.open.append(msg)
        self.paths.append(tuple(self.open))

    def range_pop(self) -> None:
        self.open.pop()


def nested(trace: dict[str, Any]) -> list[tuple[str, ...]]:
    """The paths of the ranges in a Chrome trace, in the order of their starts; they nest, or this fails."""
    ranges = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    open_: list[tuple[str, float]] = []
    paths = []
    for event in sorted(ranges, key=lambda event: (event["ts"], -event["dur"])):
        end = event["ts"] + event["dur"]
        while open_ and open_[-1][1] <= event["ts"]:
            open_.pop()
        # To the nanosecond, which is how Kineto rounds.
        assert not open_ or end <= open_[-1][1] + 0.002, event
        open_.append((event["name"], end))
        paths.append(tuple(name for name, _ in open_))
    return paths


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize(
    "changes", [{}, {"sampler": "ddpm", "batch": 2}, {"guidance_scale": 1.0, "sampler": "heun"}]
)
def test_ranges_change_no_bit(tiny_checkpoint: Path, name: str, changes: dict[str, Any]) -> None:
    problem = tiny_problem(tiny_checkpoint, **changes)
    inputs = problem.inputs(0)
    plain = TRACED[name].build(problem)(inputs)
    marked = ranged_trajectory(TRACED[name], problem)
    assert torch.equal(marked(inputs), plain)
    assert torch.equal(marked(inputs), plain)
    assert torch.equal(TRACED[name].build(problem)(inputs), plain)


def operators(run: Any) -> Counter[str]:
    """How often each operator ran that does something: views, and what stands for others, are left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    working = ("addmm", "::mm", "bmm", "copy_", "clone", "convolution", "add", "mul", "cat", "native", "attention")
    found: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.is_user_annotation:
            continue
        around = [event.name]
        while (event := event.cpu_parent) is not None:
            around.append(event.name)
        # Of an operator that reaches the mode, the call that the mode makes is seen again, inside a range. Where a
        # block's range is opened for it too, the profiler shows it beside the first and not in it.
        is_again = around[2:4] == ["PythonDispatchMode", around[0]]
        is_again |= around[0].startswith("ldmperf::") and around[1:2] != [] and is_operator(around[1])
        if any(word in around[0] for word in working) and not is_again:
            found[around[0]] += 1
    return found


@pytest.mark.parametrize("name", TRACED)
def test_ranges_change_no_operator(tiny_checkpoint: Path, name: str) -> None:
    """Sums of our network are still in place: nobody sees its activations, who could not see them without."""
    problem = tiny_problem(tiny_checkpoint)
    inputs = problem.inputs(0)
    plain, marked = TRACED[name].build(problem), ranged_trajectory(TRACED[name], problem)
    expected = operators(lambda: plain(inputs))
    assert expected["aten::addmm_"] > 0 or name in THEIRS
    assert operators(lambda: marked(inputs)) == expected


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_sdxl"])
def test_every_block_of_the_route_has_its_range_in_every_step(
    request: pytest.FixtureRequest, name: str, checkpoint: str
) -> None:
    path: Path = request.getfixturevalue(checkpoint)
    case = Case(unet=str(path), steps=STEPS, latent_height=8, latent_width=8, backend=name)
    times, trace = attributed(case, TRACED)
    paths = nested(trace)
    assert times.steps == STEPS
    expected = TINY_BLOCKS if checkpoint == "tiny_checkpoint" else SDXL_BLOCKS
    if name != "torch":
        # Those compute at each step what ours keeps.
        expected = expected | {"condition"}
    for step in ("step 0", "step 1"):
        inside = [path for path in paths if path[:2] == ("trajectory", step)]
        blocks = {path[-1] for path in inside if is_block(path[-1])} - {step}
        assert blocks == expected
        # A block is in its level, and a part of a transformer in its block; none is left and begun again.
        for block in expected - {"condition", "sampler"}:
            around = [path for path in inside if path[-1] == block]
            assert len(around) == 1, (block, around)
            assert around[0][2:] == place_of(block_parameter(block)), block


def is_block(name: str) -> bool:
    return name.split(".")[0] in ("conv_in", "down", "mid", "up", "norm_out", "conv_out", "sampler", "condition")


def block_parameter(block: str) -> str:
    """A parameter of ours that is in the block, by the names of its modules."""
    level, *inside = block.split(".")
    name = ".".join(["middle" if level == "mid" else level, *inside])
    name = name.replace("resnets", "resblocks").replace("attentions", "transformers")
    for part, layer in (("self-attention", "to_qkv"), ("cross-attention", "cross_q"), ("feed-forward", "ff_in")):
        before, found, _ = name.partition(f".{part}")
        if found:
            transformer, _, number = before.partition("transformers.")
            first, _, index = number.partition(".")
            return f"{transformer}transformers.{first}.blocks.{index or 0}.{layer}.weight"
    return f"{name}.weight"


@pytest.mark.parametrize("name", TRACED)
def test_operators_are_in_the_blocks_that_call_them(tiny_checkpoint: Path, name: str) -> None:
    """As the formulas say: norm, convolution, norm, convolution; attention of either kind in its part."""
    problem, opened = tiny_problem(tiny_checkpoint), Opened()
    ranged_trajectory(TRACED[name], problem, opened)(problem.inputs(0))
    step = [path for path in opened.paths if path[:2] == ("trajectory", "step 1")]

    def of(block: str) -> list[str]:
        return [path[-1] for path in step if path[-2] == block]

    kept = (
        "group_norm",
        "group_norm_silu",
        "convolution",
        "linear",
        "layer_norm",
        "self-attention",
        "cross-attention",
    )
    resnet = [operator for operator in of("down.1.resnets.0") if operator in kept]
    norm = "group_norm" if name == "diffusers" else "group_norm_silu"
    # diffusers projects the time embedding here, ours before the first step.
    time = ["linear"] if name in THEIRS else []
    assert resnet == [norm, "convolution", *time, norm, "convolution"]
    queries = 3 if name in THEIRS else 1
    attention = [operator for operator in of("mid.attentions.0.self-attention") if operator in kept]
    assert attention == ["layer_norm", *["linear"] * queries, "self-attention", "linear"]
    cross = [operator for operator in of("mid.attentions.0.cross-attention") if operator in kept]
    assert cross == ["layer_norm", *["linear"] * queries, "cross-attention", "linear"]
    assert of("up.0.upsample")[-1] == "convolution"
    if name != "diffusers":
        gated = (*kept, "geglu")
        feed_forward = [operator for operator in of("mid.attentions.0.feed-forward") if operator in gated]
        assert feed_forward == ["layer_norm", "linear", "geglu", "linear"]
        assert "residual_add" in of("down.1.resnets.0")
    if name not in THEIRS:
        assert len(of("mid.attentions.0.feed-forward")) == 4
        assert "sampler_update" in of("sampler")
    else:
        # The concatenation with a skip is the level's; the enlargement is in the block that is named for it.
        assert of("up.1").count("aten::cat") == 2
        assert of("up.0.upsample")[0] == "aten::upsample_nearest2d"


def test_nvtx_has_the_ranges_of_the_profiler(tiny_checkpoint: Path) -> None:
    problem, opened = tiny_problem(tiny_checkpoint), Opened()
    inputs = problem.inputs(0)
    marked = ranged_trajectory(TRACED["torch"], problem, opened)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        marked(inputs)
    assert opened.open == []
    names = [event.name for event in profiler.events() or () if event.is_user_annotation]
    assert Counter(names) == Counter(path[-1] for path in opened.paths)


@pytest.fixture
def _unhooked() -> Iterator[None]:
    methods = {name: getattr(UNet, name) for name in ("condition", "denoise", "forward", "with_backend")}
    yield
    assert not torch_modules._global_forward_hooks
    assert not torch_modules._global_forward_pre_hooks
    assert torch._C._len_torch_dispatch_stack() == 0
    assert methods == {name: getattr(UNet, name) for name in methods}


@pytest.mark.usefixtures("_unhooked")
@pytest.mark.parametrize("name", TRACED)
def test_nothing_stays_hooked_even_when_a_trajectory_fails(tiny_checkpoint: Path, name: str) -> None:
    problem, opened = tiny_problem(tiny_checkpoint, sampler="ddpm"), Opened()
    inputs = problem.inputs(0)
    plain = TRACED[name].build(problem)(inputs)
    marked = ranged_trajectory(TRACED[name], problem, opened)

    def failing(shape: Any) -> Tensor:
        raise RuntimeError("no noise")

    broken = type(inputs)(inputs.noise, inputs.context, None, inputs.seeds, failing, inputs.added)
    with pytest.raises(RuntimeError, match="no noise"):
        marked(broken)
    assert opened.open == []
    # And it runs again, its steps counted from 0.
    opened.paths.clear()
    assert torch.equal(marked(inputs), plain)
    assert {path[1] for path in opened.paths if path[1:] and path[1].startswith("step")} == {"step 0", "step 1"}


def test_a_network_on_another_backend_tells_its_ranges_too() -> None:
    from dataclasses import replace

    one = {"num_heads": (4,), "attention": (True,), "transformer_layers": (1,), "only_cross_attention": (False,)}
    small = replace(FAMILY["39M"], block_channels=(32,), **one)
    opened = Opened()
    watch = EvaluationWatch(Ranges(opened))
    with torch.inference_mode():
        unet = UNet(small, backend="triton")
        other = ranged(unet, watch).with_backend("torch")
        assert isinstance(other, RangedUNet)
        sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, small.context_dim)
        assert torch.equal(other(sample, 3.0, context), unet.with_backend("torch")(sample, 3.0, context))
    assert [path[-1] for path in opened.paths][:2] == ["trajectory", "step 0"]
    assert type(unet) is UNet


def test_compiled_backends_have_no_ranges_and_graphs_an_eager_twin() -> None:
    from ldmperf.profiling.options import CaseError

    twins = {}
    for backend in BACKENDS:
        case = Case(unet="39M", backend=backend, steps=50, device="cuda")
        if "compile" in backend:
            with pytest.raises(CaseError, match="choose from diffusers, diffusers-accelerated, torch, triton"):
                attributed_case(case)
            continue
        if backend in IDEAS:
            with pytest.raises(CaseError, match=f"no eager backend launches what {re.escape(backend)} captures"):
                attributed_case(case)
            continue
        eager = attributed_case(case)
        assert eager.steps == 8
        assert eager.model_copy(update={"steps": 50, "backend": backend}) == case
        twins[backend] = eager.backend
    assert twins.pop("graph") == "triton+hoist+merge"
    assert twins.pop("graph+pdl") == "triton+hoist+merge"
    assert twins.pop("graph+separate") == "triton+hoist"
    assert twins.pop("graph-invariant") == "triton-invariant"
    assert twins.pop("graph+fp8") == "triton+fp8"
    assert all(backend == twin for backend, twin in twins.items())


WITH_CLASSES = replace(FAMILY["39M"], only_cross_attention=True, num_class_embeds=9, time_cond_proj_dim=8)


@pytest.mark.parametrize("config", [*FAMILY.values(), WITH_CLASSES], ids=[*FAMILY, "with classes"])
def test_every_parameter_has_a_place_alike_in_ours_and_in_diffusers(config: UNetConfig) -> None:
    """The blocks of a size are the same under both names, and no weight is without one."""
    diffusers = pytest.importorskip("diffusers")
    from ldmperf.model import diffusers_config

    with torch.device("meta"):
        ours = UNet(config)
        theirs = diffusers.UNet2DConditionModel(**diffusers_config(config))
    places = [{place_of(name) for name, _ in network.named_parameters()} for network in (ours, theirs)]
    assert places[0] == places[1]
    assert () not in places[0]


def test_names_that_are_no_block_have_no_place() -> None:
    for name in ("", "encoder.layers.0.weight", "downs.1", "middleman.weight"):
        assert place_of(name) == ()
