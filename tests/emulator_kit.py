"""Runs a few PTX instructions in the emulator, on registers that a test fills in."""

import numpy as np

from ldmperf.profiling.emulator.execution import code_of
from ldmperf.profiling.emulator.findings import Findings
from ldmperf.profiling.emulator.global_memory import GlobalMemory
from ldmperf.profiling.emulator.numerics import Numerics
from ldmperf.profiling.emulator.tallies import Tallies
from ldmperf.profiling.emulator.threads import LaunchGrid

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred 	%p<999>;
	.reg .b16 	%rs<999>;
	.reg .b32 	%r<999>;
	.reg .b64 	%rd<999>;
{body}
}}
"""


def ptx(body, threads=32, parameters=()):
    """A kernel of these statements. parameters: types, such as "u64"; named kernel_param_0 and so on."""
    listed = ",\n".join(f"\t.param .{kind} kernel_param_{n}" for n, kind in enumerate(parameters))
    return HEADER.format(parameters=listed, threads=threads, body=body)


class Result:
    """What a run left: registers by name, findings, the memories."""

    def __init__(self, threads, findings, tallies):
        self.threads, self.findings, self.tallies = threads, findings, tallies

    def register(self, name, dtype):
        """[lanes] of a numpy dtype: the register's bits."""
        value = np.broadcast_to(self.threads._registers[name], (self.threads.lanes,))
        return np.ascontiguousarray(value).view(dtype)

    @property
    def kinds(self):
        return self.findings.kinds


def execute(
    body,
    registers=None,
    *,
    threads=32,
    programs=1,
    shared=0,
    shared_bytes=None,
    numerics=None,
    mask=None,
    memory=None,
    values=None,
):
    """Runs statements for `threads` threads of each program; `ret;` is added.

    registers     {"%r1": [lanes] or [1] array of its bits in any dtype of its size}
    shared        bytes of shared memory; shared_bytes: what it holds, of all programs the same
    mask          [lanes] which execute anything
    memory        global memory, made of tensors
    values        what the parameters of the kernel hold, {"kernel_param_0": [1] array}
    """
    from ldmperf.profiling.emulator import execution
    from ldmperf.profiling.emulator.threads import Threads

    code = code_of(ptx(body + "\n\tret;", threads))
    findings, tallies = Findings("kernel"), Tallies(code.program)
    memory = memory or GlobalMemory([], [], 1)
    grid = LaunchGrid((programs, 1, 1), values or {}, shared)
    run_threads = Threads(code.program, grid, 0, programs, memory, numerics or Numerics(), findings, tallies)
    for name, value in (registers or {}).items():
        run_threads._registers[name] = np.ascontiguousarray(value)
    if shared_bytes is not None:
        flat = np.frombuffer(np.ascontiguousarray(shared_bytes).tobytes(), np.uint8)
        for space in range(programs):
            at = space * run_threads.space
            run_threads.shared.bytes[at : at + len(flat)] = flat
            run_threads.shared.written[
                at // run_threads.shared.granule : -(-(at + len(flat)) // run_threads.shared.granule)
            ] = True
    if mask is not None:
        run_threads.set_mask(np.asarray(mask, bool))
    with np.errstate(all="ignore"):
        execution._run(code, run_threads)
    return Result(run_threads, findings, tallies)
