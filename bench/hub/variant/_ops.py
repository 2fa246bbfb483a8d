"""The namespace in torch.ops of this build, as kernel-builder's file of this name gives it."""

import torch

_OPS_NAME = "$id"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of an operator of this build."""
    return f"{_OPS_NAME}::{op_name}"
