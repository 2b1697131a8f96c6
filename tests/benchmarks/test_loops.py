"""Trip counts of the machine code's loops, found from the intermediate code and source lines."""

import pytest

from benchmarks.loops import access_bytes, count_trips, map_loops, tensor_flops
from benchmarks.sass import Instruction, parse
from benchmarks.ttir import read_ttir

# The kernel this stands for:
#  2    before
#  3    for m in range(0, M, 64):
#  4        product
#  5        exponential
#  6    between
#  7    for c in range(0, 256, 64):
#  8        store
#  9        for d in range(0, D):
# 10            load
TTIR = """
#loc2 = loc("kernel.py":2:4)
#loc3 = loc("kernel.py":3:22)
#loc4 = loc("kernel.py":4:8)
#loc5 = loc("kernel.py":5:8)
#loc7 = loc("kernel.py":7:22)
#loc8 = loc("kernel.py":8:12)
#loc9 = loc("kernel.py":9:26)
#loc10 = loc("kernel.py":10:16)
#loc11 = loc("standard.py":287:4)
#loc12 = loc("acc"(#loc3))
#loc13 = loc(callsite(#loc11 at #loc5))
module {
  tt.func public @kernel(%M: i32 loc("M"(#loc4))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc5)
    %c64 = arith.constant 64 : i32 loc(#loc5)
    %c256_i32 = arith.constant 256 : i32 loc(#loc5)
    %z = arith.addf %u, %u : f32 loc(#loc2)
    %acc = scf.for %m = %c0 to %M step %c64 iter_args(%a = %z) -> (tensor<128x64xf32>)  : i32 {
      %k = tt.load %k_ptrs, %mask : tensor<64x16x!tt.ptr<bf16>> loc(#loc4)
      %s = tt.dot %q, %kt, %z : tensor<128x16xbf16> * tensor<16x64xbf16> -> tensor<128x64xf32> loc(#loc4)
      %r = "tt.reduce"(%s) <{axis = 1 : i32}> ({
      ^bb0(%x: f32 loc(#loc4), %y: f32 loc(#loc4)):
        %w = arith.maxnumf %x, %y : f32 loc(#loc13)
        tt.reduce.return %w : f32 loc(#loc4)
      }) : (tensor<128x64xf32>) -> tensor<128xf32> loc(#loc4)
      %p = math.exp2 %s : tensor<128x64xf32> loc(#loc5)
      scf.yield %p : tensor<128x64xf32> loc(#loc3)
    } loc(#loc12)
    scf.for %c = %c0 to %c256_i32 step %c64  : i32 {
      %v = arith.maxnumf %x, %y : f32 loc(#loc13)
      scf.if %cond {
        tt.store %y_ptrs, %y : tensor<128x64x!tt.ptr<f32>> loc(#loc8)
      } else {
      } loc(#loc8)
      scf.for %d = %c0 to %D step %c64  : i32 {
        %u = tt.load %u_ptrs : tensor<512x!tt.ptr<f32>> loc(#loc10)
      } loc(#loc9)
    } loc(#loc7)
    tt.return loc(#loc2)
  } loc(#loc2)
} loc(#loc2)
"""


def kernel(*given):
    read = read_ttir(TTIR)
    assert count_trips(read.loops, given) is None
    return read


def sass(*lines):
    """Machine code from (source line, text) pairs; text ending in a colon is a label."""
    rows, address = [], 0
    for line, text in lines:
        if text.endswith(":"):
            rows.append(text)
            continue
        predicate, body = (text.split(" ", 1)) if text.startswith("@") else ("", text)
        rows += [f'\t//## File "kernel.py", line {line}', f"        /*{address:04x}*/  {predicate} {body} ;"]
        address += 16
    return parse("\n".join(rows))


def test_ttir_says_lines_bounds_nesting_and_work():
    read = read_ttir(TTIR)
    assert [loop.line for loop in read.loops] == [("kernel.py", 3), ("kernel.py", 7), ("kernel.py", 9)]
    assert [loop.constant for loop in read.loops] == [None, 4, None]
    assert [loop.parent for loop in read.loops] == [None, None, 1]
    first, second, third = (loop.work for loop in read.loops)
    assert first.flops == 2 * 128 * 64 * 16 and first.mma == 1
    assert first.exps == 128 * 64 and first.load_bytes == 64 * 16 * 2
    assert second.store_bytes == 128 * 64 * 4 and second.load_bytes == 0
    assert third.load_bytes == 512 * 4
    assert read.outside.flops == read.outside.exps == read.outside.load_bytes == 0


def test_lines_belong_to_the_loop_that_alone_has_them():
    owner = read_ttir(TTIR).owner
    lines = {line: owner.get(("kernel.py", line)) for line in range(2, 11)}
    assert lines == {2: None, 3: 0, 4: 0, 5: 0, 6: None, 7: 1, 8: 1, 9: 2, 10: 2}
    assert ("standard.py", 287) not in owner  # in two loops


def test_trips_come_from_constants_and_from_the_plan():
    loops = kernel(16, 12).loops
    assert [loop.total for loop in loops] == [16, 4, 12]
    assert [loop.entries for loop in loops] == [1, 1, 4]
    assert count_trips(loops, (16, 4, 24)) is None and [loop.total for loop in loops] == [16, 4, 24]
    assert count_trips(loops, (16, 4, 1, 24)) is None and [loop.total for loop in loops] == [16, 4, 24]
    assert count_trips(loops, (16,)) == "the plan gives 1 trip counts, the kernel has 2 run-time loops"


EXP = "MUFU.EX2 R1, R2"


def exps(count, line=5):
    return [(line, EXP)] * count


def test_a_plain_loop_runs_its_trips():
    code = sass((2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(64), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, kernel(16, 12), warps=4)
    assert mapping.source == [0] and mapping.executions == [16] and mapping.unroll == [1] and mapping.notes == []


def test_an_unrolled_loop_runs_less_often():
    code = sass((2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(128), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, kernel(16, 12), warps=4)
    assert mapping.executions == [8] and mapping.notes == ["line 3: unrolled 2 times"]


def test_work_that_warps_repeat_is_not_taken_for_unrolling():
    copies = [(4, "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]")]  # 2048 bytes, those of one trip
    code = sass((2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(128), *copies, (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, kernel(16, 12), warps=4)
    assert mapping.executions == [16] and mapping.unroll == [1]
    assert mapping.notes == ["line 3: exponentials done 2.00 times over, in several warps"]


def test_the_rest_of_an_unrolled_loop_gets_what_is_left():
    code = sass(
        *[(2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(256), (3, "@P0 BRA `(.L_x_0)")],
        *[(3, ".L_x_1:"), *exps(64), (3, "@P0 BRA `(.L_x_1)"), (6, "EXIT")],
    )
    assert map_loops(code, kernel(15, 12), warps=4).executions == [3, 3]


def test_a_peeled_trip_is_not_counted_twice():
    code = sass(*exps(64), (3, ".L_x_0:"), *exps(64), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, kernel(16, 12), warps=4)
    assert mapping.executions == [15] and mapping.notes == ["line 3: 1 of 16 trips peeled"]


def test_inner_loops_multiply_and_keep_their_own_lines():
    code = sass(
        *[(7, ".L_x_0:"), (8, "STG.E.128 [R1], R4"), *[(8, "STG.E.128 [R1], R4")] * 15, (10, ".L_x_1:")],
        *[(10, "LDG.E.128 R1, [R2]"), (9, "@P0 BRA `(.L_x_1)"), (7, "@P1 BRA `(.L_x_0)"), (7, "EXIT")],
    )
    mapping = map_loops(code, kernel(16, 12), warps=4)
    assert mapping.source == [1, 2] and mapping.executions == [4, 12]


def test_a_loop_that_was_inlined_twice_is_told_apart_by_its_work():
    text = TTIR.replace('"kernel.py":7', '"kernel.py":3').replace("tt.store", "tt.dot")
    text = text.replace("%y : tensor<128x64x!tt.ptr<f32>>", "%y : tensor<128x64xbf16> * tensor<64x64xbf16> -> x")
    read = read_ttir(text)
    count_trips(read.loops, (16, 12))
    assert read.loops[0].line == read.loops[1].line
    hgmma = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    code = sass((2, "MOV R1, RZ"), (3, ".L_x_0:"), *[(8, hgmma)] * 8, (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, read, warps=4)
    assert mapping.source == [1] and mapping.executions == [4] and mapping.notes == []


def test_a_loop_from_nowhere_is_a_note():
    code = sass((2, ".L_x_0:"), *exps(64, line=2), (2, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, kernel(16, 12), warps=4)
    assert mapping.executions == [1] and mapping.notes == ["a loop of 65 instructions has no source loop: counted once"]


def test_work_that_does_not_divide_is_a_note():
    code = sass((2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(90), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    note = "line 3: exponentials of 1.41 trips in one of the machine's, taken as not unrolled"
    assert note in map_loops(code, kernel(16, 12), warps=4).notes


@pytest.mark.parametrize(
    "op, flops",
    [("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 * 2), ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8 * 8), ("FFMA", 0)],
)
def test_flops_of_tensor_instructions(op, flops):
    assert tensor_flops(Instruction(0, op), warps=8) == flops


@pytest.mark.parametrize(
    "op, size", [("LDG.E.128", 16), ("LDG.E.U16", 2), ("LDGSTS.E.BYPASS.128", 16), ("STG.E", 4), ("LDS.64", 8)]
)
def test_bytes_of_loads(op, size):
    assert access_bytes(Instruction(0, op)) == size
