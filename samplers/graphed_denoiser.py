"""`GraphedDenoiser`: the network's evaluation alone as a CUDA graph, for sampling loops that are not ours."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .captures import Capturable, Captured, Captures, Graphed
from .cuda_graphs import CudaGraphs, Graphs
from .tree import buffer, check, leaves, map_tensors, num_steps, padded, room, structure
from .values import shown

C = TypeVar("C")


@dataclass(frozen=True)
class _Values:
    """A conditioning as it was at a call; its tensors are kept, so that no other takes their place unnoticed."""

    tree: Any
    tensors: list[Tensor]
    # None where a tensor made in inference mode counts no writes.
    versions: list[int] | None

    @classmethod
    def of(cls, tree: Any) -> _Values:
        tensors = leaves(tree)
        counted = not any(tensor.is_inference() for tensor in tensors)
        return cls(tree, tensors, [tensor._version for tensor in tensors] if counted else None)

    def has_same(self, other: _Values) -> bool:
        """Whether the tensors are the same, and have the same values."""
        return (
            self.versions is not None
            and self.versions == other.versions
            and all(map(operator.is_, self.tensors, other.tensors))
        )


@dataclass(eq=False)
class _Memory:
    """What a captured evaluation reads and writes, outside the captures' pool."""

    model_input: Tensor
    conditioning: Any
    step: Tensor
    output: Tensor | None = None
    loaded: _Values | None = None

    def tensors(self) -> list[Tensor]:
        return leaves((self.model_input, self.conditioning, self.step, self.output))

    def load(self, values: _Values, conditioning: Any) -> None:
        """Copies the conditioning, which has these values, unless it is there."""
        if self.loaded is None or not self.loaded.has_same(values):
            self.loaded = None
            if values.tensors:
                torch._foreach_copy_(leaves(self.conditioning), leaves(conditioning))
            self.loaded = values


class GraphedDenoiser(Graphed[_Memory], Generic[C]):
    """Calls `denoise(model_input, conditioning, step)` by replaying its capture, with the same bits.

    denoise, modules, max_captures, graphs  as of `GraphedSampler`
    eager_unless_worth  runs a shape eagerly where its replay is not faster than an eager call, where memory runs
                        out, and, once its capture was dropped before it had paid, for as many calls as the next
                        one costs (`Worth`); otherwise every shape is captured at its first call, and memory that
                        runs out raises. `decisions` tells each case in words, which are logged too.

    A capture is never stale: every call checks the modules, copies the model input and the step, and copies the
    conditioning where it has other tensors than the capture's last one, or tensors that were written since. Writes
    through `.data` are not seen.

    Dependent launches are captured as by `GraphedSampler`.

    denoise is called with images channels-last, and without gradients. Not for two threads at once.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor, C, Tensor], Tensor],
        *,
        modules: nn.Module | Sequence[nn.Module] | None = None,
        max_captures: int = 4,
        graphs: Graphs | None = None,
        eager_unless_worth: bool = False,
    ) -> None:
        self._denoise = denoise
        self._graphs = graphs or CudaGraphs()
        self._captures = Captures(
            type(self).__name__,
            denoise,
            modules,
            max_captures=max_captures,
            graphs=self._graphs,
            worth=eager_unless_worth,
        )
        # The last conditionings with room for more steps, which takes copies.
        self._roomy: list[tuple[_Values, Any]] = []

    def clear(self) -> None:
        """Waits until the device is done with all captures, drops them and releases their memory.

        Shapes that run eagerly are tried again.
        """
        self._roomy.clear()
        super().clear()

    def __call__(self, model_input: Tensor, conditioning: C, step: int | Tensor) -> Tensor:
        """denoise's output for model_input [B, ...], a new tensor in denoise's dtype and layout.

        conditioning  tensors in tuples, lists, dicts and dataclasses, as of `GraphedSampler`
        step          a number, or an int64 tensor of one element, which is not read by the host

        The host does not wait for the device, except in a capture. Raises ValueError for a number outside the
        conditioning's steps, where its `num_steps` tells them, for tensors on another device, and where gradients
        are asked for; CaptureError as `GraphedSampler`.
        """
        if not isinstance(model_input, Tensor) or not model_input.is_floating_point():
            raise ValueError(f"model_input must be a float tensor [B, ...], not {shown(model_input)}")
        device = model_input.device
        self._graphs.check(device)
        check(conditioning)
        if torch.is_grad_enabled() and any(one.requires_grad for one in (model_input, *leaves(conditioning))):
            raise ValueError("a captured graph computes no gradients: call the network itself, or under no_grad")
        # A later call outside inference mode uses the same tensors.
        with torch.inference_mode(False), torch.no_grad():
            values = _Values.of(conditioning)
            for tensor in values.tensors:
                if tensor.device != device:
                    raise ValueError(
                        f"conditioning must be on {device} as the model input is; a tensor is on {tensor.device}"
                    )
            _check_step(step, num_steps(conditioning))
            roomy = self._with_room(conditioning, values)
            key = (device, model_input.shape, model_input.dtype, structure(roomy))
            with self._graphs.turn(device):
                captured = self._captures.find(
                    key, device, _described(model_input), lambda: self._work(model_input, roomy)
                )
                if captured is not None:
                    return _replayed(captured, model_input, values, roomy, step)
            like = _like_images(model_input).copy_(model_input)
            number = _set_step(torch.empty(1, dtype=torch.int64, device=device), step)
            return _checked(self._denoise(like, roomy, number)).clone()

    def _with_room(self, conditioning: C, values: _Values) -> Any:
        for known, roomy in self._roomy:
            if known.tree is conditioning and known.has_same(values):
                return roomy
        roomy = padded(conditioning, room(num_steps(conditioning) or 0))
        # Two, as loops that guide may evaluate the halves one after the other.
        self._roomy = [(values, roomy), *self._roomy[:1]]
        return roomy

    def _work(self, model_input: Tensor, conditioning: Any) -> Capturable[_Memory]:
        memory = _Memory(
            _like_images(model_input).zero_(),
            map_tensors(conditioning, buffer),
            torch.zeros(1, dtype=torch.int64, device=model_input.device),
        )

        def call() -> None:
            output = _checked(self._denoise(memory.model_input, memory.conditioning, memory.step))
            if memory.output is None:
                # In the first call of the warm-up: outside the captures' memory.
                memory.output = torch.empty_like(output)
            memory.output.copy_(output)

        return Capturable(memory, memory.tensors, call)


def _replayed(
    captured: Captured[_Memory], model_input: Tensor, values: _Values, conditioning: Any, step: int | Tensor
) -> Tensor:
    memory = captured.memory
    memory.load(values, conditioning)
    memory.model_input.copy_(model_input)
    _set_step(memory.step, step)
    captured.replay()
    assert memory.output is not None
    return memory.output.clone()


def _checked(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"denoise must return a tensor, not {shown(output)}")
    return output


def _set_step(number: Tensor, step: int | Tensor) -> Tensor:
    """Writes the step into `number` [1] without waiting: as an argument of a launch, or by a copy."""
    return number.copy_(step.reshape(1), non_blocking=True) if isinstance(step, Tensor) else number.fill_(step)


def _check_step(step: int | Tensor, count: int | None) -> None:
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.dtype != torch.int64:
            raise ValueError(f"step must be an int64 tensor of one element, not {step.dtype} {list(step.shape)}")
    elif type(step) is not int or step < 0 or (count is not None and step >= count):
        most = "on" if count is None else f"to {count - 1}, the conditioning's last"
        raise ValueError(f"step must be a number from 0 {most}, not {shown(step)}")


def _like_images(tensor: Tensor) -> Tensor:
    """Uninitialised memory for such a tensor, channels-last for images, the layout that the network reads."""
    memory_format = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)


def _described(model_input: Tensor) -> str:
    return f"the network for {list(model_input.shape)} {str(model_input.dtype).removeprefix('torch.')}"
