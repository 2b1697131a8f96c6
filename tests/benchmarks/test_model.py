"""The time model, on instructions and launches whose clocks can be told by hand."""

from types import SimpleNamespace

import pytest

from benchmarks.compile import Compiled
from benchmarks.machine import MACHINES
from benchmarks.model import instruction_clocks, model, resident_blocks
from benchmarks.sass import Instruction

H200 = MACHINES[90]


@pytest.mark.parametrize(
    "text, warps, arch, expected",
    [
        ("MUFU.EX2 R1, R2", 8, 90, {"issue": 2, "mufu": 16}),
        ("FFMA R1, R2, R3, R4", 8, 90, {"issue": 2, "fp32": 2}),
        ("FFMA R1, R2, R3, R4", 8, 80, {"issue": 2, "fp32": 4}),
        ("FFMA2 R2, R4, R6, R8", 4, 100, {"issue": 1, "fp32": 2}),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", 8, 90, {"issue": 2, "fp32": 4}),
        ("FMNMX R1, R2, R3, !PT", 8, 90, {"issue": 2, "alu": 4}),
        ("SHFL.BFLY PT, R1, R2, 0x2, 0x1f", 8, 90, {"issue": 2, "lsu": 8}),
        ("LDS.128 R4, [R2]", 4, 90, {"issue": 1, "lsu": 16}),
        ("LDSM.16.MT88.4 R4, [R2]", 4, 80, {"issue": 1, "lsu": 16}),
        ("LDG.E.U16 R4, desc[UR4][R2.64]", 4, 90, {"issue": 1, "lsu": 4}),
        ("STG.E.128 desc[UR4][R2.64], R4", 4, 90, {"issue": 1, "lsu": 16, "l2": 2048 * 132 / 5120}),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", 4, 90, {"issue": 1}),
        # 2 * 64 * 128 * 16 FLOP a warpgroup; 128 rows of B, and 64 of A where A is in shared memory, of 32 bytes
        ("HGMMA.64x128x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56", 8, 90, {"issue": 2, "tensor": 128, "lsu": 64}),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0", 4, 90, {"issue": 1, "tensor": 64, "lsu": 48}),
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR8], R24", 4, 90, {"issue": 1, "tensor": 32, "lsu": 32}),
        ("HMMA.16816.F32.BF16 R8, R4, R2, R8", 8, 80, {"issue": 2, "tensor": 16}),
        ("HMMA.1688.F32.TF32 R8, R4, R2, R8", 8, 80, {"issue": 2, "tensor": 16}),
        ("HMMA.16816.F32.BF16 R8, R4, R2, R8", 8, 90, {"issue": 2, "tensor": 8 / 0.63}),
    ],
)
def test_clocks_of_an_instruction(text, warps, arch, expected):
    op, operands = text.split(" ", 1)
    clocks = instruction_clocks(Instruction(0, op, operands), MACHINES[arch], warps)
    assert clocks == pytest.approx(expected)


def test_an_instruction_that_never_runs_costs_an_issue_slot():
    never = Instruction(0, "LDS", "RZ, [RZ]", predicate="!PT")
    assert instruction_clocks(never, H200, 4) == {"issue": 1}


@pytest.mark.parametrize(
    "arch, registers, warps, shared, tmem, expected",
    [
        (90, 128, 8, 20000, 0, (2, "registers")),
        (90, 127, 8, 20000, 0, (2, "registers")),  # handed out by eight a thread
        (90, 129, 8, 20000, 0, (1, "registers")),
        (90, 168, 4, 20000, 0, (3, "registers")),
        (90, 255, 4, 120000, 0, (1, "smem")),
        (90, 32, 1, 0, 0, (32, "blocks")),
        (90, 32, 4, 0, 0, (16, "registers")),
        (80, 64, 4, 166912, 0, (1, "smem")),
        (90, 64, 4, 300000, 0, (0, "smem")),
        (100, 64, 4, 20000, 256, (2, "tmem")),
    ],
)
def test_resident_blocks(arch, registers, warps, shared, tmem, expected):
    assert resident_blocks(MACHINES[arch], registers, warps, shared, tmem) == expected


CODE = """
        /*0000*/                   FFMA R1, R2, R3, R4 ;
.L_x_0:
\t//## File "kernel.py", line 2
{body}
        /*9000*/              @!P0 BRA `(.L_x_0) ;
        /*9010*/                   EXIT ;
"""
TTIR = """
#loc1 = loc("kernel.py":1:4)
#loc2 = loc("kernel.py":2:8)
    scf.for %c = %c0 to %M step %c64  : i32 {
      %p = math.exp2 %s : tensor<128x64xf32> loc(#loc2)
    } loc(#loc1)
"""


def launch(programs, exps_a_thread=64, **changes):
    body = "\n".join(f"        /*{16 + 16 * i:04x}*/  MUFU.EX2 R1, R2 ;" for i in range(exps_a_thread))
    compiled = Compiled(
        arch=90, warps=4, registers=128, stack=0, local=0, shared=0, tmem=0,
        sass=CODE.format(body=body), ttir=TTIR,
    )  # fmt: skip
    plan = dict(programs=programs, loops=(10,), flops=0, exps=64 * 128 * 10 * programs, dtype="bf16")
    return SimpleNamespace(**{**plan, "bytes_read": 0, "bytes_written": 0, **changes}), compiled


def test_a_launch_is_its_loops_times_their_trips():
    plan, compiled = launch(programs=132 * 3)
    m = model(plan, compiled, H200)
    assert m.clocks["mufu"] == 64 * 10 * 128 / 16  # exponentials x trips x threads / lanes
    assert m.clocks["fp32"] == 1
    assert m.binds == "mufu" and m.notes == []
    assert m.overlapped_us == pytest.approx(3 * 5120 / 1.83e3)  # three programs on each SM
    assert m.serial_us == pytest.approx(3 * 5121 / 1.83e3)
    assert m.overlapped_us == pytest.approx(m.limit_us)
    assert m.resident_blocks == 4 and m.waves == pytest.approx(0.75)


def test_copies_before_a_loop_are_counted_in_it():
    plan, compiled = launch(programs=132)
    copy = '\t//## File "kernel.py", line 2\n        /*000{}*/  @P1 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;\n'
    inside = compiled.sass.replace(".L_x_0:\n", ".L_x_0:\n" + copy.format(2))
    both = copy.format(1) + inside
    times = [model(plan, Compiled(**{**vars(compiled), "sass": text}), H200) for text in (inside, both)]
    assert times[0].clocks["lsu"] == times[1].clocks["lsu"] == 10 * 4 * 512 / 128
    assert times[0].clocks["l2"] == times[1].clocks["l2"] > 0
    assert times[1].clocks["issue"] == times[0].clocks["issue"] + 1


def test_the_busiest_sm_sets_the_time():
    times = [model(*launch(programs=n), H200).overlapped_us for n in (1, 132, 133)]
    assert times[0] == times[1] == times[2] / 2


def test_bytes_bind_when_there_are_more_of_them():
    plan, compiled = launch(programs=132, bytes_read=48 * 10**6, bytes_written=0)
    m = model(plan, compiled, H200)
    assert m.binds == "hbm" and m.overlapped_us == pytest.approx(10)
    assert m.serial_us == pytest.approx(10 + 5121 / 1.83e3)


def test_warps_with_roles_have_only_their_bytes_modelled():
    plan, compiled = launch(programs=132, bytes_read=48 * 10**6)
    text = compiled.sass.replace("FFMA R1, R2, R3, R4", "USETMAXREG.DEALLOC.CTAPOOL 0x18")
    m = model(plan, Compiled(**{**vars(compiled), "sass": text}), H200)
    assert m.overlapped_us == pytest.approx(10) and m.serial_us is m.resident_us is None
    assert "only bytes" in m.notes[0] and "roles" in m.notes[0]


def test_without_trip_counts_only_bytes_are_modelled():
    m = model(*launch(programs=132, bytes_read=48 * 10**6, loops=()), H200)
    assert m.overlapped_us == pytest.approx(10) and m.binds == "hbm"
    assert m.serial_us is m.resident_us is m.flops_done is None
    assert m.notes == ["only bytes are modelled: the plan gives 0 trip counts, the kernel has 1 run-time loops"]


def test_what_does_not_fit_has_no_time():
    plan, compiled = launch(programs=132)
    m = model(plan, Compiled(**{**vars(compiled), "shared": 300_000}), H200)
    assert m.overlapped_us is None and m.resident_blocks == 0 and "does not fit" in m.notes[-1]
