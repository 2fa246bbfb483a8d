"""Work on a side stream of a real GPU. No hypothesis here: a GPU machine may have the light core only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldmperf.profiling.kernel_bench.bench import KernelBench
from ldmperf.profiling.kernel_bench.device import Pace
from ldmperf.profiling.kernel_bench.peers import Implementation, Peer
from ldmperf.profiling.kernel_bench.selection import Job
from ldmperf.profiling.measure.environment import Environment
from ldmperf.profiling.measure.integrity import impossible
from ldmperf.profiling.measure.timing import RepetitionRule, timed
from ldmperf.profiling.step.call import OperatorCall, TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_work_on_a_side_stream_is_named_and_work_that_is_joined_is_not() -> None:
    device = torch.device("cuda")
    x, side = torch.randn(8192, 8192, device=device), torch.cuda.Stream(device)

    def hidden() -> None:
        with torch.cuda.stream(side):
            for _ in range(10):
                x @ x

    def joined() -> None:
        side.wait_stream(torch.cuda.current_stream(device))
        hidden()
        torch.cuda.current_stream(device).wait_stream(side)

    def seen(call: object) -> str | None:
        return impossible([replace(timed(call, device), value=None) for _ in range(5)], None, "a call")  # type: ignore[arg-type]

    seen(joined)
    assert seen(lambda: x @ x) is None
    assert seen(joined) is None
    assert "work on a side stream" in str(seen(hidden))


def test_a_peer_that_works_on_a_side_stream_is_caught() -> None:
    shape = (1 << 16, 1024)
    call = OperatorCall(
        operator="geglu",
        dtype="float32",
        tensors=(TensorSpec(name="x", shape=shape, stride=(shape[1], 1), dtype="float32"),),
        results=(TensorSpec(name="result 0", shape=(shape[0], 512), stride=(512, 1), dtype="float32"),),
    )
    side = torch.cuda.Stream()

    def right(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * torch.nn.functional.gelu(gate)

    def hidden(x: Tensor) -> Tensor:
        with torch.cuda.stream(side):
            return right(x)

    peers = [Peer(f.__name__, lambda case, device, f=f: Implementation(f)) for f in (right, hidden)]  # type: ignore[misc]
    bench = KernelBench(
        "cuda",
        peers,
        ("eager", "graph"),
        Pace(RepetitionRule(5, 0.0), 1.0),
        Environment(os="Linux", python="3"),
        None,
    )
    records = {(record.peer, record.mode): record for record in bench.measure(Job("39M", 2, call))}
    assert records["right", "eager"].status == records["right", "graph"].status == "ok"
    assert records["hidden", "eager"].ms is None
    assert "work on a side stream" in (records["hidden", "eager"].message or "")
    # A capture sees no other stream's work, or refuses to end.
    assert records["hidden", "graph"].ms is None
