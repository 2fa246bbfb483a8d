"""Float8: rows quantized in plain torch, layers and networks that multiply in it, refusals, the backend."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ldmperf.kernels import OPERATORS, Chip, KernelUnsupported, float8_rows, geglu, layer_norm, planned_for
from ldmperf.model import FAMILY, UNet, UNetConfig, diffusers_state_dict, float8
from ldmperf.model.blocks import TransformerBlock
from ldmperf.model.float8 import Float8Linear, float8_misfit
from ldmperf.profiling import Case, profile
from ldmperf.profiling.measure.error import relative_rms
from ldmperf.profiling.measure.outcomes import Unsupported
from ldmperf.profiling.measure.timing import RepetitionRule
from ldmperf.profiling.trajectory.check import FLOAT8_TOLERANCE, TOLERANCES, Reference, tolerances
from ldmperf.profiling.trajectory.network import make_network, make_problem, randomize
from ldmperf.profiling.trajectory.ours import Float8, GraphBackend, OurBackend
from ldmperf.profiling.trajectory.rungs import all_backends
from ldmperf.samplers import Graphs

pytestmark = pytest.mark.usefixtures("_one_thread")

CONFIG = UNetConfig((32, 64), (2, 4), (True, True), norm_groups=4, context_dim=16, layers_per_block=1)
ONLY_CROSS = replace(CONFIG, only_cross_attention=True, transformer_layers=2)
SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def network(config: UNetConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> UNet:
    unet = UNet(config, backend="torch")
    randomize(unet, 0)
    return unet.to(dtype).eval().requires_grad_(False)


def evaluated(unet: UNet) -> Tensor:
    with torch.no_grad():
        return unet(SAMPLE, 500.0, CONTEXT)


# Rows


# Of e4m3: by code 0 to 126, from the format's definition.
NUMBERS = [
    (8 + (code & 7)) * Fraction(2) ** ((code >> 3) - 10) if code >> 3 else Fraction(code & 7, 512)
    for code in range(127)
]


def nearest_code(value: Fraction) -> int:
    """Of the number nearest to value, ties to the even code, 448 at most."""
    size = min(abs(value), NUMBERS[-1])
    return min(range(127), key=lambda code: (abs(NUMBERS[code] - size), code & 1)) | (128 if value < 0 else 0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
    exponent=st.integers(-20, 20),
)
def test_a_row_is_rounded_to_the_nearest_numbers_of_its_scale(values: list[float], exponent: int) -> None:
    row = torch.tensor(values, dtype=torch.float32) * 2.0**exponent
    row = torch.where(row.isfinite(), row, 1.0)
    quantized, scale = float8_rows(row)
    assert (quantized.dtype, quantized.shape, scale.dtype, scale.shape) == (
        torch.float8_e4m3fn,
        row.shape,
        torch.float32,
        (1, 1),
    )
    exact = Fraction(float(row.abs().max())) / 448
    if exact >= Fraction(2) ** -126:
        assert abs(Fraction(float(scale)) - exact) <= exact * Fraction(2) ** -23
    else:
        assert float(scale) == 2.0**-126
    # float32 reciprocal and product: two roundings, by the numbers themselves.
    scaled = (row * (1 / scale[0])).tolist()
    codes = [code & 127 if code == 128 else code for code in quantized.view(torch.uint8).tolist()]
    wanted = [nearest_code(Fraction(value)) for value in scaled]
    assert [code % 128 for code in codes] == [code % 128 for code in wanted]
    assert all((a ^ b) < 128 or a % 128 == 0 for a, b in zip(codes, wanted, strict=True))


def test_rows_of_zeros_and_what_is_not_finite() -> None:
    x = torch.tensor([[0.0, 0.0], [math.nan, 2.0], [math.inf, 2.0], [-4.0, 2.0]])
    quantized, scale = float8_rows(x)
    assert scale.flatten().tolist() == [2.0**-126, 2 * torch.tensor(1 / 448).item(), math.inf, scale[3].item()]
    assert quantized[0].float().tolist() == [0.0, 0.0]
    assert quantized[1].float().isnan().tolist() == [True, False]
    assert quantized[2].float().isnan().tolist() == [True, False]
    assert quantized[3].float().tolist() == [-448.0, 224.0]


@pytest.mark.parametrize("x", [torch.zeros(3, dtype=torch.int64), torch.zeros(()), torch.zeros(2, 0)])
def test_what_has_no_rows_of_floats_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="must be a float") as refusal:
        float8_rows(x)
    assert "\n" not in str(refusal.value)


def of_the_norm(x: Tensor, **options: Any) -> Any:
    return layer_norm(x, torch.ones(x.shape[-1]), torch.zeros(x.shape[-1]), float8=True, **options)


def of_the_gate(x: Tensor, **options: Any) -> Any:
    return geglu(torch.cat([x, x], dim=-1), float8=True, **options)


QUANTIZED = [of_the_norm, of_the_gate]


@pytest.mark.parametrize("function", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_reference_quantizes_what_it_has_not_rounded(function: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 24).to(dtype)
    quantized, scale = function(x, backend="torch")
    wide = x.double()
    exact = F.layer_norm(wide, (24,)) if function is of_the_norm else wide * F.gelu(wide)
    wanted, wanted_scale = float8_rows(exact.float())
    assert (quantized.shape, scale.shape) == (x.shape, (10, 1))
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
    assert (quantized.float() != wanted.float()).float().mean() < 0.01
    out = torch.empty_like(quantized), torch.empty_like(scale)
    assert function(x, backend="torch", out=out)[0] is out[0]
    assert torch.equal(out[0].view(torch.uint8), quantized.view(torch.uint8))
    assert torch.equal(out[1], scale)


@pytest.mark.parametrize("function", QUANTIZED)
def test_operators_refuse_in_one_line(function: Any) -> None:
    x = torch.randn(2, 8)
    for call, message in (
        (lambda: function(x.requires_grad_()), "float8 has no gradients; call it in torch.no_grad()"),
        (lambda: function(x.detach(), out=(torch.empty(2, 8), torch.empty(2, 1))), "out.*must be float8_e4m3fn"),
        (lambda: function(torch.empty(2, 0)), "with float8 there must be"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="float8 goes without a residual; add it before"):
        of_the_norm(x.detach(), residual=x.detach())


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "gfx942"])
def test_a_chip_without_float8_is_named(arch: str) -> None:
    """Also where no kernel could run: of the device, and of its architecture."""
    refused = pytest.raises(KernelUnsupported, match=f"{arch} has no conversion to float8")
    with planned_for(Chip("a chip", 100, arch)), refused:
        of_the_norm(torch.zeros(1, 8), backend="triton")
    with planned_for(Chip("a chip", 100, "sm_120")), pytest.raises(KernelUnsupported) as refusal:
        of_the_gate(torch.zeros(1, 8), backend="triton")
    assert "conversion" not in str(refusal.value)


@pytest.mark.parametrize("rows", [128, 512, 8192])
@pytest.mark.parametrize("columns", [96, 1280, 5120, 8192, 12288, 16384])
def test_rows_of_a_gate_are_whole_in_few_tiles(rows: int, columns: int) -> None:
    operator = OPERATORS["geglu"]
    call = operator.bind(torch.empty(rows, 2 * columns, dtype=torch.bfloat16, device="meta"), None, True)
    for config in (None, *operator.candidates(call)):
        (out, scale), (launch,) = operator.plan(call, config=config)
        assert (out.shape, scale.shape) == ((rows, columns), (rows, 1))
        tiles, wide = launch.arguments["CHUNKS"], launch.arguments["BLOCK_N"]
        assert (tiles - 1) * wide < columns <= tiles * wide
        values = tiles * wide * launch.arguments["BLOCK_M"] / (32 * launch.num_warps)
        assert values <= (40 if config is None else 64)


# Layers


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_its_matmul_of_what_was_rounded(bias: bool) -> None:
    layer = nn.Linear(48, 32, bias=bias).bfloat16().requires_grad_(False)
    of_float8 = Float8Linear(layer)
    quantized, scale = float8_rows(torch.randn(2, 5, 48))
    out = of_float8(quantized, scale)
    weight = of_float8.weight.double() * of_float8.scale.double().t()
    exact = (quantized.double() * scale.double().view(2, 5, 1)) @ weight.t()
    assert (out.dtype, out.shape) == (torch.bfloat16, (2, 5, 32))
    # bfloat16's rounding of the result alone; the bias is the reader's.
    assert ((out.double() - exact).abs() <= exact.abs() / 256 + 1e-5).all()
    assert of_float8.bias is layer.bias
    assert relative_rms(weight, layer.weight.double()) < 0.03


@pytest.mark.parametrize("only_cross", [True, False])
def test_a_block_and_a_network_err_a_few_times_as_much_as_in_bfloat16(only_cross: bool) -> None:
    """Against float32: what float8 adds is there, and is no more than its 3 bits of mantissa explain."""
    unet = network(ONLY_CROSS if only_cross else CONFIG)
    of_float8 = unet.with_float8(least_channels=32)
    exact = evaluated(copy.deepcopy(unet).float())
    half, quantized = (relative_rms(evaluated(one), exact) for one in (unet, of_float8))
    assert 2 * half < quantized < min(8 * half, 0.08)

    def block(of: UNet) -> TransformerBlock:
        return next(module for module in of.modules() if isinstance(module, TransformerBlock))

    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 16, 32, generator=generator), torch.randn(2, 5, 16, generator=generator)
    biases = torch.randn(3, 32, generator=generator)

    def run(of: UNet, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            *first, cross = block(of).project_context(context.to(dtype))
            return block(of)(x.to(dtype), cross, *biases.to(dtype), False, *first) - x

    exact = run(copy.deepcopy(unet).float(), torch.float32)
    half, quantized = (relative_rms(run(one, torch.bfloat16), exact) for one in (unet, of_float8))
    assert 2 * half < quantized < min(10 * half, 0.1)
    # Over its own memory where nobody else holds it.
    assert torch.equal(evaluated(of_float8), of_float8(SAMPLE, 500.0, CONTEXT))


def test_the_copy_shares_all_memory_but_that_of_wide_levels_layers() -> None:
    unet = network()
    of_float8 = unet.with_float8(least_channels=64)
    theirs = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    ours = {name: parameter.data_ptr() for name, parameter in of_float8.named_parameters()}
    assert ours.items() <= theirs.items()
    replaced = theirs.keys() - ours.keys()
    assert {name.split(".")[-2] for name in replaced} == {"to_qkv", "cross_q", "ff_in", "ff_out"}
    assert all(unet.get_parameter(name).shape[-1] % 64 == 0 for name in replaced)
    layers = [module for module in of_float8.modules() if isinstance(module, Float8Linear)]
    assert len(layers) == len(replaced)
    assert sum(layer.weight.nbytes for layer in layers) == sum(unet.get_parameter(n).nbytes for n in replaced) / 2
    assert of_float8.choices == unet.choices
    # Without the network the weights that were rounded are gone.
    gone = weakref.ref(unet.get_parameter(next(iter(replaced))))
    del unet
    gc.collect()
    assert gone() is None
    evaluated(of_float8)


def test_a_weight_that_is_written_is_noticed_at_the_next_evaluation() -> None:
    unet = network()
    of_float8 = unet.with_float8(least_channels=32)
    with torch.no_grad():
        kept = of_float8.condition([500.0], CONTEXT)
        of_float8.denoise(SAMPLE, kept, 0)
        # A bias is shared; the conditioning has it.
        unet.conv_out.bias.add_(1)
        of_float8.denoise(SAMPLE, kept, 0)
        name = next(name for name, _ in unet.named_parameters() if name.endswith("ff_out.weight"))
        unet.get_parameter(name).mul_(1.5)
        for call in (
            lambda: of_float8.denoise(SAMPLE, kept, 0),
            lambda: of_float8.condition([500.0], CONTEXT),
            lambda: of_float8(SAMPLE, 500.0, CONTEXT),
        ):
            with pytest.raises(ValueError, match=r"a weight was written.*call with_float8\(\) again") as refusal:
                call()
            assert "\n" not in str(refusal.value)
    assert not torch.equal(evaluated(unet.with_float8(least_channels=32)), evaluated(copy.deepcopy(of_float8)))


def test_copies_move_and_stay_float8() -> None:
    of_float8 = network().with_float8(least_channels=32)
    expected = evaluated(of_float8)
    assert torch.equal(evaluated(copy.deepcopy(of_float8)), expected)
    file = io.BytesIO()
    torch.save(of_float8, file)
    file.seek(0)
    assert torch.equal(evaluated(torch.load(file, weights_only=False)), expected)
    wide = copy.deepcopy(of_float8).to("meta").float()
    (layer, *_) = (module for module in wide.modules() if isinstance(module, Float8Linear))
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert layer.weight.is_meta
    with pytest.raises(ValueError, match=r"float8 layers are of a bfloat16 network; got .*float32"):
        evaluated(copy.deepcopy(of_float8).float())


def test_it_compiles_as_one_graph() -> None:
    of_float8 = network().with_float8(least_channels=32)
    with torch.no_grad():
        kept = of_float8.condition([500.0], CONTEXT)
        compiled = torch.compile(lambda x: of_float8.denoise(x, kept, 0), backend="aot_eager", fullgraph=True)
        assert relative_rms(compiled(SAMPLE), of_float8.denoise(SAMPLE, kept, 0)) < 0.01


def test_networks_refuse_in_one_line() -> None:
    unet = network()
    of_float8 = unet.with_float8(least_channels=32)
    for call, message in (
        (
            lambda: network(dtype=torch.float16).with_float8(),
            "the network is float16: convert it to bfloat16",
        ),
        (unet.with_float8, "no transformer of this network has 512 channels or more"),
        (lambda: unet.with_float8(least_channels="512"), "least_channels must be a whole number; got '512'"),
        (of_float8.with_float8, "for the network that with_float8"),
        (lambda: of_float8.with_backend("torch"), "for the network that with_float8"),
        (lambda: diffusers_state_dict(of_float8), "for the network that with_float8"),
        (
            lambda: network().requires_grad_(True).with_float8(least_channels=32)(SAMPLE, 500.0, CONTEXT),
            "float8 has no gradients",
        ),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("sm_80", "a chip has no float8: it takes compute capability 8.9 or later"),
        ("sm_89", None),
        ("sm_90", None),
        ("sm_120", None),
        ("gfx942", "AMD's float8 is another format"),
    ],
)
def test_devices_without_float8_are_named(
    device: str, arch: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8, "chip_of", lambda device: Chip("a chip", 100, arch))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    said = float8_misfit(torch.device(device), torch.bfloat16)
    assert said is None if reason is None else reason in (said or "")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    said = float8_misfit(torch.device(device), torch.bfloat16)
    assert (reason or f"has no scaled matmul on {device}") in (said or "")


def test_the_levels_of_866m_that_are_quantized() -> None:
    with torch.device("meta"):
        unet = UNet(FAMILY["866M"], backend="torch").bfloat16()
    of_float8 = unet.requires_grad_(False).with_float8()
    widths = [m.in_features for n, m in of_float8.named_modules() if isinstance(m, Float8Linear) and "ff_in" in n]
    # Of 16 transformers, five are of 320 channels.
    assert sorted(widths) == [640] * 5 + [1280] * 6


# The backend

SMALLEST = Float8(network=64, level=128)


def small_case(**changes: Any) -> Case:
    return Case(unet="39M", steps=4, dtype="bfloat16", latent_height=8, latent_width=8, **changes)


def test_a_trajectory_in_float8_runs_on_a_cpu_and_is_held_to_a_tolerance_of_its_own(run_again: Graphs) -> None:
    """And to no yardstick: its record shows more than bfloat16's error, and what passes of it."""
    backends = all_backends() | {
        "triton+fp8": OurBackend("torch", float8=SMALLEST),
        "graph+fp8": GraphBackend(run_again, "torch", float8=SMALLEST),
    }
    cases = [small_case(backend=name) for name in ("torch", "triton+fp8", "graph+fp8")]
    records = {r.case.backend: r for r in profile(cases, rule=RepetitionRule(1, 0.0), backends=backends)}
    assert {record.status for record in records.values()} == {"ok"}, records
    found = {name: record.correctness for name, record in records.items()}
    assert all(one is not None for one in found.values())
    half, *others = (found[name] for name in ("torch", "triton+fp8", "graph+fp8"))
    assert half is not None
    assert half.tolerance == TOLERANCES["bfloat16"]
    for one in others:
        assert one is not None
        assert one.tolerance == FLOAT8_TOLERANCE
        assert one.error_before is not None
        assert half.error_before is not None
        assert 1.5 * half.error_before < one.error_before < FLOAT8_TOLERANCE / 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unet": "39M"}, "networks of 320 channels or more at their first level, as of 866M; this one has 64"),
        ({"unet": "866M", "dtype": "float32"}, "float8 matmuls give bfloat16, and the network is float32"),
    ],
)
def test_what_the_backend_does_not_measure_it_says(changes: dict[str, Any], reason: str) -> None:
    case = Case(**({"dtype": "bfloat16", "steps": 2} | changes))
    if case.unet == "39M":
        unet = make_network(case)
    else:
        with torch.device("meta"):
            unet = UNet(FAMILY[case.unet], backend="torch")
    given = make_problem(case, unet)
    with pytest.raises(Unsupported, match=reason) as refusal:
        replace(all_backends()["triton+fp8"], operators="torch").build(given)  # type: ignore[type-var]
    assert "\n" not in str(refusal.value)


def test_a_float8_result_excuses_no_other() -> None:
    latents = Reference("float32", torch.ones(8).double(), None)
    errors = {"diffusers": 0.3, "graph+fp8": 0.15}
    implementations = {"diffusers": "diffusers", "graph+fp8": "torch"}
    references = dict.fromkeys(errors, latents)
    found = tolerances("bfloat16", implementations, errors, references, {"graph+fp8": 0.2})
    assert found == {"diffusers": TOLERANCES["bfloat16"], "graph+fp8": 0.2}
    # As another backend of ours would.
    found = tolerances("bfloat16", implementations, errors | {"graph+fp8": 0.09}, references, {})
    assert found["diffusers"] == pytest.approx(0.36)
