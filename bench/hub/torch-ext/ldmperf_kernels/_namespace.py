"""The namespace in torch.ops of this build's operators, which kernel-builder chooses: no two builds share one."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
