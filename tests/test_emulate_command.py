"""`ldmperf emulate`: what it tells of operators and of anybody's kernels, and what it refuses."""

import json
import math
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.cli import main
from ldmperf.profiling.options import CaseError

pytest.importorskip("triton")

from ldmperf.profiling.emulator.emulated_calls import configured, default_config, error_of, run_operator
from ldmperf.profiling.emulator.emulation import emulated
from ldmperf.profiling.emulator.operator_inputs import EXTREMES, KINDS_OF_INPUTS, given_inputs, made_inputs
from ldmperf.profiling.static.shapes import SHAPES, Shape

TINY = ("--height", "4", "--width", "4")
# One shape of each operator, so that few kernels are compiled.
SMALL = {
    **dict.fromkeys(OPERATORS, ("--channels", "64")),
    "attention": ("--heads", "1"),
    "sampler_update": (),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "emulate-cache"))
    monkeypatch.setenv("COLUMNS", "120")


def emulate(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["emulate", *map(str, arguments)])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


# ---------------------------------------------------------------- operators


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_operators_are_right_and_have_no_findings(capsys, operator):
    code, out, err = emulate(capsys, operator, *TINY, *SMALL[operator], "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["name"], told["arch"], told["findings"]) == (operator, "sm_90", [])
    for error in told["errors"]:
        # bfloat16 rounds by up to 2^-9; a matmul's operands are rounded once more, and statistics are of results.
        rounded = "bfloat16" in (error["dtype"], told["errors"][0]["dtype"])
        assert error["rms"] < (4e-3 if rounded else 1e-6)
        assert error["not_finite"] == 0
    for kernel in told["kernels"]:
        lanes = sum(count["lanes"] for count in kernel["classes"].values())
        assert lanes == kernel["instructions"]["lanes"] == sum(line["lanes"] for line in kernel["lines"])
        warps = sum(unit["warps"] for unit in kernel["units"].values())
        assert warps == kernel["instructions"]["warps"]
        assert kernel["static"]["faults"] == []
        assert kernel["programs"] == kernel["static"]["programs"]
        moved = [access for access in kernel["accesses"] if access["space"] == "global"]
        assert {"read", "write"} <= {access["what"] for access in moved}
        for access in kernel["accesses"]:
            assert access["touched"] >= access["least"]


def test_bytes_of_a_row_kernel_are_those_of_its_tensors(capsys):
    """16 tokens of 2 x 64 channels, a bias, and a result of 64 channels, in bfloat16."""
    _, out, _ = emulate(capsys, "geglu", *TINY, *SMALL["geglu"], "--json")
    (kernel,) = json.loads(out)["kernels"]
    written = next(a for a in kernel["accesses"] if (a["space"], a["what"]) == ("global", "write"))
    assert written["bytes"] == 16 * 64 * 2
    assert written["touched"] == written["least"] == 16 * 64 * 2 // 32
    assert kernel["least_bytes"] == (16 * 128 + 128 + 16 * 64) * 2


def test_multiply_adds_are_those_of_the_matmul(capsys):
    arguments = ("linear", *TINY, "--channels", "64", "--features", "64", "--config", "block_m=64,block_n=64")
    _, out, _ = emulate(capsys, *arguments, "--json")
    told = json.loads(out)
    matmul = next(kernel for kernel in told["kernels"] if kernel["multiply_adds"])
    # 16 rows are a tile of 64; 128 columns of weights.
    assert matmul["multiply_adds"] % (64 * 64 * 128) == 0
    assert told["configuration"]["block_m"] == 64


def test_tables(capsys):
    code, out, _ = emulate(capsys, "layer_norm", *TINY, *SMALL["layer_norm"], "--arch", "sm_80")
    assert code == 0
    for text in (
        "layer_norm for sm_80, emulated",
        "Error against float64",
        "Findings: none",
        "layer_norm_kernel: ",
        "registers a thread",
        "no branch split a warp",
        "Executed PTX, beside the machine code's whole body",
        "global read",
        "Lines executed most",
        "layer_norm.py:",
    ):
        assert text in out


def test_every_extreme_is_run(capsys):
    code, out, _ = emulate(capsys, "residual_add", *TINY, *SMALL["residual_add"], "--inputs", "extreme", "--json")
    assert code == 0
    told = json.loads(out)
    assert [error["inputs"] for error in told["errors"]] == list(EXTREMES)
    # An addition is rounded correctly, whatever its numbers.
    assert {error["ratio"] for error in told["errors"]} == {1.0}
    (kernel,) = told["kernels"]
    assert kernel["launches"] == len(EXTREMES)
    # Two images of 64 channels, their sum, and a bias.
    assert kernel["least_bytes"] == len(EXTREMES) * (3 * 16 * 64 + 64) * 2


def test_seeds_and_approximations_reach_the_kernel(capsys):
    def rms(*options):
        arguments = ("geglu", *TINY, *SMALL["geglu"], "--dtype", "float32", "--json")
        return json.loads(emulate(capsys, *arguments, *options)[1])["errors"][0]["rms"]

    exact = rms()
    assert rms() == exact
    assert rms("--seed", "1") != exact
    # Exponentials and reciprocals that err.
    assert rms("--perturb", "3") > exact


def test_a_file_of_tensors(capsys, tmp_path):
    """A layer norm without its optional arguments, whose eps is in the metadata."""
    x = torch.randn(3, 40) * 0.01
    weight, bias = torch.randn(40), torch.randn(40)
    path = tmp_path / "norm.safetensors"
    save_file({"x": x, "weight": weight, "bias": bias}, path, {"format": "pt", "eps": "0.5"})
    code, out, err = emulate(capsys, "layer_norm", "--inputs", path, "--json")
    assert (code, err) == (0, "")
    (error,) = json.loads(out)["errors"]
    assert (error["inputs"], error["name"], error["elements"]) == ("norm.safetensors", "result", 120)
    exact = F.layer_norm(x.double(), (40,), weight.double(), bias.double(), 0.5)
    inputs = given_inputs("layer_norm", path, {})
    assert torch.allclose(inputs.exact()["result"], exact, rtol=1e-14, atol=0)
    assert error["rms"] < 1e-6


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("foo",), "unknown kernel 'foo'; there are attention, group_norm_silu"),
        (("geglu", "--arch", "sm_42"), "unknown architecture 'sm_42'; there are sm_80, sm_90"),
        (("geglu", "--arch", "gfx942"), "unknown architecture 'gfx942'"),
        (("geglu", "--dtype", "int8"), "no dtype 'int8'; choose from"),
        (("geglu", "--groups", "2"), "geglu takes no --groups"),
        (("attention", "--head-dim", "7"), "--head-dim 7 is not a multiple of 4 up to 384"),
        (("group_norm_silu", "--channels", "321"), "321 channels do not divide into 32 groups"),
        (("geglu", "--batch", "0"), "--batch"),
        (("geglu", "--mean", "nan"), "--mean"),
        (("geglu", "--config", "block=4"), "geglu has no 'block'; its fields are block_m, block_n, num_warps"),
        (("geglu", "--config", "num_warps=many"), "num_warps=many is not a whole number"),
        (("geglu", "--config", "num_warps"), "num_warps= is not a whole number"),
        (("attention", *TINY, "--config", "matrix_sums=5"), "matrix_sums=5 is not true or false"),
        (("geglu", "--inputs", "ones"), "--inputs: no kind 'ones'; choose from random, extreme, huge"),
        (("geglu", "--inputs", "none.safetensors"), "none.safetensors"),
        (("geglu", "--inputs", "none.safetensors", "--height", "8"), "leave --height out"),
        (("geglu", "--inputs", "none.safetensors", "--seed", "8"), "leave --seed out"),
        (("geglu", "--accumulate", "float64"), "--accumulate"),
        (("geglu", "--tf32", "up"), "truncate, round"),
        (("geglu", *TINY, "--config", "block_m=0"), "--config block_m=0 cannot be launched: integer division"),
        (("geglu", *TINY, "--config", "block_m=7"), "--config block_m=7 cannot be launched: arange"),
        (("geglu", *TINY, "--config", "num_warps=3"), "--config num_warps=3 cannot be launched: num_warps"),
        (("none.py",), "none.py is a file: name a kernel or a function of it, as in none.py:NAME"),
        (("none.py:kernel",), "no Python file at none.py"),
        (("none.py:kernel", "--dtype", "float16"), "--dtype is of an operator"),
        (("none.py:kernel", "--batch", "2"), "--batch is of an operator"),
        ((), "OPERATOR | FILE.py:NAME"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(capsys, arguments, error):
    code, out, err = emulate(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert error in err
    assert err.count("\n") == 1


def test_a_file_that_does_not_fit(capsys, tmp_path):
    path = tmp_path / "some.safetensors"
    save_file({"x": torch.randn(4, 7)}, path)
    for operator, error in (
        ("geglu", "geglu refuses these inputs"),
        ("layer_norm", "layer_norm refuses these inputs"),
    ):
        code, _, err = emulate(capsys, operator, "--inputs", path)
        assert (code, err.count("\n")) == (2, 1)
        assert error in err
    save_file({"x": torch.randn(4, 8)}, path, {"bias": "{"})
    assert "no JSON" in emulate(capsys, "geglu", "--inputs", path)[2]
    path.write_bytes(b"no tensors")
    assert "no .safetensors file that can be read" in emulate(capsys, "geglu", "--inputs", path)[2]


def test_interpreted_kernels_are_not_emulated(capsys, monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    code, _, err = emulate(capsys, "geglu")
    assert (code, err.count("\n")) == (2, 1)
    assert "unset it" in err


# ---------------------------------------------------------------- anybody's kernels

KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs{mask})
    tl.store(out_ptr + offs, x + 1, mask=offs < n)


@triton.jit
def column(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs * 32))


@triton.jit
def product(a_ptr, b_ptr, c_ptr):
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    c = tl.dot(tl.load(a_ptr + places), tl.load(b_ptr + places), input_precision="tf32")
    tl.store(c_ptr + places, c)


@triton.jit
def unexplained(x_ptr):
    tl.store(x_ptr, 1.0)


def example_add_one():
    x, out = torch.randn(1000), torch.empty(1000)
    return (8,), {{"x_ptr": x, "out_ptr": out, "n": 1000, "BLOCK": 128}}, {{"out_ptr": x.double() + 1}}


def example_column():
    x, out = torch.randn(64 * 32), torch.empty(64)
    return 1, {{"x_ptr": x, "out_ptr": out, "BLOCK": 64, "num_warps": 2}}


def example_product():
    a, b, c = torch.rand(16, 16), torch.rand(16, 16), torch.empty(16, 16)
    return 1, {{"a_ptr": a, "b_ptr": b, "c_ptr": c, "num_warps": 1}}, {{"c_ptr": a.double() @ b.double()}}


def twice():
    x, out = torch.zeros(256), torch.empty(256)
    for _ in range(2):
        add_one[(2,)](x, out, 256, BLOCK=128)
    assert out.eq(1).all()


def fails():
    twice()
    raise RuntimeError("not what was hoped for")


def nothing():
    pass


def needs(size):
    pass
"""


@pytest.fixture
def write(tmp_path):
    def written(mask=", mask=offs < n"):
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(KERNELS.format(mask=mask)))
        return path

    return written


def test_a_kernel_and_its_example(capsys, write):
    code, out, err = emulate(capsys, f"{write()}:add_one", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    (error,) = told["errors"]
    assert (error["name"], error["elements"], error["ratio"]) == ("out_ptr", 1000, 1.0)
    (kernel,) = told["kernels"]
    assert (kernel["kernel"], kernel["programs"], kernel["launches"]) == ("add_one", 8, 1)
    assert kernel["static"]["kernel"] == "add_one"
    assert {access["what"]: access["bytes"] for access in kernel["accesses"]} == {"read": 4000, "write": 4000}
    assert {line["source"] for line in kernel["lines"] if line["source"]} <= {
        f"mine.py:{line}" for line in range(7, 12)
    }


def test_a_broken_kernel_has_a_finding_with_its_line(capsys, write):
    """Without a mask the last program reads past the end."""
    code, out, _ = emulate(capsys, f"{write(mask='')}:add_one")
    assert code == 1
    finding = "FINDING out of bounds: add_one at mine.py:10 `x = tl.load(x_ptr + offs)`, 24 times"
    assert finding in " ".join(out.split())
    code, out, _ = emulate(capsys, f"{write(mask='')}:add_one", "--json", "--arch", "sm_80")
    assert code == 1
    (finding,) = json.loads(out)["findings"]
    assert (finding["kind"], finding["source"], finding["count"]) == ("out of bounds", "mine.py:10", 24)


def test_what_an_example_leaves_unwritten_is_found(capsys, write):
    path = write()
    path.write_text(path.read_text().replace("return (8,)", "return (7,)"))
    code, out, _ = emulate(capsys, f"{path}:add_one", "--json")
    assert code == 1
    assert [finding["kind"] for finding in json.loads(out)["findings"]] == ["unwritten result"]


def test_no_ratio_is_shown_where_what_is_expected_needs_no_rounding(capsys, write):
    path = write()
    path.write_text(path.read_text().replace("x.double() + 1", "x"))
    code, out, _ = emulate(capsys, f"{path}:add_one")
    # A wrong number is told, and is no finding.
    assert code == 0
    assert "Error against what the example expects" in out
    (row,) = (line.split() for line in out.splitlines() if line.split()[1:2] == ["out_ptr"])
    assert (row[4], *row[6:]) == ("1.00e+00", "0.00e+00")
    assert "inf" not in out


def test_what_is_expected_is_kept_from_the_kernel(capsys, write):
    """In place: what is expected of a tensor is what it holds before the launch."""
    path = write()
    path.write_text(path.read_text().replace('"out_ptr": out', '"out_ptr": x', 1).replace("x.double() + 1", "x"))
    (error,) = json.loads(emulate(capsys, f"{path}:add_one", "--json")[1])["errors"]
    assert error["largest"] == pytest.approx(1)


def test_a_column_is_not_coalesced(capsys, write):
    _, out, _ = emulate(capsys, f"{write()}:column", "--json")
    (kernel,) = json.loads(out)["kernels"]
    read = next(access for access in kernel["accesses_by_line"] if access["what"] == "read")
    # 64 numbers, 128 bytes apart; two warps, 128 bytes each.
    assert (read["source"], read["touched"], read["least"]) == ("mine.py:17", 64, 8)
    assert kernel["static"]["num_warps"] == 2
    _, out, _ = emulate(capsys, f"{write()}:column")
    assert "Lines whose accesses take more than the least" in out


def test_how_matmuls_are_computed_is_chosen(capsys, write):
    def told(*options):
        return json.loads(emulate(capsys, f"{write()}:product", *options, "--json")[1])

    cut = told()
    assert told() == cut
    assert told("--seed", "1") != cut
    assert cut["kernels"][0]["multiply_adds"] == 16**3
    # Products of positive numbers: cutting off makes them all smaller, rounding does not.
    assert told("--tf32", "round")["errors"][0]["rms"] < 0.6 * cut["errors"][0]["rms"]
    assert told("--accumulate", "tensor-core")["errors"][0]["rms"] != cut["errors"][0]["rms"]


def test_a_function_that_launches(capsys, write):
    code, out, err = emulate(capsys, f"{write()}:twice", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["errors"] == []
    (kernel,) = told["kernels"]
    assert (kernel["launches"], kernel["programs"], kernel["static"]) == (2, 4, None)


def test_what_a_function_raises_is_told_last(capsys, write):
    code, out, err = emulate(capsys, f"{write()}:fails")
    assert code == 1
    assert "add_one: 4 programs" in out
    line = 1 + KERNELS.splitlines().index('    raise RuntimeError("not what was hoped for")')
    assert err.endswith(f"fails raised RuntimeError in line {line}: not what was hoped for\n")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nothing", "launched no Triton kernel"),
        ("needs", "needs takes size; give a function without arguments"),
        (
            "gone",
            "has no 'gone'; its kernels are add_one, column, product, unexplained; "
            "its functions without arguments are twice, fails, nothing",
        ),
        (
            "unexplained",
            "has no example_unexplained(), which tells how to launch unexplained: let it return (grid, {",
        ),
    ],
)
def test_what_cannot_be_run_of_a_file(capsys, write, name, error):
    code, out, err = emulate(capsys, f"{write()}:{name}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert error in err


def test_what_is_not_emulated_is_named(capsys, write):
    path = write()
    sleeps = 'tl.inline_asm_elementwise("nanosleep.u32 20; mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)'
    body = f"x = tl.full([32], 1, tl.int32)\n    tl.store(x_ptr + tl.arange(0, 32), {sleeps})"
    example = "\n\ndef example_unexplained():\n    return 1, {'x_ptr': torch.empty(32, dtype=torch.int32)}\n"
    path.write_text(path.read_text().replace("tl.store(x_ptr, 1.0)", body) + example)
    code, out, err = emulate(capsys, f"{path}:unexplained")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "not emulated: unexplained" in err
    assert "nanosleep.u32 20" in err


def test_a_file_that_cannot_be_imported(capsys, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import torch\n1 / 0\n")
    code, _, err = emulate(capsys, f"{path}:kernel")
    assert (code, err.count("\n")) == (1, 1)
    assert "cannot be imported (ZeroDivisionError: division by zero)" in err


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("operator", list(SHAPES))
def test_inputs_are_finite_and_so_are_results(operator, dtype):
    shape = Shape(
        dtype, **{"channels": 64, **SHAPES[operator][2], "batch": 1, "height": 4, "width": 4, "heads": 2}
    )
    described = SHAPES[operator][0](shape)
    for kind in KINDS_OF_INPUTS:
        inputs = made_inputs(operator, shape, kind)
        for name, value in inputs.arguments.items():
            if not isinstance(value, torch.Tensor):
                continue
            assert (value.shape, value.stride(), value.dtype) == (
                described[name].shape,
                described[name].stride(),
                described[name].dtype,
            )
            assert value.isfinite().all()
        OPERATORS[operator].check(OPERATORS[operator].bind(**inputs.arguments))
        for name, exact in inputs.exact().items():
            # Statistics are float32 from float64.
            assert exact.dtype == torch.float64 or name == "result[1]"
            assert exact.to(dtype).isfinite().all()


def test_what_extremes_are():
    def x_of(kind, dtype=torch.float16, **options):
        shape = Shape(dtype, batch=1, channels=64, height=4, width=4)
        return made_inputs("residual_add", shape, kind, **options).arguments["x"].double()

    random = x_of("random", seed=5)
    assert torch.equal(random, x_of("random", seed=5))
    assert not torch.equal(random, x_of("random", seed=6))
    shifted = x_of("random", torch.float32, seed=5, mean=3.0, scale=0.5)
    assert abs(float(shifted.mean()) - 3) < 0.1
    assert abs(float(shifted.std()) - 0.5) < 0.05
    # x, the residual and the bias: three times 2^14 is finite in float16, three times 2^15 is not.
    assert x_of("largest").abs().unique().tolist() == [2.0**14]
    assert x_of("largest", torch.float32).abs().unique().tolist() == [2.0**126]
    assert x_of("subnormal").abs().unique().tolist() == [n * 2.0**-24 for n in range(8)]
    assert x_of("subnormal", torch.bfloat16).abs().max() == 7 * 2.0**-133
    assert float(x_of("huge").abs().max()) > 8192
    assert float(x_of("tiny").abs().max()) < 0.01
    zeros = x_of("zeros")
    assert not zeros[:, :32].any()
    assert zeros[:, 32:].all()
    hot = x_of("one-hot")
    assert torch.equal(hot.sum(-1), torch.ones(1, 64, 4).double())
    assert set(hot.unique().tolist()) == {0.0, 1.0}


def test_slices_share_memory():
    inputs = made_inputs("attention", Shape(batch=1, height=4, width=4, heads=1), "random")
    q, k, v = (inputs.arguments[name] for name in "qkv")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.storage_offset() == 40
    assert not torch.equal(q, k)


def test_the_exact_update_of_a_sampler():
    """U[k] @ [registers, guided output, noise], by einsum; the arguments stay as they are."""
    inputs = made_inputs("sampler_update", Shape(batch=2, channels=4, height=3, width=5), "random")
    a = inputs.arguments
    before = a["registers"].clone()
    exact = inputs.exact()
    assert torch.equal(a["registers"], before)
    from ldmperf.kernels import philox_normal
    from ldmperf.kernels.philox import STEP_NOISE

    k = int(a["step"])
    uncond, cond = a["model_output"].double().chunk(2)
    output = uncond + a["guidance_scale"][k].double() * (cond - uncond)
    noise = philox_normal(a["seeds"], (4, 3, 5), k, STEP_NOISE).double()
    new = torch.einsum("ij,j...->i...", a["table"][k].double(), torch.stack([*before.double(), output, noise]))
    for n in range(2):
        assert torch.allclose(exact[f"registers[{n}]"], new[n], rtol=1e-12, atol=1e-12)
    assert torch.allclose(
        exact["model_input"], (a["input_scale"][k].double() * new[0]).repeat(2, 1, 1, 1), atol=1e-12
    )


# ---------------------------------------------------------------- errors and configurations


def test_errors_by_hand():
    exact = torch.tensor([1.0, 2.0, -4.0, 1 + 2.0**-10], dtype=torch.float64)
    found = torch.tensor([1.0, 2.5, -4.0, 1.0]).bfloat16()
    error = error_of("y", found, exact)
    norm = float(np.sqrt((exact.numpy() ** 2).sum()))
    assert error.largest == 0.5
    assert error.rms == pytest.approx(math.sqrt(0.25 + 2.0**-20) / norm)
    assert error.rounding == pytest.approx(2.0**-10 / norm)
    assert error.ratio == pytest.approx(math.sqrt(0.25 + 2.0**-20) * 2**10)
    assert (error.dtype, error.elements, error.not_finite) == ("bfloat16", 4, 0)


def test_what_is_not_finite_is_counted_apart():
    exact = torch.tensor([1.0, 1e39, 1e39, -1e39, 2.0, 3.0, math.nan], dtype=torch.float64)
    found = torch.tensor([1.0, math.inf, 3e38, math.inf, math.nan, -math.inf, math.nan])
    error = error_of("y", found, exact)
    # Right: 1, an overflow that rounding has too, and NaN for NaN.
    assert error.not_finite == 4
    assert (error.largest, error.rms, error.ratio) == (math.inf, math.inf, math.inf)
    # An overflow that rounding has too is none of the kernel's.
    error = error_of("y", found[[0, 1, 6]], exact[[0, 1, 6]])
    assert (error.not_finite, error.largest, error.rms, error.ratio) == (0, 0, 0, 1)


def test_a_result_where_nothing_has_to_be_rounded():
    ones = torch.ones(3, dtype=torch.float64)
    assert error_of("y", torch.ones(3), ones).ratio == 1
    assert error_of("y", torch.full((3,), 2.0), ones).ratio == math.inf
    with pytest.raises(CaseError, match="shape"):
        error_of("y", torch.ones(4), ones)


@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_the_default_configuration_is_found_again(operator, side):
    """Also where it is none of the candidates: launches of it are those of no configuration."""
    op = OPERATORS[operator]
    channels = 4 if operator == "sampler_update" else 320
    call = op.bind(**SHAPES[operator][0](Shape(batch=1, channels=channels, height=side, width=side)))

    def told(launches):
        numbers = [{n: v for n, v in one.arguments.items() if isinstance(v, int)} for one in launches]
        return [(one.name, one.programs, one.num_warps, one.num_stages) for one in launches], numbers

    assert told(op.plan(call, config=default_config(op, call))[1]) == told(op.plan(call)[1])


def test_a_configuration_keeps_what_is_not_told():
    operator = OPERATORS["geglu"]
    call = operator.bind(**SHAPES["geglu"][0](Shape(batch=1, channels=320, height=16, width=16)))
    default = operator.plan(call)[1][0]
    config = configured(operator, call, "num_warps=8, block_m=2")
    assert (config.num_warps, config.block_m) == (8, 2)
    assert config.block_n == default.arguments["BLOCK_N"]
    attention = OPERATORS["attention"]
    call = attention.bind(**SHAPES["attention"][0](Shape(batch=1, height=16, width=16)))
    assert configured(attention, call, "matrix_sums=true").matrix_sums is True
    assert configured(attention, call, "matrix_sums=0").matrix_sums is False


def test_a_result_that_a_kernel_does_not_write_is_found():
    """Without its stores: registers were written before the call, the model's next input was not."""

    def without_stores(ptx):
        return "\n".join(line for line in ptx.splitlines() if "st.global" not in line)

    inputs = made_inputs("sampler_update", Shape(batch=1, height=4, width=4, channels=4), "random")
    with emulated("sm_90", edit=without_stores) as emulation:
        run_operator(emulation, inputs)
    (finding,) = emulation.findings
    assert (finding.kind, finding.count) == ("unwritten result", 2 * 4 * 4 * 4)
