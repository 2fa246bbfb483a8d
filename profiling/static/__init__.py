"""Kernels compiled and inspected without a GPU: resources, instructions, and what is predicted from them.

`compile` compiles a launch, `inspection` is what is told of it, `display` shows it. `inspection_records` is what
is written, `inspection_table` a line for each. `shapes`, `planned` and `tuned` choose launches,
`launch_items` inspects many. `sass`, `ptx`, `ptxas` and `amd` read the compiler's output; `units`, `occupancy` and
`prediction` derive from it. `baseline` holds what may not get worse.
"""

INSPECTIONS_NAME = "inspections.jsonl"
