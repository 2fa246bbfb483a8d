"""What a record of a case holds beside its samples: phases, harness, trace, floor, energy."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..measure.recorded import Count, KernelTime, Milliseconds, RecordModel, Samples


class Phases(RecordModel):
    """What happens once, each part timed apart on the wall clock, in milliseconds; null when it was not done.

    weights: making or loading the network, shared by the backends of a group. build: the backend's own.
    first_call: its first trajectory. warmup: the trajectories between that and timing. reference: the reference
    trajectory, where it was computed apart. graph_warmup and capture: of the steps that were captured as CUDA
    graphs, a part of first_call; null where none was.
    """

    weights_ms: Milliseconds | None = None
    build_ms: Milliseconds | None = None
    first_call_ms: Milliseconds | None = None
    warmup_ms: Milliseconds | None = None
    graph_warmup_ms: Milliseconds | None = None
    capture_ms: Milliseconds | None = None
    reference_ms: Milliseconds | None = None


class Harness(RecordModel):
    """How the samples were taken: timing of a backend ended when both minima were reached.

    `interleaved`: the backends that were timed in turn with this one, itself included. `order`: for each sample
    who ran in its round, in that order; empty in older records. `stopped_by`: "seconds" where the time given to
    the whole profile ran out first, so that there are fewer samples than the minima ask for. `round_seed`: in
    place of the case's seed for the inputs of timed rounds (the last sample has the check's); random, null in
    older records. `confirmed_by`: the backend or reference that the result of a timed round agreed with; null
    where no round had fresh inputs, or nothing to compare with, and in older records. `in_turns`: between rounds
    processes of other sides had theirs (`ldmperf compare --commits`), so that caches are colder than in a profile.
    `groups_before`: the groups that the same process had measured before this one (`--one-process`), which may
    have left caches warm and memory fragmented; null where its process ended before it told, and in older records.
    """

    min_count: int
    min_seconds: float
    warmup_count: int
    interleaved: tuple[str, ...]
    order: tuple[tuple[str, ...], ...] = ()
    stopped_by: Literal["seconds"] | None = None
    round_seed: Count | None = None
    confirmed_by: str | None = None
    in_turns: bool = False
    groups_before: Count | None = None


class Trace(RecordModel):
    """What the device did in one trajectory.

    `evaluations`: model evaluations of that trajectory, which is shorter than the one that was timed; null in
    older records, where it was as long. `launches`: kernels, copies and fills. `launches_per_step`: those from one
    model evaluation to the next, null where that could not be told. `busy_ms`: how long at least one of them ran.
    `step_busy_ms`: the same within a step, in the mean. `step`: the mean over such steps, by kernel, the longest
    first; empty where they could not be told.
    """

    evaluations: Annotated[int | None, Field(ge=1)] = None
    launches: Annotated[int, Field(ge=0)]
    launches_per_step: Annotated[int | None, Field(ge=0)] = None
    busy_ms: Milliseconds
    step_busy_ms: Milliseconds | None = None
    step: tuple[KernelTime, ...] = ()

    def busy_in(self, evaluations: int) -> float | None:
        """How long the device is busy in a trajectory of so many evaluations, in ms, each further one a mean step.

        Null where that is another number than was traced and the steps could not be told.
        """
        further = 0 if self.evaluations is None else evaluations - self.evaluations
        if not further:
            return self.busy_ms
        return None if self.step_busy_ms is None else self.busy_ms + further * self.step_busy_ms


class Parts(RecordModel):
    """What the parts of a pipeline's calls took, sample by sample: together `gpu_ms`, on the CPU `wall_ms`.

    text: the prompt's tokens and the text encoder. steps: from there to the latents that the decoder is given,
    what prepares the steps included. decode: the decoder. rest: what the pipeline does with the images. On a GPU
    they are times between events in the stream, so that one in which the device waits for the host is as long as
    the wait.
    """

    text: Samples
    steps: Samples
    decode: Samples
    rest: Samples


class Floor(RecordModel):
    """The least times of a step on this machine, from what it computes and moves and the ceilings measured here.

    step_ms        the roofline: each launch at the longest of its bytes, FLOPs and exponentials, summed; of a
                   rival its convolutions and all else, without activations
    least_step_ms  what no implementation undercuts: all FLOPs of the step, those of 3x3 convolutions (of a rival
                   all convolutions) counted at a quarter (Winograd's algorithm), and no bytes (a cache may hold
                   them); at `least_flop_per_s`
    nbytes, flops, exponentials    of a step; a multiply-add is two FLOPs
    *_per_s        the ceilings: reads and writes of a copy, matmuls in the case's dtype, exponentials
    least_flop_per_s    of the fastest dtype that gives the case's accuracy, with a margin (measure/ceilings.py)
    """

    step_ms: Milliseconds
    least_step_ms: Milliseconds
    nbytes: Count
    flops: Count
    exponentials: Count
    bytes_per_s: Annotated[float, Field(gt=0)]
    flop_per_s: Annotated[float, Field(gt=0)]
    exponentials_per_s: Annotated[float, Field(gt=0)]
    least_flop_per_s: Annotated[float | None, Field(gt=0)] = None


class Energy(RecordModel):
    """The GPU's energy over a window of whole trajectories, untimed, after timing: by NVML's counter.

    `joules` is null where it cannot be told, and `message` says why. `window_s` is at least two seconds, as the
    counter is updated every 20 to 100 ms. `trajectories`: how many ran in the window. `counted_s`: from the first
    to the last update of the counter within it; the mean power between them counts for all of the window.
    `relative_error`: the most by which the unknown moments of these two updates change the joules; the sensor's
    own error comes on top. What an idle GPU takes is not subtracted.
    """

    joules: Annotated[float | None, Field(ge=0)] = None
    window_s: Annotated[float, Field(ge=0)] = 0.0
    trajectories: Annotated[int, Field(ge=0)] = 0
    counted_s: Annotated[float, Field(ge=0)] = 0.0
    relative_error: Annotated[float | None, Field(ge=0)] = None
    message: Annotated[str | None, Field(pattern=r"^[^\r\n]+$")] = None

    @model_validator(mode="after")
    def _joules_or_why_not(self) -> Self:
        if (self.joules is None) == (self.message is None):
            raise ValueError("energy has joules or a message, and not both")
        if self.joules is not None and not (self.window_s and self.trajectories):
            raise ValueError("joules are of a window and of trajectories")
        return self
