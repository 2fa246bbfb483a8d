"""Global state of torch changes no value of a network, and numbers of numpy and torch are numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldmperf.model import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("_one_thread")

CONFIG = UNetConfig(
    (16, 24),
    (2, 3),
    (False, True),
    layers_per_block=1,
    norm_groups=4,
    context_dim=12,
    transformer_layers=(1, 2),
    added_time_dim=4,
    added_dim=14,
    only_cross_attention=(False, True),
    num_class_embeds=4,
    time_cond_proj_dim=5,
)
SAMPLE = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
# Numbers that bfloat16 does not hold.
SIZES = torch.tensor([[1023.0, 7.0], [513.0, 0.0]])
CALL = {
    "text_embeds": TEXT,
    "time_ids": SIZES,
    "class_labels": [3, 0],
    "timestep_cond": torch.randn(2, 5, generator=torch.Generator().manual_seed(3)),
}
TIMESTEPS = ([999.0, 640.5], torch.tensor([[999.0, 3.0], [640.5, 8.0]]), 999)


@functools.cache
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG, backend="torch").eval().requires_grad_(False)


def values(unet: UNet) -> list[Tensor]:
    """Whatever a network returns."""
    constants = unet.constants()
    found = [constants.values]
    for timesteps in TIMESTEPS:
        conditioning = unet.condition(timesteps, CONTEXT, **CALL, constants=constants)
        found += [
            conditioning.shifts,
            *conditioning.context,
            conditioning.constants,
            conditioning.padded(4).shifts,
        ]
        found.append(unet.denoise(SAMPLE, conditioning, 0))
    found.append(unet(SAMPLE, 640.5, CONTEXT, **CALL))
    found.append(unet.with_backend("auto")(SAMPLE, 640.5, CONTEXT, **CALL))
    return found


@functools.cache
def expected() -> list[Tensor]:
    return values(network())


@contextmanager
def state(
    dtype: torch.dtype, device: str | None, deterministic: str, mode: Callable[[], object]
) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic != "off", warn_only=deterministic == "warn")
    try:
        with nullcontext() if device is None else torch.device(device), mode():  # type: ignore[attr-defined]
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


states = st.builds(
    state,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([None, "cpu", "meta"]),
    st.sampled_from(["off", "warn", "error"]),
    st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]),
)


@settings(max_examples=20, deadline=None)
@given(states)
def test_global_state_changes_no_value(changed: object) -> None:
    wanted = expected()
    with changed:  # type: ignore[attr-defined]
        found = values(network())
    for value, other in zip(found, wanted, strict=True):
        assert (value.dtype, value.device) == (other.dtype, other.device)
        assert torch.equal(value, other)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(["off", "warn", "error"]),
    st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]),
)
def test_a_network_built_under_global_state_is_a_network(
    dtype: torch.dtype, deterministic: str, mode: Callable[[], object]
) -> None:
    torch.manual_seed(0)
    with state(dtype, "cpu", deterministic, mode):
        unet = UNet(CONFIG, backend="torch")
    spreads = dict(network().named_parameters())
    for name, parameter in unet.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.requires_grad
        written = parameter.detach().clone().double()
        assert written.isfinite().all()
        if parameter.ndim > 1:
            assert written.std().item() == pytest.approx(spreads[name].double().std().item(), rel=0.2)
    assert unet._constant_sizes == network()._constant_sizes
    # It computes what a network built without that state does of the same weights.
    plain = UNet(CONFIG, backend="torch").to(dtype)
    plain.load_state_dict(unet.state_dict())
    with torch.no_grad():
        assert torch.equal(unet(SAMPLE, 5.0, CONTEXT, **CALL), plain(SAMPLE, 5.0, CONTEXT, **CALL))


@pytest.mark.parametrize(
    "number",
    [np.float32, np.float64, np.int64, torch.tensor, lambda value: torch.tensor(value, dtype=torch.int32)],
    ids=["float32", "float64", "int64", "0-d", "0-d int"],
)
def test_numbers_of_numpy_and_torch_are_timesteps_and_steps(number: Callable[[int], object]) -> None:
    unet = network()
    wanted = unet.condition([999.0, 7.0], CONTEXT, **CALL)
    found = unet.condition([number(999), number(7)], CONTEXT, **CALL)
    assert torch.equal(found.shifts, wanted.shifts)
    assert torch.equal(unet.condition(np.array([999, 7]), CONTEXT, **CALL).shifts, wanted.shifts)
    for single in (number(999), np.array(999)):
        assert torch.equal(
            unet.condition(single, CONTEXT, **CALL).shifts, unet.condition(999.0, CONTEXT, **CALL).shifts
        )
    assert torch.equal(unet(SAMPLE, number(7), CONTEXT, **CALL), unet(SAMPLE, 7.0, CONTEXT, **CALL))


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_integers_of_numpy_and_torch_are_steps(number: Callable[[int], object]) -> None:
    unet = network()
    conditioning = unet.condition([999.0, 7.0], CONTEXT, **CALL)
    for step in (0, 1):
        assert torch.equal(
            unet.denoise(SAMPLE, conditioning, number(step)), unet.denoise(SAMPLE, conditioning, step)
        )
        assert torch.equal(conditioning.padded(number(step) + 3).shifts, conditioning.padded(step + 3).shifts)
    for wrong in (2, -1, 0.5, True):
        with pytest.raises(ValueError, match="a whole number from 0 to 1"):
            unet.denoise(SAMPLE, conditioning, wrong)
