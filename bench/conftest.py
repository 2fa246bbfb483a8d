"""Options of the kernel benchmarks."""

from __future__ import annotations

import pytest

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.kernel_bench.kernel_records import MODES
from ldmperf.profiling.kernel_bench.peers import PEERS, usual_peers
from ldmperf.profiling.kernel_bench.selection import SIZES, jobs
from ldmperf.profiling.options import CaseError, best_device, known_names, whole_number

# The tests of a kernel of Hugging Face's hub run in the repository that they are written to.
collect_ignore = ["hub"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--kernels", default=",".join(OPERATORS), help="Operators, comma separated.")
    group.addoption("--sizes", help="Sizes of the family, or vae; 866M and 39M unless told, 39M on a CPU.")
    group.addoption("--batches", default="2", help="The UNet's batch, comma separated.")
    group.addoption("--records", action="store_true", help="Write records to bench/results/<gpu>/ too.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each call, mode and peer; those of one call beside each other, as they are measured together."""
    if "job" not in metafunc.fixturenames:
        return
    config = metafunc.config
    on_gpu = best_device() == "cuda"
    try:
        operators = known_names("kernels", [config.getoption("kernels")], OPERATORS)
        sizes = known_names("sizes", [config.getoption("sizes") or ("866M,39M" if on_gpu else "39M")], SIZES)
        batches = [whole_number("batches", text) for text in config.getoption("batches").split(",")]
    except CaseError as wrong:
        raise pytest.UsageError(str(wrong)) from None
    found = [
        pytest.param(
            job, mode, peer, id=f"{job.call.operator} {job.call.label} {job.size} b{job.batch} {mode} {name}"
        )
        for job in jobs(operators, sizes, batches, "bfloat16" if on_gpu else "float32")
        for mode in (MODES if on_gpu else ("eager",))
        for name, peer in PEERS.items()
        if peer.serves(job.call, first_of_operator=False) and name in usual_peers(best_device())
    ]
    metafunc.parametrize(("job", "mode", "peer"), found)
