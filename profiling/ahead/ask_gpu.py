"""Prints what the CUDA driver says of the first GPU, as JSON: name, multiprocessors, arch; null without one.

Run as a script: a process that asks the driver can no longer fork processes that use it. No imports of ours or of
torch's, which take seconds.
"""

import ctypes
import json

# CUdevice_attribute: MULTIPROCESSOR_COUNT, COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR.
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


def ask() -> dict[str, object] | None:
    """What is printed."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = ctypes.create_string_buffer(256)
    if cuda.cuDeviceGetName(name, len(name), device):
        return None
    asked = {attribute: ctypes.c_int() for attribute in (_MULTIPROCESSORS, _MAJOR, _MINOR)}
    if any(cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device) for number, value in asked.items()):
        return None
    multiprocessors, major, minor = (value.value for value in asked.values())
    return {"name": name.value.decode(), "multiprocessors": multiprocessors, "arch": f"sm_{major}{minor}"}


if __name__ == "__main__":
    print(json.dumps(ask()))
