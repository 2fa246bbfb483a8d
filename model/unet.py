"""The UNet: `condition` computes the values that a trajectory keeps, `denoise` is a step, `forward` is both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.kernels import GroupNormSiLU

from . import arguments
from .blocks import Resample, ResBlock, Transformer, TransformerBlock
from .choices import Choices
from .conditioning import Conditioning, Constants
from .config import UNetConfig
from .deferred import deferred_biases, split_biases
from .embeddings import EmbeddingMLP, LabelEmbedding, TimestepEmbedding, sinusoids
from .fields import integer, shown
from .float8 import FLOAT8_CHANNELS, FLOAT8_MULTIPLE, float8_misfit, refuse_float8
from .image_by_image import Values, conditioned, evaluated
from .private import PrivacyKept
from .route import Level, Stop, route
from .staleness import MadeFrom, Snapshot
from .written import Image, Written, normed

_BOTH, _BIAS = ("weight", "bias"), ("bias",)
# The parameters that `condition` reads, by the last name of their module.
CONDITIONING_PARAMETERS = {
    **dict.fromkeys(("linear_1", "linear_2", "time_projection", "shortcut", "proj_out"), _BOTH),
    **dict.fromkeys(("cross_kv", "first_kv", "cond_proj", "class_embedding"), ("weight",)),
    **dict.fromkeys(("conv_in", "conv1", "conv2", "conv", "to_out", "cross_out", "ff_out"), _BIAS),
}


class _Remembered:
    """What a network remembers of its modules and weights, made anew when these have changed.

    It has slots and no `__dict__`, so it is no value of the network to whoever compares a module's values
    (`ldmperf.samplers.GraphedSampler`).
    """

    __slots__ = ("privacy", "snapshot")

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.privacy = PrivacyKept()


class UNet(nn.Module):
    """A text-conditioned latent-diffusion UNet (Rombach et al., arXiv 2112.10752).

    `backend` goes to every operator: "auto", "torch" or "triton" (see `ldmperf.kernels`). `products`,
    `convolutions`, `tails` and `statistics` say the same of what can be merged (`Choices`). Weights of
    convolutions are channels-last, as the activations are. With `batch_invariant` an image's results are the same
    to the bit alone and in any batch (docs/batch-invariance.md): each is computed alone, and torch.compile leaves
    that uncompiled. Raises ValueError for a choice that is none of these three.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        backend: str = "auto",
        products: str = "auto",
        convolutions: str = "auto",
        tails: str = "auto",
        statistics: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        choices = Choices(backend, products, convolutions, tails, statistics).checked()
        self.config = config
        self.choices = choices
        self.batch_invariant = batch_invariant
        groups, eps, channels = config.norm_groups, config.norm_eps, config.block_channels
        layers, last = config.layers_per_block, len(channels) - 1

        def level(
            i: int, widths: Iterable[int], transformers: int, only: bool, down: bool = False, up: bool = False
        ) -> Level:
            """A ResBlock from each of `widths` to the level's own width, transformers, and a resampling if any."""
            out = channels[i]
            sizes = config.num_heads[i], config.transformer_layers[i], config.context_dim, only
            return Level(
                [ResBlock(width, out, groups, eps, choices) for width in widths],
                [Transformer(out, *sizes, groups, choices) for _ in range(transformers)],
                downsample=Resample(out, 2, choices) if down else None,
                upsample=Resample(out, 1, choices) if up else None,
            )

        self.time_embedding = TimestepEmbedding(channels[0], config.time_dim, config.time_cond_proj_dim)
        classes = config.num_class_embeds
        self.class_embedding = None if classes is None else LabelEmbedding(classes, config.time_dim)
        self.add_embedding = None if config.added_dim is None else EmbeddingMLP(config.added_dim, config.time_dim)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        width, skips, only_cross = channels[0], [channels[0]], config.only_cross_attention
        self.down = nn.ModuleList()
        for i, out in enumerate(channels):
            widths = [width, *[out] * (layers - 1)]
            self.down.append(level(i, widths, config.attention[i] * layers, only_cross[i], down=i < last))
            skips += [out] * (layers + (i < last))
            width = out
        self.middle = level(last, [width, width], 1, only=False) if config.has_middle else None
        self.up = nn.ModuleList()
        for i, out in reversed(list(enumerate(channels))):
            widths = [x + skips.pop() for x in (width, *[out] * layers)]
            self.up.append(level(i, widths, config.attention[i] * (layers + 1), only_cross[i], up=i > 0))
            width = out
        self.norm_out = GroupNormSiLU(groups, width, eps, backend=choices.backend)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        # The time projections of all ResBlocks as one linear layer: one matmul for a whole trajectory.
        self.shift_channels = [stop.resblock.conv1.out_channels for stop in self._route()]
        self.time_projection = nn.Linear(config.time_dim, sum(self.shift_channels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        with torch.no_grad():
            biases = self._deferred_biases()
        # The length of each deferred bias, 0 where there is none: set by the architecture, not by the weights.
        self._constant_sizes = [sum(map(len, vectors)) for vectors in biases]
        self._remembered = _Remembered()

    def _route(self) -> tuple[Stop, ...]:
        """The stops of the modules that the network has now: any may have been replaced."""
        middle = [] if self.middle is None else [self.middle]
        return route(*cast(tuple[Iterable[Level], ...], (self.down, middle, self.up)))

    def _deferred_biases(self) -> list[list[Tensor]]:
        return deferred_biases(self._route(), cast(Tensor, self.conv_in.bias))

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
        class_labels: Sequence[int] | Tensor | None = None,
        timestep_cond: Tensor | None = None,
        constants: Constants | None = None,
    ) -> Conditioning:
        """The values that a trajectory keeps.

        timesteps: K numbers for K steps, or a tensor [K, B] where the samples of a batch differ. context
        [B, T, Dctx], any float dtype; with guidance the batch holds both halves. Stable Diffusion XL alone takes
        text_embeds [B, P], the pooled text embedding, and time_ids [B, N], sizes and crops of the images:
        P + N * added_time_dim is the config's added_dim. class_labels: B integers below the config's
        num_class_embeds; one on the device that is not makes its sample NaN, as the host does not wait to read it.
        timestep_cond [B, time_cond_proj_dim]: an embedded guidance scale, or None as diffusers takes it too.
        constants: a kept result of `constants()`.

        Raises ValueError for shapes and labels that do not fit, and for constants of weights that have changed
        since.
        """
        if constants is None:
            constants = self.constants()
        elif not torch.compiler.is_compiling():
            constants.check()
        t = arguments.on_device(self.time_projection.weight.device, timesteps)
        added = arguments.Added(text_embeds, time_ids, class_labels, timestep_cond)
        return self._condition(t, context, added, constants)

    def _condition(self, t: Tensor, context: Tensor, added: arguments.Added, constants: Constants) -> Conditioning:
        """`condition` with the timesteps on the device, float32."""
        arguments.check_context(self.config, context)
        t = arguments.in_rows(t, context.shape[0])
        arguments.check_constants(sum(self._constant_sizes), constants.values)
        arguments.check_added(self.config, context.shape[0], added)
        if self.class_embedding is not None and added.class_labels is not None:
            classes = self.class_embedding.num_embeddings
            labels = arguments.labels_on_device(t.device, classes, context.shape[0], added.class_labels)
            added = added._replace(class_labels=labels)
        values = partial(conditioned, self._values) if self._is_split(context.shape[0]) else self._values
        shifts, contexts = values(t, context, added)
        return Conditioning(shifts, contexts, constants.values, constants.made_from)

    def _is_split(self, batch: int) -> bool:
        """Whether images are computed one by one."""
        return self.batch_invariant and batch > 0

    def _values(self, t: Tensor, context: Tensor, added: arguments.Added) -> Values:
        """`shifts` and `context` of a `Conditioning`."""
        stops, projection = self._route(), self.time_projection
        embedding = self.time_embedding(t, added.timestep_cond)
        for summand in self._summands(added):
            embedding = embedding + summand
        embedding = F.silu(embedding)
        conv_bias = torch.cat([stop.resblock.conv1.bias for stop in stops if stop.resblock.conv1.bias is not None])
        shifts = F.linear(embedding.flatten(0, 1), projection.weight, projection.bias + conv_bias)
        context = context.to(projection.weight)
        contexts = tuple(
            stop.transformer.project_context(context) for stop in stops if stop.transformer is not None
        )
        return shifts.unflatten(0, embedding.shape[:2]), contexts

    def _summands(self, given: arguments.Added) -> Iterator[Tensor]:
        """[B, time_dim] each, added to the time embedding: the class's row, and what Stable Diffusion XL has."""
        size, weight = self.config.added_time_dim, self.time_projection.weight
        if self.class_embedding is not None:
            yield self.class_embedding(given.class_labels)
        text_embeds, time_ids = given.text_embeds, given.time_ids
        if self.add_embedding is not None and size and text_embeds is not None and time_ids is not None:
            embedded = sinusoids(arguments.on_device(weight.device, time_ids).flatten(), size)
            beside = embedded.view(time_ids.shape[0], time_ids.shape[1] * size)
            yield self.add_embedding(torch.cat([text_embeds.to(weight), beside.to(weight)], dim=1))

    def denoise(self, sample: Tensor, conditioning: Conditioning, step: int | Tensor) -> Tensor:
        """One evaluation: sample [B, Cin, H, W] at the step's timestep -> [B, Cout, H, W].

        step: a number from 0 to K - 1, or an int64 tensor [1] of it on the device: a captured CUDA graph reads the
        tensor at each replay. The result is channels-last and in the network's dtype; a sample of that layout and
        dtype is read without a copy. Nothing that the caller holds is written: neither the sample, nor the
        conditioning, nor an activation seen by a hook, a module of another class, a replaced method or a
        TorchFunctionMode. A TorchDispatchMode sees sums in place.

        Raises ValueError for a step outside the conditioning (the number in a tensor is not read), for shapes that
        do not fit the network or the conditioning, and for a conditioning of weights that have changed since.
        """
        if not torch.compiler.is_compiling():
            conditioning.check()
        arguments.check_sample(self.config, sample)
        batch = sample.shape[0]
        arguments.check_batch(conditioning, batch)
        shifts = arguments.of_step(conditioning.shifts, step)
        evaluate = partial(self._evaluated, conditioning.constants)
        if self._is_split(batch):
            return evaluated(evaluate, sample, shifts, conditioning.context)
        return evaluate(sample, shifts.expand(batch, -1), conditioning.context)

    def _evaluated(self, constants: Tensor, sample: Tensor, shifts: Tensor, contexts: Iterable[Tensor]) -> Tensor:
        """`denoise` with the shifts [B, S] of its step."""
        shift_of, context = iter(shifts.split(self.shift_channels, dim=1)), iter(contexts)
        at_stops, at_end = split_biases(constants, self._constant_sizes)
        in_place = not torch.is_grad_enabled() and self._remembered.privacy.holds(self)

        sample = sample.to(self.dtype, memory_format=torch.channels_last)
        first = F.conv2d(sample, self.conv_in.weight, padding=1)
        # What nobody else sees may have statistics beside it.
        x: Image = Written(first) if in_place else first
        skips = [x]
        for stop, shift, biases in zip(self._route(), shift_of, at_stops, strict=True):
            skip = skips.pop() if stop.pops else None
            # The next skip's size, not twice x's: an odd size was rounded up on the way down.
            size = Written.of(skips[-1]).image.shape[2:] if stop.enlarges else None
            of_block = size if stop.transformer is None else None
            # By position: torch.utils.checkpoint takes no other arguments with use_reentrant=True.
            x = stop.resblock(x, shift, skip, biases.before, biases.bias, of_block, in_place)
            if stop.transformer is not None:
                kept = biases.between, biases.closing, biases.tokens, biases.tail
                x = stop.transformer(x, next(context), *kept, size, in_place)
            if stop.pushes:
                skips.append(x)
            if stop.resample is not None:
                x = stop.resample(x)
                if stop.pushes:
                    skips.append(x)
        out: Tensor = self.conv_out(normed(self.norm_out, x, at_end))
        return out

    def constants(self) -> Constants:
        """The deferred biases (`Conditioning.constants`), which depend on the weights alone."""
        return self._constants(self._made_from())

    def _constants(self, made_from: MadeFrom | None) -> Constants:
        return Constants(torch.cat(list(chain(*self._deferred_biases()))), made_from)

    def _made_from(self) -> MadeFrom | None:
        """A mark of the weights as they are now; none inside torch.compile."""
        if torch.compiler.is_compiling():
            return None
        remembered = self._remembered
        if remembered.snapshot is None or remembered.snapshot.change() is not None:
            remembered.snapshot = Snapshot(self, CONDITIONING_PARAMETERS)
        return MadeFrom(self, remembered.snapshot)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights and modules are its own.
        return {**self.__dict__, "_remembered": _Remembered()}

    def with_backend(
        self, backend: str, products: str = "auto", *, batch_invariant: bool | None = None, **choices: str
    ) -> UNet:
        """The same network on the same memory, with other values of `backend`, `products` and other choices.

        `choices` as of the constructor, "auto" unless given; `batch_invariant` is this network's unless given.
        Raises ValueError for a network of `with_float8`, which comes after this.
        """
        refuse_float8(self, "with_backend")
        invariant = self.batch_invariant if batch_invariant is None else batch_invariant
        with torch.device("meta"):
            other = UNet(self.config, backend=backend, products=products, batch_invariant=invariant, **choices)
        other.load_state_dict(self.state_dict(), assign=True)
        for theirs, mine in zip(other.parameters(), self.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        return other.train(self.training)

    @torch.no_grad()
    def with_float8(self, *, least_channels: int = FLOAT8_CHANNELS) -> UNet:
        """The same network on the same memory, in which wide transformers multiply in float8 (float8.py).

        Replaced are the layers after their norms and gates, at levels of at least `least_channels` channels: of
        another size than the rest of the network's memory, their weights are rounded to float8_e4m3fn with a scale
        for each row. It is for inference: gradients raise ValueError. So does a weight of these that was written
        since, at the next evaluation, and here a network that is not bfloat16, has no such level, or is on a
        device without float8.
        """
        refuse_float8(self, "with_float8")
        weight = self.conv_in.weight
        if (misfit := float8_misfit(weight.device, weight.dtype)) is not None:
            raise ValueError(misfit)
        if integer(least_channels) is None:
            raise ValueError(f"least_channels must be a whole number; got {shown(least_channels)}")
        other = self.with_backend(**self.choices._asdict())
        blocks = [block for block in other.modules() if isinstance(block, TransformerBlock)]
        wide = [b for b in blocks if b.channels >= least_channels and b.channels % FLOAT8_MULTIPLE == 0]
        if not wide:
            raise ValueError(
                f"no transformer of this network has {least_channels} channels or more, a multiple of "
                f"{FLOAT8_MULTIPLE}: use it in bfloat16"
            )
        for block in wide:
            block.quantize()
        return other

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        context: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        class_labels: Sequence[int] | Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """sample [B, Cin, H, W], timestep a number or [B], the others of `condition` -> [B, Cout, H, W]."""
        arguments.check_sample(self.config, sample)
        t = arguments.on_device(self.time_projection.weight.device, timestep).reshape(1, -1)
        if t.shape[1] not in (1, sample.shape[0]):
            raise ValueError(
                f"timestep must be one number or one per sample ({sample.shape[0]}); got {t.shape[1]}: "
                "use condition() and denoise() for several steps"
            )
        # These constants are used once, so they need no mark of the weights.
        added = arguments.Added(text_embeds, time_ids, class_labels, timestep_cond)
        conditioning = self._condition(t, context, added, self._constants(None))
        return self.denoise(sample, conditioning, 0)
