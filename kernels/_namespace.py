"""The namespace in torch.ops of this copy's operators.

The folder may be copied into another package and be loaded beside ours: each copy takes its own namespace. A build
for Hugging Face's kernel hub (docs/hub-kernels.md) has another file in this one's place.
"""

import re

# A folder's name may hold what a schema may not.
_COPY = "ldmperf_" + re.sub(r"\W", "_", __package__ or "kernels", flags=re.ASCII)
NAMESPACE = "ldmperf" if __package__ == "ldmperf.kernels" else _COPY
