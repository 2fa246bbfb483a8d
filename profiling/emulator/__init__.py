"""Compiled kernels executed on the CPU: the PTX that Triton makes, all threads of many programs in lock step.

`program` reads PTX; `instruction_set` says what executes an instruction, the files of instructions do. `threads`
are the registers of many programs, `memory` and `global_memory` what they access and who raced, `execution` the
loop.
`numerics` and `accumulation` say how numbers are rounded, `findings` and `tallies` what is told of a run.
"""
