"""What the backends of a case share: the network, with a checkpoint's weights or seeded ones, and the plan."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

import torch

from ldmperf.model import FAMILY, RELEASED, UNet, UNetConfig, load_unet
from ldmperf.samplers import NoiseSchedule, make_plan

from ..measure.heap import trim_heap
from ..measure.outcomes import Unsupported, release_memory
from ..peer import SCHEDULER_CONFIG
from ..step.flops import count_gflop
from .backend import Backend, Problem, Subject
from .case import Case, Task
from .rungs import all_backends
from .unet_problem import UNetProblem

# A super-resolution UNet reads the low-resolution latent beside its own.
IN_CHANNELS = {"t2i": 4, "sr": 8}


def make_network(case: Case) -> UNet:
    """The case's UNet in its dtype on its device, in eval mode; the same weights for the same case and seed.

    Raises `Unsupported` for a checkpoint whose channels do not fit the task or that has classes, and what
    `load_unet` raises.
    """
    dtype: torch.dtype = getattr(torch, case.dtype)
    if case.is_checkpoint:
        unet = load_unet(case.path, dtype=dtype, device=case.device, backend="torch")
    else:
        config = family_config(case)
        with torch.device(case.device):
            unet = UNet(config, backend="torch").to(dtype)
        randomize(unet, case.seed)
    needed = IN_CHANNELS[case.task]
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels != (needed, 4):
        fitting = [task for task, count in IN_CHANNELS.items() if channels == (count, 4)]
        # Nine input channels are inpainting's.
        advice = f"give --task {fitting[0]}" if fitting else "no task here takes these: choose another checkpoint"
        raise Unsupported(
            f"task {case.task} needs a UNet from {needed} to 4 channels; {case.label} goes from {channels[0]} to "
            f"{channels[1]}; {advice}"
        )
    if unet.config.num_class_embeds is not None:
        raise Unsupported(
            f"{case.label} takes a class beside each prompt, which no task here has: choose another checkpoint"
        )
    return unet.eval().requires_grad_(False)


def family_config(case: Case) -> UNetConfig:
    """The configuration of the case's size, or published network, for its task."""
    config = FAMILY[case.unet] if case.unet in FAMILY else RELEASED[case.unet]
    return dataclasses.replace(config, in_channels=IN_CHANNELS[case.task])


@torch.no_grad()
def randomize(network: torch.nn.Module, seed: int) -> None:
    """Fills the network in place with random weights of unit gain: activations and the output stay of order one.

    Matrices and convolutions get variance 1 / fan_in, biases and norms are drawn too, so that one that is left out
    or misplaced shows in the result. torch's default weights would shrink the signal until the output hardly
    depends on the input, and a wrong network would pass.
    """
    generator = torch.Generator(next(network.parameters()).device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2:
            bound = math.sqrt(3.0 / parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.uniform_(-0.1, 0.1, generator=generator)
            if name.endswith("weight"):
                parameter.add_(1.0)


def make_problem(case: Case, unet: UNet) -> UNetProblem:
    """The case's trajectory on that network; raises `Unsupported` for steps that the sampler cannot take."""
    try:
        plan = make_plan(case.sampler, NoiseSchedule.from_diffusers(SCHEDULER_CONFIG), case.steps)
    except ValueError as refusal:
        raise Unsupported(str(refusal)) from None
    return UNetProblem(case, unet, plan, SCHEDULER_CONFIG)


class FamilySubject:
    """The UNets of the family, and checkpoints of their kind; a `Subject`."""

    @property
    def backends(self) -> Mapping[str, Backend]:
        return all_backends()

    def identity(self, case: Case) -> tuple[object, ...]:
        return case.unet, case.task, case.dtype, case.device, None if case.is_checkpoint else case.seed

    def network(self, case: Case) -> UNet:
        return make_network(case)

    def problem(self, case: Case, network: UNet) -> UNetProblem:
        return make_problem(case, network)

    def gflop(self, case: Case) -> float | None:
        if case.is_checkpoint:
            return None
        return count_gflop(family_config(case), case.latent_height, case.latent_width, case.context_tokens)


FAMILY_SUBJECTS: Mapping[Task, Subject] = {"t2i": FamilySubject(), "sr": FamilySubject()}


class Networks:
    """Makes networks and keeps the last: neighbouring groups share it, and two might not fit."""

    def __init__(self, subjects: Mapping[Task, Subject] = FAMILY_SUBJECTS) -> None:
        self._subjects = subjects
        self._kept: tuple[tuple[object, ...], torch.nn.Module, float] | None = None

    def problem(self, case: Case) -> tuple[Problem, float]:
        """The case's problem, and how long making its network took, in ms.

        Raises `Unsupported` for a network, a task or steps that cannot be measured, and what loading raises.
        """
        if case.task not in self._subjects:
            raise Unsupported(f"no subject for task {case.task} was given; `ldmperf profile` knows them all")
        subject = self._subjects[case.task]
        network, ms = self._get(case, subject)
        return subject.problem(case, network), ms

    def _get(self, case: Case, subject: Subject) -> tuple[torch.nn.Module, float]:
        identity = subject.identity(case)
        if self._kept is None or self._kept[0] != identity:
            self._kept = None
            release_memory()
            trim_heap()
            start = time.perf_counter()
            network = subject.network(case)
            self._kept = (identity, network, 1e3 * (time.perf_counter() - start))
        return self._kept[1:]
