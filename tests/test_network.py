"""The network of a case: its checkpoint must fit its task."""

import pytest
from diffusers import UNet2DConditionModel

from ldmperf.model import UNetConfig, diffusers_config
from ldmperf.profiling import Case
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.trajectory.network import make_network


@pytest.mark.parametrize(
    ("channels", "task", "advice"),
    [
        ((8, 4), "t2i", "give --task sr"),
        ((4, 4), "sr", "give --task t2i"),
        ((9, 4), "t2i", "choose another checkpoint"),
        ((9, 4), "sr", "choose another checkpoint"),
        ((4, 8), "t2i", "choose another checkpoint"),
    ],
)
def test_channels_that_do_not_fit_the_task_say_what_to_do(tmp_path, channels, task, advice):
    config = UNetConfig((8,), (2,), (True,), 1, True, *channels, context_dim=8, norm_groups=4)
    UNet2DConditionModel(**diffusers_config(config)).save_pretrained(tmp_path)
    with pytest.raises(Unsupported) as caught:
        make_network(Case(unet=str(tmp_path), task=task, guidance_scale=1.0))
    message = str(caught.value)
    assert advice in message
    assert f"goes from {channels[0]} to {channels[1]}" in message
    # The same checkpoint with the task that it was trained for.
    if "--task" in advice:
        assert make_network(Case(unet=str(tmp_path), task=advice.split()[-1])).config == config


def test_a_network_with_classes_is_refused_and_one_with_a_condition_runs_without(tmp_path):
    tiny = {"context_dim": 8, "norm_groups": 4}
    for name, extra in (("classes", {"num_class_embeds": 5}), ("condition", {"time_cond_proj_dim": 6})):
        config = UNetConfig((8,), (2,), (True,), 1, **tiny, **extra)
        UNet2DConditionModel(**diffusers_config(config)).save_pretrained(tmp_path / name)
    with pytest.raises(Unsupported, match=r"takes a class beside each prompt.*: choose another checkpoint\Z"):
        make_network(Case(unet=str(tmp_path / "classes"), guidance_scale=1.0))
    assert make_network(Case(unet=str(tmp_path / "condition"), guidance_scale=1.0)).config == config
