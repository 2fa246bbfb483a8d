"""Kernels in triton's interpreter: TRITON_INTERPRET=1 is read when they are decorated, so a process of its own.

tests/test_interpreter.py starts it; `TRITON_INTERPRET=1 pytest tests/interpreter` does by hand. The same tests run
compiled kernels on an emulated GPU by `pytest -p ldmperf.emulate tests/interpreter`.
"""

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings

from ldmperf.kernels import _triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "cpu" in _triton.DEVICES
collect_ignore_glob = [] if INTERPRETED or EMULATED else ["*.py"]
# Tests of the interpreter, not of kernels.
OF_THE_INTERPRETER = {
    "test_a_residual_add_in_place_whatever_the_order_of_its_programs": "sets the interpreter's order of programs",
    "test_bfloat16_is_refused_in_the_interpreter_for_users": "compiled kernels take bfloat16",
    "test_the_interpreter_is_refused_to_users": "compiled kernels convert to float8",
}

# The same examples in every run of the suite: a failure is of the code that changed. To search further, by hand:
# TRITON_INTERPRET=1 pytest tests/interpreter --hypothesis-profile=default
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

# Relative error that is rounding alone.
FLOOR = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def _rounded(values):
    """The bits of float32 values as bfloat16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _bfloat16_as_on_a_gpu():
    """Repairs the interpreter: its products multiply bfloat16's bits as integers, its casts cut them off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def values(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(np.matmul(values(a), values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def get_bf16(self, value):
        return TensorHandle(_rounded(np.array([value], np.float32)), tl.bfloat16)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.get_bf16 = get_bf16


def _float8_as_on_a_gpu():
    """Repairs the interpreter: its casts to float8 cut off subnormals, round ties up and make NaN a number."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(src.data, np.float32))
            nearest = values.clamp(-448, 448).to(torch.float8_e4m3fn)
            return TensorHandle(nearest.view(torch.uint8).numpy(), tl.float8e4nv)
        return cast(self, src, dst_type, rounding_mode)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _patched_once_a_launch():
    """Spares the interpreter half its time: every call in a kernel patches triton.language, as the launch has."""
    from triton.runtime import interpreter

    patch, execute, scopes = interpreter._patch_lang, interpreter.GridExecutor.__call__, {}

    def patch_once(fn):
        return scopes[fn.__module__] if fn.__module__ in scopes else scopes.setdefault(fn.__module__, patch(fn))

    def execute_afresh(self, *args, **kwargs):
        scopes.clear()
        return execute(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, execute_afresh


def _without_unread_overflow_checks():
    """Spares it a fifth of the rest: sums of integers once more in 64 bits, for what only `debug` asserts."""
    from triton.runtime.interpreter import interpreter_builder as builder

    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _types_are_made_once():
    """Spares it a quarter of that: every value makes its type, its shape and its numpy dtype anew."""
    import triton.language as tl
    from triton.runtime import interpreter

    make_block, make_tensor, numpy_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks, tensors, dtypes = {}, {}, {}

    def make_block_once(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def make_tensor_once(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {key: value for key, value in vars(self).items() if key not in ("handle", "type")}
        vars(self).update(tensors[type.name], handle=handle, type=type)

    def numpy_dtype_once(type):
        return dtypes[type.name] if type.name in dtypes else dtypes.setdefault(type.name, numpy_dtype(type))

    tl.block_type.__init__, tl.tensor.__init__ = make_block_once, make_tensor_once
    interpreter._get_np_dtype = numpy_dtype_once


if INTERPRETED:
    _bfloat16_as_on_a_gpu()
    _float8_as_on_a_gpu()
    _patched_once_a_launch()
    _without_unread_overflow_checks()
    _types_are_made_once()


def pytest_collection_modifyitems(items):
    if EMULATED:
        for item in items:
            if item.originalname in OF_THE_INTERPRETER:
                item.add_marker(pytest.mark.skip(reason=OF_THE_INTERPRETER[item.originalname]))


LAYOUTS = ("plain", "channels_last", "sliced", "channel_slice", "expanded", "transposed")


def image(shape, layout, dtype, generator, mean=0.0, scale=1.0):
    """[B, C, H, W] of the layout; the storage around it is NaN."""
    batch, channels, height, width = shape

    def random(*size):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)

    if layout == "channels_last":
        return random(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        around = torch.full((batch + 1, channels + 2, height + 1, 2 * width + 1), torch.nan, dtype=dtype)
        return around[1:, 1:-1, 1:, 1::2].copy_(random(*shape))
    if layout == "channel_slice":
        around = torch.full((batch, channels + 5, height, width), torch.nan, dtype=dtype)
        return around.to(memory_format=torch.channels_last)[:, 2:-3].copy_(random(*shape))
    if layout == "expanded":
        return random(1, *shape[1:]).expand(*shape)
    if layout == "transposed":
        return random(batch, channels, width, height).transpose(2, 3)
    return random(*shape)


def tokens(shape, layout, dtype, generator, mean=0.0, scale=1.0):
    """[B, N, C] of the layout, its last dimension contiguous; the storage around it is NaN."""
    batch, count, channels = shape

    def random(*size):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)

    if layout in ("sliced", "channel_slice"):
        around = torch.full((batch + 1, count + 2, 3 * channels), torch.nan, dtype=dtype)
        return around[1:, 1:-1, channels : 2 * channels].copy_(random(*shape))
    if layout == "expanded":
        return random(1, count, channels).expand(*shape)
    if layout == "transposed":
        return random(count, batch, channels).transpose(0, 1)
    return random(*shape)


def _flat(values):
    """The values of a call, those of its tuples too."""
    for value in values:
        yield from _flat(value) if isinstance(value, tuple | list) else (value,)


def launch(operator, *args, config=None, **kwargs):
    """The operator's result by its kernels, under a configuration; every result and workspace was NaN before."""
    from ldmperf.kernels._launch import run

    call = operator.bind(*args, **kwargs)
    result, launches = operator.plan(call, config=config)
    given = {id(value) for value in _flat(call) if isinstance(value, torch.Tensor)}
    for one in launches:
        for tensor in one.tensors.values():
            if id(tensor) not in given and tensor.is_floating_point():
                tensor.fill_(torch.nan)
    run(launches, torch.device("cpu"))
    return result


def relative_rms(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def judge(actual, exact, own, dtype, factor=2.0):
    """Fails unless the error is rounding, or at most `factor` times that of torch's own in the same dtype."""
    assert actual.shape == exact.shape
    assert actual.dtype == dtype
    if exact.numel():
        error = relative_rms(actual, exact)
        assert error <= max(FLOOR[dtype], factor * relative_rms(own, exact)), error


def pick_configs(operator, choose, *args, **kwargs):
    """The default configuration and some that a tuner may choose."""
    found = operator.candidates(operator.bind(*args, **kwargs))
    return [None, *(found[choose.randrange(len(found))] for _ in range(2))]


@pytest.fixture(scope="session")
def kit():
    """The functions above."""
    return SimpleNamespace(
        image=image,
        tokens=tokens,
        launch=launch,
        judge=judge,
        relative_rms=relative_rms,
        pick_configs=pick_configs,
    )
