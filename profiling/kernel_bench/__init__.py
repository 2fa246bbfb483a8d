"""Kernel benches: each operator at a step's shapes, beside its peers, timed on the device."""

KERNELS_NAME = "kernels.jsonl"
