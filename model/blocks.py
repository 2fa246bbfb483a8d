"""The blocks of the UNet.

A block leaves some biases to later stops, and takes those of earlier ones as arguments (deferred.py). A block
overwrites nothing that its caller holds: only `UNet.denoise` passes `in_place`, where nobody else sees the
activations. Only then, too, activations travel with the statistics that the next norm needs (written.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmperf.kernels import (
    GroupNormSiLU,
    TransformerFrontCall,
    TransformerTailCall,
    attention,
    geglu,
    layer_norm,
    linear,
    linear_separate,
    transformer_front,
    transformer_front_backend,
    transformer_tail,
    transformer_tail_backend,
)

from .choices import Choices
from .float8 import Float8Linear
from .written import (
    Image,
    Written,
    as_image,
    as_tokens,
    convolved,
    matmul_add,
    merged,
    normed,
    summed,
    wants_statistics,
)

# The GroupNorm before a transformer has its own eps, and no SiLU, in every Stable Diffusion release.
TRANSFORMER_NORM_EPS = 1e-6


class ResBlock(nn.Module):
    """Two convolutions around the time shift. The shift already holds the first convolution's bias."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        backend = choices.backend
        self.norm1 = GroupNormSiLU(groups, in_channels, eps, backend=backend)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps, backend=backend)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # A 1x1 convolution of channels-last memory is a linear layer of its tokens.
        self.shortcut = nn.Linear(in_channels, out_channels) if in_channels != out_channels else None

    def forward(
        self,
        x: Image,
        shift: Tensor,
        skip: Image | None = None,
        before: Tensor | None = None,
        bias: Tensor | None = None,
        size: torch.Size | None = None,
        in_place: bool = False,
    ) -> Image:
        """x [B, Cin, H, W], shift [B, Cout] -> [B, Cout, H, W], or [B, Cout, *size] by nearest neighbour.

        With `skip` [B, Cskip, H, W] the input is both side by side, and Cin counts the channels of both. `before`
        [Cin] and `bias` [Cout] as of `Biases`; a result of another size needs `bias`. `in_place` overwrites the
        results of the block's own layers, never x or skip. The result is `Written` where x is.
        """
        travels = isinstance(x, Written)
        h = normed(self.norm1, x, before, skip)
        x, skip = Written.of(x).image, None if skip is None else Written.of(skip).image
        h = normed(self.norm2, convolved(h, self.conv1.weight, 1, self.choices, travels), shift)
        if size is None:
            beside: dict[str, Tensor | None] = {"residual": x}
            if self.shortcut is not None:
                beside = {"shortcut": x, "skip": skip, "shortcut_weight": self.shortcut.weight}
            written = merged(h, self.conv2.weight, 1, self.choices, travels, bias=bias, **beside)
            if written is not None:
                return written if travels else written.image
        h = F.conv2d(h, self.conv2.weight, padding=1)
        if self.shortcut is not None:
            if bias is None:
                h = self._add_shortcut(h, x, skip, in_place)
                return Written(h) if travels else h
            x = self._add_shortcut(None, x, skip, in_place)
        return summed(x, h, bias, size, self.choices, travels)

    def _add_shortcut(self, h: Tensor | None, x: Tensor, skip: Tensor | None, in_place: bool) -> Tensor:
        """h + W [x; skip] as Wx x + Ws skip: no concatenation is written. Without h the shortcut alone."""
        parts = [x] if skip is None else [x, skip]
        weights = cast(nn.Linear, self.shortcut).weight.split([part.shape[1] for part in parts], dim=1)
        for part, weight in zip(parts, weights, strict=True):
            if h is None:
                h = as_image(F.linear(as_tokens(part), weight), x.shape[2:])
            else:
                h = matmul_add(h, as_tokens(part), weight, in_place)
        return cast(Tensor, h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward, each added to the residual stream.

    The residual stream misses the bias of every sum: each norm takes the missing biases as its shift. With
    `only_cross` the first attention reads the context too. Layers after a norm or the gate may be `Float8Linear`
    (float8.py).
    """

    def __init__(self, channels: int, heads: int, context_dim: int, only_cross: bool, choices: Choices) -> None:
        super().__init__()
        self.heads = heads
        self.choices = choices
        self.norm1 = nn.LayerNorm(channels)
        if only_cross:
            self.first_q: nn.Linear | Float8Linear = nn.Linear(channels, channels, bias=False)
            self.first_kv = nn.Linear(context_dim, 2 * channels, bias=False)
        else:
            self.to_qkv: nn.Linear | Float8Linear = nn.Linear(channels, 3 * channels, bias=False)
        self.only_cross = only_cross
        self.to_out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_q: nn.Linear | Float8Linear = nn.Linear(channels, channels, bias=False)
        self.cross_kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.cross_out = nn.Linear(channels, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff_in: nn.Linear | Float8Linear = nn.Linear(channels, 8 * channels)
        self.ff_out: nn.Linear | Float8Linear = nn.Linear(4 * channels, channels)

    @property
    def channels(self) -> int:
        """Those of its tokens."""
        return self.to_out.out_features

    def quantize(self) -> None:
        """Has the layers after its norms and its gate multiply in float8."""
        for name in ("to_qkv", "first_q", "cross_q", "ff_in", "ff_out"):
            if (layer := getattr(self, name, None)) is not None:
                setattr(self, name, Float8Linear(layer))

    def project_context(self, context: Tensor) -> list[Tensor]:
        """Keys and values [B, T, 2, heads, D] of a context [B, T, Dctx] for each attention that reads it."""
        if isinstance(self.ff_out, Float8Linear):
            # Here too, because a captured step runs no forward.
            self.ff_out.check()
        batch, tokens, _ = context.shape
        layers = (self.first_kv, self.cross_kv) if self.only_cross else (self.cross_kv,)
        width = self.cross_q.out_features // self.heads
        return [layer(context).view(batch, tokens, 2, self.heads, width) for layer in layers]

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        before: Tensor | None,
        after_attention: Tensor,
        after_cross: Tensor,
        in_place: bool = False,
        first: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, C], context the last of `project_context` -> [B, N, C], without any block's bias.

        before, after_attention, after_cross [C]: the bias missing from the tokens at each of the norms, `before`
        None for nothing. `in_place` overwrites x, for a caller that alone holds it. first: what the first
        attention reads of the context, None where it reads x.
        """
        batch, tokens, channels = x.shape
        heads = self.heads, channels // self.heads
        x = matmul_add(x, self.attended(x, before, first), self.to_out.weight, in_place)
        q = self._linear(x, self.norm2, self.cross_q, after_attention).view(batch, tokens, *heads)
        h = attention(q, *context.unbind(2), backend=self.choices.backend).view(x.shape)
        x = matmul_add(x, h, self.cross_out.weight, in_place)
        if isinstance(self.ff_out, Float8Linear):
            h = self._float8_feed_forward(x, after_cross)
            return x.add_(h) if in_place and x.dtype == h.dtype else x + h
        h = self._linear(x, self.norm3, self.ff_in, after_cross, "geglu")
        return matmul_add(x, h, self.ff_out.weight, in_place)

    def attended(self, x: Tensor, before: Tensor | None = None, first: Tensor | None = None) -> Tensor:
        """The first attention of x [B, N, C], before the layer behind it; arguments as of `forward`."""
        if first is None:
            return self.attention_of(self._linear(x, self.norm1, self.to_qkv, before))
        batch, tokens, channels = x.shape
        q = self._linear(x, self.norm1, self.first_q, before).view(
            batch, tokens, self.heads, channels // self.heads
        )
        return attention(q, *first.unbind(2), backend=self.choices.backend).view(x.shape)

    def attention_of(self, qkv: Tensor) -> Tensor:
        """Self-attention of packed queries, keys and values [B, N, 3 C] -> [B, N, C]."""
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        return attention(q, k, v, backend=self.choices.backend).flatten(2)

    def tail_call(
        self, x: Tensor, attended: Tensor, context: Tensor, image: Tensor, proj: nn.Linear, statistics: bool
    ) -> TransformerTailCall:
        """What follows `attended`, up to the sum with `image`, without a bias of the last projection."""
        return TransformerTailCall(
            *(attended, x, image, context, self.to_out.weight, self.norm2.weight, self.norm2.bias),
            *(self.cross_q.weight, self.cross_out.weight, self.norm3.weight, self.norm3.bias),
            *(self.ff_in.weight, self.ff_out.weight, proj.weight, self.norm2.eps),
            out_bias=self.to_out.bias,
            cross_bias=self.cross_out.bias,
            ff_in_bias=self.ff_in.bias,
            ff_out_bias=self.ff_out.bias,
            statistics=statistics,
        )

    def _linear(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        layer: nn.Linear | Float8Linear,
        x_bias: Tensor | None,
        activation: str | None = None,
    ) -> Tensor:
        """activation(layer(norm(x + x_bias))); of a `Float8Linear` without its bias and activation."""
        if isinstance(layer, Float8Linear):
            if x.dtype != torch.bfloat16:
                raise ValueError(f"float8 layers are of a bfloat16 network; got activations of {x.dtype}")
            backend = self.choices.backend
            return layer(  # type: ignore[no-any-return]
                *layer_norm(x, norm.weight, norm.bias, norm.eps, x_bias=x_bias, float8=True, backend=backend)
            )
        separate = self.choices.products == "torch"
        call = linear_separate if separate else linear
        return call(
            x,
            layer.weight,
            layer.bias,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            x_bias=x_bias,
            activation=activation,
            backend=self.choices.backend if separate else self.choices.products,
        )

    def _float8_feed_forward(self, x: Tensor, x_bias: Tensor) -> Tensor:
        """The feed-forward of x + x_bias without the last bias; the gate adds the first."""
        h = self._linear(x, self.norm3, self.ff_in, x_bias)
        out: Tensor = self.ff_out(*geglu(h, bias=self.ff_in.bias, float8=True, backend=self.choices.backend))
        return out


class Transformer(nn.Module):
    """Transformer blocks over the positions of an image, between a projection in and one out."""

    def __init__(
        self,
        channels: int,
        heads: int,
        layers: int,
        context_dim: int,
        only_cross: bool,
        groups: int,
        choices: Choices,
    ) -> None:
        super().__init__()
        self.choices = choices
        eps, backend = TRANSFORMER_NORM_EPS, choices.backend
        self.norm = GroupNormSiLU(groups, channels, eps, activation=None, backend=backend)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, only_cross, choices) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels)

    def project_context(self, context: Tensor) -> Tensor:
        """Keys and values [N, B, T, 2, heads, D] of a context [B, T, Dctx], N the attentions that read it."""
        blocks = cast(Iterable[TransformerBlock], self.blocks)
        found = [packed for block in blocks for packed in block.project_context(context)]
        return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)

    def forward(
        self,
        x: Image,
        context: Tensor,
        between: Tensor | None,
        closing: Tensor | None,
        tokens: Tensor,
        tail: Tensor | None,
        size: torch.Size | None = None,
        in_place: bool = False,
    ) -> Image:
        """x [B, C, H, W], context of `project_context` -> [B, C, H, W], or [B, C, *size].

        `between`, `closing`, `tokens` and `tail` as of `Biases`; a result of another size needs `closing`.
        `in_place` overwrites x and the results of submodules, for a caller that alone holds them, and may compute
        what a block computes without calling it. The result is `Written` where x is.
        """
        travels = isinstance(x, Written)
        x, of_x = Written.of(x)
        keys_values = context.unbind()
        if in_place and tail is not None and size is None and len(keys_values) == 1:
            written = self._merged(x, of_x, keys_values[0], between, tail, travels)
            if written is not None:
                return written if travels else written.image
        h = self.proj_in(as_tokens(normed(self.norm, Written(x, of_x), between)))
        at_norms = (None, *tokens.view(-1, x.shape[1]).unbind())
        each = len(keys_values) // len(self.blocks)
        for i, block in enumerate(self.blocks):
            *first, cross = keys_values[each * i : each * (i + 1)]
            h = block(h, cross, *at_norms[3 * i : 3 * i + 3], in_place, *first)
        if closing is None:
            h = matmul_add(x, h, self.proj_out.weight, in_place)
            return Written(h) if travels else h
        h = as_image(F.linear(h, self.proj_out.weight), x.shape[2:])
        return summed(x, h, closing, size, self.choices, travels)

    def _merged(
        self,
        x: Tensor,
        statistics: Tensor | None,
        context: Tensor,
        between: Tensor | None,
        tail: Tensor,
        travels: bool,
    ) -> Written | None:
        """`forward` with one block in three launches; None where `choices` take the separate ones."""
        block, tokens = cast(TransformerBlock, self.blocks[0]), as_tokens(x)
        if isinstance(block.ff_out, Float8Linear):
            return None
        leaves = travels and wants_statistics(x, self.choices)
        call = block.tail_call(tokens, tokens, context, x, self.proj_out, leaves)
        if transformer_tail_backend(call, self.choices.tails) == "torch":
            return None
        norm, proj, norm1 = self.norm, self.proj_in, block.norm1
        front = TransformerFrontCall(
            *(x, norm.num_groups, norm.weight, norm.bias, proj.weight, norm1.weight, norm1.bias),
            *(block.to_qkv.weight, norm.eps, norm1.eps, statistics, proj.bias, between),
        )
        if statistics is not None and transformer_front_backend(front, self.choices.tails) == "triton":
            h, qkv = transformer_front(**front._asdict(), backend="triton")
            attended = block.attention_of(qkv)
        else:
            h = proj(as_tokens(normed(norm, Written(x, statistics), between)))
            attended = block.attended(h)
        call = call._replace(attended=attended, x=h, proj_bias=tail)
        found = transformer_tail(**call._asdict(), backend="triton")
        return Written(*found) if isinstance(found, tuple) else Written(found)


class Resample(nn.Module):
    """The 3x3 convolution between two levels, without its bias, which is deferred.

    Stride 2 halves the resolution, rounded up. Stride 1 follows an enlargement: the block before it writes its
    result at the new size.
    """

    def __init__(self, channels: int, stride: int, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Image) -> Image:
        """[B, C, H, W] -> [B, C, H', W'], `Written` where x is."""
        image, stride, travels = Written.of(x).image, self.conv.stride[0], isinstance(x, Written)
        written = convolved(image, self.conv.weight, stride, self.choices, travels)
        return written if travels else written.image
