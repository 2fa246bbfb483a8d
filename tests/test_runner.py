"""The runner: no wrong result has a time, no failure stops the others, and the real backends agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmperf.kernels import KernelUnsupported
from ldmperf.profiling import Case, Record, load_records, profile
from ldmperf.profiling.backends import Backend, Inputs, OurBackend, Problem, Trajectory, Unsupported
from ldmperf.profiling.cases import DTYPES
from ldmperf.profiling.check import TOLERANCES, relative_rms
from ldmperf.profiling.lane import failure
from ldmperf.profiling.peers import DiffusersBackend
from ldmperf.profiling.records import RecordStore
from ldmperf.profiling.runner import groups
from ldmperf.profiling.timing import RepetitionRule
from ldmperf.samplers import SAMPLERS

pytestmark = pytest.mark.usefixtures("_one_thread")

TWICE = RepetitionRule(2, 0.0)
BOTH: dict[str, Backend] = {"torch": OurBackend("torch"), "diffusers": DiffusersBackend()}


def tiny_case(checkpoint: Path, **changes: object) -> Case:
    fields: dict[str, object] = {"unet": str(checkpoint), "steps": 2, "latent_height": 16, "latent_width": 16}
    return Case(**(fields | changes))


@dataclass
class Changed:
    """The torch backend, with what it returns changed by a function of the latents and the number of the call."""

    change: Callable[[Tensor, int], Tensor]
    implementation: str = "torch"
    calls: list[Inputs] = field(default_factory=list)

    def build(self, problem: Problem) -> Trajectory:
        right = OurBackend("torch").build(problem)

        def trajectory(inputs: Inputs) -> Tensor:
            self.calls.append(inputs)
            return self.change(right(inputs), len(self.calls))

        return trajectory


def raising(error: Exception, at_call: int = 1) -> Changed:
    def change(latents: Tensor, call: int) -> Tensor:
        if call == at_call:
            raise error
        return latents

    return Changed(change)


def measure(case: Case, backends: dict[str, Backend], rule: RepetitionRule = TWICE) -> dict[str, Record]:
    """The records of the case on each of the backends, with the real ones for references."""
    cases = [case.model_copy(update={"backend": name}) for name in backends]
    records = profile(cases, rule=rule, backends=BOTH | backends)
    assert [record.case for record in records] == cases
    return {record.case.backend: record for record in records}


def test_the_real_pair_agrees_and_each_is_the_others_reference(tiny_checkpoint: Path) -> None:
    records = measure(tiny_case(tiny_checkpoint), BOTH)
    for name, other in (("torch", "diffusers"), ("diffusers", "torch")):
        record = records[name]
        assert record.status == "ok", record.message
        assert record.correctness is not None
        assert record.correctness.reference == f"{other} float32"
        # Rounding differs between two implementations: a thing compared with itself would give exactly zero.
        assert 0 < (record.correctness.error_before or 0) < 1e-5
        assert record.correctness.error_after == record.correctness.error_before
        assert record.wall_ms is not None
        assert record.wall_ms.n == 2
        assert record.gpu_ms is None
        assert record.peak_memory_bytes is None
        assert record.evaluations == 2
        assert record.harness.interleaved == ("torch", "diffusers")
        assert record.phases.first_call_ms is not None
        assert record.phases.build_ms is not None
        assert record.phases.weights_ms is not None
        assert record.phases.reference_ms is None
        assert record.parameters == sum(p.numel() for p in DiffusersBackendUNet(tiny_checkpoint).parameters())


def DiffusersBackendUNet(checkpoint: Path) -> torch.nn.Module:  # noqa: N802
    import diffusers

    unet: torch.nn.Module = diffusers.UNet2DConditionModel.from_pretrained(checkpoint)
    return unet


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_agrees_with_diffusers_own(tiny_checkpoint: Path, sampler: str) -> None:
    case = tiny_case(tiny_checkpoint, sampler=sampler, steps=4, batch=2)
    records = measure(case, BOTH, RepetitionRule(1, 0.0))
    assert {record.status for record in records.values()} == {"ok"}, [r.message for r in records.values()]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_super_resolution_sees_the_low_resolution_latents(guidance_scale: float) -> None:
    case = Case(
        unet="39M", task="sr", steps=1, guidance_scale=guidance_scale, latent_height=8, latent_width=8, batch=2
    )
    records = measure(case, BOTH, RepetitionRule(1, 0.0))
    assert {record.status for record in records.values()} == {"ok"}, [r.message for r in records.values()]
    blind = Blind()
    assert measure(case, {"blind": blind}, RepetitionRule(1, 0.0))["blind"].status == "incorrect"


class Blind:
    """Takes zeros for the low-resolution latents."""

    implementation = "torch"

    def build(self, problem: Problem) -> Trajectory:
        right = OurBackend("torch").build(problem)

        def trajectory(inputs: Inputs) -> Tensor:
            assert inputs.low_resolution is not None
            zeros = torch.zeros_like(inputs.low_resolution)
            return right(Inputs(inputs.noise, inputs.context, zeros, inputs.seeds, inputs.step_noise))

        return trajectory


def test_a_task_that_does_not_fit_the_checkpoint_is_unsupported(tiny_checkpoint: Path) -> None:
    record = measure(tiny_case(tiny_checkpoint, task="sr"), {"torch": OurBackend("torch")})["torch"]
    assert record.status == "unsupported"
    assert record.message is not None
    assert "8 to 4 channels" in record.message


def not_a_number(latents: Tensor, call: int) -> Tensor:
    return torch.full_like(latents, math.nan)


@pytest.mark.parametrize(
    "change",
    [
        lambda latents, call: latents * (1 + 2e-4),
        lambda latents, call: latents.roll(1, dims=-1),
        lambda latents, call: torch.zeros_like(latents),
        lambda latents, call: latents[:, :, :8],
        not_a_number,
    ],
    ids=["slightly off", "shifted", "zeros", "another shape", "nan"],
)
def test_a_wrong_result_is_incorrect_and_has_no_time(
    tiny_checkpoint: Path, change: Callable[[Tensor, int], Tensor]
) -> None:
    records = measure(
        tiny_case(tiny_checkpoint),
        {"wrong": Changed(change), "diffusers": DiffusersBackend(), "torch": OurBackend("torch")},
    )
    wrong = records["wrong"]
    assert wrong.status == "incorrect"
    assert wrong.wall_ms is None
    assert wrong.message is not None
    assert "before timing" in wrong.message
    assert wrong.correctness is not None
    assert wrong.correctness.error_after is None
    assert (records["diffusers"].status, records["torch"].status) == ("ok", "ok")


def test_a_result_that_goes_wrong_only_while_timed_is_incorrect(tiny_checkpoint: Path) -> None:
    late = Changed(lambda latents, call: latents if call == 1 else latents * 1.01)
    record = measure(tiny_case(tiny_checkpoint), {"late": late})["late"]
    assert record.status == "incorrect"
    assert record.wall_ms is None
    assert record.message is not None
    assert "after timing" in record.message
    assert record.correctness is not None
    assert record.correctness.error_before is not None
    assert record.correctness.error_before < 1e-4
    assert record.correctness.error_after == pytest.approx(0.01, rel=0.01)


def test_two_that_disagree_both_lose_their_time(tiny_checkpoint: Path) -> None:
    # Which of the pair is wrong, their disagreement cannot say.
    wrong = Changed(lambda latents, call: latents * 1.01)
    records = measure(tiny_case(tiny_checkpoint), {"torch": wrong, "diffusers": DiffusersBackend()})
    assert {record.status for record in records.values()} == {"incorrect"}


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("error", OUT_OF_MEMORY[:2], ids=["torch", "python"])
def test_out_of_memory_is_data_and_the_others_go_on(tiny_checkpoint: Path, error: Exception, at_call: int) -> None:
    # The first call, a timed one, the last one.
    records = measure(
        tiny_case(tiny_checkpoint), {"greedy": raising(error, at_call), "torch": OurBackend("torch")}
    )
    greedy = records["greedy"]
    assert (greedy.status, greedy.wall_ms) == ("oom", None)
    assert greedy.message is not None
    assert "\n" not in greedy.message
    assert records["torch"].status == "ok"


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_every_wording_of_out_of_memory_is_known(error: Exception) -> None:
    assert failure(error)[0] == "oom"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("first\nsecond"), ("error", "ValueError: first")),
        (RuntimeError(""), ("error", "RuntimeError: no message")),
        (Unsupported("not here"), ("unsupported", "not here")),
        (KernelUnsupported("attention", ["head_dim 7"]), ("unsupported", None)),
    ],
)
def test_failures_become_a_status_and_one_line(error: Exception, expected: tuple[str, str | None]) -> None:
    status, message = failure(error)
    assert status == expected[0]
    assert expected[1] in (None, message)
    assert "\n" not in message


def test_a_real_allocation_that_fails_is_oom(tiny_checkpoint: Path) -> None:
    def change(latents: Tensor, call: int) -> Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)

    assert measure(tiny_case(tiny_checkpoint), {"greedy": Changed(change)})["greedy"].status == "oom"


def test_an_error_names_its_type_and_stops_nobody_else(tiny_checkpoint: Path) -> None:
    records = measure(
        tiny_case(tiny_checkpoint),
        {"broken": raising(ZeroDivisionError("of all things\nand more")), "torch": OurBackend("torch")},
    )
    assert records["broken"].message == "ZeroDivisionError: of all things"
    assert (records["broken"].status, records["torch"].status) == ("error", "ok")


class Missing:
    """A backend that is not installed."""

    implementation = "diffusers"

    def build(self, problem: Problem) -> Trajectory:
        raise Unsupported("not installed")


def test_without_the_peer_ours_is_checked_in_a_wider_dtype(tiny_checkpoint: Path) -> None:
    for dtype, reference in (("float32", "torch float64"), ("bfloat16", "torch float32")):
        case = tiny_case(tiny_checkpoint, dtype=dtype)
        records = measure(case, {"torch": OurBackend("torch"), "diffusers": Missing()})
        assert (records["diffusers"].status, records["diffusers"].message) == ("unsupported", "not installed")
        ours = records["torch"]
        assert ours.status == "ok", ours.message
        assert ours.correctness is not None
        assert ours.correctness.reference == reference
        assert (ours.correctness.error_before or 0) > 0
        assert ours.phases.reference_ms is not None


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_checked_against_float32(tiny_checkpoint: Path, dtype: str) -> None:
    case = tiny_case(tiny_checkpoint, dtype=dtype)
    records = measure(case, BOTH)
    for name, reference in (("torch", "diffusers float32"), ("diffusers", "torch float32")):
        assert records[name].status == "ok", records[name].message
        correctness = records[name].correctness
        assert correctness is not None
        assert correctness.reference == reference
        assert correctness.tolerance == TOLERANCES[case.dtype]
        assert (correctness.error_before or 0) > 1e-5


def test_a_reference_that_fails_leaves_no_time(tiny_checkpoint: Path) -> None:
    case = tiny_case(tiny_checkpoint, backend="torch")
    everything: dict[str, Backend] = {
        "torch": OurBackend("torch"), "diffusers": raising(MemoryError(), at_call=1)
    }  # fmt: skip
    (record,) = profile([case], rule=TWICE, backends=everything)
    assert (record.status, record.wall_ms) == ("oom", None)


def test_timed_inputs_are_fresh_random_and_the_same_for_all(tiny_checkpoint: Path) -> None:
    first, second = Changed(lambda x, n: x), Changed(lambda x, n: x)
    measure(tiny_case(tiny_checkpoint, batch=2), {"first": first, "second": second}, RepetitionRule(4, 0.0))
    # First call, three timed rounds, and the last on the check's inputs again.
    assert len(first.calls) == len(second.calls) == 5
    for mine, theirs in zip(first.calls, second.calls, strict=True):
        assert torch.equal(mine.noise, theirs.noise)
        assert torch.equal(mine.context, theirs.context)
        assert mine.noise.data_ptr() != theirs.noise.data_ptr()
        assert mine.noise.std() > 0.9
        assert mine.context.shape[0] == 4
    noises = [inputs.noise for inputs in first.calls]
    assert torch.equal(noises[0], noises[-1])
    # All images of all other rounds differ.
    images = torch.cat(noises[:-1]).flatten(1)
    assert len({tuple(image.tolist()) for image in images}) == len(images) == 8


def test_the_same_weights_whatever_the_backend_and_the_order() -> None:
    from ldmperf.profiling.network import make_network

    case = Case(unet="39M")
    once, again = make_network(case), make_network(case.model_copy(update={"backend": "diffusers"}))
    for (name, a), b in zip(once.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = make_network(case.model_copy(update={"seed": 1}))
    assert not torch.equal(once.conv_in.weight, other.conv_in.weight)
    # Unit gain: the output is of order one, and depends on the input.
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = torch.randn(2, 77, 1024, generator=torch.Generator().manual_seed(0))
    output = once(sample, 500.0, context)
    assert 0.3 < output.std() < 3
    assert relative_rms(output[:1], output[1:]) > 0.3


def test_relative_rms_is_as_defined() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_rms(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_rms(reference, reference) == 0.0
    assert math.isnan(relative_rms(torch.tensor([math.nan, 4.0]), reference))
    assert relative_rms(torch.zeros(3), reference) == math.inf


def test_groups_are_what_differs_in_the_backend_alone() -> None:
    a, b = Case(unet="39M", steps=1), Case(unet="39M", steps=2)
    peers = [case.model_copy(update={"backend": "diffusers"}) for case in (a, b)]
    assert groups([a, b, *peers, a]) == [[a, peers[0]], [b, peers[1]]]


class Heard:
    """A listener that interrupts at the n-th group."""

    def __init__(self, interrupt_at: int) -> None:
        self.interrupt_at = interrupt_at
        self.began = 0

    def begin(self, cases: Sequence[Case]) -> None:
        self.began += 1

    def ran(self, case: Case, phase: str) -> None:
        if self.began == self.interrupt_at:
            raise KeyboardInterrupt

    def end(self, records: Sequence[Record]) -> None: ...


def test_an_interrupt_keeps_what_is_done_and_skip_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cases = [tiny_case(tiny_checkpoint, steps=n) for n in (1, 2, 3)]
    backends: dict[str, Backend] = BOTH
    store = RecordStore(tmp_path / "records.jsonl")
    with pytest.raises(KeyboardInterrupt):
        profile(cases, rule=TWICE, store=store, listener=Heard(2), backends=backends)
    assert [record.case for record in store.load()] == cases[:1]
    done = {record.case_key for record in store.load()}
    profile(cases, rule=TWICE, store=store, skip=done, backends=backends)
    records, rejected = load_records(tmp_path)
    assert ([record.case for record in records], rejected) == (cases, 0)


def test_process_wide_settings_are_put_back(tiny_checkpoint: Path) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        record = measure(tiny_case(tiny_checkpoint), {"torch": OurBackend("torch")})["torch"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert record.environment.float32_matmul_precision == "highest"
    assert record.environment.cudnn_tf32 is False
    assert torch.backends.cudnn.allow_tf32 == before[1]
