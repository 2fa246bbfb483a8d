"""`ldmperf inspect`: what it prints, what it refuses, and what it compiles for."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ldmperf.kernels import OPERATORS
from ldmperf.kernels.operators import RESIDUAL_ADD
from ldmperf.profiling.cli import main
from ldmperf.profiling.terminal.counting import counting

pytest.importorskip("triton")

from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import specialization_of
from ldmperf.profiling.static.display import UNITS
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
        (("geglu", "--dtype", "int8"), "no dtype 'int8'; choose from"),
        # No option stands in for the check of another.
        (("attention", "--head-dim", "family", "--size", "39M"), "leave out --head-dim"),
        (("attention", "--head-dim", "family", "--dtype", "int8"), "choose from"),
        (("attention", "--head-dim", "family", "--groups", "2"), "attention takes no --groups"),
        (("attention", "--head-dim", "family", "--arch", "gfx942"), "give one number"),
        (("attention", "--head-dim", "family", "--sass"), "give one number"),
        (("attention", "--size", "39M", "--head-dim", "7"), "multiple of 4"),
        (("geglu", "--head-dim", "family"), "geglu takes no --head-dim"),
        (("geglu", "--size", "39M", "--dtype", "int8"), "choose from"),
        (("group_norm_silu", "--channels", "99999999"), "16384"),
        (("residual_add", "--height", "1000000000"), "16384"),
        (("geglu", "--groups", "2"), "geglu takes no --groups"),
        (("group_norm_silu", "--channels", "321"), "321 channels do not divide into 32 groups"),
        (("transformer_tail", "--channels", "320"), "320 channels of bfloat16 do not fit the registers"),
        (("transformer_front", "--channels", "128", "--dtype", "float32"), "128 channels of float32 do not fit"),
        (("geglu", "--size", "7T"), "unknown size '7T'"),
        (("geglu", "--size", "39M", "--width", "8"), "leave out --width"),
        (("geglu", "--size", "vae"), "size vae does not use geglu"),
        (("geglu", "--batch", "0"), "--batch"),
        ((), "name an operator (attention, ...), a size"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(capsys, arguments, error):
    code, out, err = inspect(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert error in err
    assert err.count("\n") == 1


def test_what_does_not_compile_is_one_line_and_exit_code_1(capsys, monkeypatch):
    from triton.errors import TritonError

    def refuses(error):
        def inspect_launch(*_):
            raise error

        monkeypatch.setattr("ldmperf.profiling.static.inspection.inspect_launch", inspect_launch)
        return inspect(capsys, "geglu")

    for error, told in (
        (TritonError("at 3:4\nnumel exceeds the maximum"), "numel exceeds the maximum); choose a smaller one"),
        (RuntimeError("PassManager::run failed"), "geglu of this shape does not compile for sm_90"),
        (PermissionError(13, "Permission denied"), "set TRITON_CACHE_DIR to another folder"),
    ):
        code, out, err = refuses(error)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert told in err


def test_interpreted_kernels_are_not_compiled(capsys, monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    code, _, err = inspect(capsys, "geglu")
    assert (code, err.count("\n")) == (2, 1)
    assert "unset it" in err


@pytest.mark.parametrize("columns", [60, 80])
def test_an_inspection_fits_a_narrow_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = inspect(capsys, "attention", "--head-dim", "40")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    assert "..." not in out


def test_the_units_have_the_names_of_the_documentation(capsys):
    _, out, _ = inspect(capsys, "attention", "--json")
    told = set(json.loads(out)[0]["prediction"]["cycles"])
    page = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")
    columns = set(next(line for line in page.splitlines() if line.startswith("| D | held as")).split(" | "))
    assert told - columns == {"integer FMA", "memory"}
    assert {"exponential", "shared memory", "load/store", "FMA", "L2"} <= told & columns
    assert set(UNITS) - columns == {"memory"}


def test_counting_tells_now_and_then_where_there_is_no_bar():
    now = itertools.count(0, 2)
    out = io.StringIO()
    with counting(Console(file=out), 7, "kernels", lambda: next(now)) as count:
        for number in range(7):
            count(f"kernel[{number}]\x1b")
    lines = out.getvalue().splitlines()
    assert lines == [r"3 of 7 kernels: kernel[2]\x1b", r"6 of 7 kernels: kernel[5]\x1b"]


def test_counting_draws_a_bar_on_a_terminal():
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80)
    with counting(terminal, 3, "kernels") as count:
        count("[red]one\x1b")
    assert "1/3" in out.getvalue()
    assert r"[red]one\x1b" in out.getvalue()


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
    (launch,) = RESIDUAL_ADD.plan(RESIDUAL_ADD.bind(x=x, residual=residual))[1]
    found = specialization_of(launch, MACHINES["sm_90"])
    constants, attributes, signature = dict(found.constants), dict(found.attributes), dict(found.signature)
    assert constants["bias_ptr"] is None
    assert constants["stride_xc"] == 1
    assert signature["x_ptr"] == "*fp16"
    assert attributes["x_ptr"] == attributes["channels"] == "D"
    assert not {"residual_ptr", "pixels", "width", "stride_rb"} & set(attributes)


def test_numbers_past_32_bits_are_passed_in_64():
    x = torch.empty(2, 32, 8192, 16384, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    (launch,) = RESIDUAL_ADD.plan(RESIDUAL_ADD.bind(x=x, residual=x))[1]
    signature = dict(specialization_of(launch, MACHINES["sm_90"]).signature)
    assert signature["stride_xb"] == "i64"
    assert signature["stride_xh"] == "i32"


def test_every_operator_has_shapes():
    assert set(SHAPES) == set(OPERATORS)
