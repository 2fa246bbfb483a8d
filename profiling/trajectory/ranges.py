"""Named ranges around what a trajectory runs: steps, blocks, operators; for torch's profiler and for NVTX.

The network is not changed, and nothing is hooked unless a trajectory is traced. In ours nobody may see the
activations between its modules, or sums are no longer in place (`ldmperf.model`), so that no module is hooked: a
TorchDispatchMode opens a range for each operator, and the weights that an operator reads tell the block. In
diffusers' network hooks of its blocks tell it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ldmperf.model import Conditioning, UNet

from ..peer import import_diffusers
from ..step.classes import ATTENTION, operator_name
from ..step.recording import operator_of, returns_views
from .backend import Backend, Inputs, Problem, Trajectory
from .places import CONDITION, SAMPLER, place_of

TRAJECTORY = "trajectory"
_STEP = "step "


class Marks(Protocol):
    """Where ranges are marked beside torch's profiler: `torch.cuda.nvtx`, or nothing."""

    def range_push(self, msg: str) -> object: ...
    def range_pop(self) -> object: ...


def step_number(name: str) -> int | None:
    """The number of the step whose range has that name; None for any other range."""
    number = name.removeprefix(_STEP)
    return int(number) if name.startswith(_STEP) and number.isdecimal() else None


class Ranges:
    """The ranges that are open, outermost first.

    A step is from one evaluation of the network to the next, as in `trace.py`; its number counts evaluations.
    """

    def __init__(self, marks: Marks | None = None) -> None:
        self._marks = marks
        self._open: list[tuple[str, record_function]] = []
        self._evaluations = 0
        self._depth = 0

    @property
    def place(self) -> str:
        """The name of the innermost range; empty for none."""
        return self._open[-1][0] if self._open else ""

    def at(self, *names: str) -> None:
        """Closes and opens ranges until these are open; those that are open already stay so."""
        kept = 0
        while kept < min(len(names), len(self._open)) and self._open[kept][0] == names[kept]:
            kept += 1
        while len(self._open) > kept:
            self._close()
        for name in names[kept:]:
            self._enter(name)

    def in_step(self, *names: str) -> None:
        """The same below the step that runs, or below the trajectory before the first."""
        step = (f"{_STEP}{self._evaluations - 1}",) if self._evaluations else ()
        self.at(TRAJECTORY, *step, *names)

    @contextmanager
    def trajectory(self) -> Iterator[None]:
        """The range of a whole trajectory, whose steps are counted from 0."""
        self._evaluations = self._depth = 0
        self.at(TRAJECTORY)
        try:
            yield
        finally:
            self.at()

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A range inside those that are open."""
        self._enter(name)
        try:
            yield
        finally:
            self._close()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """An evaluation of the network, which begins a step; one inside another is a part of it."""
        if not self._depth:
            self._evaluations += 1
            self.in_step()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.in_step(SAMPLER)

    def _enter(self, name: str) -> None:
        annotation = record_function(name)
        annotation.__enter__()
        if self._marks is not None:
            self._marks.range_push(name)
        self._open.append((name, annotation))

    def _close(self) -> None:
        _, annotation = self._open.pop()
        if self._marks is not None:
            self._marks.range_pop()
        annotation.__exit__(None, None, None)


# These return their argument where they can, and a copy where they cannot: what they consist of tells which.
_PERHAPS_COPIES = frozenset({"aten::to", "aten::reshape", "aten::flatten", "aten::contiguous"})


class OperatorRanges(TorchDispatchMode):
    """A range around each operator that torch dispatches, views left out. `follow` is told each operator's
    arguments before. The operators run as without."""

    def __init__(self, ranges: Ranges, follow: Callable[[Iterable[object]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranges = ranges
        self._follow = follow

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            # A range that is opened is itself an operator.
            return func(*args, **kwargs)
        self._follow((*args, *kwargs.values()))
        if func._schema.name in _PERHAPS_COPIES:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if returns_views(func):
            return func(*args, **kwargs)
        name = operator_of(func) or operator_name(func._schema.name)
        if name == ATTENTION:
            name = "cross-attention" if self._ranges.place.endswith("cross-attention") else "self-attention"
        with self._ranges.within(name):
            return func(*args, **kwargs)


class EvaluationWatch:
    """What networks tell: when they are evaluated, and which of their weights lie where."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self.is_denoising = False
        self._places: dict[int, tuple[str, ...]] = {}

    def add(self, unet: nn.Module) -> None:
        self._places |= {id(parameter): place_of(name) for name, parameter in unet.named_parameters()}

    def follow(self, arguments: Iterable[object]) -> None:
        """Opens the ranges of the block whose weights are among the arguments; `condition` reads those of all."""
        if self.is_denoising:
            for argument in arguments:
                if isinstance(argument, nn.Parameter) and (place := self._places.get(id(argument))):
                    self.ranges.in_step(*place)
                    return


class RangedUNet(UNet):
    """A UNet that tells an `EvaluationWatch` when it runs; made by `ranged`. Its modules are those of another."""

    watch: EvaluationWatch

    def condition(self, *args: Any, **kwargs: Any) -> Conditioning:
        self.watch.ranges.in_step(CONDITION)
        try:
            return super().condition(*args, **kwargs)
        finally:
            self.watch.ranges.in_step()

    def denoise(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.watch.ranges.evaluation():
            self.watch.ranges.in_step()
            self.watch.is_denoising = True
            try:
                return super().denoise(*args, **kwargs)
            finally:
                self.watch.is_denoising = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.watch.ranges.evaluation():
            self.watch.ranges.in_step(CONDITION)
            return super().forward(*args, **kwargs)

    def with_backend(
        self, backend: str, products: str = "auto", *, batch_invariant: bool | None = None, **choices: str
    ) -> UNet:
        other = super().with_backend(backend, products, batch_invariant=batch_invariant, **choices)
        return ranged(other, self.watch)


def ranged(unet: UNet, watch: EvaluationWatch) -> RangedUNet:
    """The same network, its modules and weights shared, that tells `watch` of its evaluations."""
    other = RangedUNet.__new__(RangedUNet)
    other.__dict__.update(unet.__getstate__())
    other.watch = watch
    watch.add(other)
    return other


@contextmanager
def module_ranges(ranges: Ranges, watch: EvaluationWatch) -> Iterator[None]:
    """Hooks by which diffusers' UNet opens its ranges; in a block, the weights that an operator reads tell where.

    Only modules with others inside are hooked, and no longer all modules of the process than until the network is
    found: our kernels take a layer along only where nobody looks at it (`ldmperf.kernels.layers.is_plain`).
    """
    network = import_diffusers().UNet2DConditionModel
    evaluations: list[AbstractContextManager[None]] = []
    hooks: list[RemovableHandle] = []

    def begin(*_: object) -> None:
        evaluations.append(ranges.evaluation())
        evaluations[-1].__enter__()
        ranges.in_step(CONDITION)
        watch.is_denoising = True

    def end(*_: object) -> None:
        watch.is_denoising = False
        evaluations.pop().__exit__(None, None, None)

    def find(module: nn.Module, args: object) -> None:
        if isinstance(module, network):
            finder.remove()
            watch.add(module)
            hooks.extend([*block_hooks(ranges, module), module.register_forward_pre_hook(begin)])
            hooks.append(module.register_forward_hook(end))
            # A hook that is set now runs from the next call on.
            begin()

    finder = register_module_forward_pre_hook(find)
    hooks.append(finder)
    try:
        yield
    finally:
        watch.is_denoising = False
        for hook in hooks:
            hook.remove()


def block_hooks(ranges: Ranges, network: nn.Module) -> Iterator[RemovableHandle]:
    """Sets the hooks of the network's blocks and of their parts."""
    closed: set[tuple[str, ...]] = set()
    for name, module in network.named_modules():
        has_others = next(module.children(), None) is not None
        # Activations without weights may be shared by several blocks.
        is_block = has_others and next(module.parameters(), None) is not None
        if not is_block or not (place := place_of(name)):
            continue
        yield module.register_forward_pre_hook(lambda module, args, place=place: ranges.in_step(*place))
        # What a block leaves open is closed, while the parts of a block follow each other.
        if len(place) <= 2 and place not in closed:
            closed.add(place)
            yield module.register_forward_hook(lambda module, args, out, place=place: ranges.in_step(*place[:-1]))


def ranged_trajectory(backend: Backend, problem: Problem, marks: Marks | None = None) -> Trajectory:
    """The backend's trajectory with ranges around what it runs; its result has the same bits as without.

    Raises what `backend.build` does.
    """
    ranges = Ranges(marks)
    watch = EvaluationWatch(ranges)
    if backend.implementation == "diffusers":
        hooked: Callable[[], AbstractContextManager[None]] = partial(module_ranges, ranges, watch)
        run = backend.build(problem)
    else:
        hooked = nullcontext
        assert isinstance(problem.network, UNet)
        run = backend.build(problem.with_network(ranged(problem.network, watch)))

    def trajectory(inputs: Inputs) -> Tensor:
        with ranges.trajectory(), hooked(), OperatorRanges(ranges, watch.follow):
            return run(inputs)

    return trajectory
