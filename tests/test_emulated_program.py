"""PTX that the emulator reads: statements, registers of blocks in braces, labels, sources, and whole kernels."""

import re

import emulator_kit as kit
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ldmperf.profiling.emulator.emulation import emulated
from ldmperf.profiling.emulator.execution import code_of
from ldmperf.profiling.emulator.findings import KINDS, Findings, lines_of
from ldmperf.profiling.emulator.program import UnknownInstruction, parse_ptx
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static.compile import compile_launch, target
from ldmperf.profiling.static.planned import planned
from ldmperf.profiling.static.shapes import SHAPES, Shape

# ---------------------------------------------------------------- statements


def only(text):
    """The instruction of a statement."""
    (instruction,) = parse_ptx(kit.ptx(text)).instructions
    return instruction


@pytest.mark.parametrize(
    ("text", "guard", "negated", "opcode", "modifiers", "operands"),
    [
        ("ret;", None, False, "ret", (), ()),
        ("@%p1 ret;", "%p1", False, "ret", (), ()),
        ("\t@!%p12\tmov.u32 \t%r1 ,  %tid.x ;", "%p12", True, "mov", ("u32",), ("%r1", "%tid.x")),
        ("@ ! %p3 add.s32 %r1,%r2,-7;", "%p3", True, "add", ("s32",), ("%r1", "%r2", "-7")),
        ("mov.b32 %r1, 0f3F800000;", None, False, "mov", ("b32",), ("%r1", "0f3F800000")),
        ("mov.b64 %rd1, 0d3FF0000000000000;", None, False, "mov", ("b64",), ("%rd1", "0d3FF0000000000000")),
        ("prmt.b32 %r1, %r2, %r3, 0x3340U;", None, False, "prmt", ("b32",), ("%r1", "%r2", "%r3", "0x3340U")),
        ("mov.b32 {_, %rs1}, %r1;", None, False, "mov", ("b32",), (("_", "%rs1"), "%r1")),
        (
            "@%p1 ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];",
            *("%p1", False, "ld", ("global", "L1__evict_last", "v2", "b32"), (("%r1", "%r2"), "[ %rd1 + 0 ]")),
        ),
        (
            "st.shared::cta.b8 [global_smem+16], %rs1;",
            None,
            False,
            "st",
            ("shared__cta", "b8"),
            ("[global_smem+16]", "%rs1"),
        ),
        (
            "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;",
            *(None, False, "cp", ("async", "cg", "shared", "global")),
            ("[ %r1 + 0 ]", "[ %rd1 + 0 ]", "0x10", "%r2"),
        ),
        (
            "shfl.sync.idx.b32 %r1 | %p1, %r2, 0, 31, -1;",
            *(None, False, "shfl", ("sync", "idx", "b32"), ("%r1|%p1", "%r2", "0", "31", "-1")),
        ),
        ("vote.sync.any.pred %p1, !%p2, -1;", None, False, "vote", ("sync", "any", "pred"), ("%p1", "!%p2", "-1")),
        (
            "mad.lo.s32\n\t\t%r1, %r2,\n\t\t%r3, %r4;",
            None,
            False,
            "mad",
            ("lo", "s32"),
            ("%r1", "%r2", "%r3", "%r4"),
        ),
        ("mov.u32 %r1, /* , */ 5; // 6;", None, False, "mov", ("u32",), ("%r1", "5")),
    ],
)
def test_statements(text, guard, negated, opcode, modifiers, operands):
    i = only(text)
    assert (i.guard, i.negated, i.opcode, i.modifiers, i.operands) == (guard, negated, opcode, modifiers, operands)
    named = set(re.findall(r"%[a-z]+\d+", text.split(opcode, 1)[1]))
    assert i.registers == named
    assert [i.bytes_of(name) for name in sorted(named)] == [
        {"p": 1, "rs": 2, "r": 4, "rd": 8}[name.strip("%0123456789")] for name in sorted(named)
    ]


def test_operands_by_position():
    i = only("ld.shared.v2.b32 {%r1, %r2}, [%r3];")
    assert (i.values(0), i.values(1), i.operand(1), i.kind) == (("%r1", "%r2"), ("[%r3]",), "[%r3]", "b32")
    for missing in (lambda: i.operand(0), lambda: i.operand(2), lambda: i.values(2), lambda: i.bytes_of("%q1")):
        with pytest.raises(UnknownInstruction, match=r"ld\.shared\.v2"):
            missing()


def test_lines_sources_and_several_statements_on_a_line():
    body = """
	.loc	1 7 0                           // kernel.py:7:0
	mov.u32 %r1, 1; mov.u32 %r2, 2;;
	.loc	2 86 25                         // other.py:86:25 @[ kernel.py:9:4 ]
	// begin inline asm
	{ mov.u32 %r3, 3; }
	// end inline asm
	.loc	1 8 3
	.pragma "used_bytes_mask 0xf0f";
	ret;
"""
    text = kit.ptx(body)
    instructions = parse_ptx(text).instructions
    assert [i.source for i in instructions] == [
        *["kernel.py:7:0"] * 2,
        "other.py:86:25 @[ kernel.py:9:4 ]",
        ".loc\t1 8 3",
    ]
    for i in instructions:
        assert i.text in text.split("\n")[i.line - 1]


@pytest.mark.parametrize(
    "text",
    [
        "mov.u32 %r1, %r2 %r3;",
        "%r1 = add;",
        "@%q1 mov.u32 %r1, 0;",
        "mov.u32 %q1, 0;",
        "mov.u32 %r1, %clock;",
        "mov.u64 %rd1, %globaltimer;",
        "mov.b64 %rd1, table;",
        "ld.shared.b32 %r1, [other_smem];",
        "call.uni foo, (%r1);",
        ".reg .b128 %q<2>;\n\tret;",
        ".reg .v4 .f32 %q;\n\tret;",
        "mov.u32 %r1, 1",
    ],
)
def test_what_is_not_known_is_refused(text):
    with pytest.raises(UnknownInstruction):
        code_of(kit.ptx(text))


def test_local_memory_and_tables_are_refused_by_name():
    body = "\t.local .align 4 .b8 \t__local_depot0[28];\n\t.reg .b64 \t%SPL;\n\tmov.b64 \t%SPL, __local_depot0;"
    with pytest.raises(UnknownInstruction, match="__local_depot0"):
        parse_ptx(kit.ptx(body))
    table = ".global .align 4 .b8 table[4] = {1, 2, 3, 4};\n"
    with pytest.raises(UnknownInstruction, match="table"):
        parse_ptx(table + kit.ptx("mov.b64 %rd1, table;"))
    # A table that is not used does not matter.
    assert len(parse_ptx(table + kit.ptx("ret;")).instructions) == 1


def test_a_static_array_in_shared_memory_is_refused():
    """Its address would not be 0."""
    with pytest.raises(UnknownInstruction, match="own"):
        parse_ptx(".shared .align 4 .b8 own[64];\n" + kit.ptx("ld.shared.b32 %r1, [own];"))


# ---------------------------------------------------------------- blocks in braces


def test_a_blocks_registers_are_its_own():
    body = """
	{
		.reg .b32 t, %r2, u<2>;
		mov.u32 %r2, 50;
		add.u32 t, %r1, 1;
		mov.u32 u1, 1000;
		{ .reg .b32 t; add.u32 t, %r1, 10; add.u32 %r3, t, u1; }
		{ .reg .b32 v; mov.u32 v, t; add.u32 %r4, v, %r2; }
		.reg .b32 w;
		mov.u32 w, t;
		mov.u32 %r5, w;
	}
	{ .reg .b16 t; mov.u16 t, 7; cvt.u32.u16 %r6, t; }
	add.u32 %r7, %r2, 0;
"""
    r1 = np.arange(32, dtype=np.uint32)
    result = kit.execute(body, {"%r1": r1, "%r2": np.uint32([5])})
    expected = {"%r3": r1 + 1010, "%r4": r1 + 51, "%r5": r1 + 1, "%r6": r1 * 0 + 7, "%r7": r1 * 0 + 5}
    for name, values in expected.items():
        assert result.register(name, np.uint32).tolist() == values.tolist(), name
    assert not result.kinds


def test_a_blocks_registers_are_gone_after_it():
    with pytest.raises(UnknownInstruction):
        parse_ptx(kit.ptx("{ .reg .b32 t; mov.u32 t, 1; }\n\tmov.u32 %r1, t;"))
    result = kit.execute("{ .reg .b32 t; mov.u32 t, 1; }\n\t{ .reg .b32 t; add.u32 %r1, t, 0; }")
    assert result.kinds == {"unwritten register"}


def test_predicates_and_labels_of_blocks():
    """Each block counts to its own number, by a loop of the same name."""
    loop = """
	{{
		.reg .pred done;
		.reg .b32 n;
		mov.u32 n, 0;
	again:
		add.u32 n, n, 1;
		setp.ge.u32 done, n, {count};
		@!done bra again;
		@done bra.uni out;
		mov.u32 n, 77;
	out:
		mov.u32 {result}, n;
	}}"""
    body = loop.format(count=3, result="%r1") + loop.format(count="%r9", result="%r2")
    counts = np.arange(32, dtype=np.uint32) % 5 + 1
    result = kit.execute(body, {"%r9": counts})
    assert (result.register("%r1", np.uint32) == 3).all()
    assert result.register("%r2", np.uint32).tolist() == counts.tolist()


def test_a_brace_in_the_first_column_does_not_end_the_kernel():
    assert len(parse_ptx(kit.ptx("{\nmov.u32 %r1, 1;\n}\n\tmov.u32 %r2, 2;\n\tret;")).instructions) == 3


def test_labels_are_indices():
    program = parse_ptx(kit.ptx("$L__BB0_1:\n\tmov.u32 %r1, 0;\n$L__tmp2:\n$L2:\n\tbra $L__BB0_1;\nEnd:"))
    assert program.labels == {"$L__BB0_1": 0, "$L__tmp2": 1, "$L2": 1, "End": 2}
    with pytest.raises(UnknownInstruction):
        code_of(kit.ptx("bra.uni $L__BB0_3;"))


# ---------------------------------------------------------------- the head of a kernel


def headed(text, old=".reqntid 32"):
    ptx = kit.ptx("ret;")
    assert old in ptx
    return parse_ptx(ptx.replace(old, text))


@pytest.mark.parametrize(
    ("text", "threads"),
    [
        (".reqntid 128", 128),
        (".reqntid 64, 1, 1", 64),
        (".reqntid 64,1", 64),
        (".maxntid 256, 1, 1", 256),
        (".maxntid 1024\n.reqntid 32\n.minnctapersm 2", 32),
        (".reqntid 96\n.reqnctapercluster 1, 1, 1", 96),
    ],
)
def test_threads(text, threads):
    assert headed(text).threads == threads


@pytest.mark.parametrize(
    "text",
    [
        *["", ".minnctapersm 1", ".reqntid 32, 2", ".reqntid 32, 1, 2", ".reqntid 16", ".reqntid 0"],
        ".reqntid 32\n.reqnctapercluster 2, 1, 1",
    ],
)
def test_threads_that_are_not_whole_warps_in_a_row_are_refused(text):
    with pytest.raises(UnknownInstruction, match="threads of kernel"):
        headed(text)


def test_parameters():
    listed = """
	.param .u64 .ptr .global .align 16 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .f32 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3"""
    ptx = kit.ptx("ret;").replace("kernel(\n\n)", f"kernel({listed}\n)")
    assert parse_ptx(ptx).parameters == tuple(
        (kind, f"kernel_param_{n}") for n, kind in enumerate(["u64", "u32", "f32", "u64"])
    )
    with pytest.raises(UnknownInstruction, match=r"parameter \.param \.align 64 \.b8 descriptor"):
        parse_ptx(ptx.replace(".u32 kernel_param_1", ".align 64 .b8 descriptor[128]"))


def test_the_name_the_architecture_and_shared_memory():
    program = parse_ptx(kit.ptx("ret;"))
    assert (program.name, program.arch, program.shared) == ("kernel", "sm_90", {"global_smem"})
    assert headed(".target sm_80", ".target sm_90a").arch == "sm_80"
    with pytest.raises(UnknownInstruction, match="no kernel"):
        parse_ptx(".version 8.7\n")


def test_files_by_their_names():
    tables = """
	.file	1 "/folder/kernel.py"
	.file	2 "/src/ops" "norm.py"
	.file	3 "/a/same.py", 1234, 99
	.file	4 "/b" "same.py"
	.file	5 "/folder/kernel.py"
"""
    assert parse_ptx(kit.ptx("ret;") + tables).files == {
        "kernel.py": "/folder/kernel.py",
        "norm.py": "/src/ops/norm.py",
    }


@pytest.mark.parametrize(
    ("body", "shared", "global_"),
    [
        ("ret;", 16, 16),
        ("ld.shared.v4.b32 {%r1,%r2,%r3,%r4}, [%r5];", 4, 16),
        ("st.shared.b8 [%r1], %rs1;\n\tld.global.nc.v2.b64 {%rd1,%rd2}, [%rd3];", 1, 8),
        ("st.volatile.shared.b16 [%r1], %rs1;", 2, 16),
        ("atom.global.gpu.relaxed.add.noftz.f16x2 %r1, [%rd1], %r2;", 16, 4),
        ("red.global.add.f64 [%rd1], %rd2;", 16, 8),
        ("cp.async.ca.shared.global [%r1], [%rd1], 0x4;", 4, 4),
        ("cp.async.ca.shared.global [%r1], [%rd1], 8, %r2;", 8, 8),
        ("cp.async.cg.shared.global [%r1], [%rd1], 0x10, %r2;", 16, 16),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];", 16, 16),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;", 16, 16),
        ("wgmma.fence.sync.aligned;", 16, 16),
    ],
)
def test_memory_is_watched_by_the_narrowest_access(body, shared, global_):
    assert parse_ptx(kit.ptx(body)).granules == {"shared": shared, "global": global_}


# ---------------------------------------------------------------- kernels that Triton compiles


def counted(ptx):
    """(instructions, labels) of Triton's PTX: a statement a line, and those of inline assembly."""
    body = ptx[ptx.index("\n{\n") : ptx.index("-- End function")]
    lines = [line.split("//")[0] for line in body.split("\n")]
    statements = [part.strip() for line in lines for part in re.split("[;{}]" if "[" not in line else ";", line)]
    statements = [part for part in statements if re.match(r"(@!?%p\d+ )?[a-z]", part)]
    return len(statements), sum(bool(re.match(r"\$L\w+:", line)) for line in lines)


def compiled(kernel, signature, constants, arch="sm_90"):
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=target(MACHINES[arch])).asm["ptx"]


@triton.jit
def mixed_kernel(x_ptr, y_ptr, z_ptr, rows, BLOCK: tl.constexpr):
    """What Triton makes of much: a loop, a matmul, a reduction, a scan, atomics, masks, conversions."""
    offs = tl.arange(0, BLOCK)
    square = offs[:, None] * BLOCK + offs[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for row in range(rows):
        x = tl.load(x_ptr + row * BLOCK * BLOCK + square, mask=offs[None, :] < rows, other=0.0)
        total = tl.dot(x, tl.trans(x), total)
    tl.store(y_ptr + square, total, mask=offs[:, None] < rows)
    tl.atomic_add(z_ptr + offs % 7, tl.sum(total, 1), mask=offs < rows)
    tl.store(z_ptr + 8 + offs, tl.cumsum(tl.max(total, 0)), eviction_policy="evict_first")


PARTS = {"x_ptr": "*bf16", "y_ptr": "*fp32", "z_ptr": "*fp32", "rows": "i32"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_kernel_is_read_whole(arch):
    ptx = compiled(mixed_kernel, PARTS, {"BLOCK": 64}, arch)
    program = parse_ptx(ptx)
    assert (len(program.instructions), len(program.labels)) == counted(ptx)
    assert (program.threads, program.arch, program.name) == (128, arch, "mixed_kernel")
    # Two more than the kernel's own: Triton's scratch memory.
    assert [kind for kind, _ in program.parameters] == ["u64", "u64", "u64", "u32", "u64", "u64"]
    lines = ptx.split("\n")
    assert all(i.text in lines[i.line - 1] for i in program.instructions)
    told = {i.source.split(":")[0] for i in program.instructions}
    assert {"test_emulated_program.py", "standard.py"} <= told
    assert told <= set(program.files) | {""}
    assert len(code_of(ptx).actions) == len(program.instructions)


def test_the_kernels_of_an_operator_are_read_whole():
    for launch in planned("geglu", SHAPES["geglu"][0](Shape()), MACHINES["sm_80"]):
        ptx = compile_launch(launch, MACHINES["sm_80"]).asm["ptx"]
        program = parse_ptx(ptx)
        assert (len(program.instructions), len(program.labels)) == counted(ptx)
        assert program.threads == 32 * launch.num_warps


@triton.jit
def unpacking_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    low, high = tl.inline_asm_elementwise(
        """
        {
            // Halves of a word; the brace below is in the first column.
            .reg .pred p;
            .reg .b32 part<2>;
            and.b32 part0, $2, 65535;
            shr.u32 part1, $2, 16; setp.gt.u32 p, part0, part1;
            @p mov.b32 $0, part0;
            @!p mov.b32 $0, part1;
            mov.b32 $1, part1;
}
        """,
        "=&r,=&r,r",
        args=[x],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    tl.store(y_ptr + offs, low * 3 + high)


def test_inline_assembly_with_registers_of_its_own():
    x = torch.randint(-(2**31), 2**31 - 1, (2048,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(x)
    with emulated("sm_90") as emulation:
        unpacking_kernel[(4,)](x, y, BLOCK=512)
    bits = x.numpy().view(np.uint32).astype(np.int64)
    low, high = bits & 65535, bits >> 16
    assert y.tolist() == (np.maximum(low, high) * 3 + high).tolist()
    assert not emulation.findings


@triton.jit
def libdevice_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, LARGE: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = libdevice.sin(x) if LARGE else libdevice.fast_dividef(x, 3.0) + libdevice.rint(x)
    tl.store(y_ptr + offs, y)


def test_what_libdevice_makes_is_read_or_refused_by_name():
    pointers = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    plain = compiled(libdevice_kernel, pointers, {"BLOCK": 128, "LARGE": False})
    assert len(parse_ptx(plain).instructions) == counted(plain)[0]
    # The sine of large numbers takes a table and an array in local memory.
    with pytest.raises(UnknownInstruction, match="__local_depot0"):
        parse_ptx(compiled(libdevice_kernel, pointers, {"BLOCK": 128, "LARGE": True}))


# ---------------------------------------------------------------- findings


def test_lines_of_a_source():
    assert lines_of("") == ""
    assert lines_of("kernel.py:86:25") == "kernel.py:86"
    assert (
        lines_of("kernel.py:86:25 @[ kernel.py:334:99 @[ top.py:1:2 ] ]")
        == "kernel.py:86 in kernel.py:334 in top.py:1"
    )
    assert lines_of("_attention-kernels.py:10") == "_attention-kernels.py:10"
    # Where Triton knows no line, it tells 0, and at times no column.
    assert lines_of("kernel.py:0") == lines_of("kernel.py:0:5") == ""
    assert lines_of("kernel.py:0:0 @[ top.py:1:2 ]") == "top.py:1"
    assert lines_of("<string>:3:1 @[ a b.py:7:0 ]") == "<string>:3 in a b.py:7"


def instruction(line, source, text="ld.shared.b32 %r1, [%r2];"):
    from dataclasses import replace

    return replace(only(text), line=line, source=source)


def test_findings_are_grouped_by_kind_and_line_of_the_source():
    findings = Findings("first")
    assert not findings
    assert (len(findings), findings.kinds, list(findings)) == (0, set(), [])
    findings.add("race", instruction(10, "k.py:5:1"), 3, "byte 0")
    findings.add("race", instruction(11, "k.py:5:9"), 4, "byte 4")
    findings.add("race", instruction(11, "k.py:5:9"), 2, "byte 8")
    findings.add("race", instruction(12, "k.py:6:1"), np.int64(1))
    findings.add("misaligned", instruction(10, "k.py:5:1"))
    findings.kernel = "second"
    findings.add("race", instruction(10, "k.py:5:1"))
    findings.add("unwritten result", None, 7, "elements")
    assert findings
    assert findings.kinds == {"race", "misaligned", "unwritten result"}
    told = {(f.kind, f.kernel, f.source, f.count, f.line, f.detail) for f in findings}
    assert told == {
        ("race", "first", "k.py:5", 9, 11, "byte 4"),
        ("race", "first", "k.py:6", 1, 12, ""),
        ("misaligned", "first", "k.py:5", 1, 10, ""),
        ("race", "second", "k.py:5", 1, 10, ""),
        ("unwritten result", "second", "", 7, 0, "elements"),
    }
    assert len(findings) == len(told)
    with pytest.raises(AssertionError, match="no kind"):
        findings.add("racing", None)


def test_the_text_of_a_finding():
    findings = Findings("kernel")
    findings.add("race", instruction(10, "k.py:5:1 @[ k.py:9:2 ]", "st.shared.b32\n\t[%r2],   %r1;"), 3, "byte 0")
    findings.add("unwritten result", None, 7, "elements")
    first, second = map(str, findings)
    assert first == "race: kernel at k.py:5 in k.py:9, 3 times (byte 0; PTX line 10: st.shared.b32 [%r2], %r1)"
    assert second == "unwritten result: kernel at an unknown line, 7 times (elements)"


def test_every_kind_of_finding_is_told_by_a_sentence():
    assert all(text and kind == kind.strip() for kind, text in KINDS.items())
