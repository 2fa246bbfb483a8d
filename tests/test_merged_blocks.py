"""Networks whose blocks merge all that they can, with references in the kernels' place, against diffusers' in
float64."""

import functools
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmperf.kernels import (
    conv3x3_ref,
    group_norm_silu_ref,
    residual_add_ref,
    transformer_front_ref,
    transformer_tail_ref,
)
from ldmperf.kernels import modules as kernel_modules
from ldmperf.kernels._statistics import like_statistics
from ldmperf.model import UNet, UNetConfig, blocks, written

from .test_unet import error, pair


def checked_norm(x, *arguments, statistics=None, skip=None, skip_statistics=None, backend, **options):
    """`group_norm_silu`, which takes given statistics only if they are those of their image."""
    assert backend == "auto"
    for image, given_ in ((x, statistics), (skip, skip_statistics)):
        if given_ is not None:
            torch.testing.assert_close(given_, like_statistics(given_, image), rtol=1e-4, atol=1e-5)
    return group_norm_silu_ref(x, *arguments, skip=skip, **options)


@pytest.fixture
def launched(monkeypatch):
    """How often each reference ran in the place of a merged kernel."""
    count = Counter()
    for module, name, reference in (
        (written, "conv3x3", conv3x3_ref),
        (blocks, "transformer_tail", transformer_tail_ref),
        (blocks, "transformer_front", transformer_front_ref),
        (written, "residual_add", residual_add_ref),
    ):

        @functools.wraps(reference)
        def run(*arguments, backend, name=name, reference=reference, **options):
            count[name] += 1
            return reference(*arguments, **options)

        monkeypatch.setattr(module, name, run)
        if name != "residual_add":
            monkeypatch.setattr(module, f"{name}_backend", lambda call, backend: backend)
    monkeypatch.setattr(written, "_FEW_PIXELS", 0)
    monkeypatch.setattr(kernel_modules, "group_norm_silu", checked_norm)
    return count


SMALL = {"norm_groups": 4, "context_dim": 12}
MERGED = ("convolutions", "tails", "statistics")
# By which biases the sum of a transformer of one block adds where another size or no padding follows.
CONFIGS = {
    "its own": UNetConfig((8, 16, 16), (2, 2, 2), (True, True, True), layers_per_block=1, **SMALL),
    "those of a sum before": UNetConfig((8, 16), (2, 2), (True, True), layers_per_block=2, **SMALL),
    "none": UNetConfig((8,), (2,), (True,), layers_per_block=2, **SMALL),
}


@pytest.mark.parametrize("size", [(4, 4), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize("name", CONFIGS)
def test_with_all_that_can_be_merged_a_network_equals_diffusers(launched, name, size):
    ours, theirs = pair(CONFIGS[name], torch.float64)
    merged = ours.with_backend("auto", "torch", **dict.fromkeys(MERGED, "triton"))
    assert error(merged, theirs, 2, size, 3, 500.0) < 1e-9
    assert {"conv3x3", "transformer_tail", "transformer_front"} <= launched.keys()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_that_merges_wherever_it_can_compiles_as_one_graph(dynamic):
    torch.manual_seed(0)
    network = UNet(CONFIGS["its own"], **dict.fromkeys(MERGED, "triton")).eval()
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="eager")
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(sample, 3.0, context), network(sample, 3.0, context))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_merged_a_network_equals_diffusers(launched, data):
    draw = data.draw
    levels = draw(st.integers(1, 3))
    of_levels = functools.partial(st.lists, min_size=levels, max_size=levels)
    config = UNetConfig(
        block_channels=tuple(draw(of_levels(st.sampled_from((8, 16))))),
        num_heads=tuple(draw(of_levels(st.sampled_from((1, 2, 4))))),
        attention=tuple(draw(of_levels(st.booleans()))),
        layers_per_block=draw(st.integers(1, 2)),
        has_middle=draw(st.booleans()),
        transformer_layers=tuple(draw(of_levels(st.sampled_from((1, 1, 2))))),
        only_cross_attention=draw(st.sampled_from((False, False, True))),
        **SMALL,
    )
    ours, theirs = pair(config, torch.float64)
    either = st.sampled_from(("triton", "torch"))
    merged = ours.with_backend("auto", "torch", **{name: draw(either) for name in MERGED})
    batch, size = draw(st.integers(1, 2)), draw(st.sampled_from(((4, 4), (5, 3), (9, 8))))
    assert error(merged, theirs, batch, size, draw(st.integers(1, 3)), draw(st.floats(0, 1000))) < 1e-9
