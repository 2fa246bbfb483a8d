"""The fourth tier: every operator's compiled code, executed without a GPU. `make emulate` runs more of it.

The launches of the family's smallest size in its default configurations, judged as tests/gpu judges them.
"""

import math

import pytest
import torch
from emulated_kernels import Job, family_calls_of, others_of, run_inputs

pytest.importorskip("triton")

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.emulator.operator_inputs import KINDS_OF_INPUTS, EmulatedInputs, made_inputs
from ldmperf.profiling.static.shapes import Shape

# Of group norm there are many codes, which take long to compile.
LIMITS = {"group_norm_silu": 4, "linear": 6}
DTYPES = {"attention": "float16", "layer_norm": "float16", "residual_add": "float32"}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton-cache")))
        yield


def family_inputs(job):
    generator = torch.Generator().manual_seed(0)
    found = [
        EmulatedInputs(job.operator, "random", call.arguments("cpu", generator))
        for call in family_calls_of(job, ("39M",))
    ]
    others = ("conv3x3", "transformer_front", "transformer_tail")
    return [*found, *(others_of(job) if job.operator in others else ())]


def check(row):
    assert row.findings == []
    assert row.share <= 1, row
    assert row.codes > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_of_the_smallest_size(operator):
    job = Job(operator, DTYPES.get(operator, "bfloat16"), "sm_90")
    check(run_inputs(job, family_inputs(job), limit=LIMITS.get(operator)))


@pytest.mark.parametrize("dim", [40, 64, 80, 160])
def test_attention_of_many_keys(dim):
    """The tiles of many tokens: scores computed ahead, row sums by matmuls, ragged tiles, a mask."""
    shape = Shape(torch.bfloat16, batch=1, heads=1, height=12, width=12, head_dim=dim)
    masked = Shape(torch.bfloat16, batch=1, heads=1, height=12, width=12, head_dim=dim, mask=1)
    inputs = [made_inputs("attention", one, "random") for one in (shape, masked)]
    check(run_inputs(Job("attention", "bfloat16", "sm_90"), inputs))


@pytest.mark.parametrize(
    "operator", ["attention", "group_norm_silu", "linear", "conv3x3", "transformer_front", "transformer_tail"]
)
def test_an_operator_on_an_older_chip(operator):
    job = Job(operator, "bfloat16", "sm_80")
    check(run_inputs(job, family_inputs(job), limit=3))


@pytest.mark.parametrize("kind", KINDS_OF_INPUTS)
def test_extreme_inputs(kind):
    """Infinities and NaN only where what is exact has none in the dtype."""
    shape = Shape(torch.bfloat16, batch=1, channels=64, height=6, width=6)
    for operator in ("group_norm_silu", "layer_norm", "geglu"):
        check(run_inputs(Job(operator, "bfloat16", "sm_90"), [made_inputs(operator, shape, kind)]))


def attention_of_scores(scale):
    """Attention of 36 tokens whose scores are of the order of scale**2."""
    shape = Shape(torch.bfloat16, batch=1, heads=1, height=6, width=6, head_dim=32)
    inputs = [made_inputs("attention", shape, "random", scale=scale)]
    return run_inputs(Job("attention", "bfloat16", "sm_90"), inputs)


def test_attention_of_large_scores():
    check(attention_of_scores(2.0**13))


def test_scores_past_2_to_the_31_are_not_finite():
    """A limit of one multiply-add an element: it takes off a maximum that is rounded (docs/attention.md)."""
    assert attention_of_scores(2.0**17).share == math.inf
