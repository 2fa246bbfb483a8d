"""Machine code read as text: instructions, loops, units, resources, occupancy, and the prediction from them."""

from dataclasses import replace

import pytest
import torch

from ldmperf.kernels import OPERATORS, Launch
from ldmperf.kernels._linear_config import LinearConfig
from ldmperf.profiling.machines import MACHINES
from ldmperf.profiling.static import sass
from ldmperf.profiling.static.amd import AmdResources, amd_resources
from ldmperf.profiling.static.compile import Compiled, Specialization, compile_launch
from ldmperf.profiling.static.inspection import Inspection, inspect_launch, inspect_launches
from ldmperf.profiling.static.occupancy import occupancy
from ldmperf.profiling.static.prediction import Traffic, predict
from ldmperf.profiling.static.ptx import Access, global_accesses
from ldmperf.profiling.static.sass import Instruction, disassemble, hot_region, instructions_of, parse, resources
from ldmperf.profiling.static.shapes import SHAPES, Shape
from ldmperf.profiling.static.units import class_of, is_move, mix, multiply_adds, unit_counts, width

# Lines as cuobjdump prints them, with their encodings.
LOOP = """
Resource usage:
 Common:
  GLOBAL:0 CONSTANT[4]:8
 Function loop_kernel:
  REG:117 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
\tcode for sm_90a
\t\tFunction : loop_kernel
\t.headerflags\t@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                              /* 0x0000 */
                                                                                        /* 0x000ff0 */
        /*0010*/              @P0 BRA 0x90 ;                                                           /* 0x0000 */
        /*0020*/                   IMAD.MOV.U32 R66, RZ, RZ, RZ ;                                      /* 0x0000 */
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                                    /* 0x0000 */
        /*0040*/                   FFMA R8, R4, R5, R8 ;                                               /* 0x0000 */
        /*0050*/                   BSSY B0, 0x70 ;                                                     /* 0x0000 */
        /*0060*/                   BSYNC B0 ;                                                          /* 0x0000 */
        /*0070*/                   ISETP.GE.AND P0, PT, R0, UR6, PT ;                                  /* 0x0000 */
        /*0080*/              @!P0 BRA 0x30 ;                                                          /* 0x0000 */
        /*0090*/                   STL [R1], R8 ;                                                      /* 0x0000 */
        /*00a0*/                   LDL R8, [R1] ;                                                      /* 0x0000 */
        /*00b0*/              @!P1 EXIT ;                                                              /* 0x0000 */
        /*00c0*/                   STG.E.128 desc[UR4][R2.64], R4 ;                                    /* 0x0000 */
        /*00d0*/                   EXIT ;                                                              /* 0x0000 */
        /*00e0*/                   BRA 0xe0;                                                           /* 0x0000 */
        /*00f0*/                   NOP;                                                                /* 0x0000 */
"""


def instruction(text, address=0):
    (found,) = parse(f"        /*{address:04x}*/                   {text} ;")
    return found


def program(*lines):
    text = "\n".join(f"        /*{16 * i:04x}*/        {line} ;" for i, line in enumerate(lines))
    return parse(text)


def test_instructions_and_resources_are_read():
    found = parse(LOOP)
    assert len(found) == 16
    assert found[1] == Instruction(0x10, "BRA", (), "0x90", "P0")
    assert (found[3].opcode, found[3].modifiers) == ("LDG", ("E", "128"))
    assert found[8].predicate == "!P0"
    assert found[8].target == 0x30
    used = resources(LOOP, found)
    assert (used.registers, used.stack, used.local, used.spill_loads, used.spill_stores) == (117, 8, 16, 1, 1)


def test_text_that_is_no_disassembly_is_refused():
    with pytest.raises(ValueError, match="no instruction"):
        parse("ptxas info: 0 bytes spill")
    with pytest.raises(ValueError, match="res-usage"):
        resources("        /*0000*/ EXIT ;", [])


def test_the_hot_loop_is_what_runs_again():
    region = hot_region(parse(LOOP))
    assert region.loop
    assert [i.address for i in region.instructions] == [0x30, 0x40, 0x50, 0x60, 0x70, 0x80]


def test_without_a_loop_the_region_is_all_but_subroutines_and_padding():
    body = program(
        "MOV R1, R2", "@P0 CALL.REL.NOINC 0x40", "EXIT", "BRA 0x30", "MUFU.RCP R0, R1", "RET.REL.NODEC R2 0x0"
    )
    region = hot_region(body)
    assert not region.loop
    assert [i.opcode for i in region.instructions] == ["MOV", "CALL", "EXIT"]


def test_a_jump_back_out_of_a_cold_block_is_no_loop():
    # The block behind EXIT is entered from the middle and returns behind its entry.
    body = program("MOV R1, R2", "@P0 BRA 0x40", "FADD R1, R1, R1", "EXIT", "MOV R3, R4", "BRA 0x20", "BRA 0x60")
    assert not hot_region(body).loop


def test_of_nested_loops_the_longest_innermost_is_hot():
    body = program(
        "MOV R0, R1",  # 00
        "FADD R0, R0, R0",  # 10, outer header
        "FMUL R1, R1, R1",  # 20, short loop
        "@P0 BRA 0x20",  # 30
        "FFMA R2, R2, R2, R2",  # 40, long loop
        "FFMA R3, R3, R3, R3",  # 50
        "BRA.U UP0, 0x40",  # 60, its predicate is an operand
        "@P1 BRA 0x10",  # 70
        "EXIT",
    )
    assert [i.address for i in hot_region(body).instructions] == [0x40, 0x50, 0x60]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", "matrix"),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "matrix"),
        ("MUFU.EX2 R4, R5", "exponential"),
        ("FFMA R4, R5, R6, R7", "FMA"),
        ("HFMA2.MMA R2, -RZ, RZ, 0, 0", "FMA"),
        ("HFMA2.BF16_V2 R2, R3, R4, R5", "FMA"),
        ("IMAD.WIDE R2, R3, 0x2, R4", "FMA"),
        ("IADD3 R10, -R11, RZ, RZ", "ALU"),
        ("LOP3.LUT R4, R5, 0x7, RZ, 0xc0, !PT", "ALU"),
        ("FSETP.GEU.AND P0, PT, R4, R5, PT", "ALU"),
        ("STS.128 [R4], R8", "load/store"),
        ("LDGSTS.E.BYPASS.128 [R4], desc[UR4][R8.64]", "load/store"),
        ("SHFL.BFLY PT, R4, R5, 0x10, 0x1f", "load/store"),
        ("F2FP.BF16.F32.PACK_AB R4, R5, R6", "conversion"),
        ("I2F.RP R4, R7", "conversion"),
        ("ULDC.64 UR8, c[0x0][0x210]", "uniform"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "control"),
        ("S2R R5, SR_CTAID.X", "other"),
    ],
)
def test_an_instruction_has_a_class(text, kind):
    assert class_of(instruction(text)) == kind


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", 16),
        ("LDG.E.64.CONSTANT R4, [R2.64]", 8),
        ("LDG.E R4, [R2.64]", 4),
        ("LDG.E.U16 R4, [R2.64]", 2),
        ("STG.E.U8 [R2.64], R4", 1),
        ("LDGSTS.E.BYPASS.128 [R4], desc[UR4][R8.64]", 16),
        ("LDSM.16.M88.4 R4, [R8]", 16),
        ("LDSM.16.MT88.2 R4, [R8]", 8),
        ("LDS.128 R4, [R8]", 16),
        ("SHFL.BFLY PT, R4, R5, 0x10, 0x1f", 4),
        ("FFMA R4, R5, R6, R7", 0),
    ],
)
def test_widths_in_bytes_of_a_thread(text, size):
    assert width(instruction(text)) == size


def test_moves_are_told_apart_where_they_run():
    moves = [
        "MOV R1, R2",
        "IMAD.MOV.U32 R6, RZ, RZ, RZ",
        "HFMA2.MMA R2, -RZ, RZ, 0, 0",
        "HFMA2 R2, -RZ, RZ, 1.5, 0",
    ]
    assert all(is_move(instruction(text)) for text in moves)
    others = ["IMAD R2, R3, R4, R5", "HFMA2.BF16_V2 R2, R3, R4, R5", "FADD R1, R2, R3"]
    assert not any(is_move(instruction(text)) for text in others)


def test_units_share_instructions():
    counts = unit_counts(
        program("FFMA R1, R2, R3, R4", "IMAD R1, R2, R3, R4", "I2F R1, R2", "LDG.E.128 R4, [R2.64]")
    )
    assert counts == {
        "issue": 4,
        "FMA": 2,
        "integer FMA": 1,
        "exponential": 1,
        "load/store": 1,
        "shared memory": 16,
    }


def test_the_mix_counts_every_instruction_once():
    found = mix(hot_region(parse(LOOP)).instructions)
    assert found.by_class["load/store"] == found.by_class["FMA"] == found.by_class["ALU"] == 1
    assert found.by_class["control"] == 3
    assert sum(found.by_class.values()) == 6
    assert found.global_widths == {"16": 1}


def test_matrix_instructions_by_their_shape():
    # 64 x 256 x 16 by four warps; m16n8k16 by one.
    assert multiply_adds(instruction("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24")) == 64 * 256 * 16 // 4
    assert multiply_adds(instruction("HMMA.16816.F32.BF16 R4, R8, R12, R4")) == 2048


# Of the CUDA occupancy calculator; and the programming guide's example: of a kernel of 64 registers and 512
# threads two blocks fit, of one with 65 registers one.
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs", "limit"),
    [
        ("sm_80", 32, 0, 8, 8, "warps"),
        ("sm_80", 64, 0, 16, 2, "registers"),
        ("sm_80", 65, 0, 16, 1, "registers"),
        ("sm_80", 65, 0, 32, 0, "registers"),
        ("sm_80", 40, 0, 4, 12, "registers"),
        ("sm_80", 255, 0, 4, 2, "registers"),
        ("sm_80", 32, 48 * 1024, 4, 3, "shared memory"),
        ("sm_90", 32, 48 * 1024, 4, 4, "shared memory"),
        ("sm_80", 32, 163 * 1024, 4, 1, "shared memory"),
        ("sm_80", 32, 164 * 1024, 4, 0, "shared memory"),
        ("sm_90", 32, 227 * 1024, 4, 1, "shared memory"),
        ("sm_90", 32, 228 * 1024, 4, 0, "shared memory"),
        ("sm_90", 16, 0, 1, 32, "blocks"),
        ("sm_90", 256, 0, 4, 0, "registers"),
    ],
)
def test_occupancy(arch, registers, shared, warps, programs, limit):
    found = occupancy(MACHINES[arch], registers=registers, shared=shared, num_warps=warps)
    assert (found.programs, found.warps, found.limit) == (programs, programs * warps, limit)
    assert found.fraction == programs * warps / 64


def test_the_prediction_is_instructions_over_lanes():
    region = program("FFMA R1, R2, R3, R4", "FFMA R1, R2, R3, R4", "MUFU.EX2 R1, R2", "LDG.E.128 R4, [R2.64]")
    h200, a100 = MACHINES["sm_90"], MACHINES["sm_80"]
    found = predict(h200, region, 4)
    # Of one warp: 64 products on 128 lanes, 32 exponentials on 16, four instructions on four schedulers.
    assert found.cycles["FMA"] == pytest.approx(4 * 0.5)
    assert found.cycles["exponential"] == pytest.approx(4 * 2.0)
    assert found.cycles["issue"] == pytest.approx(4 * 1.0)
    assert found.cycles["shared memory"] == pytest.approx(4 * 4.0)
    assert found.memory_bytes == 4 * 32 * 16
    assert found.cycles["memory"] == pytest.approx(2048 / (4.8e12 / 1.98e9 / 132))
    assert found.bound == "memory"
    assert predict(a100, region, 4).cycles["FMA"] == pytest.approx(4 * 1.0)
    assert predict(h200, region, 4, Traffic(1.0, None, "one program")).bound == "shared memory"


def test_dense_peaks_of_the_data_sheets():
    """TFLOP/s in 16 bits (of the H200 at the 1.83 GHz of its sheet) and in 32: lanes times chips and clock."""
    for arch, unit, clock, peak in (
        ("sm_90", "matrix", 1.83, 989),
        ("sm_90", "FMA", 1.98, 66.9),
        ("sm_80", "matrix", 1.41, 312),
        ("sm_80", "FMA", 1.41, 19.5),
    ):
        machine = MACHINES[arch]
        assert 2e-3 * machine.lanes[unit] * machine.multiprocessors * clock == pytest.approx(peak, rel=0.01)


PTX = """
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u32 k_param_1,
\t.param .u64 k_param_2,
\t.param .u64 .ptr .global .align 1 k_param_3
)
\tld.param.b64 \t%rd1, [k_param_0];
\tld.param.b32 \t%r1, [k_param_1];
\tld.param.b64 \t%rd2, [k_param_2];
\tld.param.b64 \t%rd3, [k_param_3];
\tmul.lo.s64 \t%rd4, %rd2, %rd9;
\tadd.s64 \t%rd5, %rd1, %rd4;
\tmad.wide.s32 \t%rd6, %r1, 2, %rd5;
\tmad.wide.s32 \t%rd7, %r1, 2, %rd3;
\t@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd6 + 0 ];
\t@%p1 ld.global.b16 { %rs1 }, [ %rd6 + 16 ];
\tcp.async.cg.shared.global [ %r8 + 0 ], [ %rd6 + 0 ], 0x10, %r9;
\t@%p1 st.global.v2.b32 [ %rd7 + 0 ], { %r2, %r3 };
\tadd.s64 \t%rd8, %rd5, %rd3;
\tst.global.b32 [ %rd8 + 0 ], { %r2 };
"""


def test_accesses_are_followed_back_to_their_argument():
    parameters = [("x_ptr", "*bf16"), ("rows", "i32"), ("stride", "i64"), ("out_ptr", "*bf16")]
    assert global_accesses(PTX, parameters) == [
        Access("x_ptr", False, 16),
        Access("x_ptr", False, 2),
        Access("x_ptr", False, 16),
        Access("out_ptr", True, 8),
        # Of two pointers at once: not told.
        Access("?", True, 4),
    ]


AMD = """
amdhsa.kernels:
  - .agpr_count:     4
    .group_segment_fixed_size: 1024
    .private_segment_fixed_size: 16
    .sgpr_count:     28
    .sgpr_spill_count: 1
    .vgpr_count:     40
    .vgpr_spill_count: 2
"""


def test_the_resources_of_amd_metadata():
    found = amd_resources(AMD)
    assert (found.vgprs, found.agprs, found.sgprs, found.vgpr_spills, found.sgpr_spills) == (40, 4, 28, 2, 1)
    assert (found.scratch, found.lds) == (16, 1024)
    with pytest.raises(ValueError, match="vgpr_count"):
        amd_resources(AMD.replace(".vgpr_count", ".vgprs"))


def test_scalar_registers_in_lanes_of_a_vector_register_are_no_fault():
    machine = MACHINES["gfx942"]
    compiled = Compiled(Specialization("k", (), (), (), 4, 1), machine, 0, {})
    launch = Launch(None, 1, {})
    amd = AmdResources(vgprs=40, agprs=0, sgprs=100, vgpr_spills=0, sgpr_spills=1, scratch=0, lds=0)
    assert Inspection(launch, compiled, amd=amd).faults == []
    to_memory = Inspection(launch, compiled, amd=replace(amd, scratch=4)).faults
    assert to_memory == ["1 scalar register spills", "4 bytes of scratch"]
    assert Inspection(launch, compiled, amd=replace(amd, vgpr_spills=2)).faults == ["2 vector register spills"]


def test_a_product_reads_from_memory_once_and_through_l2_for_every_program():
    x, weight = (
        torch.empty(2, 1024, 640, device="meta").bfloat16(),
        torch.empty(5120, 640, device="meta").bfloat16(),
    )
    operator = OPERATORS["linear"]
    call = operator.bind(x, weight, activation="geglu")
    (launch,) = operator.plan(call, config=LinearConfig(128, 128, 64, 1, 8, 3))[1]
    found = inspect_launch(launch, MACHINES["sm_90"]).nvidia.prediction
    # A tile of rows and two of the weight, 64 channels of 2 bytes, in each of ten passes of 16 x 20 programs.
    assert found.cycles["L2"] == pytest.approx(3 * 128 * 64 * 2 / (5120 / 132))
    assert found.memory_bytes == pytest.approx(2 * (2048 * 640 + 5120 * 640 + 2048 * 2560) / (16 * 20 * 10))
    # 2048 multiply-adds a cycle, dense, 16 bits; two accumulators.
    assert found.cycles["matrix"] == pytest.approx(2 * 128 * 128 * 64 / 2048)


@pytest.mark.parametrize("registers", [1, 2, 4])
def test_every_term_of_an_update_is_rounded_once_whatever_the_number_of_registers(registers):
    """A captured step has room for four: were products rounded by themselves there, its bits would be others."""
    shape = Shape(batch=1, channels=4)
    arguments = SHAPES["sampler_update"][0](shape)
    memory = torch.empty(registers, 1, 64, 64, 4, device="meta")
    table = torch.empty(50, registers, registers + 2, device="meta")
    operator = OPERATORS["sampler_update"]
    call = operator.bind(**arguments | {"registers": memory.permute(0, 1, 4, 2, 3), "table": table})
    (launch,) = operator.plan(call)[1]
    ttir = compile_launch(launch, MACHINES["sm_90"]).asm["ttir"]
    # Guidance, and each register's terms but the first: of every register and of the noise.
    assert ttir.count("= math.fma ") == 1 + registers * (registers + 1)


@pytest.mark.parametrize("torn", ["*.cubin", "[!_]*.json", "__grp__*", "*"])
def test_a_cache_of_triton_that_cannot_be_read_is_compiled_anew(tmp_path, monkeypatch, torn):
    """As a crash or a full disk leaves it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    operator = OPERATORS["geglu"]
    (launch,) = operator.plan(operator.bind(torch.empty(6, 64, device="meta")))[1]
    first = inspect_launch(launch, MACHINES["sm_90"]).as_json()
    files = [path for path in tmp_path.rglob(torn) if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:20])
    assert inspect_launch(launch, MACHINES["sm_90"]).as_json() == first
    assert all(path.stat().st_size > 20 for path in files)


def test_codes_that_are_read_at_once_are_those_that_cuobjdump_tells_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = []
    for name, arch in (("linear", "sm_90"), ("geglu", "gfx942"), ("linear", "sm_80"), ("geglu", "sm_90")):
        build, _, defaults = SHAPES[name]
        launch = OPERATORS[name].plan(OPERATORS[name].bind(**build(Shape(**defaults))))[1][-1]
        chosen.append((launch, MACHINES[arch]))
    together = inspect_launches(chosen)
    for (launch, machine), found in zip(chosen, together, strict=True):
        assert found.as_json() == inspect_launch(launch, machine).as_json()
        if machine.backend == "cuda":
            cubin = found.compiled.asm["cubin"]
            target = {"sm_90": "sm_90a", "sm_80": "sm_80"}[machine.arch]
            (alone,) = instructions_of([cubin], target)
            told = disassemble(cubin)
            assert alone == parse(told)
            assert found.nvidia.resources == resources(told, alone)
            assert found.nvidia.region.loop == hot_region(alone).loop
            assert len(found.nvidia.region) == len(hot_region(alone))
    assert together[0].nvidia.region.loop


@pytest.mark.parametrize("cubin", [b"", b"\x7fELF" * 4, bytes(64), bytes(400)])
def test_what_is_no_cubin_is_refused(cubin):
    with pytest.raises(ValueError, match=r"no ELF file|0 functions"):
        instructions_of([cubin], "sm_90a")


@pytest.mark.parametrize("size", [32, 48, 64, 40])
def test_an_instruction_that_is_not_told_is_noticed(size, monkeypatch):
    """The codes behind it would be cut in the wrong places."""
    told = "        /*0000*/  MOV R1, R2 ;\n        /*0010*/  BRA 0x10 ;\n        /*0030*/  EXIT ;\n"
    monkeypatch.setattr(sass, "_code", bytes)
    monkeypatch.setattr(sass, "_said", lambda *_, of: "".join(told.splitlines(True)[: 2 if len(of) < 40 else 3]))
    if size == 32:
        assert [one.opcode for (one,) in instructions_of([bytes(16), bytes(16)], "sm_80")] == ["MOV", "BRA"]
    else:
        with pytest.raises(ValueError, match="does not tell every instruction"):
            instructions_of([bytes(size)], "sm_80")
