"""`ldmperf inspect`: what it prints, what it refuses, and what it compiles for."""

import json
import subprocess
import sys

import pytest
import torch

from ldmperf.kernels import OPERATORS
from ldmperf.profiling.cli import main

pytest.importorskip("triton")

from ldmperf.profiling.static.compile import specialization_of
from ldmperf.profiling.static.machines import MACHINES
from ldmperf.profiling.static.shapes import SHAPES


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inspect-cache"))
    monkeypatch.setenv("COLUMNS", "120")


def inspect(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_what_is_predicted_says_so(capsys):
    code, out, _ = inspect(capsys, "geglu", "--arch", "sm_90")
    assert code == 0
    for text in ("geglu_kernel for sm_90", "registers", "occupancy", "hot" if "hot loop" in out else "whole body"):
        assert text in out
    assert out.index("PREDICTION, not measured") < out.index("<- bound")
    assert "predicted cycles" in out


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_json_of_every_operator(capsys, operator):
    code, out, _ = inspect(capsys, operator, "--json", "--arch", "sm_80")
    assert code == 0
    for told in json.loads(out):
        assert told["arch"] == "sm_80"
        assert told["faults"] == []
        assert sum(told["region"]["mix"].values()) == told["region"]["instructions"] <= told["instructions"]
        assert told["prediction"]["bound"] in told["prediction"]["cycles"]


def test_an_amd_chip_has_resources_and_no_prediction(capsys):
    code, out, _ = inspect(capsys, "residual_add", "--arch", "gfx942", "--json")
    assert code == 0
    (told,) = json.loads(out)
    assert told["resources"]["vgprs"] > 0
    assert "prediction" not in told


def test_sass_is_printed_on_request(capsys):
    _, out, _ = inspect(capsys, "residual_add", "--sass")
    assert "LDG.E" in out
    assert "EXIT" in out


def test_shapes_reach_the_kernel(capsys):
    _, out, _ = inspect(
        capsys, "layer_norm", "--channels", "96", "--height", "4", "--width", "4", "--batch", "1", "--json"
    )
    (told,) = json.loads(out)
    assert told["tensor_bytes"]["x_ptr"] == 16 * 96 * 2


def test_a_size_of_the_family_brings_all_its_launches(capsys):
    _, out, _ = inspect(capsys, "geglu", "--size", "39M", "--json")
    columns = {told["tensor_bytes"]["out_ptr"] for told in json.loads(out)}
    assert len(columns) > 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("foo",), "unknown kernel 'foo'"),
        (("geglu", "--arch", "sm_42"), "unknown architecture 'sm_42'; there are sm_80, sm_90, gfx942"),
        (("geglu", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("geglu", "--groups", "2"), "geglu takes no --groups"),
        (("group_norm_silu", "--channels", "321"), "321 channels do not divide into 32 groups"),
        (("geglu", "--size", "7T"), "unknown size '7T'"),
        (("geglu", "--size", "39M", "--width", "8"), "leave out --width"),
        (("geglu", "--size", "vae"), "size vae does not use geglu"),
        (("geglu", "--batch", "0"), "--batch"),
        ((), "Missing argument 'kernel'"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(capsys, arguments, error):
    code, out, err = inspect(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert error in err
    assert err.count("\n") == 1


def test_help_stays_light():
    code = (
        "import sys\nfrom ldmperf.profiling.cli import main\n"
        "try: main(['inspect', '--help'])\nexcept SystemExit: pass\nprint('triton' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert "ldmperf inspect geglu" in out
    assert out.strip().endswith("False")


def test_a_launch_is_specialized_as_the_jit_does():
    """None and 1 are constants; pointers, strides and sizes divisible by 16 are marked; others are not."""
    x = torch.empty(2, 320, 7, 9, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    # From the second channel: two bytes past an aligned address.
    residual = torch.empty(2, 7, 9, 321, device="meta", dtype=torch.float16)[..., 1:].permute(0, 3, 1, 2)
    (launch,) = OPERATORS["residual_add"].plan(x=x, residual=residual)[1]
    found = specialization_of(launch, MACHINES["sm_90"])
    constants, attributes, signature = dict(found.constants), dict(found.attributes), dict(found.signature)
    assert constants["bias_ptr"] is None
    assert constants["stride_xc"] == 1
    assert signature["x_ptr"] == "*fp16"
    assert attributes["x_ptr"] == attributes["channels"] == "D"
    assert not {"residual_ptr", "pixels", "width", "stride_rb"} & set(attributes)


def test_numbers_past_32_bits_are_passed_in_64():
    x = torch.empty(2, 32, 8192, 16384, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    (launch,) = OPERATORS["residual_add"].plan(x=x, residual=x)[1]
    signature = dict(specialization_of(launch, MACHINES["sm_90"]).signature)
    assert signature["stride_xb"] == "i64"
    assert signature["stride_xh"] == "i32"


def test_every_operator_has_shapes():
    assert set(SHAPES) == set(OPERATORS)
