"""Whether the first and the last convolution gain from 8 channels instead of 4: `python bench/conv_padding.py`.

Takes a GPU, some seconds. For both convolutions of each size, at 4 and at 8 channels: microseconds on the device
and the kernels that cuDNN takes. Padding pays where 8 channels save more than the launch that pads the input.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from ldmperf.model import FAMILY
from ldmperf.profiling.options import CaseError, known_names

CALLS = 30


def device_us(x: torch.Tensor, weight: torch.Tensor) -> tuple[float, list[str]]:
    """Device microseconds of a 3x3 convolution, and the names of its kernels."""

    def convolve(times: int) -> None:
        for _ in range(times):
            F.conv2d(x, weight, padding=1)
        torch.cuda.synchronize()

    convolve(3)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        convolve(CALLS)
    kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    us = sum(event.time_range.elapsed_us() for event in kernels) / CALLS
    return us, sorted({event.name for event in kernels})


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="39M,866M", help="names of the family, comma-separated")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2, help="of the network: twice the images with guidance")
    arguments = parser.parse_args()
    try:
        sizes = known_names("sizes", [arguments.sizes], FAMILY)
    except CaseError as wrong:
        print(f"conv_padding.py: {wrong}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("cuda is not here: this measures a GPU", file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
    options = {"device": "cuda", "dtype": getattr(torch, arguments.dtype)}
    for size in sizes:
        width = FAMILY[size].block_channels[0]
        for name, shape in (("conv_in", (width, 4)), ("conv_out", (4, width))):
            for channels in (4, 8):
                cout, cin = (channels if side == 4 else side for side in shape)
                x = torch.randn(arguments.batch, cin, 64, 64, **options).to(memory_format=torch.channels_last)
                weight = torch.randn(cout, cin, 3, 3, **options).to(memory_format=torch.channels_last)
                us, kernels = device_us(x, weight)
                print(f"{size} {name} {channels} channels: {us:.1f} us  {', '.join(kernels)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
