"""The resources of an AMD kernel, from the metadata in its assembly text."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class AmdResources:
    """Vector and scalar registers of a wavefront's lane, their spills, and bytes of scratch and of LDS."""

    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    lds: int


def amd_resources(assembly: str) -> AmdResources:
    """Read `.amdgpu_metadata`. Raises ValueError where a field is missing."""
    fields = {
        "vgprs": "vgpr_count",
        "agprs": "agpr_count",
        "sgprs": "sgpr_count",
        "vgpr_spills": "vgpr_spill_count",
        "sgpr_spills": "sgpr_spill_count",
        "scratch": "private_segment_fixed_size",
        "lds": "group_segment_fixed_size",
    }
    values = {}
    for name, field in fields.items():
        found = re.search(rf"^[\s-]*\.{field}:\s+(\d+)\s*$", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"no .{field} in the AMD assembly")
        values[name] = int(found[1])
    return AmdResources(**values)
