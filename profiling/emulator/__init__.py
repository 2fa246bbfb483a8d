"""Compiled kernels executed on the CPU: the PTX that Triton makes, all threads of many programs in lock step.

`program` reads PTX; `instruction_set` says what executes an instruction, the files of instructions do. `threads`
are the registers of many programs. `memory` and `global_memory` are what they access and who raced, by what
`lane_accesses` notes. `execution` is the loop, `emulation` with `emulated_driver` Triton's way to it,
`pytest_plugin` that of tests. `numerics` and `accumulation` say how numbers are rounded, `poison` what was never
written. `findings` and `tallies` are what is told of a run. `emulated_calls` runs an operator on
`operator_inputs`; `mutants` takes things away from compiled code.
"""
