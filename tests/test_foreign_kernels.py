"""Other people's kernels in the emulator: right numbers and no finding; with a fault planted, its line is told."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import foreign_kernels

from ldmperf.profiling.emulator.emulation import emulated

leaky_relu = torch.nn.functional.leaky_relu


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, Y, ROWS = normal(1000), normal(1000, seed=1), normal(37, 200)
A, B = normal(70, 52, dtype=torch.float16), normal(52, 90, dtype=torch.float16, seed=1)
BINS = torch.randint(0, 13, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)

# Of a module of foreign kernels: a call of it, the same in float64, a relative error that only rounding makes.
CALLS = {
    "add": (lambda kernels: kernels.add(X, Y), X.double() + Y.double(), 1e-7),
    "softmax": (lambda kernels: kernels.softmax(ROWS), ROWS.double().softmax(1), 1e-6),
    "persistent softmax": (lambda kernels: kernels.persistent_softmax(ROWS), ROWS.double().softmax(1), 1e-6),
    "matmul": (lambda kernels: kernels.matmul(A, B), A.double() @ B.double(), 5e-4),
    "activated matmul": (
        lambda kernels: kernels.matmul(A, B, "leaky_relu"),
        leaky_relu(A.double() @ B.double()),
        5e-4,
    ),
    "even matmul": (
        lambda kernels: kernels.masked_matmul(A[:, :32], B[:32]),
        A[:, :32].double() @ B[:32].double(),
        5e-4,
    ),
    "masked matmul": (
        lambda kernels: kernels.masked_matmul(A, B.T.contiguous().T, "leaky_relu"),
        leaky_relu(A.double() @ B.double()),
        5e-4,
    ),
    "histogram": (
        lambda kernels: kernels.histogram(BINS, X, 13)[1],
        torch.zeros(13).double().index_add(0, BINS.long(), X.double()),
        1e-6,
    ),
    "column sums": (lambda kernels: kernels.column_sums(A), A.double().sum(0), 1e-6),
}


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_kernels_as_others_write_them(arch):
    with emulated(arch, strict=True) as emulation:
        for name, (call, exact, tolerance) in CALLS.items():
            result = call(foreign_kernels)
            emulation.check_written(result)
            error = float((result.double() - exact).norm() / exact.norm())
            assert error < tolerance, name
        counts, _ = foreign_kernels.histogram(BINS, X, 13)
    assert counts.tolist() == torch.bincount(BINS, minlength=13).tolist()
    # Seven kernels, the autotuned ones with both configurations and more than once.
    assert len(emulation.kernels) == 7
    assert emulation.launches == 3 + 3 + 1 + 2 * 3 + 2 + 1


DIVIDED = "weights / tl.sum(weights, axis=0), mask="
ADDED = "acc += tl.load(c_ptrs, mask=(out_m[:, None] < m) & (out_n[None, :] < n))\n    "
STORED = "tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(out_m"
NOT_ATOMIC = """weights += tl.load(sum_ptr + bins, mask=inside)
    tl.store(sum_ptr + bins, weights, mask=inside)"""
INITIAL = "acc = tl.load(out_ptr + offs_n, mask=offs_n < columns, other=0.0)"
# A call of the above, what its text is replaced by, the kind of finding, a part of the line that it is found at.
FAULTS = {
    "add: no mask": ("add", "x + y, mask=inside)", "x + y)", "out of bounds", "x + y)"),
    "add: offset": (
        "add",
        "out_ptr + offs,",
        "out_ptr + offs - tl.program_id(0),",
        "race of programs",
        "offs - tl",
    ),
    "add: out is read": ("add", "tl.load(y_ptr", "tl.load(out_ptr", "uninitialised", "y = tl.load(out_ptr"),
    "softmax: no mask": (
        *("softmax", ', mask=offs < columns, other=-float("inf")', ""),
        *("out of bounds", "x = tl.load(x_ptr + row * stride_x + offs)"),
    ),
    "softmax: stride": (
        *("softmax", f"row * stride_out + offs, {DIVIDED}offs", f"row * (stride_out - 1) + offs, {DIVIDED}offs"),
        *("race of programs", "(stride_out - 1)"),
    ),
    "softmax: out is read": (
        *("softmax", "x_ptr + row * stride_x + offs, mask=offs", "out_ptr + row * stride_x + offs, mask=offs"),
        *("uninitialised", "x = tl.load(out_ptr"),
    ),
    "persistent softmax: no mask": (
        *("persistent softmax", f"{DIVIDED}inside", f"{DIVIDED}offs >= 0"),
        *("out of bounds", "mask=offs >= 0"),
    ),
    "persistent softmax: rows of others": (
        *("persistent softmax", f"row * stride_out + offs, {DIVIDED}inside", f"offs, {DIVIDED}inside"),
        *("race of programs", "out_ptr + offs, weights"),
    ),
    "matmul: no mask of k": (
        *("matmul", "tl.load(a_ptrs, mask=offs_k[None, :] < left, other=0.0)", "tl.load(a_ptrs)"),
        *("out of bounds", "a = tl.load(a_ptrs)"),
    ),
    # Of tiles that are stored at once.
    "matmul: another's tile": (
        *("matmul", "out_n = pid_n * BLOCK_N", "out_n = pid_m * BLOCK_N"),
        *("conflicting stores", "mask=(out_m[:, None] < m)"),
    ),
    "matmul: out is added to": ("matmul", STORED, ADDED + STORED, "uninitialised", "acc += tl.load(c_ptrs"),
    "masked matmul: no mask of k": (
        *("masked matmul", 'args["k"] % args["BLOCK_K"] == 0', "True"),
        *("out of bounds", "a = tl.load(a_ptr + offs_m"),
    ),
    "masked matmul: another's tile": (
        *("masked matmul", "c_ptr + offs_m[:, None]", "c_ptr + (offs_m % BLOCK_M)[:, None]"),
        *("conflicting stores", "mask=(offs_m[:, None] < m)"),
    ),
    "histogram: no mask": (
        *("histogram", "tl.load(x_ptr + offs, mask=inside)\n    weights", "tl.load(x_ptr + offs)\n    weights"),
        *("out of bounds", "bins = tl.load"),
    ),
    "histogram: no atomic": (
        *("histogram", "tl.atomic_add(sum_ptr + bins, weights, mask=inside)", NOT_ATOMIC),
        *("race of programs", "tl.store(sum_ptr"),
    ),
    "histogram: no zeros": (
        *("histogram", "sums = torch.zeros(", "sums = torch.empty("),
        *("uninitialised", "tl.atomic_add(sum_ptr"),
    ),
    "column sums: no mask": (
        *("column sums", "(offs_m[:, None] < rows) &", "(offs_m[:, None] >= 0) &"),
        *("out of bounds", "x = tl.load(x_ptr + offs_m"),
    ),
    "column sums: two in one": (
        *("column sums", "tl.store(out_ptr + offs_n, acc", "tl.store(out_ptr + offs_n // 2, acc"),
        *("conflicting stores", "offs_n // 2, acc"),
    ),
    "column sums: out is added to": (
        *("column sums", "acc = tl.zeros((BLOCK_N,), dtype=tl.float32)", INITIAL),
        *("uninitialised", "acc = tl.load(out_ptr"),
    ),
}


def broken_kernels(folder, old, new):
    """The module of foreign kernels with a part of its text replaced, and its lines."""
    # One line further down: triton keeps kernels by their text and first line, not by their file.
    text = "\n" + Path(foreign_kernels.__file__).read_text()
    assert text.count(old) == 1
    text = text.replace(old, new)
    path = folder / "broken_kernels.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, text.splitlines()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_at_its_line(name, tmp_path):
    call, old, new, kind, line = FAULTS[name]
    module, lines = broken_kernels(tmp_path, old, new)
    (number,) = (number for number, text in enumerate(lines, 1) if line in text)
    with emulated("sm_90") as emulation:
        CALLS[call][0](module)
    found = {(finding.kind, finding.source) for finding in emulation.findings}
    assert (kind, f"broken_kernels.py:{number}") in found
