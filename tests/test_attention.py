"""Attention on torch's operator: lengths, masks, gradients, errors, and which backend "auto" takes."""

import json
import math

import pytest
import torch

from ldmperf.kernels import KernelUnsupported, _launch, attention
from ldmperf.kernels._launch import Chip
from ldmperf.kernels.attention import AttentionCall, AttentionConfig, plan, tuning_key


def exact(q, k, v, attended, scale=None):
    """By definition, a sample and a head at a time, in float64; `attended` [B, Nk]."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        kept = attended[b].nonzero()[:, 0]
        for h in range(q.shape[2]):
            scores = q[b, :, h].double() @ k[b, kept, h].double().T * (scale or q.shape[3] ** -0.5)
            if len(kept):
                out[b, :, h] = torch.softmax(scores, dim=-1) @ v[b, kept, h].double()
    return out


def operands(dtype=torch.float32, batch=3, queries=5, keys=7, heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, batch, keys, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v


LENGTHS = torch.tensor([0, 3, 99])
MASK = torch.tensor([[True] * 7, [False] * 7, [True, False] * 3 + [True]])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("options", "attended"),
    [
        ({}, torch.ones(3, 7, dtype=torch.bool)),
        ({"key_lengths": LENGTHS}, torch.arange(7) < LENGTHS[:, None]),
        ({"key_lengths": LENGTHS.int()}, torch.arange(7) < LENGTHS[:, None]),
        ({"key_mask": MASK}, MASK),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_what_counts_is_what_is_attended_to(options, attended, scale, dtype, tolerance):
    q, k, v = operands(dtype)
    expected = exact(q, k, v, attended, scale)
    # What is left out may be anything.
    k, v = (torch.where(attended[:, :, None, None], x, math.nan) for x in (k, v))
    out = attention(q, k, v, scale=scale, **options, backend="torch")
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert not out[~attended.any(1)].any()
    assert out.is_contiguous()


@pytest.mark.parametrize("options", [{"key_lengths": LENGTHS}, {"key_mask": MASK}])
def test_gradients_with_samples_that_attend_to_nothing(options):
    leaves = [x.requires_grad_() for x in operands(torch.float64, queries=2, dim=4)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, **options, backend="torch"), leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_lengths": LENGTHS, "key_mask": MASK}, "give key_lengths or key_mask, not both"),
        ({"key_lengths": LENGTHS[:2]}, r"key_lengths must be int32 or int64 \[3\] on cpu; got int64 \[2\] on cpu"),
        ({"key_lengths": LENGTHS.float()}, "key_lengths must be int32 or int64"),
        ({"key_mask": MASK[:, :5]}, r"key_mask must be bool \[3, 7\] on cpu"),
        ({"key_mask": MASK.int()}, "key_mask must be bool"),
        ({"key_mask": MASK.to("meta")}, "on cpu; got bool .* on meta"),
    ],
)
def test_wrong_masks_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        attention(*operands(), **options)
    assert "\n" not in str(caught.value)


def test_the_kernel_names_what_it_cannot_serve():
    with pytest.raises(KernelUnsupported, match="head_dim 7 is not a multiple of 4 up to 384"):
        attention(*operands(dim=7), backend="triton")


def test_classes_of_shapes_share_a_key_and_others_do_not():
    def key(batch=2, queries=4096, keys=4096, dim=40, dtype=torch.bfloat16, **options):
        q = torch.empty(batch, queries, 8, dim, dtype=dtype, device="meta")
        return tuning_key(AttentionCall(q, *[q[:, :1].expand(-1, keys, -1, -1)] * 2, **options))

    assert key(queries=4000, keys=3000) == key()
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    others = [
        key(keys=77),
        key(keys=64),
        key(dim=48),
        key(batch=16),
        key(dtype=torch.float16),
        key(key_lengths=lengths),
        key(key_mask=lengths),
        key(tf32=True),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_auto_takes_what_was_measured(tmp_path, monkeypatch):
    """Without a measurement torch's; with one the faster; and "triton" the tuned tile in any case."""
    q = torch.empty(2, 256, 8, 40, dtype=torch.bfloat16, device="meta")
    call = AttentionCall(q, q, q)
    key, tile = tuning_key(call), {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(_launch, "TUNED_FOLDER", tmp_path)

    def fastest(name, table):
        chip = Chip(name, 132)
        (tmp_path / f"{chip.file_name}.json").write_text(json.dumps(table))
        return _launch.fastest("attention", chip, lambda: key, unmeasured="torch"), plan(call, chip=chip)[1][0]

    chosen, launch = fastest("a", {"kernels": {}})
    assert chosen == "torch"
    chosen, launch = fastest("b", {"kernels": {"attention": {key: tile}}})
    assert chosen == "triton"
    assert launch.arguments["BLOCK_N"] == AttentionConfig(**tile).block_n
    chosen, launch = fastest("c", {"kernels": {"attention": {key: tile}}, "torch": {"attention": [key]}})
    assert chosen == "torch"
    assert launch.arguments["BLOCK_N"] == 32
