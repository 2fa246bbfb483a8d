"""The host never waits for the device: no blocking copy between devices, no value read back.

The device is "meta", which is no CPU either: what would be a copy to a GPU is a copy to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldmperf.model import UNet, UNetConfig
from ldmperf.samplers import NoiseSchedule, initial_noise, make_plan, sample

SCHEDULE = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"})
TINY = UNetConfig((16, 32), (2, 4), (True, False), layers_per_block=1, context_dim=12, norm_groups=4)


class Waits(TorchDispatchMode):
    """Notes the operators at which the host would wait for a GPU, and copies to it that it would not wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0
        self._made = MadeElsewhere(self.waits)

    def __enter__(self) -> Waits:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        out = func(*args, **kwargs)
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"):
            self.waits.append(name)
        if name in ("aten::copy_", "aten::_to_copy"):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.device != out.device:
                bound = {
                    argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)
                }
                is_waited = not {**bound, **kwargs}.get("non_blocking", False)
                # What comes back is not there before the device has made it.
                if is_waited or source.device.type != "cpu":
                    self.waits.append(f"{name} from {source.device}")
                else:
                    self.copies += 1
        return out


class MadeElsewhere(TorchFunctionMode):
    """`torch.tensor` and its like copy to a device where no dispatch mode looks: they wait."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and device.type != "cpu":
            self.waits.append(f"torch.{func.__name__} on {device}")
        return func(*args, **kwargs)


X = torch.zeros(2, device="meta")


@pytest.mark.parametrize(
    "waiting",
    [
        lambda: torch.zeros(2).to("meta"),
        lambda: torch.as_tensor([1.0]).to("meta"),
        lambda: X.copy_(torch.zeros(2)),
        lambda: torch.tensor([1.0], device="meta"),
        lambda: torch.as_tensor([1.0], device="meta"),
        lambda: torch.zeros(2).item if torch.zeros(2).sum().item() else None,
    ],
)
def test_what_waits_is_noted(waiting: Callable[[], object]) -> None:
    with Waits() as noted:
        waiting()
    assert len(noted.waits) == 1
    with Waits() as noted:
        torch.zeros(2).to("meta", non_blocking=True)
        X.copy_(torch.zeros(2), non_blocking=True)
        torch.full((1,), 3.0, device="meta")
    assert noted.waits == []
    assert noted.copies == 2


def network() -> tuple[UNet, torch.Tensor, torch.Tensor]:
    with torch.device("meta"):
        unet = UNet(TINY, backend="torch").eval().requires_grad_(False)
        return unet, torch.empty(2, 4, 8, 8), torch.empty(2, 3, 12)


@pytest.mark.parametrize(
    ("timestep", "copies"),
    [
        (500.0, 0),
        (37, 0),
        (np.float64(2.5), 0),
        (np.float32(2.5), 1),
        (torch.tensor(4), 1),
        (torch.tensor([1.0, 2.0]), 1),
        (torch.zeros(2, device="meta"), 0),
        (torch.zeros((), device="meta", dtype=torch.int64), 0),
    ],
)
@torch.no_grad()
def test_a_forward_waits_for_nothing(timestep: Any, copies: int) -> None:
    unet, x, context = network()
    with Waits() as noted:
        unet(x, timestep, context)
    assert noted.waits == []
    assert noted.copies == copies


@pytest.mark.parametrize("timesteps", [[999.0, 3.0], np.array([999.0, 3.0]), torch.tensor([[1.0, 2.0]]), 5.0])
@torch.no_grad()
def test_conditioning_and_a_step_wait_for_nothing(timesteps: Any) -> None:
    unet, x, context = network()
    with Waits() as noted:
        conditioning = unet.condition(timesteps, context, constants=unet.constants())
        unet.denoise(x, conditioning, 0)
    assert noted.waits == []
    assert noted.copies == (not isinstance(timesteps, float))


@pytest.mark.parametrize("seeds", [[1, 2], torch.tensor([1, 2]), torch.zeros(2, dtype=torch.int64, device="meta")])
@pytest.mark.parametrize("name", ["ddpm", "unipc"])
@torch.no_grad()
def test_a_trajectory_waits_for_nothing(name: str, seeds: Any) -> None:
    unet, _, context = network()
    plan = make_plan(name, SCHEDULE, 3)
    with Waits() as noted:
        noise = initial_noise(seeds, (4, 8, 8), device="meta")
        sample(
            lambda x, step: unet(x, step.timestep, context.repeat(2, 1, 1)),
            plan,
            noise,
            guidance_scale=3.0,
            seeds=seeds,
            backend="torch",
        )
    assert noted.waits == []
    assert noted.copies >= 3


def test_a_tensor_of_the_callers_is_read_before_the_call_returns() -> None:
    """A pinned one would be read later: the copy to the device is of a copy."""
    timesteps, seeds = torch.tensor([1.0, 2.0]), torch.tensor([1, 2])
    sources: list[int] = []

    class Sources(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if (
                func._schema.name == "aten::_to_copy"
                and out.device.type == "meta"
                and args[0].device.type == "cpu"
            ):
                sources.append(args[0].data_ptr())
            return out

    unet, _, context = network()
    with torch.no_grad(), Sources():
        unet.condition(timesteps, context)
        initial_noise(seeds, (4, 2, 2), device="meta")
    assert len(sources) == 2
    assert not {timesteps.data_ptr(), seeds.data_ptr()} & set(sources)
