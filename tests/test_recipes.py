"""What is kept of a call by layout: filled in with the right tensors, planned once, bounded, without tensors.

Kernels are launched on a stand-in device that notes what it is given.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldmperf.kernels import OPERATORS, Chip, _launch, _recipes, geglu, linear, residual_add
from ldmperf.kernels._recipes import ByLayout, recipe

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
host_time = SimpleNamespace(**runpy.run_path(str(ROOT / "bench" / "host_time.py"), run_name="host_time"))

HALF = torch.bfloat16


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=HALF)


def image(*shape: int) -> Tensor:
    return half(*shape).to(memory_format=torch.channels_last)


def norm_call(batch: int, size: int, channels: int, with_skip: bool) -> dict[str, Any]:
    x = image(batch, channels, size, size)
    skip = image(batch, channels, size, size) if with_skip else None
    wide = 2 * channels if with_skip else channels
    x_bias = half(batch, 2 * wide)[:, wide:]
    return {"x": x, "num_groups": 8, "weight": half(wide), "bias": half(wide), "x_bias": x_bias, "skip": skip}


def attention_call(batch: int, size: int, channels: int, with_context: bool) -> dict[str, Any]:
    q, k, v = half(batch, size * size, 3, 8, channels // 8).unbind(2)
    if with_context:
        k, v = half(batch, 77, 2, 8, channels // 8).unbind(2)
    return {"q": q, "k": k, "v": v}


def linear_call(batch: int, size: int, channels: int, gated: bool) -> dict[str, Any]:
    return {
        "x": half(batch, size * size, channels),
        "weight": half(4 * channels, channels),
        "bias": half(4 * channels),
        "norm_weight": half(channels),
        "norm_bias": half(channels),
        "x_bias": half(channels),
        "activation": "geglu" if gated else None,
    }


def conv_call(batch: int, size: int, channels: int, with_shortcut: bool) -> dict[str, Any]:
    x = image(batch, channels, size, size)
    beside: dict[str, Any] = {"residual": image(batch, channels, size, size)}
    if with_shortcut:
        beside = {"shortcut": x, "skip": x, "shortcut_weight": half(channels, 2 * channels)}
    return {
        "x": x,
        "weight": image(channels, channels, 3, 3),
        "bias": half(channels),
        **beside,
        "statistics": True,
    }


def sampler_call(batch: int, size: int, channels: int, with_noise: bool) -> dict[str, Any]:
    def floats(*shape: int) -> Tensor:
        return torch.empty(shape)

    return {
        "registers": floats(2, batch, 4, size, size),
        "model_output": image(2 * batch, 4, size, size),
        "table": floats(9, 2, 4),
        "step": torch.zeros(1, dtype=torch.int64),
        "guidance_scale": floats(9),
        "seeds": torch.zeros(batch, dtype=torch.int64) if with_noise else None,
        "model_input": image(2 * batch, 4, size, size),
        "input_scale": floats(9),
    }


def front_call(batch: int, size: int, channels: int, biased: bool) -> dict[str, Any]:
    channels = min(channels, 128)
    return {
        "image": image(batch, channels, size, size),
        "num_groups": 4,
        "group_weight": half(channels),
        "group_bias": half(channels),
        "proj_weight": half(channels, channels),
        "norm_weight": half(channels),
        "norm_bias": half(channels),
        "qkv_weight": half(3 * channels, channels),
        "statistics": torch.empty(batch, -(-size * size // 16), 2, channels),
        "x_bias": half(channels) if biased else None,
    }


def tail_call(batch: int, size: int, channels: int, with_statistics: bool) -> dict[str, Any]:
    channels = min(channels, 128)
    tokens = (batch, size * size, channels)
    return {
        "attended": half(*tokens),
        "x": half(*tokens),
        "image": image(batch, channels, size, size),
        "context": half(batch, 7, 2, 4, channels // 4),
        **{name: half(channels, channels) for name in ("out_weight", "q_weight", "cross_weight", "proj_weight")},
        **{name: half(channels) for name in ("norm2_weight", "norm2_bias", "norm3_weight", "norm3_bias")},
        "ff_in_weight": half(8 * channels, channels),
        "ff_out_weight": half(channels, 4 * channels),
        "out_bias": half(channels),
        "statistics": with_statistics,
    }


CALLS: dict[str, Callable[[int, int, int, bool], dict[str, Any]]] = {
    "group_norm_silu": norm_call,
    "layer_norm": lambda batch, size, channels, both: {
        "x": half(batch, size * size, channels),
        "weight": half(channels),
        "bias": half(channels),
        "residual": half(batch, size * size, channels) if both else None,
    },
    "geglu": lambda batch, size, channels, both: {
        "x": half(batch, size * size, 2 * channels),
        "bias": half(2 * channels) if both else None,
    },
    "residual_add": lambda batch, size, channels, both: {
        "x": image(batch, channels, size, size),
        "residual": half(batch, channels, size, size),
        "bias": half(channels),
        "size": [2 * size, 2 * size] if both else None,
    },
    "attention": attention_call,
    "linear": linear_call,
    "transformer_front": front_call,
    "transformer_tail": tail_call,
    "conv3x3": conv_call,
    "sampler_update": sampler_call,
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Any]]]:
    """Of every launch from now on: the kernel's arguments in order, then its programs, warps and stages."""
    found: list[list[Any]] = []

    def run(kernel: Any, programs: int, *arguments: Any) -> None:
        options = [programs, kernel.options["num_warps"], kernel.options["num_stages"]]
        found.append([*arguments[8:], *options])

    with host_time.stand_in_device():
        monkeypatch.setattr(host_time.NoKernel, "run", run)
        yield found


def described(value: Any, of_call: dict[int, str]) -> Any:
    """An argument of a launch: the name of the tensor if it is one of the call's, the layout of other memory."""
    if not isinstance(value, Tensor):
        return value
    return of_call.get(value.data_ptr(), (tuple(value.shape), value.stride(), value.dtype))


def places(arguments: dict[str, Any]) -> dict[int, str]:
    return {value.data_ptr(): name for name, value in arguments.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_kept_call_launches_what_a_new_plan_would(name: str, launched: list[list[Any]]) -> None:
    operator = OPERATORS[name]

    @settings(max_examples=12, deadline=None)
    @given(st.sampled_from([1, 2, 3]), st.sampled_from([3, 8, 32]), st.sampled_from([64, 160, 640]), st.booleans())
    def check(batch: int, size: int, channels: int, flag: bool) -> None:
        for _ in range(2):
            arguments = CALLS[name](batch, size, channels, flag)
            names = places(arguments)
            launched.clear()
            result = operator.call(**arguments, backend="triton")
            called = [[described(value, names) for value in values] for values in launched]
            launched.clear()
            planned, launches = operator.plan(operator.bind(**arguments))
            _launch.run(launches, torch.device("cpu"))
            assert called == [[described(value, names) for value in values] for values in launched]
            assert called
            for given_, wanted in zip(tensors(result), tensors(planned), strict=True):
                assert described(given_, {}) == described(wanted, {})

    check()


def tensors(result: Any) -> tuple[Tensor, ...]:
    return () if result is None else result if isinstance(result, tuple) else (result,)


def test_results_are_what_the_last_launch_writes_and_new_for_every_call(launched: list[list[Any]]) -> None:
    x = half(4, 16)
    first, second = geglu(x, backend="triton"), geglu(x, backend="triton")
    assert [values[2].data_ptr() for values in launched] == [first.data_ptr(), second.data_ptr()]
    assert first.data_ptr() != second.data_ptr()


def test_a_tensor_given_twice_is_two_arguments_of_the_next_call(launched: list[list[Any]]) -> None:
    x, other = image(1, 8, 4, 4), image(1, 8, 4, 4)
    residual_add(x, x, backend="triton")
    residual_add(x, other, backend="triton")
    residual_add(other, other, backend="triton")
    assert [[value.data_ptr() for value in values[:2]] for values in launched] == [
        [x.data_ptr(), x.data_ptr()],
        [x.data_ptr(), other.data_ptr()],
        [other.data_ptr(), other.data_ptr()],
    ]


def test_a_kept_kernel_is_launched_on_the_pointers_that_it_was_compiled_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And without triton's binder; pointers that are no multiples of 16 take another kernel, by the binder."""
    kernels: list[Any] = []
    aligned = half(4, 16)
    odd = half(4 * 16 + 1)[1:].view(4, 16)
    with host_time.stand_in_device():
        monkeypatch.setattr(host_time.NoKernel, "run", lambda kernel, *_: kernels.append(kernel))
        for x in (odd, aligned, aligned, odd, aligned):
            geglu(x, backend="triton")
        monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: pytest.fail("bound again"))
        geglu(half(4, 16), backend="triton")
        # What triton asks at every launch: a kernel that is instrumented is another one.
        bound: list[Any] = []
        monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: bound.append(1))
        for group, name, value in (
            ("runtime", "debug", True),
            ("compilation", "instrumentation_mode", "consan"),
            ("runtime", "add_stages_inspection_hook", lambda *_: ("", "")),
        ):
            with monkeypatch.context() as changed:
                changed.setattr(getattr(triton.knobs, group), name, value)
                geglu(half(4, 16), backend="triton")
        assert len(bound) == 3
        geglu(half(4, 16), backend="triton")
        assert len(bound) == 3
    first, second = kernels[:2]
    assert first is not second
    assert kernels == [first, second, second, first, second, second, second]


def counted(function: Callable[..., Any]) -> tuple[ByLayout[Any], list[Any]]:
    seen: list[Any] = []

    def noting(*arguments: Any) -> Any:
        seen.append(arguments)
        return function(*arguments)

    return ByLayout(noting), seen


def test_a_layout_is_asked_for_once_and_anything_that_differs_is_another() -> None:
    kept, seen = counted(lambda *_: object())
    x = torch.empty(4, 6)
    others = [
        (x.clone(), None),
        (torch.empty(4, 6, dtype=HALF), None),
        (torch.empty(6, 4).t(), None),
        (torch.empty(8, 6)[::2], None),
        (torch.empty(4, 6, device="meta"), None),
        (torch.empty(6, 4), None),
        (x, x),
        (x, 1.0),
        (x, [1, 2]),
        (None, x),
    ]
    values = [kept(*arguments) for arguments in others]
    assert [kept(*arguments) for arguments in others] == values
    assert len(set(values)) == len(seen) == len(others)
    assert kept(torch.zeros(4, 6), None) is values[0]
    assert kept(torch.nn.Parameter(x), None) is values[0]


def test_what_is_kept_holds_no_tensor(launched: list[list[Any]]) -> None:
    storages = []
    for name, make in CALLS.items():
        arguments = make(1, 8, 64, True)
        OPERATORS[name].call(**arguments, backend="triton")
        storages += [
            torch.multiprocessing.reductions.StorageWeakRef(t.untyped_storage()) for t in values_of(arguments)
        ]
        del arguments
    launched.clear()
    assert len(storages) > 20
    assert all(storage.expired() for storage in storages)


def values_of(arguments: dict[str, Any]) -> list[Tensor]:
    return [value for value in arguments.values() if isinstance(value, Tensor)]


def test_the_oldest_goes_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recipes, "MOST", 3)
    kept, seen = counted(lambda n: n)
    for n in (1, 2, 3, 4, 2, 3, 4, 1):
        assert kept(n) == n
    assert seen == [(1,), (2,), (3,), (4,), (1,)]


def test_an_error_is_not_kept_and_sizes_that_are_no_numbers_are_asked_for_each_time() -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("no")

    kept, seen = counted(fails)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            kept(1)
    assert len(seen) == 2
    symbolic, seen = counted(lambda size: "made")
    assert [symbolic({"a symbol is": "unhashable"}) for _ in range(2)] == ["made", "made"]
    assert len(seen) == 2


def test_another_folder_of_tuned_tables_or_chip_is_another_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, seen = counted(lambda n: n)
    kept(1)
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)
    kept(1)
    assert len(seen) == 2
    monkeypatch.setattr(_launch, "chip_of", lambda device: Chip("NVIDIA H200", 132))
    kept(1)
    assert len(seen) == 3
    ByLayout.forget()
    kept(1)
    assert len(seen) == 4


def test_a_plan_on_a_view_of_its_arguments_is_refused() -> None:
    x = half(4, 16)
    result, launches = OPERATORS["geglu"].plan(OPERATORS["geglu"].bind(x[:2]))
    with pytest.raises(AssertionError, match="view"):
        recipe([x], result, launches)


def test_launches_are_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    seen: list[int] = []
    step = _recipes._BoundLaunch({(1,): lambda: seen.append(current[-1])}, 1, (), (), {})
    for index in (1, 0, 1):
        _recipes.Recipe(torch.device("cuda", index), (), (step,), None).run(())
    assert seen == [1, 0, 1]
    assert current == [0]


def test_a_call_asks_for_reasons_and_plans_once(
    launched: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of "auto" too, which asks before it is known whether `linear` or its parts run."""
    module = sys.modules["ldmperf.kernels.linear"]
    asked = {"unsupported_reasons": 0, "plan": 0, "tuning_key": 0}
    for name in asked:
        original = getattr(module, name)

        def counting(*arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            asked[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counting)
        monkeypatch.setitem(vars(module.OPERATOR), name, counting)
    for _ in range(5):
        linear(**linear_call(2, 64, 64, True))
    assert asked["plan"] == asked["tuning_key"] == 1
    assert asked["unsupported_reasons"] == 2
    assert len(launched) == 5


def test_the_bench_counts_every_operator() -> None:
    from ldmperf.profiling.step.calls import attention_calls, sampler_call, vae_calls

    cases = [attention_calls(8, 64, 1)[0], sampler_call("ddim", 2, "bfloat16", (8, 8)), vae_calls()[-1]]
    with host_time.stand_in_device():
        found = [host_time.host_time(case) for case in cases]
    assert [time.operator for time in found] == [case.operator for case in cases]
    for time in found:
        assert time.launches in (1, 2)
        assert min(time.reasons, time.tuned, time.plan, time.triton, time.call) > 0
        assert time.checks + time.library + time.rest + time.triton == pytest.approx(time.call)
    lines = host_time.lines("39M", found)
    assert [line.split()[0] for line in lines[2:5]] == ["attention", "sampler_update", "group_norm_silu"]
    assert host_time.step_ms(found, merged=True) == pytest.approx(sum(t.count * t.call for t in found) / 1e3)
    # Nothing is left of the stand-in.
    with pytest.raises(Exception, match="need a GPU"):
        geglu(half(4, 16), backend="triton")
