"""The UNet: `condition` computes once what a trajectory keeps, `denoise` is a step, `forward` is both in a row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import Conditioning, Constants
from .config import UNetConfig, shown
from .layers import (
    EmbeddingMLP,
    GroupNorm,
    Pending,
    Resample,
    ResBlock,
    TimestepEmbedding,
    Transformer,
    TransformerBlock,
    sinusoids,
)
from .private import OwnClasses, Privacy
from .staleness import MadeFrom, Snapshot

T = TypeVar("T")

BACKENDS = ("auto", "torch", "triton")


class Place(NamedTuple):
    """A ResBlock and the transformer behind it, if there is one.

    whole: no bias may be missing from their result, since the convolution that reads it pads with zeros
    """

    resblock: ResBlock
    transformer: Transformer | None
    whole: bool


class Level(nn.Module):
    """What runs at one resolution: ResBlocks, followed by transformers for as long as there are any."""

    def __init__(self, resblocks: Sequence[ResBlock], transformers: Sequence[Transformer]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(resblocks)
        self.transformers = nn.ModuleList(transformers)
        self.downsample: Resample | None = None
        self.upsample: Resample | None = None

    def places(self) -> list[Place]:
        """The blocks in the order in which they run."""
        resampled = self.downsample is not None or self.upsample is not None
        last = len(self.resblocks) - 1
        return [
            Place(cast(ResBlock, resblock), cast(Transformer | None, transformer), resampled and i == last)
            for i, (resblock, transformer) in enumerate(zip_longest(self.resblocks, self.transformers))
        ]


# Modules whose code is known: none keeps what it is given or returns.
OWN_CLASSES = OwnClasses(
    (
        *(Level, ResBlock, Transformer, TransformerBlock, Resample, GroupNorm, EmbeddingMLP, TimestepEmbedding),
        *(nn.ModuleList, nn.Conv2d, nn.Linear, nn.LayerNorm),
    )
)


def check_backend(option: str, value: str) -> None:
    """Raises ValueError for the value of an option that is not one of `BACKENDS`."""
    if value not in BACKENDS:
        raise ValueError(f"unknown {option} {value!r}: choose one of {', '.join(BACKENDS)}")


class UNet(nn.Module):
    """A text-conditioned latent-diffusion UNet (Rombach et al., arXiv 2112.10752).

    `backend` goes to every operator: "auto", "torch" or "triton" (see `ldmperf.kernels`). `products` is that of
    the matrix products with a norm or a gate beside them (`ldmperf.kernels.linear`): "auto" merges them where that
    is measured or predicted to be faster, "triton" wherever it can, "torch" nowhere. With `backend="torch"`
    nothing is merged. Convolution weights are kept channels-last, as the activations are. Raises ValueError for
    another `backend` or `products`.
    """

    def __init__(self, config: UNetConfig, *, backend: str = "auto", products: str = "auto") -> None:
        super().__init__()
        check_backend("backend", backend)
        check_backend("products", products)
        self.config = config
        groups, eps, channels = config.norm_groups, config.norm_eps, config.block_channels
        last = len(channels) - 1

        def resblock(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, groups, eps, backend)

        def transformer(level: int) -> Transformer:
            heads = config.num_heads[level]
            layers = config.transformer_layers[level]
            return Transformer(channels[level], heads, layers, config.context_dim, groups, backend, products)

        self.time_embedding = TimestepEmbedding(channels[0], config.time_dim)
        self.add_embedding = None if config.added_dim is None else EmbeddingMLP(config.added_dim, config.time_dim)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        skips = [channels[0]]
        width = channels[0]
        self.down = nn.ModuleList()
        for i, out_channels in enumerate(channels):
            resblocks = []
            for _ in range(config.layers_per_block):
                resblocks.append(resblock(width, out_channels))
                width = out_channels
                skips.append(width)
            level = Level(resblocks, [transformer(i) for _ in resblocks if config.attention[i]])
            if i < last:
                level.downsample = Resample(width, stride=2)
                skips.append(width)
            self.down.append(level)
        self.middle = None
        if config.has_middle:
            self.middle = Level([resblock(width, width), resblock(width, width)], [transformer(last)])
        self.up = nn.ModuleList()
        for i in reversed(range(len(channels))):
            resblocks = []
            for _ in range(config.layers_per_block + 1):
                resblocks.append(resblock(width + skips.pop(), channels[i]))
                width = channels[i]
            level = Level(resblocks, [transformer(i) for _ in resblocks if config.attention[i]])
            if i > 0:
                level.upsample = Resample(width, stride=1)
            self.up.append(level)
        self.norm_out = GroupNorm(groups, width, eps, "silu", backend)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        # The time projections of all ResBlocks as one linear layer: one matrix product for a whole trajectory.
        self.shift_channels = [block.conv1.out_channels for block in self._resblocks()]
        self.time_projection = nn.Linear(config.time_dim, sum(self.shift_channels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        with torch.no_grad():
            found = self._pending()
        # The length of each constant, 0 where there is none: set by the architecture, not by the weights.
        self._constant_sizes = [sum(map(len, group)) for group in found]
        self._snapshot: Snapshot | None = None
        self._privacy: Privacy | None = None

    def _levels(self) -> list[Level]:
        middle = [] if self.middle is None else [self.middle]
        return [cast(Level, level) for level in (*self.down, *middle, *self.up)]

    def _resblocks(self) -> list[ResBlock]:
        return [place.resblock for level in self._levels() for place in level.places()]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.conv_in.weight.dtype

    def condition(
        self,
        timesteps: float | Sequence[float] | Tensor,
        context: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        constants: Constants | None = None,
    ) -> Conditioning:
        """Compute once what a trajectory keeps.

        timesteps: K numbers for K steps, or a tensor [K, B] where the samples of a batch differ. context
        [B, T, Dctx], any float dtype; with guidance the batch holds both halves. Of Stable Diffusion XL,
        text_embeds [B, P]: the pooled text embedding, and time_ids [B, N]: sizes and crops of the images, where
        P + N * added_time_dim is the config's added_dim. constants: kept of `constants()`.

        Raises ValueError for shapes that do not fit, and for constants of weights that have changed since.
        """
        if constants is None:
            constants = self.constants()
        elif not torch.compiler.is_compiling():
            constants.check()
        return self._condition(self._on_device(timesteps), context, text_embeds, time_ids, constants)

    def _condition(
        self, t: Tensor, context: Tensor, text_embeds: Tensor | None, time_ids: Tensor | None, constants: Constants
    ) -> Conditioning:
        """`condition` with the timesteps on the device, float32."""
        if not isinstance(context, Tensor) or context.ndim != 3 or context.shape[-1] != self.config.context_dim:
            raise ValueError(
                f"context must be [B, T, {self.config.context_dim}]; got {_shape(context)}: "
                "pass the hidden states of the text encoder that the UNet was trained with"
            )
        if t.ndim < 2:
            t = t.reshape(-1, 1)
        if t.ndim != 2 or t.shape[1] not in (1, context.shape[0]):
            raise ValueError(
                f"timesteps must be [K] or [K, {context.shape[0]}] as the context's batch; got {list(t.shape)}: "
                "pass one row per step"
            )
        length = sum(self._constant_sizes)
        if constants.values.shape != (length,):
            raise ValueError(
                f"constants must be [{length}], those of this network; got {list(constants.values.shape)}: "
                "make them with its constants()"
            )
        weight = self.time_projection.weight
        added = self._added(context.shape[0], text_embeds, time_ids)
        embedding = self.time_embedding(t.reshape(-1)).unflatten(0, tuple(t.shape))
        embedding = F.silu(embedding if added is None else embedding + added)
        conv_bias = torch.cat([block.conv1.bias for block in self._resblocks() if block.conv1.bias is not None])
        shifts = F.linear(embedding.flatten(0, 1), weight, self.time_projection.bias + conv_bias)
        context = context.to(weight)
        return Conditioning(
            shifts=shifts.unflatten(0, embedding.shape[:2]),
            context=tuple(
                place.transformer.project_context(context)
                for level in self._levels()
                for place in level.places()
                if place.transformer is not None
            ),
            constants=constants.values,
            made_from=constants.made_from,
        )

    def _added(self, batch: int, text_embeds: Tensor | None, time_ids: Tensor | None) -> Tensor | None:
        """[B, time_dim]: what Stable Diffusion XL adds to the time embedding; None elsewhere."""
        config = self.config
        got = [_shape(given) for given in (text_embeds, time_ids)]
        if self.add_embedding is None or config.added_time_dim is None:
            if text_embeds is not None or time_ids is not None:
                raise ValueError(
                    f"this network adds nothing to its time embedding; got text_embeds {got[0]} and time_ids "
                    f"{got[1]}: leave both out"
                )
            return None
        if (
            not isinstance(text_embeds, Tensor)
            or not isinstance(time_ids, Tensor)
            or text_embeds.ndim != 2
            or time_ids.ndim != 2
            or not text_embeds.shape[0] == time_ids.shape[0] == batch
            or text_embeds.shape[1] + time_ids.shape[1] * config.added_time_dim != config.added_dim
        ):
            raise ValueError(
                f"text_embeds must be [{batch}, P] and time_ids [{batch}, N] with P + {config.added_time_dim} N = "
                f"{config.added_dim}; got {got[0]} and {got[1]}: pass the pooled text embedding, and sizes and "
                "crops of each image"
            )
        weight = self.time_projection.weight
        embedded = sinusoids(self._on_device(time_ids).flatten(), config.added_time_dim)
        beside = embedded.view(batch, time_ids.shape[1] * config.added_time_dim)
        out: Tensor = self.add_embedding(torch.cat([text_embeds.to(weight), beside.to(weight)], dim=1))
        return out

    def _on_device(self, timesteps: float | Sequence[float] | Tensor) -> Tensor:
        """Timesteps in float32 on the weights' device; the host does not wait for the device."""
        device = self.time_projection.weight.device
        try:
            if isinstance(timesteps, int | float):
                return torch.full((1,), timesteps, dtype=torch.float32, device=device)
            if not isinstance(timesteps, Tensor):
                # Neither the default dtype nor the default device has a say.
                timesteps = torch.as_tensor(timesteps, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"timesteps must be numbers; got {shown(timesteps)}: pass a number, a sequence or a tensor of them"
            ) from error
        t = timesteps
        if t.device.type != "cpu":
            return t.to(device, torch.float32)
        # The copy is ours and pageable: CUDA reads it before the call returns, so that it may go.
        return t.to(torch.float32, copy=True).to(device, non_blocking=True)

    def denoise(self, sample: Tensor, conditioning: Conditioning, step: int | Tensor) -> Tensor:
        """One evaluation: sample [B, Cin, H, W] at the step's timestep -> [B, Cout, H, W].

        step: a number from 0 to K - 1, or an int64 tensor [1] on the device that holds one: a CUDA graph captured
        with a tensor evaluates whatever step that holds at a replay. The result is channels-last and in the
        network's dtype. A sample in that dtype and channels-last is read in place. Neither the sample nor the
        conditioning is written, nor anything that a hook, a module of another class, a replaced method or a
        TorchFunctionMode keeps; a TorchDispatchMode sees sums in place.

        Raises ValueError for a step that is none of the conditioning's (a tensor's number is not read), for shapes
        that do not fit the network or the conditioning, and for a conditioning of weights that have changed since.
        """
        if not torch.compiler.is_compiling():
            conditioning.check()
        self._check_sample(sample)
        batch = sample.shape[0]
        if conditioning.shifts.shape[1] not in (1, batch) or any(
            packed.shape[1] != batch for packed in conditioning.context
        ):
            raise ValueError(
                f"the conditioning's batch is not the sample's {batch}: pass one context per sample, "
                "with guidance both halves"
            )
        shifts = iter(_of_step(conditioning.shifts, step).expand(batch, -1).split(self.shift_channels, dim=1))
        context = iter(conditioning.context)
        pending, pending_out = self._pending_of(conditioning.constants)
        in_place = not torch.is_grad_enabled() and self._is_private()

        def block(place: Place, x: Tensor, skip: Tensor | None, like: Tensor | None) -> Tensor:
            # The next skip's size, not twice x's: an odd size was rounded up on the way down.
            size = None if like is None else like.shape[2:]
            # By position: torch.utils.checkpoint takes no other arguments with use_reentrant=True.
            before, bias, _ = next(pending)
            if place.transformer is None:
                return cast(Tensor, place.resblock(x, next(shifts), skip, before, bias, size, in_place))
            x = place.resblock(x, next(shifts), skip, before, bias, None, in_place)
            return cast(Tensor, place.transformer(x, next(context), *next(pending), size, in_place))

        sample = sample.to(self.dtype, memory_format=torch.channels_last)
        x = self._run(F.conv2d(sample, self.conv_in.weight, padding=1), block, lambda module, x: module(x))
        out: Tensor = self.conv_out(self.norm_out(x, pending_out))
        return out

    def _check_sample(self, sample: Tensor) -> None:
        fits = isinstance(sample, Tensor) and sample.ndim == 4 and sample.shape[1] == self.config.in_channels
        if not fits or 0 in sample.shape[2:]:
            raise ValueError(
                f"sample must be [B, {self.config.in_channels}, H, W], not empty in H or W; got {_shape(sample)}: "
                "pass latents, with what the UNet was trained to see beside them"
            )

    def _is_private(self) -> bool:
        """Whether only `denoise` holds what its modules pass on, so that sums may overwrite it."""
        if torch.compiler.is_compiling():
            # A compiled graph plans its memory itself, and needs no in-place sums.
            return False
        if self._privacy is None or not self._privacy.knows_all():
            self._privacy = Privacy(self, OWN_CLASSES)
        return self._privacy.holds()

    def constants(self) -> Constants:
        """The biases that are passed on (`Conditioning.constants`), which depend on the weights alone."""
        return Constants(torch.cat(list(chain(*self._pending()))), self._made_from())

    def _made_from(self) -> MadeFrom | None:
        """A mark of the weights as they are now; none inside torch.compile."""
        if torch.compiler.is_compiling():
            return None
        if self._snapshot is None or self._snapshot.change() is not None:
            self._snapshot = Snapshot(self, self._conditioning_parameters())
        return MadeFrom(self, self._snapshot)

    def _conditioning_parameters(self) -> Iterator[tuple[nn.Module, str]]:
        """What `condition` reads: each module with the name of a parameter."""
        embeddings = [self.time_embedding, *([] if self.add_embedding is None else [self.add_embedding])]
        layers = [layer for embedding in embeddings for layer in (embedding.linear_1, embedding.linear_2)]
        for module in (*layers, self.time_projection):
            yield from ((module, "weight"), (module, "bias"))
        yield self.conv_in, "bias"
        for level in self._levels():
            for resblock, transformer, _ in level.places():
                yield from ((resblock.conv1, "bias"), (resblock.conv2, "bias"))
                if resblock.shortcut is not None:
                    yield from ((resblock.shortcut, "weight"), (resblock.shortcut, "bias"))
                if transformer is not None:
                    yield from ((transformer.proj_out, "weight"), (transformer.proj_out, "bias"))
                    for block in cast(Iterable[TransformerBlock], transformer.blocks):
                        yield from ((block.to_out, "bias"), (block.cross_out, "bias"), (block.ff_out, "bias"))
                        yield block.cross_kv, "weight"
            for resample in (level.downsample, level.upsample):
                if resample is not None:
                    yield resample.conv, "bias"

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights and modules are its own.
        return {**self.__dict__, "_snapshot": None, "_privacy": None}

    def _pending_of(self, constants: Tensor) -> tuple[Iterator[Pending], Tensor | None]:
        """What `_pending` returned, as views of `Conditioning.constants`."""
        pieces = iter(constants.split([size for size in self._constant_sizes if size]))
        *found, out = [next(pieces) if size else None for size in self._constant_sizes]
        return (Pending(*found[i : i + 3]) for i in range(0, len(found), 3)), out

    def _pending(self) -> list[list[Tensor]]:
        """The deferred biases: the parts of a `Pending` of every ResBlock and transformer, then the last norm's.

        Computed by the network's own traversal, which carries each image's missing bias instead of the image. Each
        part is a list of vectors to be concatenated, empty for None.
        """
        found: list[list[Tensor]] = []

        def through(
            module: ResBlock | Transformer, lacking: list[Tensor], before: Tensor | None, adds: bool
        ) -> Tensor | None:
            constant = module.constant(before)
            found.extend((_given(before), [constant] if adds else [], lacking))
            return None if adds else constant

        def block(place: Place, x: Tensor | None, skip: Tensor | None, like: Tensor | None) -> Tensor | None:
            resblock, transformer, whole = place
            before = _beside(x, skip, resblock.norm1.num_channels)
            if transformer is None:
                # A separate residual add takes a bias at no cost; an in-place matmul takes none.
                return through(resblock, [], before, whole or resblock.shortcut is None)
            if whole and resblock.shortcut is None:
                # Adds early the bias that the in-place matmul omits; the transformer's norm subtracts it.
                ahead = transformer.constant(None)
                found.extend((_given(before), [resblock.constant(before) + ahead], []))
                found.extend(([-ahead], [], transformer.lacking()))
                return None
            before = through(resblock, [], before, resblock.shortcut is None)
            return through(transformer, transformer.lacking(), before, whole)

        out = self._run(self.conv_in.bias, block, lambda module, x: module.conv.bias)
        return [*found, _given(out)]

    def _run(
        self,
        x: T,
        block: Callable[[Place, T, T | None, T | None], T],
        resample: Callable[[Resample, T], T],
    ) -> T:
        """The network between the first convolution and the last norm.

        T is an image in a step, and the bias that an image lacks in `_pending`. block(place, x, skip, like):
        `like` is the next skip where the result is enlarged to that skip's size, else None.
        """
        skips = [x]
        for level in cast(Iterable[Level], self.down):
            for place in level.places():
                x = block(place, x, None, None)
                skips.append(x)
            if level.downsample is not None:
                x = resample(level.downsample, x)
                skips.append(x)
        if self.middle is not None:
            for place in self.middle.places():
                x = block(place, x, None, None)
        for level in cast(Iterable[Level], self.up):
            for place in level.places():
                skip = skips.pop()
                enlarge = level.upsample is not None and place.whole
                x = block(place, x, skip, skips[-1] if enlarge else None)
            if level.upsample is not None:
                x = resample(level.upsample, x)
        return x

    def with_backend(self, backend: str, products: str = "auto") -> UNet:
        """The same network, on the same memory, with its operators and products on other backends."""
        with torch.device("meta"):
            other = UNet(self.config, backend=backend, products=products)
        other.load_state_dict(self.state_dict(), assign=True)
        for theirs, mine in zip(other.parameters(), self.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        return other.train(self.training)

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        context: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """sample [B, Cin, H, W], timestep a number or [B], the others of `condition` -> [B, Cout, H, W]."""
        self._check_sample(sample)
        t = self._on_device(timestep).reshape(1, -1)
        if t.shape[1] not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep must be one number or one per sample ({sample.shape[0]}); got {t.shape[1]}: "
                "use condition() and denoise() for several steps"
            )
        # These constants are used once, so they need no mark of the weights.
        constants = Constants(torch.cat(list(chain(*self._pending()))))
        return self.denoise(sample, self._condition(t, context, text_embeds, time_ids, constants), 0)


def _of_step(shifts: Tensor, step: int | Tensor) -> Tensor:
    """The row of `shifts` [K, B, S] of a step."""
    steps = shifts.shape[0]
    if isinstance(step, Tensor) and (step.ndim or step.device == shifts.device):
        if step.numel() == 1 and step.dtype in (torch.int64, torch.int32):
            return shifts.index_select(0, step).squeeze(0)
    elif not isinstance(step, bool):
        try:
            number = operator.index(step)
        except TypeError:
            number = -1
        if 0 <= number < steps:
            return shifts[number]
    got = f"{step.dtype} {list(step.shape)}" if isinstance(step, Tensor) else shown(step)
    raise ValueError(
        f"step must be a whole number from 0 to {steps - 1}, or an int64 tensor [1] of it; got {got}: "
        "make a conditioning of as many timesteps as there are steps"
    )


def _shape(value: object) -> object:
    """What an error shows of a tensor, or of what stands in its place."""
    if value is None:
        return None
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _given(vector: Tensor | None) -> list[Tensor]:
    return [] if vector is None else [vector]


def _beside(x: Tensor | None, skip: Tensor | None, channels: int) -> Tensor | None:
    """x and skip in a row [channels], with zeros for one that is None; None for both."""
    given = [part for part in (x, skip) if part is not None]
    missing = channels - sum(len(part) for part in given)
    if given and missing:
        zeros = given[0].new_zeros(missing)
        given = [zeros, *given] if x is None else [*given, zeros]
    return torch.cat(given) if given else None
