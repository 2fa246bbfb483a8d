"""kernels/layers.py against the hosts' own forwards: diffusers' and torch's modules, in float64 and float32."""

import copy
from functools import partial

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from dropin_checks import Computed
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.prune import random_unstructured

from ldmperf.kernels import layers

LAYERS = {
    nn.GroupNorm: layers.GroupNorm,
    nn.LayerNorm: layers.LayerNorm,
    GEGLU: layers.GEGLU,
    ResnetBlock2D: layers.ResnetBlock2D,
    BasicTransformerBlock: layers.BasicTransformerBlock,
}


def taken(module, backend="torch"):
    """A copy of a module, under our forward."""
    ours = copy.deepcopy(module)
    host = type(module)
    ours.__class__ = type(host.__name__, (host,), {"forward": LAYERS[host].forward})
    ours.ldmperf_backend = backend
    return ours


def randomized(module):
    """Norms and biases that do something; evaluation mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return module.eval()


def relative_error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


def compare(module, *args, **kwargs):
    """Our forward equals the host's in float64, and errs no more than it in float32."""

    def run(one, dtype):
        # Copies: a SiLU in place writes to its input.
        given = [a if a is None else a.to(dtype, copy=True) for a in args]
        options = {k: v if v is None else v.to(dtype, copy=True) for k, v in kwargs.items()}
        return one(*given, **options)

    with torch.no_grad():
        module.double()
        exact = run(module, torch.float64)
        assert relative_error(run(taken(module), torch.float64), exact) < 1e-12
        module.float()
        theirs, ours = run(module, torch.float32), run(taken(module), torch.float32)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + 1e-7
    return ours


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def image(*shape, channels_last=True):
    x = torch.randn(*shape, dtype=torch.float64) + 0.5
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def resnet(**options):
    defaults = {"in_channels": 8, "out_channels": 12, "temb_channels": 6, "groups": 4}
    return randomized(ResnetBlock2D(**defaults | options))


def without_bias(block):
    block.conv1.bias = block.conv2.bias = None
    return block


def padded(block, mode):
    for name in ("conv1", "conv2"):
        old = getattr(block, name)
        conv = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, padding_mode=mode)
        conv.load_state_dict(old.state_dict())
        setattr(block, name, conv)
    return block


def without_affine(block):
    block.norm1, block.norm2 = nn.GroupNorm(4, 8, affine=False), nn.GroupNorm(4, 12, affine=False)
    return block


def in_place(block):
    block.nonlinearity = nn.SiLU(inplace=True)
    return block


RESNETS = {
    "shortcut": {},
    "no shortcut": {"out_channels": 8},
    "shortcut without bias": {"conv_shortcut_bias": False},
    "no time": {"temb_channels": None},
    "scale and shift": {"time_embedding_norm": "scale_shift"},
    "time without SiLU": {"skip_time_act": True},
    "up": {"up": True},
    "down": {"down": True},
    "up by sde_vp": {"up": True, "kernel": "sde_vp"},
    "down by fir": {"down": True, "kernel": "fir"},
    "scaled": {"output_scale_factor": 1.5},
    "mish": {"non_linearity": "mish"},
    "groups": {"groups_out": 6, "eps": 1e-3},
    "third width": {"conv_2d_out_channels": 10},
}
CHANGED = {
    "no biases": without_bias,
    "circular": lambda block: padded(block, "circular"),
    "reflected": lambda block: padded(block, "reflect"),
    "no affine": without_affine,
    "in place": in_place,
}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", [*RESNETS, *CHANGED])
def test_resnet_block(name, channels_last):
    block = CHANGED[name](resnet()) if name in CHANGED else resnet(**RESNETS[name])
    temb = None if block.time_emb_proj is None else torch.randn(3, 6, dtype=torch.float64)
    ours = compare(block, image(3, 8, 4, 6, channels_last=channels_last), temb)
    # In the format of the image that it came as, which diffusers' FIR filters do not keep.
    expected = channels_last and "fir" not in name
    assert ours.is_contiguous(memory_format=torch.channels_last) is expected


def test_resnet_block_takes_a_time_for_all_images_and_a_raw_one():
    compare(resnet(), image(3, 8, 4, 6), torch.randn(1, 6, dtype=torch.float64))
    # Without a projection diffusers adds what it is given.
    compare(resnet(temb_channels=None), image(3, 8, 4, 6), torch.randn(3, 12, 4, 6, dtype=torch.float64))
    compare(resnet(temb_channels=None), image(3, 8, 4, 6), torch.randn(3, 12, 1, 1, dtype=torch.float64))


def test_scale_and_shift_need_a_time():
    block = taken(resnet(temb_channels=None, time_embedding_norm="scale_shift"))
    with pytest.raises(ValueError, match="needs temb; got None"):
        block(image(1, 8, 4, 4).float(), None)


def test_dropout_draws_what_the_host_draws():
    block = resnet(dropout=0.4).train()
    ours, x, temb = taken(block), image(2, 8, 4, 4).float(), torch.randn(2, 6)
    torch.manual_seed(1)
    expected = block(x, temb)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x, temb), expected)


def transformer(**options):
    defaults = {"dim": 12, "num_attention_heads": 2, "attention_head_dim": 6, "cross_attention_dim": 10}
    return randomized(BasicTransformerBlock(**defaults | options))


BLOCKS = {
    "cross attention": {},
    "self-attention alone": {"cross_attention_dim": None},
    "cross attention twice": {"only_cross_attention": True},
    "self-attention twice": {"double_self_attention": True},
    "biases": {"attention_bias": True},
    "no affine": {"norm_elementwise_affine": False},
    "gelu": {"activation_fn": "gelu"},
    "eps": {"norm_eps": 1e-2},
    "final dropout": {"final_dropout": True},
}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_transformer_block(name, contiguous):
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    x = x if contiguous else x.transpose(1, 2).contiguous().transpose(1, 2)
    context = torch.randn(2, 5, 10, dtype=torch.float64)
    compare(
        transformer(**BLOCKS[name]),
        x,
        encoder_hidden_states=None if name.startswith("self") else context,
        attention_mask=torch.zeros(2, 1, 7 if name != "cross attention twice" else 5, dtype=torch.float64),
        encoder_attention_mask=torch.zeros(2, 1, 7 if name.startswith("self") else 5, dtype=torch.float64),
    )


def test_transformer_block_in_chunks_and_with_gligen():
    x, context = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    block = transformer()
    block.set_chunk_feed_forward(3, dim=1)
    compare(block, x, encoder_hidden_states=context)
    block.set_chunk_feed_forward(4, dim=1)
    with pytest.raises(ValueError, match="does not divide into chunks of 4"):
        taken(block)(x.float(), encoder_hidden_states=context.float())
    gated = transformer(attention_type="gated")
    nn.init.constant_(gated.fuser.alpha_attn, 0.7)
    for dtype in (torch.float64, torch.float32):
        gated.to(dtype)
        given = {"gligen": {"objs": torch.randn(2, 3, 10, dtype=dtype)}}
        with torch.no_grad():
            run = partial(
                nn.Module.__call__,
                hidden_states=x.to(dtype),
                encoder_hidden_states=context.to(dtype),
                cross_attention_kwargs=given,
            )
            torch.testing.assert_close(run(taken(gated)), run(gated))
        assert list(given) == ["gligen"]


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": "ada_norm_single"},
        {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 8},
    ],
)
def test_a_block_of_another_kind_is_the_hosts(options):
    block = transformer(**options)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 10)
    given = {"encoder_hidden_states": context, "timestep": torch.randn(2, 6 * 12)}
    assert torch.equal(taken(block)(x, **given), block(x, **given))


@pytest.mark.parametrize("bias", [True, False])
def test_geglu(bias):
    compare(randomized(GEGLU(6, 10, bias=bias)), torch.randn(2, 3, 6, dtype=torch.float64))


def test_norms():
    compare(randomized(nn.GroupNorm(3, 12)), image(2, 12, 3, 5))
    compare(nn.GroupNorm(3, 12, affine=False), image(2, 12, 3, 5))
    compare(randomized(nn.GroupNorm(3, 12)), torch.randn(2, 12, 5, dtype=torch.float64))
    compare(randomized(nn.LayerNorm(12)), torch.randn(2, 3, 12, dtype=torch.float64))
    compare(nn.LayerNorm(12, elementwise_affine=False), torch.randn(2, 3, 12, dtype=torch.float64))
    compare(randomized(nn.LayerNorm(12, bias=False)), torch.randn(2, 3, 12, dtype=torch.float64))
    compare(randomized(nn.LayerNorm((3, 12))), torch.randn(2, 3, 12, dtype=torch.float64))


CASES = {
    "resnet": (resnet, lambda: (image(2, 8, 4, 4).float(), torch.randn(2, 6))),
    "scale and shift": (
        partial(resnet, time_embedding_norm="scale_shift"),
        lambda: (image(2, 8, 4, 4).float(), torch.randn(2, 6)),
    ),
    "transformer": (transformer, lambda: (torch.randn(2, 7, 12), None, torch.randn(2, 5, 10))),
    "geglu": (lambda: randomized(GEGLU(6, 10)), lambda: (torch.randn(2, 3, 6),)),
}
NAMES = {
    "resnet": ["norm1", "nonlinearity", "conv1", "time_emb_proj", "norm2", "dropout", "conv2", "conv_shortcut"],
    "scale and shift": ["norm1", "nonlinearity", "conv1", "norm2"],
    "transformer": ["norm1", "attn1", "norm2", "attn2", "norm3", "ff", "attn1.to_q", "ff.net.0.proj"],
    "geglu": ["proj"],
}


def watched(module, names, seen):
    for name in names:
        part = module.get_submodule(name)
        part.register_forward_hook(lambda _, given, out, name=name: seen.append((name, given[:1], out)))


@pytest.mark.parametrize("case", CASES)
def test_hooks_on_submodules_fire_and_see_what_they_saw(case):
    make, inputs = CASES[case]
    block, given = make(), inputs()
    with torch.no_grad():
        for names in [[name] for name in NAMES[case]] + [NAMES[case]]:
            theirs, ours = copy.deepcopy(block), taken(block)
            expected, seen = [], []
            watched(theirs, names, expected)
            watched(ours, names, seen)
            torch.testing.assert_close(ours(*given), theirs(*given))
            assert [name for name, _, _ in seen] == [name for name, _, _ in expected] != []
            torch.testing.assert_close([s[1:] for s in seen], [e[1:] for e in expected])
        if case == "resnet":
            # All of them watched: nothing is fused, and nothing but the sum of two images is ours.
            assert torch.equal(ours(*given), theirs(*given))


@pytest.mark.parametrize("name", NAMES["resnet"])
def test_a_hook_may_change_a_value(name):
    block, given = resnet(), CASES["resnet"][1]()
    results = []
    for one in (block, taken(block)):
        handle = one.get_submodule(name).register_forward_hook(lambda _, __, out: out * 1.5)
        pre = one.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (inputs[0] + 0.25, *inputs[1:]))
        results.append(one(*given))
        handle.remove()
        pre.remove()
    torch.testing.assert_close(*reversed(results))


@pytest.mark.parametrize("which", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("case", CASES)
def test_hooks_of_the_backward_fire(case, which):
    make, inputs = CASES[case]
    block, given = make(), inputs()
    given = [value.requires_grad_() if torch.is_tensor(value) else value for value in given]
    for name in NAMES[case]:
        seen = {"theirs": [], "ours": []}
        for whose, one in (("theirs", copy.deepcopy(block)), ("ours", taken(block))):
            into = seen[whose]
            getattr(one.get_submodule(name), which)(lambda _, *grads, into=into: into.append(grads))
            one(*given).sum().backward()
        assert seen["theirs"]
        torch.testing.assert_close(seen["ours"], seen["theirs"])


def test_hooks_of_all_modules_fire():
    make, inputs = CASES["resnet"]
    block, given = make(), inputs()
    counts = []
    for one in (block, taken(block)):
        seen = []
        handle = register_module_forward_hook(lambda module, *_, seen=seen: seen.append(type(module).__name__))
        one(*given)
        handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1]


class Twice(torch.Tensor):
    """A parameter of another class, as quantized ones are: twice what it says, for torch's operators alone."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def value(given):
            return 2 * given.as_subclass(torch.Tensor) if isinstance(given, Twice) else given

        assert "ldmperf" not in str(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(value, args), **{name: value(given) for name, given in (kwargs or {}).items()})


@pytest.mark.parametrize(
    ("case", "name"),
    [("resnet", "conv1"), ("resnet", "norm2"), ("transformer", "norm2"), ("geglu", "proj")],
)
def test_what_is_not_plain_is_called(case, name):
    """A subclass, a forward on the instance, a parametrized weight, a parameter of a tensor subclass."""

    def subclass(part):
        host = type(part)
        part.__class__ = type("Doubled", (host,), {"forward": lambda self, x: 2 * host.forward(self, x)})

    def on_instance(part):
        forward = part.forward
        part.forward = lambda x: 2 * forward(x)

    def parametrized(part):
        nn.utils.parametrize.register_parametrization(part, "weight", nn.Tanh())

    def weight_norm(part):
        if part.weight.ndim > 1:
            nn.utils.parametrizations.weight_norm(part)
            part.parametrizations.weight.original0.data.mul_(1.5)

    def pruned(part):
        random_unstructured(part, "weight", amount=0.5)

    def of_subclass(part):
        part._parameters["weight"] = part.weight.detach().as_subclass(Twice)

    make, inputs = CASES[case]
    block, given = make(), inputs()
    plain = block(*given)
    for change in (subclass, on_instance, parametrized, weight_norm, pruned, of_subclass):
        theirs, ours = copy.deepcopy(block), taken(block)
        for one in (theirs, ours):
            torch.manual_seed(3)
            change(one.get_submodule(name))
        torch.testing.assert_close(ours(*given), theirs(*given))
        if change is not weight_norm or theirs.get_submodule(name).weight.ndim > 1:
            assert not torch.allclose(theirs(*given), plain)


def test_a_norm_of_ours_on_the_instance_is_plain():
    """As `kernelize` sets it."""
    norm = nn.GroupNorm(2, 8)
    norm.forward = layers.GroupNorm.forward.__get__(norm)
    assert layers.is_plain(norm, nn.GroupNorm)
    norm.forward = layers.GroupNorm.forward.__get__(nn.GroupNorm(2, 8))
    assert not layers.is_plain(norm, nn.GroupNorm)
    norm.forward = nn.GroupNorm.forward.__get__(norm)
    assert layers.is_plain(norm, nn.GroupNorm)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    make, inputs = CASES[case]
    block = make().double()
    given = [None if g is None else g.double().requires_grad_() for g in inputs()]
    found = []
    for one in (block, taken(block)):
        out = one(*given)
        leaves = [g for g in given if g is not None] + list(one.parameters())
        found.append(torch.autograd.grad(out.sin().sum(), leaves))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("case", CASES)
def test_under_autocast(case):
    make, inputs = CASES[case]
    block, given = make(), inputs()
    with torch.no_grad():
        exact = copy.deepcopy(block).double()(*[None if g is None else g.double() for g in given])
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = block(*given), taken(block)(*given)
    assert ours.dtype == theirs.dtype
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact)


@pytest.mark.parametrize("case", CASES)
def test_in_bfloat16(case):
    make, inputs = CASES[case]
    block, given = make(), inputs()
    with torch.no_grad():
        low = [None if g is None else g.bfloat16() for g in given]
        block.bfloat16()
        exact = copy.deepcopy(block).double()(*[None if g is None else g.double() for g in low])
        theirs, ours = block(*low), taken(block)(*low)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact)


def test_an_image_of_another_dtype_is_added_as_the_host_adds_it():
    block = resnet()
    block.conv_shortcut.register_forward_hook(lambda _, __, out: out.double())
    x, temb = CASES["resnet"][1]()
    expected = block(x, temb)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(taken(block)(x, temb), expected, rtol=1e-5, atol=1e-6)


def computed(module, *args):
    with torch.no_grad(), Computed() as mode:
        module(*args)
    return mode.names


def test_a_resnet_block_makes_eight_passes_instead_of_thirteen():
    block = resnet(out_channels=8)
    given = CASES["resnet"][1]()
    assert computed(taken(block), *given) == [
        *("group_norm_silu", "convolution", "silu", "addmm", "add"),
        *("group_norm_silu", "convolution", "residual_add"),
    ]
    assert len(computed(block, *given)) == 13


def test_a_resnet_block_with_a_shortcut():
    given = CASES["resnet"][1]()
    ours, theirs = computed(taken(resnet()), *given), computed(resnet(), *given)
    assert "bias" not in ours
    # The biases are added to one another, not to images.
    assert len(ours) == 10
    assert len(theirs) >= 15


def test_a_transformer_block_adds_and_normalizes_at_once():
    block, given = transformer(), CASES["transformer"][1]()
    ours, theirs = computed(taken(block), *given), computed(block, *given)
    assert [n for n in ours if "norm" in n] == ["layer_norm", "add_layer_norm", "add_layer_norm"]
    # Only the last sum is one of its own; diffusers' has three.
    assert (ours.count("add"), theirs.count("add")) == (1, 3)
    gates = computed(taken(randomized(GEGLU(6, 10))), torch.randn(2, 3, 6))
    assert gates == ["linear"]


def test_errors_name_what_is_wrong():
    with pytest.warns(FutureWarning, match="`scale` is ignored"):
        taken(randomized(GEGLU(6, 10)))(torch.randn(2, 6), scale=0.5)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        taken(nn.GroupNorm(2, 8), backend="fast")(torch.randn(2, 8, 3, 3))
