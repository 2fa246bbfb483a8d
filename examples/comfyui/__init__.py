"""ComfyUI's entry: what it reads of a folder under custom_nodes/."""

from .node import LdmperfKernels

NODE_CLASS_MAPPINGS = {"LdmperfKernels": LdmperfKernels}
NODE_DISPLAY_NAME_MAPPINGS = {"LdmperfKernels": "ldmperf kernels"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
