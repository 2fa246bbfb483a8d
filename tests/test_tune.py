"""The search for launch configurations: the choice among timings, the bound, and the table it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tune
import tune_search

from ldmperf.kernels import OPERATORS
from ldmperf.kernels import _launch as launch
from ldmperf.profiling.kernel_bench.selection import first_of_each_key, head_dim_jobs, jobs
from ldmperf.profiling.measure.timing import Deadline
from ldmperf.profiling.step.calls import attention_calls, family_calls

HEAD = {"gpu": "NVIDIA H200", "commit": "a" * 40, "versions": {"torch": "2.13.0"}}


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int = 4


def timer(times: dict[Any, float], seen: list[Any] | None = None) -> Callable[[Any], float]:
    def time_one(config: Any) -> float:
        if seen is not None:
            seen.append(config)
        if times[config] < 0:
            raise tune.Wrong("off by 0.5\nmore")
        return times[config]

    return time_one


def test_the_fastest_right_candidate_is_chosen() -> None:
    times = {None: 1.0, Config(1): 0.9, Config(2): 0.5, Config(3): -1.0, Config(4): 0.7}
    found = tune_search.search([Config(i) for i in (1, 2, 3, 4)], timer(times), Deadline(None))
    assert (found.best, found.ms, found.now, found.tried) == (Config(2), 0.5, 1.0, 4)
    assert found.failures == ("Config(block=3, num_warps=4): off by 0.5",)


def test_what_is_used_now_stays_unless_beaten_by_more_than_noise() -> None:
    assert tune_search.search([Config(1)], timer({None: 1.0, Config(1): 0.985}), Deadline(None)).best is None
    assert tune_search.search([Config(1)], timer({None: 1.0, Config(1): 0.97}), Deadline(None)).best == Config(1)
    assert tune_search.search([], timer({None: 1.0}), Deadline(None)).best is None


def test_a_lucky_first_time_does_not_win() -> None:
    lucky = iter([0.1])

    def time_one(config: Any) -> float:
        if config == Config(1):
            return next(lucky, 2.0)
        return {None: 1.0, Config(2): 0.8}[config]

    assert tune_search.search([Config(1), Config(2)], time_one, Deadline(None)).best == Config(2)


def test_a_search_that_is_cut_short_chooses_from_what_it_saw() -> None:
    now = 0.0
    seen: list[Any] = []
    times = {None: 1.0} | {Config(i): 0.5 + 0.01 * i for i in range(20)}
    inner = timer(times, seen)

    def time_one(config: Any) -> float:
        nonlocal now
        now += 1.0
        return inner(config)

    found = tune_search.search([Config(i) for i in range(20)], time_one, Deadline(5.5, clock=lambda: now), "key")
    tried = seen[1:6]
    assert found.tried == 5
    assert found.best == min(tried, key=lambda c: c.block)


def test_what_an_operator_recommends_is_tried_first_and_the_rest_in_a_fixed_random_order() -> None:
    candidates = [Config(i) for i in range(40)]
    order = tune_search.search_order(candidates, "key")
    assert order[: tune_search.HEAD] == candidates[: tune_search.HEAD]
    assert sorted(order, key=lambda config: config.block) == candidates
    assert order != candidates
    assert order == tune_search.search_order(candidates, "key") != tune_search.search_order(candidates, "other")


def a_call(operator: str, which: int = 0, size: str = "39M") -> Any:
    return [case for case in family_calls(size, 2, "bfloat16") if case.operator == operator][which]


def names(case: Any) -> set[str]:
    return {tensor.name for tensor in tune.read_once(case).tensors}


def test_a_step_reads_weights_once_and_keys_of_a_text_but_not_of_its_own_tokens() -> None:
    assert names(a_call("linear")) >= {"weight", "norm_weight", "norm_bias"}
    assert "x" not in names(a_call("linear"))
    own, text = attention_calls(40, 64, 2)
    assert (names(own), names(text)) == (set(), {"k", "v"})
    with_skip = next(c for c in family_calls("39M", 2, "bfloat16") if any(t.name == "skip" for t in c.tensors))
    assert {"skip", "weight", "bias"} <= names(with_skip)
    assert not names(with_skip) & {"x"}


def test_activations_stay_where_they_are_and_weights_rotate_past_the_cache() -> None:
    case = a_call("linear")
    arguments = case.arguments("cpu")
    weights = sum(t.nbytes for t in tune.read_once(case).tensors)
    calls = tune.as_in_a_step(case, arguments, l2_bytes=10 * weights)
    assert len(calls) == 20
    assert {id(call["x"]) for call in calls} == {id(arguments["x"])}
    assert len({call["weight"].data_ptr() for call in calls}) == 20
    assert all(call["weight"].shape == arguments["weight"].shape for call in calls)
    assert all(call["eps"] == arguments["eps"] for call in calls if "eps" in arguments)
    # A call without weights is repeated as it is; a few large ones are repeated in turn.
    (own, _) = attention_calls(8, 16, 2)
    calls = tune.as_in_a_step(own, own.arguments("cpu"), l2_bytes=2**20)
    assert len(calls) == tune.LEAST_CALLS
    assert len({id(call["q"]) for call in calls}) == 1
    calls = tune.as_in_a_step(case, arguments, l2_bytes=weights)
    assert len(calls) == tune.LEAST_CALLS
    assert len({call["weight"].data_ptr() for call in calls}) == 2


def test_the_table_tells_of_every_entry_what_the_cache_held() -> None:
    table = tune_search.merged({}, HEAD, "geglu", "a", found(Config(8)))
    table = tune_search.merged(table, HEAD, "geglu", "b", found(Config(8)), "step")
    table = tune_search.merged(table, HEAD, "linear", "a", found(None, 0.5), "step")
    assert table["l2"] == {"geglu": {"a": "cold", "b": "step"}, "linear": {"a": "step"}}
    assert tune_search.merged(table, HEAD, "geglu", "b", found(Config(1)))["l2"]["geglu"]["b"] == "cold"
    # A table from before there were two.
    old = {"schema_version": 1, **HEAD, "kernels": {"geglu": {"old": {"block": 1}}}}
    assert tune_search.merged(old, HEAD, "geglu", "a", found(Config(8)))["l2"] == {"geglu": {"a": "cold"}}


def test_a_candidate_that_cannot_be_launched_is_counted_and_not_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = list(first_of_each_key(jobs(("geglu",), ("39M",), (2,), "bfloat16")))[:1]
    seen: list[Any] = []

    def timer_of(case: Any) -> Callable[[Any], float]:
        return lambda config: seen.append(config) or 1.0

    def refused(case: Any, config: Any) -> str | None:
        return "too much shared memory" if config.num_warps == 8 else None

    tune.tune(given, timer_of, tmp_path / "t.json", HEAD, Deadline(None), 60.0, refused=refused)
    assert {config.num_warps for config in seen if config is not None} == {1, 2, 4}
    candidates = OPERATORS["geglu"].candidates(given[0][1].call.bound("meta"))
    failed = sum(config.num_warps == 8 for config in candidates)
    assert f"{len(candidates)} of {len(candidates)} tried, {failed} failed" in capsys.readouterr().err


def test_candidates_are_compiled_in_the_order_in_which_they_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real compiler, two of them; the third cannot be launched."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    given = list(first_of_each_key(jobs(("geglu",), ("39M",), (2,), "bfloat16")))[:1]
    case = given[0][1].call
    operator = OPERATORS["geglu"]
    good, bad = (
        operator.candidates(case.bound("meta"))[0],
        type(operator.candidates(case.bound("meta"))[0])(1, 3, 1),
    )
    monkeypatch.setitem(OPERATORS, "geglu", replace(operator, candidates=lambda call: [bad, good]))
    refused = tune.compile_ahead(given, launch.Chip("NVIDIA H200", 132), 60.0)
    assert refused(case, good) is None
    assert refused(case, bad) is not None
    told = capsys.readouterr().err
    assert "1 candidate cannot be launched" in told
    assert tune.compile_ahead(given, launch.Chip("gpu", 132, "sm_75"), 60.0)(case, bad) is None


def test_what_is_wrong_now_or_loses_the_device_ends_the_search() -> None:
    with pytest.raises(tune.Wrong):
        tune_search.search([Config(1)], timer({None: -1.0, Config(1): 1.0}), Deadline(None))

    def lost(config: Any) -> float:
        if config is not None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 1.0

    with pytest.raises(RuntimeError, match="illegal"):
        tune_search.search([Config(1)], lost, Deadline(None))


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: out of memory", False),
        ("Triton Error [CUDA]: out of memory", False),
        ("out of resource: shared memory, Required: 300000, Hardware limit: 232448", False),
        ("Triton Error [CUDA]: out of resource: shared memory", False),
        ("off by 0.5", False),
    ],
)
def test_only_what_loses_the_device_is_fatal(text: str, fatal: bool) -> None:
    assert tune_search.is_fatal(RuntimeError(text)) == fatal


def test_a_finalist_whose_code_has_faults_is_passed_over_for_the_next_best() -> None:
    times = {None: 1.0, Config(1): 0.5, Config(2): 0.4, Config(3): 0.6, Config(4): 0.985}
    asked: list[Any] = []

    def search(faulty: set[Any]) -> Any:
        def faults(config: Any) -> list[str]:
            asked.append(config)
            return ["4 spill loads", "ptxas C7510"] if config in faulty else []

        asked.clear()
        return tune_search.search(list(times)[1:], timer(times), Deadline(None), faults=faults)

    found = search({Config(2)})
    assert (found.best, found.ms, asked) == (Config(1), 0.5, [Config(2), Config(1)])
    assert found.passed_over == ("Config(block=2, num_warps=4), 0.4 ms: 4 spill loads; ptxas C7510",)
    # What is used now stays where nothing that is better by more than noise is left.
    found = search({Config(1), Config(2), Config(3)})
    assert (found.best, found.ms, len(found.passed_over)) == (None, 1.0, 3)
    assert asked == [Config(2), Config(1), Config(3)]


def test_no_entry_with_faults_is_written_and_the_output_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = list(first_of_each_key(jobs(("geglu",), ("39M",), (2,), "bfloat16")))[:1]
    key, job = given[0]
    worse, best = OPERATORS["geglu"].candidates(job.call.bound("meta"))[:2]
    times = {best: 0.5, worse: 0.6}

    def faults(case: Any, config: Any) -> list[str]:
        assert case == job.call
        return ["8 spill stores"] if config == best else []

    path = tmp_path / "t.json"
    timer_of = lambda case: lambda config: times.get(config, 1.0)  # noqa: E731
    tune.tune(given, timer_of, path, HEAD, Deadline(None), 60.0, faults=faults)
    assert json.loads(path.read_text())["kernels"]["geglu"] == {key: vars(worse)}
    assert f"faster, and not taken: {best}, 0.5 ms: 8 spill stores" in capsys.readouterr().err


def test_faults_are_those_of_both_16_bit_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real compiler: 256 queries by 4 warps have no room for their accumulators."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = a_call("attention")
    candidate = OPERATORS["attention"].candidates(case.bound("meta"))[0]
    good = replace(candidate, block_m=64, block_n=64, num_warps=4, num_stages=2)
    faults = tune.faults_on(launch.Chip("NVIDIA H200", 132))
    assert faults(case, good) == []
    bad = faults(case, replace(good, block_m=256))
    assert {fault.partition(",")[0] for fault in bad} == {"bfloat16", "float16"}
    assert all("spill" in fault or "stack" in fault or "local" in fault or "ptxas" in fault for fault in bad)
    # What the compiler refuses is a fault as well.
    assert "cannot be inspected" in faults(case, replace(good, block_m=3))[0]


def test_torch_is_timed_with_the_finalists() -> None:
    times = {None: 1.0, Config(1): 0.5, Config(2): 0.7, tune_search.TORCH: 0.4}
    configs = [Config(1), Config(2)]
    found = tune_search.search(configs, timer(times), Deadline(None), with_torch=True)
    assert (found.best, found.ms, found.torch, found.torch_is_faster) == (Config(1), 0.5, 0.4, True)
    found = tune_search.search(configs, timer(times | {tune_search.TORCH: 0.6}), Deadline(None), with_torch=True)
    assert (found.best, found.torch_is_faster) == (Config(1), False)
    # Against what is used now where that is the best of ours.
    found = tune_search.search([], timer(times), Deadline(None), with_torch=True)
    assert (found.best, found.ms, found.torch_is_faster) == (None, 1.0, True)


def test_torch_is_asked_for_no_statistics_of_a_convolution_but_keeps_those_that_are_given() -> None:
    given = torch.ones(1)
    asked = {"x": 1, "statistics": True}
    assert tune.as_timed(tune_search.TORCH, asked) == {"x": 1, "statistics": False}
    assert tune.as_timed(Config(1), asked) is tune.as_timed(None, asked) is asked
    for arguments in ({"x": 1}, {"statistics": False}, {"statistics": given}):
        assert tune.as_timed(tune_search.TORCH, arguments) is arguments


def test_torch_that_is_wrong_or_not_asked_for_has_no_time() -> None:
    seen: list[Any] = []
    found = tune_search.search([Config(1)], timer({None: 1.0, Config(1): 0.5}, seen), Deadline(None))
    assert (found.torch, found.torch_is_faster) == (None, False)
    assert tune_search.TORCH not in seen
    times = {None: 1.0, Config(1): 0.5, tune_search.TORCH: -1.0}
    found = tune_search.search([Config(1)], timer(times), Deadline(None), with_torch=True)
    assert (found.best, found.torch, found.torch_is_faster) == (Config(1), None, False)
    assert found.failures == ("torch: off by 0.5",)


def found(best: Any, torch_ms: float | None = None) -> Any:
    return tune_search.Found(best, 1.0, 1.0, 1, (), torch_ms)


def test_entries_join_what_is_there(tmp_path: Path) -> None:
    before = {
        "schema_version": 1,
        **HEAD,
        "commit": "b" * 40,
        "kernels": {"geglu": {"old": {"block": 1}, "key": {"block": 2}}, "layer_norm": {"x": {"block": 3}}},
    }
    after = tune_search.merged(before, HEAD, "geglu", "key", found(Config(8)))
    assert after["kernels"] == {
        "geglu": {"key": {"block": 8, "num_warps": 4}, "old": {"block": 1}},
        "layer_norm": {"x": {"block": 3}},
    }
    assert after["commit"] == "a" * 40
    assert before["kernels"]["geglu"]["key"] == {"block": 2}  # type: ignore[index]
    for text in ("{", json.dumps(before | {"gpu": "NVIDIA A100"}), json.dumps(before | {"schema_version": 2})):
        path = tmp_path / "table.json"
        path.write_text(text)
        with pytest.raises(SystemExit, match="move it away"):
            tune_search.load_table(path, "NVIDIA H200")


def test_the_table_names_the_keys_where_torch_is_faster() -> None:
    table: dict[str, Any] = {}
    for key, best, torch_ms in (("a", Config(8), 0.5), ("b", None, 0.5), ("c", None, 2.0), ("d", Config(1), 2.0)):
        table = tune_search.merged(table, HEAD, "attention", key, found(best, torch_ms))
    entry = {"block": 8, "num_warps": 4}
    assert table["torch"] == {"attention": ["a", "b"]}
    # Ours stays in the table where torch is faster; null is the kernel's default.
    assert table["kernels"]["attention"] == {"a": entry, "b": None, "c": None, "d": {"block": 1, "num_warps": 4}}
    # Measured again: torch is slower now, and nothing beats the entry.
    table = tune_search.merged(table, HEAD, "attention", "a", found(None, 2.0))
    assert table["torch"] == {"attention": ["b"]}
    assert table["kernels"]["attention"]["a"] == entry
    # Where torch was not timed, nothing is said of it.
    assert tune_search.merged(table, HEAD, "attention", "b", found(Config(1)))["torch"] == {"attention": ["b"]}


def test_auto_follows_what_the_tuner_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chip = launch.Chip("NVIDIA H200", 132)
    path = tmp_path / f"{chip.file_name}.json"
    given = list(first_of_each_key(head_dim_jobs((8, 64), (64,), (2,), "bfloat16")))

    def timer_of(case: Any) -> Callable[[Any], float]:
        torch_ms = 0.5 if case.attention.head_dim == 64 else 2.0
        return lambda config: torch_ms if config == tune_search.TORCH else 1.0

    assert tune.tune(given, timer_of, path, HEAD, Deadline(None), 60.0) == len(given) == 4
    assert capsys.readouterr().err.count("which auto will take") == 2
    monkeypatch.setattr(launch, "TUNED_FOLDER", tmp_path)
    for key, job in given:
        expected = "torch" if job.call.attention.head_dim == 64 else "triton"
        assert launch.fastest("attention", chip, lambda key=key: key, unmeasured="torch") == expected


def test_each_entry_is_on_disk_at_once_and_the_kernels_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = launch.Chip("NVIDIA H200", 132)
    path = tmp_path / f"{chip.file_name}.json"
    given = list(first_of_each_key(jobs(("geglu",), ("39M",), (2,), "bfloat16")))
    on_disk: list[int] = []

    def timer_of(case: Any) -> Callable[[Any], float]:
        on_disk.append(len(json.loads(path.read_text())["kernels"]["geglu"]) if path.exists() else 0)
        best = OPERATORS["geglu"].candidates(case.bound("meta"))[-1]
        return lambda config: 0.5 if config == best else 1.0

    assert tune.tune(given, timer_of, path, HEAD, Deadline(None), 60.0) == len(given) == 4
    assert on_disk == [0, 1, 2, 3]
    monkeypatch.setattr(launch, "TUNED_FOLDER", tmp_path)
    for key, job in given:
        candidates = OPERATORS["geglu"].candidates(job.call.bound("meta"))
        assert launch.tuned("geglu", key, chip, type(candidates[0])) == candidates[-1]


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("out of resource: shared memory")]
)
def test_a_key_that_cannot_be_searched_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failure: Exception
) -> None:
    def fails(case: Any) -> Any:
        raise failure

    given = list(first_of_each_key(jobs(("geglu",), ("39M",), (2,), "bfloat16")))
    path = tmp_path / "table.json"
    assert tune.tune(given, fails, path, HEAD, Deadline(None), 60.0) == 0
    assert capsys.readouterr().err.count(str(failure)) == len(given)
    assert not path.exists()


def test_a_lost_device_ends_the_tuning(tmp_path: Path) -> None:
    def lost(case: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    given = list(first_of_each_key(jobs(("geglu",), ("39M",), (2,), "bfloat16")))
    with pytest.raises(RuntimeError, match="illegal"):
        tune.tune(given, lost, tmp_path / "table.json", HEAD, Deadline(None), 60.0)


def test_calls_of_one_key_are_searched_once() -> None:
    keys = [key for key, _ in first_of_each_key(jobs(("group_norm_silu",), ("39M",), (2,), "bfloat16"))]
    calls = [call for call in family_calls("39M", 2, "bfloat16") if call.operator == "group_norm_silu"]
    assert len(keys) == len(set(keys)) < len(calls)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_candidate_of_the_family_can_be_planned(name: str) -> None:
    for _, job in first_of_each_key(jobs((name,), ("39M", "866M"), (2,), "bfloat16")):
        operator, call = OPERATORS[name], job.call.bound("meta")
        candidates = operator.candidates(call)
        assert candidates
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            assert operator.plan(call, config=config)[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["gelu"], "geglu"),
        (["geglu", "--size", "1M"], "39M"),
        (["geglu", "--head-dim", "8"], "attention"),
        (["attention", "--head-dim", "0"], "from 1"),
        (["geglu", "--batch", "2,3"], "--batch 3: tuned tables are of 1, 2, 4, 8, 16, 32, 64"),
        (["attention", "--head-dim", "40,41"], "--head-dim 41"),
        (["attention", "--head-dim", "40", "--tokens", "4096,2048"], "--tokens 2048"),
        (["geglu"], "GPU"),
    ],
)
def test_a_wrong_call_is_one_line(given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and told == "GPU":
        pytest.skip("there is a GPU")
    assert tune.main(given) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert len(errors.splitlines()) == 1
