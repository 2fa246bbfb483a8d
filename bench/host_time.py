"""Host time of an operator's call, layer by layer, without a GPU: `python bench/host_time.py`.

A small UNet at batch 1 waits for the host, so that microseconds of a call count. The whole way of a call is taken
up to the C function that hands a launch to the driver: our checks, torch.library, the look-up of the plan, the
result's memory, the launch of the kept kernel. Tensors are the CPU's, triton's driver is a stand-in and compiling
gives a kernel that does nothing. Left out: the driver's own time for a launch, torch.cuda.current_device() and the
allocator of CUDA memory (the CPU's is in its place).

Times are the thread's own, the least mean of several rounds: of this processor, and no other. A step's sum is over
our operators only.

    python bench/host_time.py
    python bench/host_time.py --size 39M,866M --batch 2 --kernel linear
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from ldmperf.kernels import OPERATORS, _launch, _triton
from ldmperf.kernels._library import IMPLEMENTATIONS
from ldmperf.kernels._recipes import ByLayout, recipe
from ldmperf.profiling.kernel_bench.selection import SIZES, VAE
from ldmperf.profiling.measure.environment import collect_environment
from ldmperf.profiling.options import CaseError, known_names, whole_number
from ldmperf.profiling.step.call import OperatorCall
from ldmperf.profiling.step.calls import family_calls

CALLS, ROUNDS = 100, 7
# The sampler of a step's sum, one of those that are cases.
SAMPLER = "ddim"


class StandInDriver:
    """What triton asks of a driver between a call and its launch, for an H100 or H200."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoKernel(CompiledKernel):  # type: ignore[misc]
    """A compiled kernel whose launch does nothing."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.name, self.module, self.function, self.packed_metadata = "none", 0, 0, ()

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *arguments: object) -> None:
        return None

    def run(self, *arguments: object) -> None:
        return None


@contextmanager
def stand_in_device() -> Iterator[None]:
    """Within, kernels take CPU tensors and are launched on nothing."""
    compiled, devices, driver = triton.compiler.compile, _triton.DEVICES, triton.runtime.driver._active
    kernels = jit_functions()
    caches = [kernel.device_caches.copy() for kernel in kernels]
    triton.compiler.compile = lambda *_, options, **__: NoKernel(options)
    triton.runtime.driver.set_active(StandInDriver())
    _triton.DEVICES = ("cuda", "cpu")
    for kernel in kernels:
        kernel.device_caches.clear()
    ByLayout.forget()
    try:
        yield
    finally:
        triton.compiler.compile, _triton.DEVICES = compiled, devices
        triton.runtime.driver._active = driver
        ByLayout.forget()
        for kernel, cache in zip(kernels, caches, strict=True):
            kernel.device_caches.clear()
            kernel.device_caches.update(cache)


def jit_functions() -> list[Any]:
    modules = [module for name, module in sys.modules.items() if name.startswith("ldmperf.kernels")]
    found = {id(v): v for module in modules for v in vars(module).values() if isinstance(v, triton.JITFunction)}
    return list(found.values())


@dataclass(frozen=True)
class HostTime:
    """Microseconds of one call.

    `reasons`, `tuned` (the look-up) and `plan` are the first call's. Layers of every further `call`: `checks` of
    its arguments, torch.`library`, `triton` from the kept kernel to the driver, and the `rest`: the kept plan is
    looked up, and the result's memory taken.
    """

    operator: str
    label: str
    count: int
    launches: int
    reasons: float
    tuned: float
    plan: float
    checks: float
    library: float
    rest: float
    triton: float
    call: float


def least_us(call: Callable[[], object]) -> float:
    """Microseconds of a call: the least mean of several rounds, as a busy neighbour only adds."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        begun = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        best = min(best, (time.thread_time_ns() - begun) / CALLS)
    return best / 1e3


class _Dispatched(TorchDispatchMode):
    """Notes the operator of ours that a call reaches, and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ldmperf":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def host_time(case: OperatorCall) -> HostTime:
    """Of one case, within `stand_in_device`."""
    operator = OPERATORS[case.operator]
    arguments = case.arguments("cpu")
    bound = operator.bind(**arguments)
    chip = _launch.chip_of(torch.device("cpu"))
    with torch.inference_mode():
        with _Dispatched() as noted:
            operator.call(**arguments, backend="triton")
        ((overload, positional),) = noted.found
        name = overload._schema.name.partition("::")[2]
        implementation = IMPLEMENTATIONS[name]
        kept = recipe(positional, *operator.plan(bound))
        tensors = kept.tensors(positional)
        call = least_us(lambda: operator.call(**arguments, backend="triton"))
        dispatched = least_us(lambda: overload(*positional))
        alone = least_us(lambda: implementation(*positional))
        launched = least_us(lambda: kept.launch(tensors))
        return HostTime(
            operator=case.operator,
            label=case.label,
            count=case.count,
            launches=len(kept.launches),
            reasons=least_us(lambda: operator.unsupported_reasons(bound)),
            tuned=least_us(
                lambda: _launch.tuned(case.operator, operator.tuning_key(bound), chip, dict)  # type: ignore[arg-type]
            ),
            plan=least_us(lambda: operator.plan(bound)),
            checks=call - dispatched,
            library=dispatched - alone,
            rest=alone - launched,
            triton=launched,
            call=call,
        )


def step_ms(found: Sequence[HostTime], *, merged: bool) -> float:
    """Milliseconds of our operators in a step of one image: norms and gates merged into matmuls, or apart."""
    left_out = ("layer_norm", "geglu") if merged else ("linear",)
    of_step = [
        one
        for one in found
        if one.operator not in left_out and (one.operator != "sampler_update" or SAMPLER in one.label)
    ]
    return sum(one.count * one.call for one in of_step) / 1e3


COLUMNS = ("reasons", "tuned", "plan", "checks", "library", "rest", "triton", "call")


def lines(size: str, found: Sequence[HostTime]) -> list[str]:
    """A line per operator, the mean over its calls of a step; then the largest, and the step's sum."""
    text = [f"{size}: microseconds a call, the mean over the calls of a step", "  " + _row("", COLUMNS)]
    for operator in dict.fromkeys(one.operator for one in found):
        of_it = [one for one in found if one.operator == operator]
        calls = sum(one.count for one in of_it)
        means = [sum(t.count * getattr(t, name) for t in of_it) / calls for name in COLUMNS]
        text.append("  " + _row(f"{operator} ({calls})", [f"{mean:.1f}" for mean in means]))
    most = max(found, key=lambda one: one.call)
    text.append(f"  the longest: {most.operator} {most.label}, {most.call:.1f} us")
    for merged, how in ((False, "norms and gates apart"), (True, "merged into matmuls")):
        text.append(f"  our operators in a step, {how}: {step_ms(found, merged=merged):.2f} ms")
    text.append("  call = checks + library + rest + triton; reasons, tuned and plan are paid once for each layout")
    return text


def _row(head: str, cells: Sequence[str]) -> str:
    return head.ljust(24) + "".join(cell.rjust(9) for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", default="39M,866M", help="Sizes of the family, comma separated.")
    parser.add_argument("--batch", default="2", help="The UNet's batch.")
    parser.add_argument("--kernel", default=",".join(OPERATORS), help="Operators, comma separated.")
    parser.add_argument("--json", action="store_true", help="Every call as a line of JSON instead.")
    options = parser.parse_args()
    try:
        sizes = known_names("size", [options.size], [size for size in SIZES if size != VAE])
        operators = known_names("kernel", [options.kernel], OPERATORS)
        batch = whole_number("batch", options.batch)
    except CaseError as wrong:
        parser.error(str(wrong))
    environment = collect_environment()
    print(
        f"{environment.cpu}, Python {environment.python}, torch {environment.torch}, triton {environment.triton}"
    )
    torch.set_num_threads(1)
    gc.disable()
    with stand_in_device():
        for size in sizes:
            cases = [c for c in family_calls(size, batch, "bfloat16") if c.operator in operators]
            found = [host_time(case) for case in cases]
            if options.json:
                print(*(json.dumps({"size": size} | asdict(one)) for one in found), sep="\n")
            else:
                print(*lines(size, found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
