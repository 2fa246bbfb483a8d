"""Python values of modules under a captured step: changes of these lead to new captures, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ldmperf.samplers import NoiseSchedule, initial_noise, make_plan, sample
from ldmperf.samplers.reads import Watch

from .tapes import graphed

pytestmark = pytest.mark.usefixtures("_one_thread")

PLAN = make_plan("ddim", NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"}), 2)
NOISE = initial_noise([1, 2], (4, 3, 3))


class Processor:
    """As attention processors are: no module, and with values of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.options = {"shift": 0.1}
        self.table = torch.tensor([0.5, 0.25, 0.75, 1.0])

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor + self.options.get("shift", 0.3) + self.table[:, None, None].to(x.dtype)


class Doubled(Processor):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Part(nn.Module):
    """Every value of it shows in what it returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, bias=False)
        self.scaling = {"first": 0.7, "second": 1.2}
        self.active = ["first"]
        self.masks: tuple[list[float], ...] = ([0.5, 0.5, 0.5], [0.5])
        self.flags: set[str] = {"a"}
        self.gain = 0.9
        self.sizes = (3, 3)
        self.processor = Processor(1.1)
        self.table = torch.tensor([0.1, 0.2, 0.3, 0.4])
        self.offset = torch.tensor(0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.transpose(1, -1)).transpose(1, -1) * self.gain + self.table[:, None, None]
        x = x * sum(self.scaling.get(name, 0.2) for name in self.active) / (1 + 0.1 * len(self.scaling))
        x = x + sum((1 + i) * mask for i, masks in enumerate(self.masks) for mask in masks)
        x = x + 0.1 * len(self.flags) + self.sizes[0] + self.offset
        return self.processor(x) + getattr(self, "s1", 0.0) + 0.1 * self.training


class Tripled(Part):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()]).eval()

    def forward(self, x: Tensor, conditioning: Any = (), step: Any = None) -> Tensor:
        for part in self.parts:
            x = torch.tanh(part(x))
        return x


def renamed(part: Part) -> None:
    part.scaling = {{"first": "third", "third": "first"}.get(k, k): v for k, v in part.scaling.items()}


def renamed_in_place(part: Part) -> None:
    values = list(part.scaling.values())
    names = ["third" if name == "first" else "first" if name == "third" else name for name in part.scaling]
    part.scaling.clear()
    part.scaling.update(zip(names, values, strict=True))


def moved_between_lists(part: Part) -> None:
    """Side by side, both lists hold the same values in the same order."""
    first, second = part.masks
    if first:
        second.insert(0, first.pop())
    else:
        first.append(second.pop(0))


def new_class(owner: Any, *classes: type) -> None:
    owner.__class__ = classes[1] if type(owner) is classes[0] else classes[0]


def replaced_forward(part: Part) -> None:
    if "forward" in vars(part):
        del part.forward
    else:
        part.forward = lambda x: 0.5 * type(part).forward(part, x)  # type: ignore[method-assign]


def new_attributes(part: Part) -> None:
    part.__dict__ = {**vars(part), "gain": part.gain * 0.8}


def added(part: Part) -> None:
    """As `enable_freeu` and `disable_freeu` do."""
    if hasattr(part, "s1"):
        del part.s1
    else:
        part.s1 = 0.25


def shift_gone_or_there(part: Part) -> None:
    if part.processor.options.pop("shift", None) is None:
        part.processor.options["shift"] = 0.2


def transposed(part: Part) -> None:
    part.linear.weight.data = part.linear.weight.data.t()


CHANGES: dict[str, Callable[[Part], Any]] = {
    "a number": lambda part: setattr(part, "gain", part.gain * 0.8),
    "a number that is a tensor now": lambda part: setattr(part, "gain", torch.tensor(float(part.gain) * 0.8)),
    "a dict's value": lambda part: part.scaling.update(second=part.scaling["second"] + 0.1, first=0.1),
    "a dict's names": renamed,
    "a dict's names, in place": renamed_in_place,
    "a dict's size": lambda part: part.scaling.update({f"new {len(part.scaling)}": 1.0}),
    "a list's size": lambda part: part.active.append("second"),
    "a list": lambda part: setattr(part, "active", ["second", *part.active]),
    "a list in a tuple": lambda part: part.masks[1].append(0.75),
    "which list a value is in": moved_between_lists,
    "a set": lambda part: part.flags.add(f"b{len(part.flags)}"),
    "a tuple": lambda part: setattr(part, "sizes", (part.sizes[0] + 1, 3)),
    "a processor": lambda part: setattr(part, "processor", Processor(part.processor.factor * 0.7)),
    "a processor's number": lambda part: setattr(part.processor, "factor", part.processor.factor * 0.9),
    "a processor's dict": shift_gone_or_there,
    "a processor's tensor": lambda part: setattr(part.processor, "table", part.processor.table * 0.9),
    "a processor's class": lambda part: new_class(part.processor, Processor, Doubled),
    "a class": lambda part: new_class(part, Part, Tripled),
    "a forward": replaced_forward,
    "another attribute": added,
    "all attributes": new_attributes,
    "a tensor": lambda part: setattr(part, "table", part.table * 0.9),
    "an equal tensor": lambda part: setattr(part, "table", part.table.clone()),
    "an equal tensor of one number": lambda part: setattr(part, "offset", part.offset.clone()),
    "a tensor's memory": lambda part: setattr(part.table, "data", part.table * 0.9),
    "strides": transposed,
    "the mode": lambda part: part.train(not part.training),
}  # fmt: skip

# What a replay reads, or what makes no difference.
NO_CHANGES: dict[str, Callable[[Part], Any]] = {
    "nothing": lambda part: None,
    "an equal number": lambda part: setattr(part, "gain", part.gain * 1.0),
    "an equal tuple": lambda part: setattr(part, "sizes", (*part.sizes,)),
    "an equal string": lambda part: part.active.__setitem__(0, "".join(list(part.active[0]))),
    "a weight's values": lambda part: part.linear.weight.mul_(0.9),
    "a tensor's values": lambda part: part.table.mul_(0.9),
    "a processor's tensor's values": lambda part: part.processor.table.mul_(0.9),
    "gradients": lambda part: part.requires_grad_(not part.linear.weight.requires_grad),
}


def eager(net: Net, noise: Tensor) -> Tensor:
    return sample(lambda x, step: net(x), PLAN, noise, backend="torch")


@pytest.mark.parametrize("name", [*CHANGES, *NO_CHANGES])
@torch.no_grad()
def test_a_replay_is_of_the_modules_as_they_are(name: str) -> None:
    net = Net()
    sampler, graphs = graphed(net)
    sampler((), PLAN, NOISE)
    for count in (1, 2):
        (CHANGES | NO_CHANGES)[name](net.parts[1])
        assert torch.equal(sampler((), PLAN, NOISE), eager(net, NOISE))
        assert graphs.captured == 1 + count * (name in CHANGES)


def test_every_change_shows() -> None:
    """Else the test above could not tell a stale capture from a good one."""
    for name, change in CHANGES.items():
        net = Net()
        before = net(NOISE)
        change(net.parts[1])
        assert torch.equal(before, net(NOISE)) == name.startswith("an equal tensor"), name


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_compiled_module_is_captured_once_and_after_changes(in_place: bool) -> None:
    net = Net()
    if in_place:
        net.compile(backend="eager")
    sampler, graphs = graphed(net if in_place else torch.compile(net, backend="eager"))
    for count in (1, 1, 2):
        if count == 2:
            CHANGES["a number"](net.parts[0])
        torch.testing.assert_close(sampler((), PLAN, NOISE), eager(net, NOISE))
        assert graphs.captured == count


@torch.no_grad()
def test_what_a_step_itself_changes_counts_when_another_shape_is_captured() -> None:
    """A replay does not count on, so runs of one shape replay."""
    net = Net()
    counted = net.parts[0]
    counted.calls = 0
    counted.register_forward_pre_hook(lambda part, args: setattr(part, "calls", part.calls + 1))
    sampler, graphs = graphed(net)
    for batch, captured in ((1, 1), (1, 1), (2, 2), (2, 3), (2, 3)):
        sampler((), PLAN, NOISE[:batch])
        assert graphs.captured == captured


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
@torch.no_grad()
def test_any_row_of_changes(data: st.DataObject) -> None:
    net = Net()
    sampler, graphs = graphed(net)
    expected = 0
    kept: set[int] = set()
    for name in data.draw(st.lists(st.sampled_from([*CHANGES, *NO_CHANGES]), min_size=2, max_size=5)):
        (CHANGES | NO_CHANGES)[name](net.parts[data.draw(st.integers(0, 1))])
        if name in CHANGES:
            kept.clear()
        batch = data.draw(st.integers(1, 2))
        expected += batch not in kept
        kept.add(batch)
        assert torch.equal(sampler((), PLAN, NOISE[:batch]), eager(net, NOISE[:batch])), name
        assert graphs.captured == expected, name


@pytest.mark.parametrize(("value", "other"), [(1, True), (1, 1.0), ((2, 1), (2, 1.0)), ("a", b"a")])
def test_equal_values_of_another_type_in_a_dict_are_other_values(value: Any, other: Any) -> None:
    """What a step launches may depend on the type: a tensor of integers times 1.0 is one of floats."""
    net = Net()
    net.options = {"factor": value}  # type: ignore[assignment]
    watch = Watch([net])
    assert watch.is_same([net])
    net.options["factor"] = other  # type: ignore[operator,index]
    assert not watch.is_same([net])


def test_fewer_or_more_modules_are_others() -> None:
    first, second = Net(), Net()
    watch = Watch([first, second])
    assert watch.is_same([first, second])
    for modules in ([], [first], [second, first], [first, second, Net()]):
        assert not watch.is_same(modules)
