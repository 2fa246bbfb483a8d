"""stub"""

import torch.nn.functional as F

from ._statistics import channel_statistics


def conv3x3(x, weight, bias=None, *, stride=1, shortcut=(), residual=None, statistics=False, backend="auto"):
    y = F.conv2d(x.double(), weight.double(), stride=stride, padding=1)
    for a, w in shortcut:
        y = y + F.conv2d(a.double(), w.double()[:, :, None, None])
    if residual is not None:
        y = y + residual.double()
    if bias is not None:
        y = y + bias.double()[:, None, None]
    y = y.to(x.dtype)
    return (y, channel_statistics(y, 64)) if statistics else y


def conv3x3_backend(x, weight, *, stride=1, backend="auto"):
    return "triton" if backend == "triton" else "torch"
