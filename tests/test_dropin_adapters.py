"""Adapters and `accelerate` in every order: outputs are those of a plain twin with the same adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from ldmperf.model.dropin import Report, accelerate, undo
from ldmperf.samplers import NoiseSchedule, initial_noise, make_plan, sample

from .adapters import CONTEXT_DIM, TARGETS, lora, tiny_unet
from .tapes import graphed

pytestmark = [
    pytest.mark.usefixtures("_one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning"),
]

PLAN = make_plan("ddim", NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear"}), 1)
NOISE = initial_noise([1, 2], (4, 8, 8)).double()
TEXT = torch.linspace(-1, 1, 2 * 3 * CONTEXT_DIM, dtype=torch.float64).reshape(2, 3, -1).sin()
TIME = torch.tensor([500])


def output(unet: Any, x: Tensor = NOISE) -> Tensor:
    out: Tensor = unet(x, TIME, TEXT, return_dict=False)[0]
    return out


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


class Adapters(RuleBasedStateMachine):
    """Everything is done to two UNets; one of them is also accelerated, undone, and run under captured steps."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.twin = tiny_unet(), tiny_unet()
        self.reports: list[Report] = []
        self.loaded: list[str] = []
        self.merged: set[str] = set()
        self.of_dora: set[str] = set()
        self.count = 0
        self.sampler, _ = graphed(self.denoise)

    def denoise(self, x: Tensor, conditioning: tuple[Tensor, Tensor], step: Tensor) -> Tensor:
        time, text = conditioning
        out: Tensor = self.unet(x, time, text, return_dict=False)[0]
        return out

    def both(self, change: Callable[[Any], Any]) -> None:
        for unet in (self.unet, self.twin):
            change(unet)

    @rule(attention=st.booleans(), norms=st.booleans(), geglu=st.booleans())
    def accelerate(self, attention: bool, norms: bool, geglu: bool) -> None:
        self.reports.append(accelerate(self.unet, attention=attention, norms=norms, geglu=geglu, backend="torch"))

    @rule()
    def accelerate_all(self) -> None:
        self.reports.append(accelerate(self.unet, backend="torch"))

    @precondition(lambda self: self.reports)
    @rule(by_scan=st.booleans())
    def undo(self, by_scan: bool) -> None:
        if by_scan:
            undo(self.unet)
            self.reports.clear()
        else:
            self.reports.pop().undo()

    @precondition(lambda self: len(self.loaded) < 3)
    @rule(
        layers=st.sets(st.sampled_from(TARGETS), min_size=1, max_size=4).map(sorted),
        rank=st.integers(1, 3),
        dora=st.booleans(),
        seed=st.integers(0, 99),
    )
    def load(self, layers: list[str], rank: int, dora: bool, seed: int) -> None:
        self.count += 1
        name = f"adapter{self.count}"
        weights = lora(self.twin, seed, layers, rank, dora)
        self.both(lambda unet: unet.load_lora_adapter(dict(weights), prefix=None, adapter_name=name))
        self.loaded.append(name)
        if dora:
            self.of_dora.add(name)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data(), seed=st.integers(0, 99))
    def write_in_place(self, data: st.DataObject, seed: int) -> None:
        name = data.draw(st.sampled_from(self.loaded))

        def change(unet: Any) -> None:
            generator = torch.Generator().manual_seed(seed)
            for place, parameter in unet.named_parameters():
                if f".{name}." in place:
                    parameter.data.add_(
                        torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 10
                    )

        self.both(change)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data(), seed=st.integers(0, 99), rank=st.integers(1, 3))
    def hotswap(self, data: st.DataObject, seed: int, rank: int) -> None:
        name = data.draw(st.sampled_from(self.loaded))
        # peft refuses these.
        if name in self.merged | self.of_dora:
            return
        adapted = {
            p.split(f".lora_A.{name}")[0] for p, _ in self.twin.named_parameters() if f"lora_A.{name}." in p
        }
        weights = {
            key: value
            for key, value in lora(self.twin, seed, sorted(adapted), rank).items()
            if key.partition(".lora_")[0] in adapted
        }

        def swap(unet: Any) -> None:
            # Clones: where the rank grows, peft exchanges tensors, and those given hold the old values.
            given = {key: value.clone() for key, value in weights.items()}
            unet.load_lora_adapter(given, prefix=None, adapter_name=name, hotswap=True)

        self.both(swap)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def set_adapters(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.loaded), min_size=1, max_size=2, unique=True))
        weights = data.draw(st.lists(st.floats(-1, 2), min_size=len(names), max_size=len(names)))
        self.both(lambda unet: unet.set_adapters(names, list(weights)))

    @precondition(lambda self: self.loaded)
    @rule(enabled=st.booleans())
    def enable_or_disable(self, enabled: bool) -> None:
        self.both(lambda unet: unet.enable_lora() if enabled else unet.disable_lora())

    @precondition(lambda self: self.loaded)
    @rule(scale=st.sampled_from([1.0, 0.5]), data=st.data())
    def fuse(self, scale: float, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.loaded))
        self.both(lambda unet: unet.fuse_lora(lora_scale=scale, adapter_names=[name]))
        self.merged.add(name)

    @precondition(lambda self: self.merged)
    @rule()
    def unfuse(self) -> None:
        self.both(lambda unet: unet.unfuse_lora())
        self.merged.clear()

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.loaded))
        self.loaded.remove(name)
        self.merged.discard(name)
        if not self.loaded:
            return self.unload()
        self.both(lambda unet: unet.delete_adapters(name))

    @precondition(lambda self: self.loaded)
    @rule()
    def unload(self) -> None:
        self.both(lambda unet: unet.unload_lora())
        self.loaded.clear()
        self.merged.clear()

    @rule()
    @torch.no_grad()
    def sample(self) -> None:
        result = self.sampler((TIME, TEXT), PLAN, NOISE)
        expected = sample(lambda x, step: output(self.twin, x), PLAN, NOISE, backend="torch")
        close(result, expected)

    @invariant()
    @torch.no_grad()
    def outputs_are_those_of_the_plain_twin(self) -> None:
        close(output(self.unet), output(self.twin))
        assert self.unet.state_dict().keys() == self.twin.state_dict().keys()

    @invariant()
    def the_report_tells_what_is_wrapped(self) -> None:
        if not self.reports:
            return
        left = self.reports[-1].left
        called = {entry.path for entry in left if "called as it is: peft's" in entry.reason}
        wrapped = {name for name, module in self.unet.named_modules() if hasattr(module, "base_layer")}
        assert called == wrapped

    def teardown(self) -> None:
        undo(self.unet)
        with torch.no_grad():
            close(output(self.unet), output(self.twin))
        for name, module in self.unet.named_modules():
            assert "ldmperf" not in type(module).__module__, name


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(
    max_examples=8,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    # To shrink a failure takes minutes.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
