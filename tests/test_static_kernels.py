"""Every kernel of a denoising step compiled for chips that need not be there, and what the machine code shows.

Compiled here is what `checked` selects: one launch of each tile, and attention at every head dimension.
`bench/static_baseline.py --every` compiles the whole family, and attention in every dtype for every chip.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton

from ldmperf.kernels import OPERATORS
from ldmperf.kernels._launch import in_other_16_bits
from ldmperf.profiling.compare.code_gate import regressions
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.measure.recorded import utc_now
from ldmperf.profiling.static.baseline import checked, entries, read_baseline
from ldmperf.profiling.static.inspection_records import compiler_environment
from ldmperf.profiling.static.launch_items import inspect_items
from ldmperf.profiling.static.planned import family_launches
from ldmperf.profiling.static.score_tile import score_tile
from ldmperf.profiling.static.shapes import SHAPES, Shape
from ldmperf.profiling.static.tuned import calls_served, tuned_items
from ldmperf.profiling.step.calls import FAMILY_HEAD_DIMS, family_calls

BASELINES = Path(__file__).parents[1] / "bench" / "static"

# Accesses of a launch's large tensors that may be narrower than 16 bytes a thread: to how much, and why.
NARROW = {
    ("sampler_update_kernel", name): (
        8,
        "a pixel's four channels are 8 bytes; 16 would be two pixels of a thread, "
        "whose float32 registers would then be 32 bytes apart",
    )
    for name in ("output_ptr", "input_ptr")
}
# Bytes of stack for spills outside the hot loop, by (triton, architecture, kernel), and why.
SPILLS = {
    ("3.9.0", "sm_80", "group_norm_apply_kernel"): (
        16,
        "ptxas 12.9 stops at 64 registers and parks two addresses of "
        "the prologue; ptxas 12.8 of the releases before needs 59 and parks none",
    ),
}
# A tensor is large where it is at least this share of what the launch moves.
LARGE = 0.1


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What was compiled, as `ldmperf inspect --json` tells it; in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton-cache")))
        yield list(inspect_items(checked()))


def described(result):
    return (
        f"{result['arch']} {result['dtype']} {result['kernel']} {result['constants']} warps={result['num_warps']}"
    )


def test_every_operator_dtype_and_architecture_is_compiled(results):
    kernels = {}
    for operator in OPERATORS.values():
        build, _, defaults = SHAPES[operator.name]
        for launch in operator.plan(operator.bind(**build(Shape(**defaults))))[1]:
            kernels[launch.name] = operator.name
    seen = {(result["kernel"], result["arch"]) for result in results}
    assert {(kernel, arch) for kernel in kernels for arch in MACHINES} <= seen
    assert {result["dtype"] for result in results} == {"bfloat16", "float16", "float32"}


def is_attention(result):
    return "HEAD_DIM" in result["constants"]


def attention_widths(result, rows):
    """The bytes of a thread's accesses to [rows, head dimension] of each of the parts that hold it.

    16, unless the alignment of a row is less (a head dimension that is no multiple of 8 in 16 bits), or a part has
    less for each thread.
    """
    constants = {name: int(value) for name, value in result["constants"].items() if value.isdecimal()}
    size = 4 if result["dtype"] == "float32" else 2
    parts = [constants[name] for name in ("PART_1", "PART_2") if constants[name]]
    threads = 32 * result["num_warps"]
    return {
        min(16, constants["ALIGN"] * size, part * rows_of * size // threads) for part in parts for rows_of in rows
    }


def test_attention_is_compiled_at_every_head_dimension(results):
    dims = {arch: set() for arch in MACHINES}
    for result in results:
        if result["kernel"] == "attention_kernel" and result["dtype"] == "bfloat16":
            dims[result["arch"]].add(int(result["constants"]["HEAD_DIM"]))
    assert all(found >= set(FAMILY_HEAD_DIMS) for found in dims.values())
    shorts = {result["arch"] for result in results if result["kernel"] == "short_attention_kernel"}
    assert shorts == set(MACHINES)


def test_attention_multiplies_on_the_matrix_unit_in_its_loop(results):
    """On sm_90 by HGMMA; sums by products of eight columns are HMMA beside it."""
    for result in results:
        if not is_attention(result) or "region" not in result:
            continue
        assert result["region"]["loop"], described(result)
        found = set(result["region"]["matrix"])
        if result["dtype"] == "float32":
            expected = set()
        elif result["arch"] == "sm_90":
            expected = {"HGMMA", "HMMA"} if result["constants"]["MATRIX_SUMS"] == "True" else {"HGMMA"}
        else:
            expected = {"HMMA"}
        assert found == expected, described(result)


def test_attention_is_read_and_written_as_wide_as_its_rows_allow(results):
    for result in results:
        if not is_attention(result) or "region" not in result:
            continue
        constants = result["constants"]
        queries = {int(constants["BLOCK_M"])}
        keys = {
            int(constants[name]) for name in ("BLOCK_N", "KEYS_1", "KEYS_2") if constants.get(name, "0") != "0"
        }
        expected = {"q_ptr": queries, "out_ptr": queries, "k_ptr": keys, "v_ptr": keys}
        found = {name: set() for name in expected}
        for access in result["global_accesses"]:
            found.setdefault(access["argument"], set()).add(access["bytes"])
        for name, rows in expected.items():
            assert found.pop(name) == attention_widths(result, rows), (name, described(result))
        if constants.get("mask_ptr") != "None":
            # A mask has a byte for each key.
            assert found.keys() == {"mask_ptr"}, described(result)
            continue
        assert not found, described(result)
        # And so in the loop's machine code: over keys, or over queries where all keys are held.
        loop = {int(width) for width in result["region"]["global_widths"]}
        assert loop == attention_widths(result, queries if "KEYS_1" in constants else keys), described(result)


def excused_spills(result):
    """The bytes of stack that `SPILLS` allows a launch."""
    return SPILLS.get((triton.__version__, result["arch"], result["kernel"]), (0, ""))[0]


def test_no_kernel_spills_or_exceeds_the_chip(results):
    faulty = []
    for result in results:
        stack = result["resources"].get("stack", 0)
        outside_the_loop = result.get("region", {}).get("loop") and result["region"]["spills"] == 0
        if result["faults"] and not (outside_the_loop and 0 < stack <= excused_spills(result)):
            faulty.append((described(result), result["faults"]))
    assert faulty == []


def test_an_excused_spill_is_still_there(results):
    needed = {(triton.__version__, result["arch"], result["kernel"]) for result in results if result["faults"]}
    assert {key for key in SPILLS if key[0] == triton.__version__} <= needed


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_large_tensors_are_read_and_written_in_16_bytes_a_thread(results, arch):
    narrow, checked, excused = [], 0, set()
    for result in results:
        if result["arch"] != arch or is_attention(result):
            continue
        total = sum(result["tensor_bytes"].values())
        for access in result["global_accesses"]:
            name = access["argument"]
            assert name != "?", described(result)
            if result["tensor_bytes"][name] < LARGE * total:
                continue
            checked += 1
            least, _ = NARROW.get((result["kernel"], name), (16, ""))
            if access["bytes"] < least:
                narrow.append((described(result), access))
            elif access["bytes"] < 16:
                excused.add((result["kernel"], name))
    assert narrow == []
    assert checked > 100
    assert excused == set(NARROW), "an exception that is not needed any more"


def test_the_machine_code_has_these_accesses_too(results):
    """The widths above are of the PTX; in the hot loop the assembler has kept them."""
    for result in results:
        # A front's longest loop is over statistics, which are a few percent of its bytes.
        others = ("sampler_update_kernel", "transformer_front_kernel")
        if "region" in result and result["kernel"] not in others and not is_attention(result):
            assert result["region"]["global_widths"].get("16", 0) > 0, described(result)


def test_no_product_is_serialized(results):
    """By ptxas: C7510 to C7519, for every default, `linear`'s too. A fault would be excused by `SPILLS`."""
    wgmma = [result for result in results if result.get("region", {}).get("matrix", {}).get("HGMMA")]
    assert {result["kernel"] for result in wgmma} >= {
        "attention_kernel",
        "short_attention_kernel",
        "linear_kernel",
    }
    assert [(described(result), result["serialized"]) for result in wgmma if result["serialized"]] == []


def test_scores_are_computed_ahead_only_where_exponentials_run_beside_them(results):
    """Two of five at least between the score product and its wait (the baseline has each); D = 112 to 256 are."""
    ahead = {}
    for result in results:
        if result["constants"].get("AHEAD") == "True" and result["arch"] == "sm_90":
            overlap = result["attention"]["overlap"]
            assert overlap["beside_scores"] >= 0.4 * overlap["exponentials"], described(result)
            ahead.setdefault(result["size"], set()).add(int(result["constants"]["HEAD_DIM"]))
    assert ahead["64x64"] == {dim for dim in FAMILY_HEAD_DIMS if 96 < dim <= 256}


def test_nothing_got_worse_than_the_baseline(results):
    baseline = read_baseline(BASELINES, triton.__version__)
    if baseline is None:
        pytest.skip(
            f"bench/static has no baseline for triton {triton.__version__}; the absolute rules were checked"
        )
    found = regressions(baseline, entries(results, compiler_environment(), utc_now()))
    hint = "\nif this is meant: make static-baseline, and commit bench/static/"
    assert not found, "\n".join(found) + hint


TUNED = Path(__file__).parents[1] / "kernels" / "tuned"
# Calls of the 39M model at batch 2, and tiles that fit them.
ENTRIES = {
    "attention": {
        "head_dim=32 queries=256 keys=256 heads=16 bfloat16": {
            "block_m": 64,
            "block_n": 64,
            "num_warps": 4,
            "num_stages": 3,
        },
        "head_dim=16 queries=1024 keys=1024 heads=16 bfloat16": None,
    },
}


def made_up(tmp_path, gpu="NVIDIA H200", **kernels):
    path = tmp_path / "made-up.json"
    path.write_text(json.dumps({"schema_version": 1, "gpu": gpu, "kernels": kernels}))
    return path


def faults_of(items):
    return [(result["size"], result["faults"]) for result in inspect_items(items, 1) if result["faults"]]


def test_no_committed_tuned_launch_has_a_fault(monkeypatch, tmp_path):
    """Spills and serialized products; kernels/tuned may be empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    items = [item for path in sorted(TUNED.glob("*.json")) for item in tuned_items(path)]
    assert not items or faults_of(items) == []


def test_a_tuned_launch_with_a_fault_is_found(monkeypatch, tmp_path):
    """By a table that is made up; 256 queries by 4 warps have no room for their accumulators."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    good, in_half = tuned_items(made_up(tmp_path, **ENTRIES))
    assert (good.launch.name, good.launch.arguments["BLOCK_N"], good.arch) == ("attention_kernel", 64, "sm_90")
    key, config = next(iter(ENTRIES["attention"].items()))
    half = key.replace("bfloat16", "float16")
    assert (in_half.key, in_half.call.dtype) == (half, "float16")
    assert in_half.launch.arguments["q_ptr"].dtype == torch.float16
    bad, bad_in_half = tuned_items(made_up(tmp_path, attention={key: config | {"block_m": 256}}))
    assert [found for found, _ in faults_of([good, in_half, bad, bad_in_half])] == [key, half]


def test_an_entry_does_not_serve_the_other_16_bit_dtype_where_that_has_its_own(tmp_path):
    key, config = next(iter(ENTRIES["attention"].items()))
    half = key.replace("bfloat16", "float16")
    for own in (config | {"num_stages": 2}, None):
        items = tuned_items(made_up(tmp_path, attention={key: config, half: own}))
        expected = [(key, 3)] if own is None else [(key, 3), (half, 2)]
        assert [(item.key, item.launch.num_stages) for item in items] == expected


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_the_key_of_the_other_16_bit_dtype_is_that_of_the_same_call(name):
    """Kernels swap a word of the key; the oracle is the key of the call in that dtype."""
    case = next(c for c in family_calls("39M", 2, "bfloat16") if c.operator == name)
    in_half = [c for c in family_calls("39M", 2, "float16") if c.operator == name]
    own, other = (OPERATORS[name].tuning_key(one.bound("meta")) for one in calls_served(case))
    assert other in [OPERATORS[name].tuning_key(c.bound("meta")) for c in in_half]
    # A sampler's update is float32 inside, whatever the model's dtype: one key for all.
    assert (in_other_16_bits(own) or own) == other
    assert (in_other_16_bits(other) or other) == own


def test_tuned_entries_of_linear_are_launches_too(tmp_path):
    case = next(case for case in family_calls("39M", 2, "bfloat16") if case.operator == "linear")
    operator, call = OPERATORS["linear"], case.bound("meta")
    key, config = operator.tuning_key(call), operator.candidates(call)[0]
    items = tuned_items(made_up(tmp_path, linear={key: dataclasses.asdict(config)}))
    assert items
    assert {item.launch.name for item in items} <= {"linear_kernel", "norm_linear_kernel", "layer_norm_kernel"}
    assert items[-1].launch.num_warps == config.num_warps


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"gpu": "Radeon VII"}, "the architecture of Radeon VII is not known"),
        (
            {"attention": {"head_dim=7 bfloat16": {"block_m": 64}}},
            "no call of attention has these keys: head_dim=7",
        ),
    ],
)
def test_a_tuned_table_that_cannot_be_compiled_is_refused(tmp_path, monkeypatch, table, message):
    few = family_calls("39M", 2, "bfloat16")
    few = [case for case in few if case.operator == "attention"]
    monkeypatch.setattr("ldmperf.profiling.static.tuned._calls", lambda operator, dtypes: iter(few))
    with pytest.raises(ValueError, match=message):
        tuned_items(made_up(tmp_path, **table))


def test_baselines_are_committed_for_the_oldest_release_and_another():
    """Records like any others, each of one release, whose names are the same in all of them."""
    names = (path.name for path in BASELINES.glob("triton-*.jsonl"))
    versions = {re.fullmatch(r"triton-([\d.]+)\.jsonl", name)[1] for name in names}
    assert "3.6.0" in versions
    assert len(versions) >= 2
    sets = [read_baseline(BASELINES, version) for version in versions]
    assert [{record.environment.triton for record in records} for records in sets] == [{v} for v in versions]
    assert len({frozenset(record.case_id for record in records) for records in sets}) == 1


def test_a_step_on_meta_keeps_the_layout_that_it_has_on_a_device():
    """Were a convolution's output contiguous, half of the launches would be others than those that run."""
    for specialization, launch in family_launches("39M", 2, "bfloat16").items():
        # Attention's tensors have tokens and heads, no pixels.
        if score_tile(launch) is not None:
            continue
        for name in ("x_ptr", "skip_ptr", "residual_ptr", "out_ptr"):
            tensor = launch.arguments.get(name)
            # Attention's four dimensions are no image.
            if tensor is not None and tensor.dim() == 4 and "HEAD_DIM" not in launch.arguments:
                assert tensor.is_contiguous(memory_format=torch.channels_last), (specialization.kernel, name)
