"""Attention in the kernel bench: its peers and their refusals, its bound, the table of the best peer."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ldmperf.kernels import attention
from ldmperf.profiling.kernel_bench import attention_peers
from ldmperf.profiling.kernel_bench.attention_table import (
    AttentionRow,
    attention_figures,
    attention_lines,
    attention_rows,
)
from ldmperf.profiling.kernel_bench.bench import KernelBench
from ldmperf.profiling.kernel_bench.device import Pace
from ldmperf.profiling.kernel_bench.implementation import Implementation
from ldmperf.profiling.kernel_bench.inputs import CallInputs
from ldmperf.profiling.kernel_bench.kernel_records import KernelRecord
from ldmperf.profiling.kernel_bench.peers import PEERS, Peer, usual_peers
from ldmperf.profiling.kernel_bench.selection import Job, head_dim_jobs
from ldmperf.profiling.kernel_bench.table import markdown, summary_lines
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.measure.rates import UnitRates, unit_rates
from ldmperf.profiling.measure.recorded import Samples
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.step.call import OperatorCall
from ldmperf.profiling.step.calls import attention_calls

pytestmark = pytest.mark.usefixtures("_one_thread")

ENVIRONMENT = Environment(os="Linux", python="3.11", torch="2.13.0", git_commit="a" * 40, git_dirty=False)
QUICK = Pace(RepetitionRule(3, 0.0), 0.0)
OF_ITSELF, OF_TEXT = attention_calls(12, 64, 2, "float32")
# 1000 TFLOP/s (2 * 1000**3 FLOP in 0.002 ms), and 16 * 125 * 2e6 exponentials a millisecond.
RATES = UnitRates(matrix_size=1000, matrix_ms=Samples.of([0.002]), multiprocessors=125, clock_ghz=2.0)


def bench(*peers: Peer) -> KernelBench:
    return KernelBench("cpu", peers, ("eager",), QUICK, ENVIRONMENT, None, RATES)


def measured(case: OperatorCall, *peers: Peer) -> dict[str, KernelRecord]:
    return {record.peer: record for record in bench(*peers).measure(Job("39M", 2, case))}


@pytest.mark.parametrize("case", [OF_ITSELF, OF_TEXT], ids=lambda case: case.label)
def test_every_peer_is_right_or_says_why_not(case: OperatorCall) -> None:
    records = measured(case, *(peer for name, peer in PEERS.items() if name != "flex"))
    assert {name: record.status for name, record in records.items()} == {
        "triton": "unsupported",
        "auto": "unsupported",
        "eager": "ok",
        "reference": "ok",
        "sdpa-cudnn": "unsupported",
        "sdpa-flash": "ok",
        "sdpa-efficient": "unsupported",
        "xformers": "unsupported",
    }
    assert all(record.message for record in records.values() if record.status == "unsupported")


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU needs a C++ compiler")
def test_flex_attention_is_right() -> None:
    (record,) = measured(attention_calls(12, 64, 1, "float32")[0], PEERS["flex"]).values()
    assert record.status == "ok", record.message


def test_peers_read_our_tensors_where_they_are() -> None:
    """A view, not a copy: what a peer is given has our memory, and what it returns our shape."""
    seen: list[torch.Tensor] = []

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        seen.extend((q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    arguments = OF_ITSELF.arguments("cpu")
    result = attention_peers._heads_first(noted)(**attention_peers._prepared(OF_ITSELF, arguments))
    assert [x.data_ptr() for x in seen] == [arguments[name].data_ptr() for name in "qkv"]
    assert [tuple(x.shape) for x in seen] == [(2, 8, 64, 12)] * 3
    exact = attention(*(arguments[name] for name in "qkv"), backend="torch")
    torch.testing.assert_close(result, exact)


@pytest.mark.parametrize("name", attention_peers.SDPA)
def test_one_backend_of_torch_is_allowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = {
        "sdpa-cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "sdpa-flash": torch.backends.cuda.flash_sdp_enabled,
        "sdpa-efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "math": torch.backends.cuda.math_sdp_enabled,
    }
    arguments = OF_ITSELF.arguments("cpu")
    monkeypatch.setattr(OperatorCall, "arguments", lambda case, device: arguments)
    # It is asked whether it serves the call, and no other is.
    asked: list[str] = []
    for other, (_, serves) in attention_peers.SDPA.items():

        def answers(parameters: Any, debug: bool, other: str = other) -> bool:
            asked.append(other)
            return True

        monkeypatch.setattr(torch.backends.cuda, serves, answers)
    made = attention_peers.sdpa(name, OF_ITSELF, torch.device("cuda"))
    with made.setting():
        assert [other for other, is_enabled in enabled.items() if is_enabled()] == [name]
    assert asked == [name]
    assert torch.backends.cuda.math_sdp_enabled()


def test_a_scale_reaches_the_peers() -> None:
    arguments = OF_TEXT.arguments("cpu") | {"scale": 0.05}
    prepared = attention_peers._prepared(OF_TEXT, arguments)
    call = attention_peers._heads_first(F.scaled_dot_product_attention)
    exact = attention(*(arguments[name] for name in "qkv"), scale=0.05, backend="torch")
    torch.testing.assert_close(call(**prepared), exact)


def test_a_setting_is_entered_around_calls_not_for_each() -> None:
    entered = inside = 0

    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        nonlocal entered, inside
        entered, inside = entered + 1, inside + 1
        yield
        inside -= 1

    def call(q: Any, k: Any, v: Any, tf32: bool) -> torch.Tensor:
        assert inside == 1
        return attention(q, k, v, backend="torch")

    peer = Peer("peer", lambda case, device: Implementation(call, setting=setting))
    pace = Pace(RepetitionRule(3, 0.0), 5.0)
    (record,) = KernelBench("cpu", [peer], ("eager",), pace, ENVIRONMENT, None).measure(Job("39M", 2, OF_TEXT))
    assert record.status == "ok", record.message
    # The first call, the calibration, three samples and the second check.
    assert (entered, inside) == (6, 0)


def test_torch_says_why_a_backend_cannot_serve() -> None:
    def refuses(parameters: Any, debug: bool) -> bool:
        assert parameters.query.shape == (2, 8, 64, 12)
        warnings.warn("head_dim should be a multiple of 8 (Triggered internally at sdp_utils.h:1)", stacklevel=1)
        warnings.warn("head_dim should be a multiple of 8 (Triggered internally at sdp_utils.h:1)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        return False

    arguments = OF_ITSELF.arguments("cpu")
    assert attention_peers._refusal(refuses, arguments) == "head_dim should be a multiple of 8; another"
    assert attention_peers._refusal(lambda parameters, debug: True, arguments) is None
    assert "cannot serve" in (attention_peers._refusal(lambda parameters, debug: False, arguments) or "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NotImplementedError("no kernel"), Unsupported),
        (RuntimeError("LoweringException: ValueError: NYI: head dimension must be at least 16"), Unsupported),
        (NotImplementedError("first\n  No operator found for `memory_efficient_attention_forward`"), Unsupported),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory, not supported"), torch.OutOfMemoryError),
    ],
)
def test_a_refusal_is_no_error_and_an_error_no_refusal(error: Exception, expected: type[Exception]) -> None:
    def call(**_: Any) -> None:
        raise error

    with pytest.raises(expected) as caught:
        attention_peers._or_refused(call)(q=None)
    if expected is Unsupported:
        assert "\n" not in str(caught.value)


def test_masks_have_no_peer() -> None:
    masked = OF_ITSELF.model_copy(
        update={"tensors": (*OF_ITSELF.tensors, OF_ITSELF.tensors[0].model_copy(update={"name": "key_mask"}))}
    )
    with pytest.raises(Unsupported, match="key_mask"):
        attention_peers._prepared(masked, {})


def test_xformers_is_called_with_our_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        return attention(q, k, v, scale=scale, backend="torch")

    operators = ModuleType("xformers.ops")
    operators.memory_efficient_attention = theirs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)
    monkeypatch.setattr(attention_peers.importlib.util, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises(Unsupported, match="GPU"):
        PEERS["xformers"].build(OF_ITSELF, torch.device("cpu"))
    made = attention_peers.xformers(OF_ITSELF, torch.device("cuda"))
    arguments = OF_ITSELF.arguments("cpu")
    expected = attention(*(arguments[name] for name in "qkv"), backend="torch")
    assert torch.equal(made.call(**made.prepare(arguments)), expected)


def test_the_reference_is_that_of_the_whole_batch() -> None:
    inputs = CallInputs(OF_TEXT, 1, torch.device("cpu"), seed=0)
    q, k, v = (inputs.sets[0][name].double() for name in "qkv")
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 12**-0.5, dim=-1)
    (found,) = inputs.reference()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.einsum("bhqk,bkhd->bqhd", weights, v))


def timed(case: OperatorCall, peer: str, ms: float, error: float = 1e-6, **changes: Any) -> KernelRecord:
    right = Peer(peer, lambda case, device: Implementation(functools.partial(attention, backend="torch")))
    (record,) = bench(right).measure(Job("39M", 2, case))
    assert record.correctness is not None
    correctness = record.correctness.model_copy(update={"error_before": error})
    return record.model_copy(update={"ms": Samples.of([ms]), "correctness": correctness, **changes})


def test_a_record_tells_its_rate_and_its_share_of_the_bound() -> None:
    scores = 2 * 8 * 64 * 64
    record = timed(OF_ITSELF, "triton", 0.001)
    assert record.tflops == pytest.approx(4 * scores * 12 / 1e-6 / 1e12)
    assert record.bound is not None
    # D = 12 is padded to 16: 64 FLOP a score at 1e15 a second, against an exponential at 4e12.
    assert record.bound.ms == pytest.approx(scores / 4e9)
    assert record.bound.matrix_ms == pytest.approx(64 * scores / 1e12)
    assert record.percent_of_bound == pytest.approx(100 * scores / 4e9 / 0.001)
    moved = record.model_copy(update={"polynomial": 2})
    assert moved.percent_of_bound == pytest.approx(75 * scores / 4e9 / 0.001)
    unknown = record.model_copy(update={"unit_rates": None})
    assert (unknown.bound, unknown.percent_of_bound) == (None, None)
    no_clock = RATES.model_copy(update={"clock_ghz": None, "message": "NVML does not tell"})
    unknown = record.model_copy(update={"unit_rates": no_clock})
    assert (unknown.bound, unknown.percent_of_bound) == (None, None)
    assert KernelRecord.model_validate_json(record.model_dump_json()) == record


def test_our_record_tells_the_polynomials_of_its_launches() -> None:
    launches = [SimpleNamespace(arguments={"POLYNOMIAL": 3}), SimpleNamespace(arguments={})]
    ours = functools.partial(attention, backend="torch")
    peer = Peer(
        "triton",
        lambda case, device: Implementation(ours, launches=lambda **_: launches),  # type: ignore[arg-type, return-value]
    )
    other = Peer("eager", lambda case, device: Implementation(ours))
    records = measured(OF_TEXT, peer, other)
    assert (records["triton"].polynomial, records["eager"].polynomial) == (3, None)


def test_what_compiles_long_runs_only_when_named() -> None:
    assert set(PEERS) - set(usual_peers("cuda")) == {"flex"}
    never = {name for name, peer in PEERS.items() if peer.gpu_only is not None}
    assert never == {"triton", "auto", "separate", "sdpa-cudnn", "sdpa-efficient", "xformers"}
    assert set(PEERS) - set(usual_peers("cpu")) == never | {"flex", "compile", "diffusers-compile"}


def test_the_units_of_a_cpu_have_no_rates() -> None:
    assert unit_rates(torch.float32, torch.device("cpu")) is None


def row(of_itself: bool = True, head_dim: int = 40, batch: int = 2, **us: float) -> AttentionRow:
    times = {name.replace("_", "-"): value for name, value in us.items()}
    errors = {"triton": 3e-3, "eager": 4e-3, "sdpa-flash": 2e-3, "xformers": 1e-3}
    return AttentionRow(
        head_dim=head_dim,
        queries=64,
        keys=64 if of_itself else 77,
        batch=batch,
        mode="graph",
        us=times,
        errors={name: error for name, error in errors.items() if name in times},
        percent_of_bound=50.0 if "triton" in times else None,
        unit="exponential" if "triton" in times else None,
    )


def test_a_row_is_compared_with_the_best_peer() -> None:
    found = row(triton=10.0, auto=8.0, reference=1.0, eager=30.0, sdpa_flash=20.0, xformers=25.0)
    assert (found.best_peer, found.ratio(), found.ratio("auto")) == ("sdpa-flash", 2.0, 2.5)
    # Against torch's own: xformers' error does not count.
    assert found.error_ratio == pytest.approx(1.5)
    assert row(triton=10.0, reference=1.0).best_peer is None
    assert row(eager=10.0).ratio() is None


def test_figures_are_means_of_their_kind_of_call() -> None:
    rows = [
        row(triton=10.0, eager=20.0),
        row(head_dim=64, triton=10.0, eager=5.0, sdpa_flash=8.0),
        row(of_itself=False, triton=10.0, eager=30.0),
        row(of_itself=False, batch=16, eager=30.0),
    ]
    by_itself, small, across, bound, error, peers = attention_figures(rows)
    assert by_itself.startswith("self-attention: the best peer takes 1.000 times as long as triton")
    assert "least 0.5000: D=64, 64 queries, 64 keys, batch 2, eager" in by_itself
    assert small.startswith("self-attention, D 8 to 48: the best peer takes 2.000 times")
    assert across.startswith("cross-attention: the best peer takes 3.000 times")
    assert "mean of 1 call;" in across
    assert bound.endswith("D=40 50, D=64 50")
    assert "1.500 times torch's least (D=64" in error
    assert peers.endswith("eager, sdpa-flash")
    assert attention_figures([]) == []


def test_rows_are_of_graphs_where_there_are_any() -> None:
    graph = timed(OF_ITSELF, "triton", 0.010, mode="graph", polynomial=2)
    records = [
        timed(OF_ITSELF, "eager", 0.030),
        timed(OF_TEXT, "eager", 0.020),
        graph,
        timed(OF_ITSELF, "eager", 0.015, mode="graph"),
    ]
    (found,) = attention_rows(records)
    assert (found.mode, found.of_itself, found.us) == ("graph", True, {"triton": 10.0, "eager": 15.0})
    assert found.percent_of_bound == graph.percent_of_bound
    assert found.unit == "exponential"
    assert [r.of_itself for r in attention_rows(records[:2])] == [True, False]
    assert attention_rows([]) == []


def test_the_table_shows_every_call_once() -> None:
    records = [timed(case, peer, 0.01) for case in (OF_TEXT, OF_ITSELF) for peer in ("triton", "eager")]
    lines = attention_lines(attention_rows(records))
    assert len(lines) == 2 + 2
    assert lines[2].split()[:5] == ["12", "64", "64", "2", "10.00"]
    assert lines[3].split()[:5] == ["12", "64", "77", "2", "10.00"]
    assert len({line.index("eager") for line in lines[2:]}) == 1
    assert "| 12 | 64 | 77 | 2 | 10.00 |" in markdown(records)
    assert any("self-attention" in line for line in summary_lines(records))
    # Only a call of the family is made so often in a step.
    assert "1 a step" in markdown(records)
    by_size = [record.model_copy(update={"size": "head_dim 12"}) for record in records]
    assert "a step" not in markdown(by_size)
    assert attention_lines([]) == []


def test_calls_by_head_dimension_begin_with_the_longest() -> None:
    found = list(head_dim_jobs((8, 40), (64, 4096), (2, 16), "bfloat16"))
    assert len(found) == len({job.call.key for job in found}) == 2 * 2 * 2 * 2
    first = [job.call.attention for job in found[:4]]
    assert first == [
        (16, 8, 4096, 4096, 8),
        (16, 8, 4096, 4096, 40),
        (2, 8, 4096, 4096, 8),
        (2, 8, 4096, 4096, 40),
    ]
    sizes = [job.call.attention for job in found]
    assert [s is not None and s.keys == 77 for s in sizes] == [False] * 8 + [True] * 8


def test_the_command_takes_head_dimensions(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldmperf.profiling.measure.rates._COPY_BYTES", {"cpu": 4096})
    options = ["--device", "cpu", "--dtype", "float32", "--batch", "1", "--out", tmp_path, "--seconds", "60"]
    found = run("kernels", "--head-dim", "8,12", "--tokens", "16", *options)
    assert found.code == 0, found.err
    for part in ("attention 1x16x8x8 ", "attention 1x16x8x12 over 77", "best peer", "peers with a time are eager"):
        assert part in found.out
