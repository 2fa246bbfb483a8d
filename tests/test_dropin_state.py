"""accelerate() beside what people do to a model object: copy, save, prune, share, replace; undo in any order."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch
from dropin_checks import SAME, close, objects, our_calls, output, relative_rms
from dropin_models import UNETS, make_unet, model_inputs, unet_and_inputs
from torch import nn
from torch.nn.utils import parametrizations, prune

from ldmperf.kernels import KernelUnsupported
from ldmperf.model.dropin import accelerate, undo

pytestmark = pytest.mark.usefixtures("_one_thread")
SMALL = UNETS["bk_sdm_small"]


def test_an_activation_that_all_share():
    """One SiLU for the resnets, the time embedding and the output: none of its other uses may change."""
    unet = make_unet(SMALL)
    shared = nn.SiLU()
    for module in unet.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.SiLU):
                setattr(module, name, shared)
    inputs = model_inputs(unet)
    expected, things = output(unet, inputs), objects(unet)
    with accelerate(unet, backend="torch"):
        assert close(unet, inputs, expected)
        assert type(shared) is nn.SiLU
    assert objects(unet) == things


@pytest.mark.parametrize("path", ["conv_act", "conv_norm_out", "down_blocks.0.resnets.0.norm1", "mid_block"])
def test_a_module_replaced_meanwhile(path):
    unet, twin = make_unet("bk_sdm_base"), make_unet("bk_sdm_base")
    inputs = model_inputs(unet)
    report = accelerate(unet, backend="torch")
    for model in (unet, twin):
        around, _, name = path.rpartition(".")
        setattr(model.get_submodule(around), name, nn.Identity() if name != "mid_block" else None)
    expected = output(twin, inputs)
    assert close(unet, inputs, expected)
    report.undo()
    assert torch.equal(output(unet, inputs), expected)
    assert not our_calls(unet, inputs)


def test_pruned_and_parametrized():
    """Both turn a weight into one that is computed at each call: by a hook, and by a class of its own."""
    unet, twin = make_unet(SMALL), make_unet(SMALL)
    inputs = model_inputs(unet)
    for model in (unet, twin):
        block = model.down_blocks[0].attentions[0].transformer_blocks[0]
        resnet = model.down_blocks[0].resnets[0]
        for module in (resnet.conv1, resnet.norm1, block.norm2, model.conv_norm_out):
            prune.l1_unstructured(module, "weight", 0.5)
        torch.manual_seed(0)
        for module in (resnet.conv2, block.ff.net[0].proj):
            parametrizations.spectral_norm(module)
        if model is unet:
            report = accelerate(model.eval(), backend="torch")
        for module in (model.up_blocks[0].resnets[0].conv1, model.up_blocks[1].resnets[0].norm2):
            prune.l1_unstructured(module, "weight", 0.5)
    expected = output(twin.eval(), inputs)
    assert close(unet, inputs, expected)
    report.undo()
    assert torch.equal(output(unet, inputs), expected)


def test_saved_and_loaded(tmp_path):
    unet, inputs = unet_and_inputs()
    unet.save_pretrained(tmp_path / "plain")
    plain = output(unet, inputs)
    with accelerate(unet, backend="torch"):
        unet.save_pretrained(tmp_path / "accelerated")
        result = output(unet, inputs)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "accelerated" / name).read_bytes()
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "accelerated").eval()
    assert torch.equal(output(loaded, inputs), plain)
    with accelerate(loaded, backend="torch"):
        assert torch.equal(output(loaded, inputs), result)


def test_loads_a_state_dict():
    unet, inputs = unet_and_inputs()
    other = make_unet(SMALL, seed=5)
    with accelerate(unet, backend="torch"):
        assert unet.load_state_dict(other.state_dict()) == ([], [])
        assert close(unet, inputs, output(other, inputs))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["deepcopy", "pickle"]
)
def test_copies_are_accelerated_and_undone_alone(copied):
    unet, inputs = unet_and_inputs()
    plain, things = output(unet, inputs), objects(unet)
    with accelerate(unet, backend="torch") as report:
        result = output(unet, inputs)
        twin = copied(unet)
        assert torch.equal(output(twin, inputs), result)
        assert our_calls(twin, inputs) == our_calls(unet, inputs)
        undo(twin)
        assert not our_calls(twin, inputs)
        assert torch.equal(output(twin, inputs), plain)
        assert our_calls(unet, inputs)
        twin = copied(unet)
        listed = len(report.replaced)
    assert objects(unet) == things
    assert our_calls(twin, inputs)
    assert len(accelerate(twin).replaced) == listed
    assert list(vars(copied(unet))) == list(vars(unet))


def test_nested():
    unet, inputs = unet_and_inputs()
    plain, things = output(unet, inputs), objects(unet)
    with accelerate(unet, norms=False, geglu=False, backend="torch") as outer:
        listed, calls, state = outer.replaced, our_calls(unet, inputs), objects(unet)
        with accelerate(unet, backend="auto") as inner:
            assert len(inner.replaced) > len(listed)
            assert close(unet, inputs, plain)
        assert outer.replaced == listed
        assert our_calls(unet, inputs) == calls
        assert objects(unet) == state
    assert objects(unet) == things


def test_twice_and_undone_by_scan():
    unet, inputs = unet_and_inputs()
    plain, things = output(unet, inputs), objects(unet)
    first = accelerate(unet, attention=False, backend="torch")
    second = accelerate(unet, backend="torch")
    assert {entry.kind for entry in first.replaced} == {entry.kind for entry in second.replaced}
    assert close(unet, inputs, plain)
    undo(unet)
    assert first.replaced == second.replaced == ()
    assert objects(unet) == things
    first.undo()
    second.undo()
    undo(unet)
    assert objects(unet) == things
    assert torch.equal(output(unet, inputs), plain)


def test_undone_when_the_block_raises():
    unet, _ = unet_and_inputs()
    things = objects(unet)
    with pytest.raises(ZeroDivisionError), accelerate(unet, backend="torch"):
        raise ZeroDivisionError
    assert objects(unet) == things


def test_moved_cast_and_trained_meanwhile():
    """What the user does to the model while it is accelerated stays."""
    unet, _ = unet_and_inputs()
    report = accelerate(unet, backend="torch")
    torch.nn.Module.to(unet, torch.float64)
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
    inputs = model_inputs(unet)
    unet.train()
    unet(**inputs).sample.square().mean().backward()
    optimizer.step()
    unet.eval()
    result = output(unet, inputs)
    report.undo()
    assert unet.dtype == torch.float64
    assert relative_rms(output(unet, inputs), result) < SAME[torch.float64]


@pytest.mark.parametrize(
    "target", [torch.nn.Linear(2, 2), "a/path", None, {"unet": 1}, torch.compile(torch.nn.Linear(2, 2))]
)
def test_of_what_it_does_not_know(target):
    for function in (accelerate, undo):
        with pytest.raises(ValueError, match="UNet2DConditionModel") as caught:
            function(target)
        assert "\n" not in str(caught.value)


def test_unknown_backend():
    unet, _ = unet_and_inputs()
    things = objects(unet)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto, torch, triton"):
        accelerate(unet, backend="cuda")
    assert objects(unet) == things


def test_the_kernels_cannot_serve_a_cpu():
    unet, inputs = unet_and_inputs()
    plain = output(unet, inputs)
    with accelerate(unet, backend="triton"), pytest.raises(KernelUnsupported, match='backend="auto"'):
        output(unet, inputs)
    with accelerate(unet):
        assert close(unet, inputs, plain)
