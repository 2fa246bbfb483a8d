"""Kernel benches: each operator at a step's shapes, beside its peers, timed on the device.

`run` is the whole run, `selection` its calls, `bench` one call, `peer_lane` one peer on it, `device` the timing.
`peers` lists the peers, `inputs` is the check; `kernel_records` is what is written, `table` what is shown.
"""

KERNELS_NAME = "kernels.jsonl"
