"""`out=` of the operators: what is written where, what is refused, under everything that torch wraps a call in."""

from __future__ import annotations

import contextlib
import functools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import TorchRuntimeError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ldmperf.kernels import (
    OPERATORS,
    attention,
    conv3x3,
    geglu,
    group_norm_silu,
    layer_norm,
    linear,
    residual_add,
    transformer_front,
    transformer_tail,
)
from ldmperf.kernels._library import OUTS

LAST = torch.channels_last
TAIL = {
    **{"attended": (2, 24, 8), "x": (2, 24, 8), "image": (2, 8, 4, 6), "context": (2, 5, 2, 2, 4)},
    **{"out_weight": (8, 8), "norm2_weight": (8,), "norm2_bias": (8,), "q_weight": (8, 8), "cross_weight": (8, 8)},
    **{"norm3_weight": (8,), "norm3_bias": (8,), "ff_in_weight": (12, 8), "ff_out_weight": (8, 6)},
    **{"proj_weight": (8, 8), "out_bias": (8,), "proj_bias": (8,)},
}
# By name: the operator with what are no tensors given, its tensors by name with their shapes. Images are
# channels-last.
CALLS = {
    "attention": (attention, {"q": (2, 5, 3, 8), "k": (2, 7, 3, 8), "v": (2, 7, 3, 8)}),
    "group_norm_silu": (
        functools.partial(group_norm_silu, num_groups=4),
        {"x": (2, 5, 4, 6), "skip": (2, 3, 4, 6), "weight": (8,), "bias": (8,), "x_bias": (2, 8)},
    ),
    "layer_norm": (layer_norm, {"x": (2, 5, 8), "weight": (8,), "bias": (8,), "x_bias": (8,)}),
    "add_layer_norm": (layer_norm, {"x": (2, 5, 8), "residual": (2, 5, 8), "weight": (8,), "bias": (8,)}),
    "linear": (
        functools.partial(linear, activation="geglu"),
        {"x": (2, 5, 8), "weight": (6, 8), "bias": (6,), "norm_weight": (8,), "norm_bias": (8,)},
    ),
    "linear alone": (linear, {"x": (2, 5, 8), "weight": (6, 8), "bias": (6,)}),
    "linear without a bias": (linear, {"x": (8,), "weight": (6, 8)}),
    "conv3x3": (
        conv3x3,
        {
            **{"x": (2, 5, 4, 6), "weight": (8, 5, 3, 3), "bias": (8,), "shortcut": (2, 3, 4, 6)},
            **{"shortcut_weight": (8, 3), "residual": (2, 8, 4, 6)},
        },
    ),
    "transformer_front": (
        functools.partial(transformer_front, num_groups=4),
        {
            **{"image": (2, 8, 4, 6), "group_weight": (8,), "group_bias": (8,), "proj_weight": (8, 8)},
            **{"norm_weight": (8,), "norm_bias": (8,), "qkv_weight": (6, 8), "x_bias": (8,)},
            "statistics": (2, 1, 2, 8),
        },
    ),
    "transformer_tail": (transformer_tail, TAIL),
    "statistics_transformer_tail": (functools.partial(transformer_tail, statistics=True), TAIL),
    "statistics_conv3x3": (
        functools.partial(conv3x3, statistics=True),
        {"x": (2, 5, 4, 6), "weight": (8, 5, 3, 3), "residual": (2, 8, 4, 6)},
    ),
    "geglu": (geglu, {"x": (2, 5, 8), "bias": (8,)}),
    "residual_add": (residual_add, {"x": (2, 3, 4, 6), "residual": (2, 3, 4, 6), "bias": (3,)}),
    "residual_add, doubled": (
        functools.partial(residual_add, size=(7, 12)),
        {"x": (2, 3, 4, 6), "residual": (2, 3, 4, 6), "bias": (3,)},
    ),
    "statistics_residual_add": (
        functools.partial(residual_add, statistics=True),
        {"x": (2, 3, 4, 6), "residual": (2, 3, 4, 6), "bias": (3,)},
    ),
}
SHARED = [(name, argument) for name, (_, shapes) in CALLS.items() for argument in shapes]


def drawn(name, dtype=torch.float32, device="cpu"):
    """(operator, arguments)"""
    operator, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.randn(shape, generator=generator).to(device, dtype) for key, shape in shapes.items()}
    if "statistics" in values:
        values["statistics"] = values["statistics"].float().abs()
    others = ("attention", "statistics")
    is_image = {key: len(shape) == 4 and name not in others and key not in others for key, shape in shapes.items()}
    return operator, {key: v.contiguous(memory_format=LAST) if is_image[key] else v for key, v in values.items()}


def each(result):
    return result if isinstance(result, tuple) else (result,)


def like(result):
    """Memory for a result, with nothing in it yet."""
    made = tuple(torch.full_like(one, math.nan) for one in each(result))
    return made if isinstance(result, tuple) else made[0]


def equal(found, expected):
    return all(map(torch.equal, each(found), each(expected)))


# What is written


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_written_there_and_that_very_tensor_returned(name, backend, dtype):
    operator, arguments = drawn(name, dtype)
    expected = operator(**arguments, backend=backend)
    out = like(expected)
    # Twice: planned, and kept.
    for _ in range(2):
        found = operator(**arguments, backend=backend, out=out)
        assert type(found) is type(expected)
        assert all(a is b for a, b in zip(each(found), each(out), strict=True))
        assert equal(out, expected)
        for one in each(out):
            one.fill_(math.nan)


def test_every_operator_with_a_result_is_called_here():
    # Float8, in which torch can compare and fill nothing, is in test_float8.py.
    outs = {name for name in OUTS if not name.startswith("float8_")}
    assert {name.partition(",")[0].split()[0] for name in CALLS} == outs
    assert {name.removeprefix("add_").removeprefix("statistics_") for name in outs} == set(OPERATORS) - {
        "sampler_update"
    }


def test_slices_of_a_buffer_are_memory_too_and_strides_of_one_element_do_not_matter():
    _, arguments = drawn("geglu")
    buffer = torch.full((7, 2, 5, 4), math.nan)
    expected = geglu(**arguments)
    geglu(**arguments, out=buffer[3])
    assert torch.equal(buffer[3], expected)
    assert buffer[2].isnan().all()
    assert buffer[4].isnan().all()
    x = arguments["x"][:1]
    row = torch.empty(9, 5, 4)[::9].as_strided((1, 5, 4), (777, 4, 1))
    assert torch.equal(geglu(x, out=row), geglu(x))
    for rows, channels, columns in ((0, 8, 4), (3, 0, 4), (3, 8, 0), (0, 0, 0)):
        out = torch.full((rows, columns), math.nan)
        x, weight = torch.ones(rows, channels), torch.ones(columns, channels)
        assert linear(x, weight, out=out) is out
        assert torch.equal(out, linear(x, weight))
        assert geglu(torch.ones(rows, 2 * columns), out=out) is out
        assert torch.equal(out, geglu(torch.ones(rows, 2 * columns)))


def test_a_matmul_alone_is_written_without_a_copy():
    """ "auto" of `linear` is torch's matmul, wherever no kernel of ours is expected to gain."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    for name, own in (("linear alone", "aten.addmm.out"), ("linear without a bias", "aten.mm.out")):
        operator, arguments = drawn(name)
        out = like(operator(**arguments))
        with Names() as names:
            operator(**arguments, out=out)
        assert own in names.found
        assert not {"aten.copy_.default", "aten.clone.default", "aten.addmm.default"} & set(names.found)


triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
host_time = SimpleNamespace(**runpy.run_path(str(ROOT / "bench" / "host_time.py"), run_name="host_time"))


@pytest.fixture
def launched(monkeypatch):
    """Of every launch from now on the pointers of its tensors; kernels run on nothing."""
    found = []

    def run(kernel, programs, *arguments):
        found.append([value.data_ptr() for value in arguments if isinstance(value, torch.Tensor)])

    with host_time.stand_in_device():
        monkeypatch.setattr(host_time.NoKernel, "run", run)
        yield found


@pytest.mark.parametrize("name", [name for name in CALLS if "alone" not in name and "without" not in name])
def test_kernels_are_launched_on_it_and_no_result_is_allocated(name, launched, monkeypatch):
    operator, arguments = drawn(name, torch.bfloat16)
    out = like(operator(**arguments, backend="torch"))
    versions = [one._version for one in each(out)]
    operator(**arguments, backend="triton", out=out)
    plain = len(launched)
    made = []
    original = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: made.append(a[0]) or original(*a, **k))
    launched.clear()
    operator(**arguments, backend="triton", out=out)
    assert len(launched) == plain >= 1
    assert {one.data_ptr() for one in each(out)} <= set(launched[-1])
    assert not set(map(tuple, made)) & {tuple(one.shape) for one in each(out)}
    # A plan without `out`, of the same layout, has its own memory. Autograd is told of writes by kernels too.
    launched.clear()
    other = operator(**arguments, backend="triton")
    assert {one.data_ptr() for one in each(other)} <= set(launched[-1])
    assert not {one.data_ptr() for one in each(out)} & set(launched[-1])
    assert [one._version for one in each(out)] == [version + 2 for version in versions]


def test_other_memory_of_a_plan_is_still_new(launched):
    """The partial statistics of a large norm."""
    x = torch.empty(1, 64, 128, 128, dtype=torch.bfloat16).to(memory_format=LAST)
    out = torch.empty_like(x)
    group_norm_silu(x, 32, backend="triton", out=out)
    statistics, applied = launched
    assert out.data_ptr() in applied
    assert out.data_ptr() not in statistics
    assert len(set(applied) - {x.data_ptr(), out.data_ptr()}) == 1


# What is refused


@settings(max_examples=10, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_memory_that_is_not_as_the_operator_makes_it_is_refused_and_untouched(name, backend, data):
    operator, arguments = drawn(name)
    expected = operator(**arguments, backend=backend)
    outs = list(each(like(expected)))
    place = data.draw(st.integers(0, len(outs) - 1))
    right = outs[place]
    wrong = data.draw(
        st.sampled_from(
            [
                right.double(),
                right.to(torch.bfloat16),
                right.to("meta"),
                right[None],
                right[..., :-1].contiguous(),
                right.new_full((*right.shape[:-1], right.shape[-1] + 1), math.nan),
                right.new_full((0,), math.nan),
                # As large, and other strides.
                right.new_full((*right.shape, 2), math.nan)[..., 0],
                torch.full((right.numel(),), math.nan).expand(2, -1)[:, : right.shape[-1]],
                *([right.transpose(2, 3)] if right.ndim == 4 and name != "attention" else []),
                *([] if right.is_contiguous() else [right.contiguous()]),
            ]
        )
    )
    outs[place] = wrong
    shape, stride = wrong.shape, wrong.stride()
    with pytest.raises(ValueError, match=r": out(\[[01]\])? must be ") as refusal:
        operator(**arguments, backend=backend, out=tuple(outs) if len(outs) > 1 else wrong)
    text = str(refusal.value)
    assert "\n" not in text
    assert f"must be float32 {list(right.shape)} of strides {list(right.stride())} on cpu; got " in text
    assert (wrong.shape, wrong.stride()) == (shape, stride)
    assert wrong.is_meta or wrong.isnan().all()


@pytest.mark.parametrize("wrong", [1, "out", [1.0], (), torch.float32])
@pytest.mark.parametrize("name", ["geglu", "add_layer_norm"])
def test_what_is_no_tensor_is_refused(name, wrong):
    operator, arguments = drawn(name)
    with pytest.raises(ValueError, match=r"^[a-z_]+: out must be a (pair of )?tensors?.*; got [a-z]+$"):
        operator(**arguments, out=wrong)


def test_a_pair_is_for_a_residual_and_one_tensor_for_none():
    operator, arguments = drawn("add_layer_norm")
    one = torch.empty(2, 5, 8)
    for wrong in (one, (one,), (one, one, one)):
        with pytest.raises(ValueError, match="out must be a pair of tensors"):
            operator(**arguments, out=wrong)
    arguments.pop("residual")
    with pytest.raises(ValueError, match="out must be a tensor; got tuple"):
        operator(**arguments, out=(one, one.clone()))
    operator(**arguments, out=[one])


@settings(max_examples=12, deadline=None)
@given(offset=st.integers(-60, 60))
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("name", "argument"), SHARED)
def test_memory_of_an_argument_is_refused_wherever_they_meet(name, argument, backend, offset):
    """In one buffer, a result `offset` elements after the argument, or before it. Both are dense."""
    operator, arguments = drawn(name)
    expected = operator(**arguments, backend=backend)
    outs = list(each(like(expected)))
    given_, result = arguments[argument], outs[-1]
    middle = 1000
    buffer = torch.zeros(3000)
    inside = buffer.as_strided(given_.shape, given_.stride(), middle).copy_(given_)
    outs[-1] = buffer.as_strided(result.shape, result.stride(), middle + offset)
    arguments[argument] = inside
    out = tuple(outs) if len(outs) > 1 else outs[0]
    meets = -result.numel() < offset < given_.numel()
    # The result of transformer_tail that is drawn here beside others is its statistics.
    in_place = (name == "residual_add" and argument != "bias") or (name, argument) == ("transformer_tail", "image")
    in_place = in_place and offset == 0
    if meets and not in_place:
        before = buffer.clone()
        message = rf"out must not share memory with {argument}; give it memory of its own$"
        with pytest.raises(ValueError, match=message):
            operator(**arguments, backend=backend, out=out)
        assert torch.equal(buffer, before)
    else:
        operator(**arguments, backend=backend, out=out)
        assert equal(out, expected)


def test_the_memory_of_a_slice_reaches_to_its_last_element():
    """Of a packed projection, read in place, whose slices span more than they have elements."""
    buffer = torch.randn(2 * 5 * 3 * 2 * 8 + 160)
    packed = buffer[:480].view(2, 5, 3, 2, 8).unbind(2)
    for place, (name, inside) in enumerate(zip("qkv", packed, strict=True)):
        values = list(torch.randn(3, 2, 5, 2, 8))
        values[place] = inside
        expected = attention(*values)
        last = inside[-1, -1, -1, -1:].storage_offset()
        shape, stride = (2, 5, 2, 8), (80, 16, 8, 1)
        with pytest.raises(ValueError, match=f"must not share memory with {name};"):
            attention(*values, out=buffer.as_strided(shape, stride, last))
        out = buffer.as_strided(shape, stride, last + 1)
        assert torch.equal(attention(*values, out=out), expected)


def test_two_results_lie_apart():
    operator, arguments = drawn("add_layer_norm")
    out = torch.empty(2, 5, 8)
    with pytest.raises(ValueError, match="out must not share memory with result0"):
        operator(**arguments, out=(out, out))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("size", [None, (1, 1)])
def test_a_residual_add_may_be_in_place(memory_format, size):
    _, arguments = drawn("residual_add")
    shape = (slice(None), slice(None), slice(0, 1), slice(0, 1)) if size else ()
    x, residual = (
        arguments[key][shape].contiguous(memory_format=memory_format).clone() for key in ("x", "residual")
    )
    bias = arguments["bias"]
    expected = residual_add(x, residual, bias, size=size)
    for taken in ("x", "residual"):
        values = {"x": x.clone(), "residual": residual.clone()}
        assert residual_add(**values, bias=bias, size=size, out=values[taken]) is values[taken]
        assert torch.equal(values[taken], expected)
    twice = x.clone()
    assert torch.equal(residual_add(twice, twice, out=twice), x + x)


def test_a_residual_of_other_strides_is_not_overwritten():
    x, residual = torch.randn(2, 3, 4, 6).to(memory_format=LAST), torch.randn(2, 3, 4, 6)
    with pytest.raises(ValueError, match="out must be float32"):
        residual_add(x, residual, out=residual)
    # The same memory, transposed: as dense, and elements lie elsewhere.
    square = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="out must not share memory with residual"):
        residual_add(torch.randn(2, 3, 4, 4), square.transpose(2, 3), out=square)


# Gradients


@pytest.mark.parametrize(("name", "argument"), SHARED)
def test_where_something_requires_grad_it_is_refused(name, argument):
    operator, arguments = drawn(name)
    expected = operator(**arguments)
    out = like(expected)
    arguments[argument].requires_grad_()
    with pytest.raises(ValueError, match=rf"out= has no gradients, and {argument} requires grad") as refusal:
        operator(**arguments, out=out)
    assert "\n" not in str(refusal.value)
    assert all(one.isnan().all() for one in each(out))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            operator(**arguments, out=out)
        assert equal(out, expected)
        assert not any(one.requires_grad for one in each(out))


def test_a_parameter_is_written_where_nothing_is_followed():
    _, arguments = drawn("geglu")
    out = nn.Parameter(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="and out requires grad"):
        geglu(**arguments, out=out)
    with torch.no_grad():
        assert geglu(**arguments, out=out) is out
    assert torch.equal(out, geglu(**arguments))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_who_saved_the_memory_for_a_backward_is_told(backend):
    _, arguments = drawn("geglu")
    out, x = torch.ones(2, 5, 4), torch.ones(2, 5, 4, requires_grad=True)
    total = (x * out).sum()
    with torch.no_grad():
        geglu(**arguments, backend=backend, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_what_transforms_or_differentiates_is_refused():
    _, arguments = drawn("geglu")
    x, out = arguments["x"], torch.empty(2, 5, 4)
    calls = (
        lambda: torch.func.vmap(lambda one: geglu(one, out=out))(x),
        lambda: torch.func.vmap(lambda one, into: geglu(one, out=into))(x, out),
        lambda: torch.func.jvp(lambda one: geglu(one, out=out), (x,), (x,)),
        lambda: torch.func.grad(lambda one: geglu(one, out=out).sum())(x),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"^geglu: out= has no derivatives and no batching: .*"):
            call()
    with forward_ad.dual_level():
        for dual, into in ((forward_ad.make_dual(x, x), out), (x, forward_ad.make_dual(out, out))):
            with pytest.raises(NotImplementedError, match="out= has no derivatives"):
                geglu(dual, out=into)
        assert geglu(x, out=out) is out
    assert torch.equal(out, geglu(x))


# What torch wraps a call in


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled_the_mutation_is_seen(backend, dynamic):
    """Of every operator, and of memory that is read before, written twice, a view, or an argument."""
    torch._dynamo.reset()
    fewer = backend == "inductor" or dynamic
    names = ("geglu", "residual_add", "residual_add, doubled") if fewer else tuple(CALLS)
    drawings = {name: drawn(name) for name in names}
    expected = {name: operator(**values, backend="torch") for name, (operator, values) in drawings.items()}

    def function(arguments, outs, buffer, image):
        before = outs["geglu"] + 1
        found = {name: CALLS[name][0](**arguments[name], backend="torch", out=outs[name]) for name in names}
        once = outs["geglu"] * 2
        twice = geglu(arguments["geglu"]["x"] + 1, backend="torch", out=outs["geglu"])
        inner = geglu(arguments["geglu"]["x"] - 1, backend="torch", out=buffer[1])
        total = residual_add(image, image, backend="torch", out=image)
        total = residual_add(arguments["residual_add"]["x"], total, backend="torch", out=total)
        return before, found, once, twice, inner, total

    arguments = {name: values for name, (_, values) in drawings.items()}
    outs = {name: like(result) for name, result in expected.items()}
    outs["geglu"].fill_(3.0)
    buffer, x = torch.zeros(3, 2, 5, 4), arguments["residual_add"]["x"]
    image = x.clone()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        before, found, once, twice, inner, total = compiled(arguments, outs, buffer, image)
    for name in names:
        assert all(a is b for a, b in zip(each(found[name]), each(outs[name]), strict=True))
        assert name == "geglu" or equal(outs[name], expected[name])
    assert torch.equal(before, torch.full_like(before, 4.0))
    assert torch.equal(once, expected["geglu"] * 2)
    gate = drawings["geglu"][1]["x"]
    assert twice is outs["geglu"]
    assert torch.equal(twice, geglu(gate + 1, backend="torch"))
    assert torch.equal(buffer, torch.stack([buffer[0] * 0, geglu(gate - 1, backend="torch"), buffer[0] * 0]))
    assert torch.equal(inner, buffer[1])
    assert total is image
    assert torch.equal(image, x + (x + x))


# What raises while it is traced runs eagerly, and dynamo says what it could not follow there.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_compiled_refusals():
    torch._dynamo.reset()
    _, arguments = drawn("geglu")
    x = arguments["x"]

    def compiled(x, out):
        # Afresh: what raised once runs eagerly from then on.
        torch._dynamo.reset()
        return torch.compile(lambda x, out: geglu(x, backend="torch", out=out), backend="aot_eager")(x, out)

    with pytest.raises(ValueError, match=r"^geglu: out must be float32"):
        compiled(x, x)
    with pytest.raises(ValueError, match="and x requires grad"):
        compiled(x.clone().requires_grad_(), torch.empty(2, 5, 4))
    # That memory is shared is seen by the compiler's tensors alone.
    for out in (x.view(-1)[:40].view(2, 5, 4), x.view(-1)[40:].view(2, 5, 4)):
        with pytest.raises(TorchRuntimeError, match="geglu: out must not share memory with x"):
            compiled(x, out)
    buffer = torch.randn(120)
    x, out = buffer[:80].view(2, 5, 8), buffer[80:].view(2, 5, 4)
    assert torch.equal(compiled(x, out), geglu(x, backend="torch"))


def test_exported():
    class Module(nn.Module):
        def forward(self, x, out):
            return geglu(x, backend="torch", out=out) + 1

    x, out = drawn("geglu")[1]["x"], torch.zeros(2, 5, 4)
    program = torch.export.export(Module(), (x, out.clone()))
    assert torch.equal(program.module()(x, out), geglu(x, backend="torch") + 1)
    assert torch.equal(out, geglu(x, backend="torch"))


@pytest.mark.parametrize("name", [name for name in OUTS if not name.startswith("float8_")])
def test_opcheck(name):
    operator, arguments = drawn(name)
    out = like(operator(**arguments))
    overload = getattr(torch.ops.ldmperf, name).out
    defaults = {"num_groups": 4, "eps": 1e-5, "tf32": False, "backend": "torch"}
    defaults |= {"stride": 1, "upsample": False, "statistics": name.startswith("statistics_")}
    if name in ("transformer_front", "group_norm_silu"):
        defaults |= {"group_eps": 1e-6, "norm_eps": 1e-5, "statistics": None}
    if name != "residual_add":
        defaults["activation"] = "geglu" if name == "linear" else "silu"
    results = {f"result{i}": one for i, one in enumerate(each(out))}
    names = [argument.name for argument in overload._schema.arguments]
    opcheck(overload, tuple({**defaults, **arguments, **results}.get(one) for one in names))


def test_flops_are_those_of_a_call_without():
    counts = []
    for with_out in (False, True):
        total = 0
        for name in ("attention", "linear", "linear alone", "conv3x3"):
            operator, arguments = drawn(name, device="meta")
            out = {"out": operator(**arguments, backend="torch")} if with_out else {}
            with FlopCounterMode(display=False) as counter:
                operator(**arguments, backend="torch", **out)
            total += counter.get_total_flops()
        counts.append(total)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_under_autocast_it_has_the_dtype_of_autocasts_rule(name, backend):
    operator, arguments = drawn(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = operator(**arguments, backend=backend)
        out = like(expected)
        assert equal(operator(**arguments, backend=backend, out=out), expected)
        other = torch.float32 if each(expected)[0].dtype == torch.bfloat16 else torch.bfloat16
        wrong = tuple(one.to(other) for one in each(out))
        needed = str(each(expected)[0].dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"must be {needed} .* under autocast; got "):
            operator(**arguments, backend=backend, out=wrong if len(wrong) > 1 else wrong[0])


@contextlib.contextmanager
def gpu_autocast():
    """Of a GPU that is not there, which torch.autocast would leave off."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_autocasts_rule_of_a_gpu(monkeypatch):
    """A norm in float32, beside a sum that keeps its dtype: the operator computes both in one."""
    operator, shapes = CALLS["add_layer_norm"]
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda into, source: copied.append((into, source.dtype)))
    with FakeTensorMode(), gpu_autocast():
        arguments = {key: torch.empty(s, dtype=torch.bfloat16, device="cuda") for key, s in shapes.items()}
        expected = operator(**arguments, backend="torch")
        assert [one.dtype for one in expected] == [torch.float32, torch.bfloat16]
        out = tuple(map(torch.empty_like, expected))
        assert operator(**arguments, backend="torch", out=out) is out
        assert [(into is one, dtype) for one, (into, dtype) in zip(out, copied, strict=True)] == [
            (True, torch.float32),
            (True, torch.bfloat16),
        ]
        with pytest.raises(ValueError, match=r"must be bfloat16 .* on cuda:0 under autocast; got float32"):
            operator(**arguments, backend="torch", out=(out[0], out[1].float()))


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_memory(name):
    with FakeTensorMode():
        operator, arguments = drawn(name)
        out = like(operator(**arguments, backend="torch"))
        assert each(operator(**arguments, backend="torch", out=out))[0] is each(out)[0]
        with pytest.raises(ValueError, match=r"out must be a|must be float32"):
            operator(**arguments, backend="torch", out=torch.empty(1))
    operator, arguments = drawn(name, device="meta")
    out = operator(**arguments, backend="torch")
    assert each(operator(**arguments, backend="torch", out=out))[0] is each(out)[0]


def test_tensor_subclasses():
    _, arguments = drawn("geglu")
    x, out = arguments["x"], torch.zeros(2, 5, 4)
    pair, both = TwoTensor(x, x + 1), TwoTensor(out, out.clone())
    assert geglu(pair, backend="torch", out=both) is both
    assert torch.equal(both.a, geglu(x))
    assert torch.equal(both.b, geglu(x + 1))
