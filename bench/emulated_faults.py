"""One fault of each kind that the emulator finds: kernels of examples/emulate, and compiled code that is edited.

Triton places barriers, waits and fences itself, so that some faults cannot be written in it. There an instruction
is taken away, or executed by half of a warp. docs/emulate.md shows all of them.
"""

import dataclasses
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated_mutants import BF16, Subject, run_subject

from ldmperf.profiling.emulator.emulation import emulated
from ldmperf.profiling.emulator.findings import Finding
from ldmperf.profiling.static.shapes import Shape

EXAMPLES = Path(__file__).parents[1] / "examples" / "emulate" / "faults.py"
# By kind: the function of examples/emulate/faults.py that has it.
WRITTEN = {
    "race": "race",
    "race of programs": "race_of_programs",
    "conflicting stores": "conflicting_stores",
    "out of bounds": "out_of_bounds",
    "misaligned": "misaligned",
    "uninitialised": "uninitialised",
    "division by zero": "division_by_zero",
}
ATTENTION = Subject("attention", "attention", Shape(BF16, 1, height=12, width=12, heads=1, head_dim=64))
TEXT = Subject("attention to a text", "attention", Shape(BF16, 1, height=10, width=13, heads=1, context=77))
NORM = Subject("group norm", "group_norm_silu", Shape(BF16, 1, channels=64, height=8, width=8))
DEPENDENT = dataclasses.replace(NORM, name="group norm, a dependent launch", dependent=True)


@dataclass(frozen=True)
class Edit:
    """What is done to a compiled kernel: the `which`-th match of a pattern, 0 the first, -1 the last."""

    kind: str
    words: str
    subject: Subject
    pattern: str
    replacement: str = ""
    which: int = 0
    # Before the code, on a line of its own.
    before: str = ""

    def __call__(self, ptx: str) -> str:
        found = list(re.finditer(self.pattern, ptx, re.MULTILINE))
        if not found:
            return ptx
        match = found[self.which]
        changed = ptx[: match.start()] + match.expand(self.replacement) + ptx[match.end() :]
        if not self.before:
            return changed
        start = changed.index("// %bb.0:")
        return changed[:start] + self.before + changed[start:]


WAIT = r"^\s*griddepcontrol\.wait.*\n"
# %half0 is true for half of each warp, %wide0 is a lane's number.
HALF = """
	.reg .pred %half<2>;
	.reg .b32 %lane<2>;
	.reg .b64 %wide<2>;
	mov.u32 %lane0, %laneid;
	setp.lt.u32 %half0, %lane0, 16;
	cvt.u64.u32 %wide0, %lane0;
"""
EDITS = (
    Edit("copy not awaited", "a cp.async.wait_group taken away", ATTENTION, r"^\s*cp\.async\.wait_group.*$"),
    Edit("matmul not awaited", "a wgmma.wait_group taken away", ATTENTION, r"^\s*wgmma\.wait_group.*$"),
    Edit("missing fence", "a fence.proxy.async taken away", TEXT, r"^\s*fence\.proxy.*$", "", -1),
    Edit(
        "differing descriptor",
        "each thread's number added to a matrix descriptor",
        ATTENTION,
        r"^(\s*)(wgmma\.mma_async[^{]*\{[^}]*\}, %rd\d+, (%rd\d+).*)$",
        r"\1add.s64 \3, \3, %wide0;\n\1\2",
        0,
        HALF,
    ),
    Edit(
        "divergent barrier",
        "a bar.sync by half of each warp",
        NORM,
        r"^(\s*)(bar\.sync.*)$",
        r"\1@%half0 \2",
        0,
        HALF,
    ),
    Edit("divergent warp", "a shuffle by half of each warp", NORM, r"^(\s*)(shfl\..*)$", r"\1@%half0 \2", 0, HALF),
    Edit("unwritten register", "the thread's number never read", NORM, r"^\s*mov\.u32\s+%r\d+, %tid\.x;$"),
    Edit("unwritten result", "a store taken away", NORM, r"^\s*(?:@%p\d+ )?st\.global.*$"),
    Edit(
        "early read",
        "a griddepcontrol.wait put behind the loads",
        DEPENDENT,
        rf"({WAIT})((?:.*\n)*?)(\s*(?:@%p\d+ )?st\.global)",
        r"\2\1\3",
    ),
    Edit(
        "early write",
        "a griddepcontrol.wait put behind the stores",
        DEPENDENT,
        rf"({WAIT})((?:.*\n)*)(\s*ret;)",
        r"\2\1\3",
    ),
    Edit("no wait", "a griddepcontrol.wait taken away", DEPENDENT, WAIT),
    Edit("unfinished", "the last wait for copies taken away", TEXT, r"^\s*cp\.async\.wait_group.*$", "", -1),
)


def find_written(kind: str, arch: str = "sm_90") -> Finding:
    """What is said of the function that has the fault."""
    spec = importlib.util.spec_from_file_location("emulate_faults", EXAMPLES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    with emulated(arch) as emulation:
        getattr(module, WRITTEN[kind])()
    return next(finding for finding in emulation.findings if finding.kind == kind)


def find_edited(edit: Edit, arch: str = "sm_90") -> Finding:
    """What is said of the edited kernel."""
    emulation, _ = run_subject(edit.subject, arch, edit)
    return next(finding for finding in emulation.findings if finding.kind == edit.kind)
