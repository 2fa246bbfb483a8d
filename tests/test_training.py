"""Training through the operators: derivatives, precision, checkpoints, hooks, memory, loops beside torch's own."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ldmperf.kernels import (
    attention,
    conv3x3,
    geglu,
    group_norm_silu,
    layer_norm,
    linear,
    residual_add,
    transformer_front,
    transformer_tail,
)
from ldmperf.profiling.kernel_bench.plain import PLAIN


def sdpa(q, k, v, mask=None, scale=None):
    mask = None if mask is None else mask[:, None, None, :]
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)


def gated(y):
    value, gate = y.chunk(2, -1)
    return value * F.gelu(gate)


def normed(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


MASK = torch.arange(14).view(2, 7) % 3 != 1
IMAGE, TOKENS, CHANNELS = (2, 8, 6, 5), (2, 7, 8), (8,)
# By name: ours, torch's own composite, and the shapes of the tensors.
CALLS = {
    "attention": (attention, sdpa, [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)]),
    "attention, masked": (
        functools.partial(attention, key_mask=MASK, scale=0.3),
        functools.partial(sdpa, mask=MASK, scale=0.3),
        [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)],
    ),
    "attention, of lengths": (
        functools.partial(attention, key_lengths=torch.tensor([7, 4])),
        functools.partial(sdpa, mask=torch.arange(7) < torch.tensor([[7], [4]])),
        [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4)],
    ),
    "group_norm_silu": (
        lambda x, w, b, s, **o: group_norm_silu(x, 4, w, b, x_bias=s, **o),
        lambda x, w, b, s: F.silu(F.group_norm(x + s[:, :, None, None], 4, w, b)),
        [IMAGE, CHANNELS, CHANNELS, (2, 8)],
    ),
    "group_norm": (
        lambda x, **o: group_norm_silu(x, 4, activation=None, **o),
        lambda x: F.group_norm(x, 4),
        [IMAGE],
    ),
    "group_norm_silu of two": (
        lambda x, k, w, b, **o: group_norm_silu(x, 4, w, b, skip=k, **o),
        lambda x, k, w, b: F.silu(F.group_norm(torch.cat([x, k], 1), 4, w, b)),
        [(2, 5, 6, 5), (2, 3, 6, 5), CHANNELS, CHANNELS],
    ),
    "layer_norm": (
        lambda x, w, b, s, **o: layer_norm(x, w, b, x_bias=s, **o),
        lambda x, w, b, s: normed(x + s, w, b),
        [TOKENS, *[CHANNELS] * 3],
    ),
    "layer_norm and a sum": (
        lambda x, r, w, b, **o: torch.cat(layer_norm(x, w, b, residual=r, **o)),
        lambda x, r, w, b: torch.cat([normed(x + r, w, b), x + r]),
        [TOKENS, TOKENS, CHANNELS, CHANNELS],
    ),
    "linear": (linear, F.linear, [TOKENS, (6, 8), (6,)]),
    "linear and its gate": (
        lambda x, w, b, **o: linear(x, w, b, activation="geglu", **o),
        lambda x, w, b: gated(F.linear(x, w, b)),
        [TOKENS, (6, 8), (6,)],
    ),
    "linear of a norm": (
        lambda x, w, b, nw, nb, s, **o: linear(
            x, w, b, norm_weight=nw, norm_bias=nb, x_bias=s, activation="geglu", **o
        ),
        lambda x, w, b, nw, nb, s: gated(F.linear(normed(x + s, nw, nb), w, b)),
        [TOKENS, (6, 8), (6,), *[CHANNELS] * 3],
    ),
    "conv3x3": (
        lambda x, w, b, s, sw, **o: conv3x3(x, w, b, shortcut=s, shortcut_weight=sw, **o),
        lambda x, w, b, s, sw: F.conv2d(x, w, b, padding=1) + F.conv2d(s, sw[:, :, None, None]),
        [IMAGE, (6, 8, 3, 3), (6,), IMAGE, (6, 8)],
    ),
    "transformer_front": (
        lambda x, p, w, v, **o: torch.cat(
            transformer_front(x, 4, v, v, p, v, v, w, proj_bias=v, x_bias=v, **o), dim=2
        ),
        lambda x, p, w, v: torch.cat(
            PLAIN["transformer_front"](x, 4, v, v, p, v, v, w, proj_bias=v, x_bias=v), dim=2
        ),
        [IMAGE, (8, 8), (6, 8), CHANNELS],
    ),
    "transformer_tail": (
        lambda h, x, image, context, w, i, o, v, **options: transformer_tail(
            h, x, image, context, w, v, v, w, w, v, v, i, o, w, 0.5, out_bias=v, proj_bias=v, **options
        ),
        lambda h, x, image, context, w, i, o, v: PLAIN["transformer_tail"](
            h, x, image, context, w, v, v, w, w, v, v, i, o, w, 0.5, out_bias=v, proj_bias=v
        ),
        [(8, 90, 8), (8, 90, 8), (8, 8, 9, 10), (8, 5, 2, 2, 4), (8, 8), (12, 8), (8, 6), CHANNELS],
    ),
    "geglu": (lambda x, b, **o: geglu(x, bias=b, **o), lambda x, b: gated(x + b), [TOKENS, CHANNELS]),
    "residual_add": (residual_add, lambda x, r, b: x + r + b[:, None, None], [IMAGE, IMAGE, CHANNELS]),
    "residual_add, doubled": (
        lambda x, r, b, **o: residual_add(x, r, b, size=(12, 9), **o),
        lambda x, r, b: F.interpolate(x + r + b[:, None, None], scale_factor=2)[..., :9],
        [IMAGE, IMAGE, CHANNELS],
    ),
}


def leaves(name, dtype=torch.float64, seed=0):
    """Leaves that require grad: values of bfloat16 in any dtype. Images are channels-last."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in CALLS[name][2]:
        value = torch.randn(shape, generator=generator).bfloat16().to(dtype)
        is_image = len(shape) == 4 and "attention" not in name
        value = value.contiguous(memory_format=torch.channels_last) if is_image else value
        found.append(value.requires_grad_())
    return found


def weighted(out):
    """A sum of the results by fixed random weights."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (out.double() * weights).sum()


def gradients(function, values):
    return torch.autograd.grad(weighted(function(*values)), values)


# Derivatives


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives_against_finite_differences(name):
    """By every argument; tests/test_derivatives.py has them beside those of torch's operators."""
    function = functools.partial(CALLS[name][0], backend="torch")
    assert torch.autograd.gradcheck(function, leaves(name), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves(name), fast_mode=True)


def test_a_sample_without_any_key_has_no_gradient_and_no_nan():
    q, k, v = leaves("attention")
    lengths = torch.tensor([3, 0])
    function = functools.partial(attention, key_lengths=lengths, backend="torch")
    for found in gradients(function, (q, k, v)):
        assert found[0].norm() > 0
        assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v), fast_mode=True)


def test_slices_of_one_projection_share_its_gradient():
    packed = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: attention(*p.unbind(2), backend="torch"), packed, fast_mode=True)
    row = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(8, dtype=torch.float64)
    function = lambda r: layer_norm(r.expand(5, 8), scale, scale, residual=r.expand(5, 8), backend="torch")[1]  # noqa: E731
    assert torch.autograd.gradcheck(function, row)


@pytest.mark.parametrize("trained", [(1,), (2,), (1, 2)])
def test_a_norm_whose_image_is_frozen(trained):
    """Of a channels-last image torch 2.13's own group norm crashes the process in its backward, on a CPU."""
    ours, theirs, _ = CALLS["group_norm_silu"]
    values = [v if i in trained else v.detach() for i, v in enumerate(leaves("group_norm_silu"))]
    chosen = [values[i] for i in trained]
    found = torch.autograd.grad(weighted(ours(*values, backend="torch")), chosen)
    image = values[0].contiguous()
    expected = torch.autograd.grad(weighted(theirs(image, *values[1:])), chosen)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# Precision

# The root of the mean square of the errors of 16 draws, ours by that of torch's own composite: at most 1.00, for
# norms 0.4 to 0.9, as torch's rounds every intermediate to bfloat16.
FACTOR = 1.05
# What float32 rounds.
FLOOR = 1e-6


def pooled_errors(name, function, dtype, draws=16):
    """For each argument the relative error of its gradient, against float64 of the same values."""
    errors = squares = 0.0
    for seed in range(draws):
        exact = gradients(CALLS[name][1], leaves(name, seed=seed))
        found = gradients(function, leaves(name, dtype, seed))
        assert all(one.dtype == dtype for one in found)
        errors += torch.stack([(a.double() - b).square().sum() for a, b in zip(found, exact, strict=True)])
        squares += torch.stack([b.square().sum() for b in exact])
    return (errors / squares).sqrt()


@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_gradients_are_as_close_to_float64_as_torchs(name):
    ours, theirs, _ = CALLS[name]
    found = pooled_errors(name, functools.partial(ours, backend="torch"), torch.bfloat16)
    assert (found <= FACTOR * pooled_errors(name, theirs, torch.bfloat16) + FLOOR).all()
    assert (found > FLOOR).all()


def under_autocast(function):
    def run(*values):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*values)

    return run


@pytest.mark.parametrize("name", CALLS)
def test_gradients_under_autocast_are_float32_and_as_close_as_torchs(name):
    ours, theirs, _ = CALLS[name]
    found = pooled_errors(name, under_autocast(functools.partial(ours, backend="torch")), torch.float32)
    assert (found <= FACTOR * pooled_errors(name, under_autocast(theirs), torch.float32) + FLOOR).all()


@pytest.mark.parametrize("name", CALLS)
def test_a_backward_inside_of_autocast_is_that_outside(name):
    function = functools.partial(CALLS[name][0], backend="torch")
    expected = gradients(function, leaves(name, torch.float32))
    values = leaves(name, torch.float32)
    loss = weighted(function(*values))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, values)
    assert all(map(torch.equal, found, expected))


# A block of a UNet, by our functions or by torch's


class Block(nn.Module):
    """A residual block and a transformer block, as diffusers has them."""

    def __init__(self, channels=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(4, channels) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.temb = nn.Linear(channels, channels)
        self.to_qkv, self.to_out = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels)
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.proj, self.down = nn.Linear(channels, 4 * channels), nn.Linear(2 * channels, channels)


class Torchs(Block):
    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb(F.silu(temb))[:, :, None, None]
        x = x + self.conv2(F.silu(self.norm2(h)))
        tokens = self.norm3(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_qkv(self.ln1(tokens)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        tokens = tokens + self.to_out(sdpa(q, k, v).flatten(2))
        tokens = tokens + self.down(gated(self.proj(self.ln2(tokens))))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Ours(Block):
    def forward(self, x, temb):
        h = group_norm_silu(x, 4, self.norm1.weight, self.norm1.bias)
        h = F.conv2d(h, self.conv1.weight, padding=1)
        x_bias = self.temb(F.silu(temb)) + self.conv1.bias
        h = group_norm_silu(h, 4, self.norm2.weight, self.norm2.bias, x_bias=x_bias)
        x = residual_add(x, F.conv2d(h, self.conv2.weight, padding=1), self.conv2.bias)
        tokens = group_norm_silu(x, 4, self.norm3.weight, self.norm3.bias, activation=None)
        tokens = tokens.flatten(2).transpose(1, 2)
        normed = layer_norm(tokens, self.ln1.weight, self.ln1.bias)
        q, k, v = linear(normed, self.to_qkv.weight).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = self.to_out(attention(q, k, v).flatten(2))
        normed, tokens = layer_norm(attended, self.ln2.weight, self.ln2.bias, residual=tokens)
        tokens = tokens + self.down(linear(normed, self.proj.weight, self.proj.bias, activation="geglu"))
        return residual_add(x, tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def blocks(dtype=torch.float64):
    """Ours and torch's, of the same parameters."""
    torch.manual_seed(0)
    ours, theirs = Ours().to(dtype), Torchs().to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x, temb = torch.randn(2, 16, 6, 5, generator=generator), torch.randn(2, 16, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), temb.to(dtype)


def trained(model, inputs, targets, steps=10):
    """The parameters after steps of SGD with momentum, and the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(*inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().item())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def furthest(found, expected):
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def test_a_training_loop_ends_where_torchs_does():
    ours, theirs = blocks()
    first = copy.deepcopy(ours.state_dict())
    targets = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, losses = trained(ours, batch(), targets)
    # Torch's own crashes on channels-last images: see test_a_norm_whose_image_is_frozen.
    expected, their_losses = trained(theirs, [one.contiguous() for one in batch()], targets)
    assert furthest(found, expected) < 1e-10
    assert losses == pytest.approx(their_losses, rel=1e-10)
    assert losses[-1] < losses[0] / 2
    assert all((found[name] - value).abs().max() > 1e-4 for name, value in first.items())


def block_gradients(model, run=None, dtype=torch.float64):
    """Of a loss by the parameters, the input and the embedding; `run` in place of a plain call."""
    inputs = [one.requires_grad_() for one in batch(dtype)]
    model.zero_grad()
    weighted((model if run is None else run)(*inputs)).backward()
    return {"x": inputs[0].grad, "temb": inputs[1].grad} | {n: p.grad for n, p in model.named_parameters()}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_changes_no_bit(use_reentrant, autocast, dtype):
    ours, _ = blocks(dtype)

    def plain(*inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(*inputs)

    def checkpointed(*inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return checkpoint(ours, *inputs, use_reentrant=use_reentrant)

    found = block_gradients(ours, checkpointed, dtype)
    assert same(found, block_gradients(ours, plain, dtype))


def test_compiled_training_is_that_of_eager():
    torch._dynamo.reset()
    ours, _ = blocks()
    eager = block_gradients(ours)
    compiled = block_gradients(ours, torch.compile(ours, backend="aot_eager", fullgraph=True))
    assert max(float((compiled[name] - value).abs().max()) for name, value in eager.items()) < 1e-11


# What torch batches one by one it says that it does.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CALLS)
def test_several_gradients_of_one_graph_at_once(name):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    # Torch 2.13's own group norm cannot, of a channels-last image.
    values = [value.detach().contiguous().requires_grad_() for value in leaves(name)]
    out = CALLS[name][0](*values, backend="torch")
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, values, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        expected = torch.autograd.grad(out, values, grad, retain_graph=True)
        torch.testing.assert_close([one[i] for one in found], list(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_frozen_arguments_have_no_gradient_and_change_no_other(name):
    function = functools.partial(CALLS[name][0], backend="torch")
    everything = gradients(function, leaves(name))
    for chosen in range(len(everything)):
        values = [v if i == chosen else v.detach() for i, v in enumerate(leaves(name))]
        (found,) = torch.autograd.grad(weighted(function(*values)), [values[chosen]])
        # A matmul of one operand's gradient alone may add in another order.
        torch.testing.assert_close(found, everything[chosen], rtol=1e-12, atol=1e-13)
        values = [v.detach() if i == chosen else v for i, v in enumerate(leaves(name))]
        if len(values) > 1:
            weighted(function(*values)).backward()
            assert values[chosen].grad is None
            assert all(v.grad is not None for i, v in enumerate(values) if i != chosen)
    assert not function(*[v.detach() for v in leaves(name)]).requires_grad


def test_gradients_accumulate_and_a_kept_graph_may_be_walked_twice():
    ours, _ = blocks()
    once = block_gradients(ours)
    inputs = [one.requires_grad_() for one in batch()]
    ours.zero_grad()
    for loss in (weighted(ours(*inputs)) for _ in range(2)):
        loss.backward()
    twice = {"x": inputs[0].grad, "temb": inputs[1].grad} | {n: p.grad for n, p in ours.named_parameters()}
    assert same(twice, {name: 2 * value for name, value in once.items()})
    inputs = [one.requires_grad_() for one in batch()]
    ours.zero_grad()
    loss = weighted(ours(*inputs))
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(inputs[0].grad, 2 * once["x"])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_was_saved_and_then_changed_is_told(dtype):
    for name, (function, _, _) in CALLS.items():
        values = leaves(name, dtype)
        expected = torch.autograd.grad(weighted(function(*values, backend="torch")), values[0])
        inner = values[0] * 1
        loss = weighted(function(inner, *values[1:], backend="torch"))
        with torch.no_grad():
            inner.add_(1)
        if "residual_add" in name or name == "layer_norm and a sum":
            # Not kept, as torch's sum keeps none.
            assert torch.equal(*torch.autograd.grad(loss, values[0]), *expected)
        elif dtype == torch.float64 and name.startswith(("group_norm", "layer_norm", "geglu")):
            # Kept is the sum with a bias or a center, as torch's own operators keep it.
            assert torch.equal(*torch.autograd.grad(loss, values[0]), *expected)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_hooks_of_tensors_parameters_and_modules_are_called():
    ours, _ = blocks()
    expected = block_gradients(ours)
    called = []
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: called.append(name))
        for name, parameter in ours.named_parameters()
    ]
    handles += [p.register_hook(lambda grad: grad * 2) for p in ours.parameters()]
    handles.append(ours.register_full_backward_hook(lambda *_: called.append("module")))
    found = block_gradients(ours)
    for handle in handles:
        handle.remove()
    assert sorted(called) == sorted([*dict(ours.named_parameters()), "module"])
    assert all(torch.equal(found[name], 2 * expected[name]) for name in dict(ours.named_parameters()))
    assert same(block_gradients(ours), expected)


def test_under_distributed_data_parallel():
    """One process: its buckets, hooks and gradients as views of them."""
    ours, _ = blocks()
    expected = block_gradients(ours)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours, gradient_as_bucket_view=True)
        found = block_gradients(ours, wrapped)
        assert same(found, expected)
        inputs = [one.requires_grad_() for one in batch()]
        with wrapped.no_sync():
            weighted(wrapped(*inputs)).backward()
        weighted(wrapped(*inputs)).backward()
        thrice = {name: value + value + value for name, value in expected.items()}
        assert all(torch.equal(p.grad, thrice[name]) for name, p in ours.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


# Memory


def saved(function, values):
    """(bytes of activations that wait for the backward, how many): each storage once, parameters left out.

    Activations are the values of more than one row; they are here the results of some operator before.
    """
    inner = [value * 1 if value.ndim > 2 else value for value in values]
    kept = {}

    def pack(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*inner)
        before = dict(kept)
    assert out.requires_grad
    return sum(before.values()), len(before)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_operator_keeps_more_than_torchs(name, dtype):
    ours, theirs, _ = CALLS[name]
    found = saved(functools.partial(ours, backend="torch"), leaves(name, dtype))
    assert found <= saved(theirs, leaves(name, dtype))


def test_a_block_keeps_less_than_torchs():
    """In bfloat16, at 64 channels and 256 pixels: what docs/kernels.md tells."""
    kept = []
    for block in (Ours, Torchs):
        torch.manual_seed(0)
        model = block(64).bfloat16()
        x = torch.randn(1, 64, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        temb = torch.randn(1, 64, dtype=torch.bfloat16)
        kept.append(saved(model, [x.requires_grad_(), temb.requires_grad_()]))
    assert kept[0] < kept[1]
