"""Forwards that take over a module of torch's or diffusers', parameters and all, with the kernels in it.

    GroupNorm, LayerNorm     torch's
    GEGLU                    act = value * gelu(gate), of one linear layer
    ResnetBlock2D            x + conv(silu(norm(conv(silu(norm(x))) + time)))
    BasicTransformerBlock    self-attention, cross-attention and feed-forward, each after a layer norm

A class here has a `forward` and nothing else. The forward runs on any module with the attributes of its namesake:
in a subclass of that (`class Fast(Host): forward = layers.GEGLU.forward`), or by Hugging Face's `kernelize`. The
backend is the module's attribute `ldmperf_backend`, "auto" where there is none.

A submodule is fused with its neighbours only if it is *plain* (`is_plain`). Any other is called as the module that
it is: LoRA, quantized, offloaded, watched by a hook. What a forward does not know is left to the host's own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from .geglu import geglu
from .group_norm import group_norm_silu
from .layer_norm import layer_norm
from .linear import linear
from .residual_add import residual_add

# A FakeTensor stands for one of the others while torch.export traces.
_PLAIN_PARAMETERS = (nn.Parameter, Tensor, FakeTensor)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does with its parameters, and nothing besides.

    Not with a subclass, a hook of torch's, a `forward` of the instance's own (as the offloading of accelerate and
    diffusers sets it), or a parameter of a tensor subclass (as quantization has them).
    """
    return (
        type(module) is kind
        and ("forward" not in module.__dict__ or _is_known(module))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
        and all(p is None or type(p) in _PLAIN_PARAMETERS for p in module._parameters.values())
    )


def _is_known(module: nn.Module) -> bool:
    """Whether the instance's forward is that of its class, as removed hooks leave it, or of a norm here."""
    known = (type(module).forward, GroupNorm.forward, LayerNorm.forward)
    return getattr(module.forward, "__self__", None) is module and module.forward.__func__ in known


class GroupNorm(nn.Module):
    """torch.nn.GroupNorm: of images [B, C, H, W] by the kernel, of other shapes by torch."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        if input.ndim != 4:
            return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return _by_kernel(self, input, None, None, _backend(self))


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm: over one dimension, with weight and bias, by the kernel, else by torch."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input: Tensor) -> Tensor:
        if not _over_rows(self):
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return cast(Tensor, layer_norm(_rows(input), self.weight, self.bias, self.eps, backend=_backend(self)))


class GEGLU(nn.Module):
    """diffusers' GEGLU: hidden_states [..., C] through `proj` to [..., 2 D], value * gelu(gate) [..., D]."""

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _warn_of_scale(args, kwargs)
        backend = _backend(self)
        if not is_plain(self.proj, nn.Linear):
            return geglu(self.proj(hidden_states), backend=backend)
        return linear(hidden_states, self.proj.weight, self.proj.bias, activation="geglu", backend=backend)


class ResnetBlock2D(nn.Module):
    """diffusers' ResnetBlock2D: input_tensor [B, Cin, H, W] and temb [B, D] or None -> [B, Cout, H, W].

    Norm and SiLU are one pass. The first convolution's bias and the time projection join the second norm, the last
    convolutions' biases the residual add: none costs a pass over the image.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        _warn_of_scale(args, kwargs)
        backend, act = _backend(self), self.nonlinearity
        x = input_tensor
        h = _resampled(self, group_norm(self.norm1, x, activation=act, backend=backend))
        x = _resampled(self, x)
        h, bias = _convolved(self.conv1, h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else act(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError('ResnetBlock2D: time_embedding_norm "scale_shift" needs temb; got None')
            scale, shift = temb.chunk(2, dim=1)
            h = act(group_norm(self.norm2, h, x_bias=bias, backend=backend) * (1 + scale) + shift)
        elif temb is None or self.time_embedding_norm != "default":
            h = group_norm(self.norm2, h, x_bias=bias, activation=act, backend=backend)
        elif temb.shape[2:] == (1, 1):
            shift = temb[:, :, 0, 0] if bias is None else temb[:, :, 0, 0] + bias
            h = group_norm(self.norm2, h, x_bias=shift, activation=act, backend=backend)
        else:
            h = group_norm(self.norm2, h + temb, x_bias=bias, activation=act, backend=backend)
        h, bias = _convolved(self.conv2, self.dropout(h))
        if self.conv_shortcut is not None:
            # As diffusers does for DDP, which warns of a gradient of other strides.
            x, shortcut_bias = _convolved(self.conv_shortcut, x.contiguous() if self.training else x)
            bias = shortcut_bias if bias is None else bias if shortcut_bias is None else bias + shortcut_bias
        return residual_sum(x, h, bias, self.output_scale_factor, backend)


class BasicTransformerBlock(nn.Module):
    """diffusers' BasicTransformerBlock: hidden_states [B, N, C] -> [B, N, C].

    A sum with the residual stream and the layer norm after it are one pass. Of norm_type "layer_norm"; of others,
    and with positional embeddings, the host's own forward.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if self.norm_type != "layer_norm" or self.pos_embed is not None:
            host: Tensor = _hosts_forward(self, BasicTransformerBlock.forward)(
                self,
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return host
        backend, x = _backend(self), _rows(hidden_states)
        options = dict(cross_attention_kwargs or {})
        _warn_of_scale((), options)
        gligen = options.pop("gligen", None)
        context = encoder_hidden_states if self.only_cross_attention else None
        h = self.attn1(
            _normed(self.norm1, x, backend),
            encoder_hidden_states=context,
            attention_mask=attention_mask,
            **options,
        )
        if gligen is not None:
            x = self.fuser(_squeezed(h + x), gligen["objs"])
            h = None
        if self.attn2 is not None:
            normed, x = _added_norm(self.norm2, h, x, backend)
            h = self.attn2(
                normed,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **options,
            )
        normed, x = _added_norm(self.norm3, h, x, backend)
        return _squeezed(_feed_forward(self, normed) + x)


def group_norm(
    norm: Any, x: Tensor, *, x_bias: Tensor | None = None, activation: Any = None, backend: str = "auto"
) -> Tensor:
    """activation(norm(x + x_bias)), in one pass for a plain nn.GroupNorm and a plain nn.SiLU.

    x [B, C, H, W]; x_bias [C], [1, C] or [B, C], or None; activation: a module, or None for none.
    """
    bias = None if x_bias is None else x_bias.expand(x.shape[0], x.shape[1])
    if x.ndim == 4 and is_plain(norm, nn.GroupNorm):
        fused = activation is not None and is_plain(activation, nn.SiLU)
        y = _by_kernel(norm, x, bias, "silu" if fused else None, backend)
        if fused:
            return y
    else:
        y = norm(x if bias is None else x + bias[:, :, None, None])
    return y if activation is None else cast(Tensor, activation(y))


def residual_sum(x: Tensor, h: Tensor, bias: Tensor | None, divisor: float, backend: str = "auto") -> Tensor:
    """(x + h + bias) / divisor, the sum in one pass for images of one shape and dtype; bias [C] or None."""
    if x.ndim == 4 and x.shape == h.shape and _same_dtype(x, h):
        total = residual_add(x, h, bias, backend=backend)
    else:
        total = x + h if bias is None else x + h + bias[:, None, None]
    return total if divisor == 1 else total / divisor


def _same_dtype(x: Tensor, y: Tensor) -> bool:
    """Whether x and y have one dtype, or autocast gives them one."""
    return x.dtype == y.dtype or torch.is_autocast_enabled(x.device.type)


def _by_kernel(norm: Any, x: Tensor, x_bias: Tensor | None, activation: str | None, backend: str) -> Tensor:
    return group_norm_silu(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        norm.eps,
        x_bias=x_bias,
        activation=activation,
        backend=backend,
    )


def _backend(module: Any) -> str:
    backend: str = getattr(module, "ldmperf_backend", "auto")
    return backend


def _over_rows(norm: Any) -> bool:
    """Whether the kernel knows this nn.LayerNorm: over the last dimension alone, with weight and bias."""
    return len(norm.normalized_shape) == 1 and norm.weight is not None and norm.bias is not None


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension. Torch's layer norm copies too what has none: tokens of an image that is
    not channels-last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _normed(norm: Any, x: Tensor, backend: str) -> Tensor:
    if not (is_plain(norm, nn.LayerNorm) and _over_rows(norm)):
        return cast(Tensor, norm(x))
    return cast(Tensor, layer_norm(x, norm.weight, norm.bias, norm.eps, backend=backend))


def _added_norm(norm: Any, h: Tensor | None, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """norm(h + x) and h + x; None for nothing to add."""
    if h is None:
        return _normed(norm, x, backend), x
    same = h.ndim == 3 and h.shape == x.shape and _same_dtype(h, x)
    if same and is_plain(norm, nn.LayerNorm) and _over_rows(norm):
        both = layer_norm(h, norm.weight, norm.bias, norm.eps, residual=x, backend=backend)
        return cast("tuple[Tensor, Tensor]", both)
    x = _squeezed(h + x)
    return _normed(norm, x, backend), x


def _squeezed(x: Tensor) -> Tensor:
    return x.squeeze(1) if x.ndim == 4 else x


def _feed_forward(block: Any, x: Tensor) -> Tensor:
    """`block.ff`, in the chunks that `set_chunk_feed_forward` asked for."""
    size, dim = block._chunk_size, block._chunk_dim
    if size is None:
        return cast(Tensor, block.ff(x))
    if x.shape[dim] % size:
        raise ValueError(
            f"BasicTransformerBlock: dimension {dim} of {list(x.shape)} does not divide into chunks of {size}; "
            "set_chunk_feed_forward with a divisor, or None"
        )
    return torch.cat([block.ff(part) for part in x.split(size, dim)], dim)


def _resampled(block: Any, x: Tensor) -> Tensor:
    """x through the block's own up- or downsampling, if it has one."""
    if block.upsample is not None:
        # As diffusers does: torch's channels-last kernel fails on large batches (diffusers issue 984).
        return cast(Tensor, block.upsample(x.contiguous() if x.shape[0] >= 64 else x))
    return x if block.downsample is None else cast(Tensor, block.downsample(x))


def _convolved(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution of x without its bias, and the bias [C]; with it, and None, where conv is not plain."""
    if not is_plain(conv, nn.Conv2d):
        return conv(x), None
    return conv._conv_forward(x, conv.weight, None), conv.bias


def _hosts_forward(module: nn.Module, ours: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of the class that the module was before `ours` took over."""
    found = [vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)]
    host: Callable[..., Any] = next(forward for forward in found if inspect.unwrap(forward) is not ours)
    return host


def _warn_of_scale(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (args or kwargs.get("scale") is not None) and not torch.compiler.is_compiling():
        warnings.warn("`scale` is ignored, as by diffusers: scale the adapter itself", FutureWarning, stacklevel=4)
