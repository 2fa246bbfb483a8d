"""What tests of `ldmperf.model.dropin` look at in a model: results, objects, calls of our operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SAME = {torch.float64: 1e-12, torch.float32: 3e-6}


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's result without gradients."""
    with torch.no_grad():
        result: torch.Tensor = model(**inputs, return_dict=False)[0]
    return result


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The error's root mean square, relative to that of what is expected; NaN where either has one."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def close(model: Any, inputs: dict[str, Any], expected: torch.Tensor) -> bool:
    """Whether a float32 model's result is the expected one, to rounding."""
    return relative_rms(output(model, inputs), expected) < SAME[torch.float32]


class OurCalls(TorchDispatchMode):
    """Counts the calls of our operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ldmperf":
            self.names[func._schema.name.removeprefix("ldmperf::")] += 1
        return func(*args, **kwargs or {})


class Computed(TorchDispatchMode):
    """The names of operators that write a result, as views do not; a convolution's bias is a pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, torch.Tensor) and first.untyped_storage().data_ptr() not in given:
            self.names += [name, "bias"] if name == "convolution" and args[2] is not None else [name]
        return out


def our_calls(model: Any, inputs: dict[str, Any]) -> Counter[str]:
    with OurCalls() as calls:
        output(model, inputs)
    return calls.names


def objects(model: Any) -> dict[str, Any]:
    """All that undo must restore: modules, their classes and attributes, parameters and buffers, by identity."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = (id(module), type(module), list(vars(module)))
        found |= {f"{path}.{name}": id(value) for name, value in vars(module).items()}
        found |= {f"{path}/{name}": id(value) for name, value in module._modules.items()}
        found |= {f"{path}:{name}": id(tensor) for name, tensor in module._parameters.items()}
        found |= {f"{path};{name}": id(tensor) for name, tensor in module._buffers.items()}
    return found


def tensors(model: Any) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def same_tensors(model: Any, before: dict[str, tuple[int, torch.Tensor]]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(
        tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
        for name, tensor in now.items()
    )


def floats(value: Any, dtype: torch.dtype) -> Any:
    """The same nest with its floating-point tensors in the dtype."""
    if isinstance(value, dict):
        return {name: floats(item, dtype) for name, item in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
