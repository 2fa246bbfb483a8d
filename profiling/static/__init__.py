"""Kernels compiled and inspected without a GPU: resources, instructions, and what is predicted from them."""
