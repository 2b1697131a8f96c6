"""Trip counts of the machine code's loops, found from the intermediate code and source lines."""

import pytest

from benchmarks.loops import access_bytes, count_trips, map_loops, read_ttir, tensor_flops
from benchmarks.sass import Instruction, parse

SOURCE = """\
def kernel():
    before
    for m in range(0, M, 64):
        product
        exponential
    between
    for c in range(0, 256, 64):
        inner
        for d in range(0, D):
            innermost
"""

TTIR = """\
#loc4 = loc("{path}":3:22)
#loc5 = loc("{path}":7:22)
#loc6 = loc("{path}":9:26)
#loc9 = loc("acc"(#loc4))
module {{
  tt.func public @kernel(%M: i32 loc("M"(#loc4))) attributes {{noinline = false}} {{
    %c0 = arith.constant 0 : i32 loc(#loc4)
    %c64 = arith.constant 64 : i32 loc(#loc4)
    %c256_i32 = arith.constant 256 : i32 loc(#loc4)
    %acc = scf.for %m = %c0 to %M step %c64 iter_args(%a = %z) -> (tensor<128x64xf32>)  : i32 {{
      %k = tt.load %k_ptrs, %mask : tensor<64x16x!tt.ptr<bf16>> loc(#loc4)
      %s = tt.dot %q, %kt, %z : tensor<128x16xbf16> * tensor<16x64xbf16> -> tensor<128x64xf32> loc(#loc4)
      %r = "tt.reduce"(%s) <{{axis = 1 : i32}}> ({{
      ^bb0(%x: f32 loc(#loc4), %y: f32 loc(#loc4)):
        %w = arith.maxnumf %x, %y : f32 loc(#loc4)
        tt.reduce.return %w : f32 loc(#loc4)
      }}) : (tensor<128x64xf32>) -> tensor<128xf32> loc(#loc4)
      %p = math.exp2 %s : tensor<128x64xf32> loc(#loc4)
      scf.yield %p : tensor<128x64xf32> loc(#loc4)
    }} loc(#loc9)
    scf.for %c = %c0 to %c256_i32 step %c64  : i32 {{
      scf.if %cond {{
        tt.store %y_ptrs, %y : tensor<128x64x!tt.ptr<f32>> loc(#loc5)
      }} else {{
      }} loc(#loc5)
      scf.for %d = %c0 to %D step %c64  : i32 {{
        %u = tt.load %u_ptrs : tensor<512x!tt.ptr<f32>> loc(#loc6)
      }} loc(#loc6)
    }} loc(#loc5)
    tt.return loc(#loc4)
  }} loc(#loc4)
}} loc(#loc4)
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    return str(path)


def sass(source, *lines):
    """Machine code from (source line, text) pairs; text ending in a colon is a label."""
    rows, address = [], 0
    for line, text in lines:
        if text.endswith(":"):
            rows.append(text)
            continue
        predicate, body = (text.split(" ", 1)) if text.startswith("@") else ("", text)
        rows += [f'\t//## File "{source}", line {line}', f"        /*{address:04x}*/  {predicate} {body} ;"]
        address += 16
    return parse("\n".join(rows))


def test_ttir_says_lines_bounds_nesting_and_work(source):
    loops, outside = read_ttir(TTIR.format(path=source))
    assert [loop.line for loop in loops] == [(source, 3), (source, 7), (source, 9)]
    assert [loop.constant for loop in loops] == [None, 4, None]
    assert [loop.parent for loop in loops] == [None, None, 1]
    keys = loops[0].work
    assert (
        keys.flops == 2 * 128 * 64 * 16 and keys.mma == 1 and keys.exps == 128 * 64 and keys.load_bytes == 64 * 16 * 2
    )
    assert loops[1].work.store_bytes == 128 * 64 * 4 and loops[1].work.load_bytes == 0
    assert loops[2].work.load_bytes == 512 * 4
    assert outside.flops == outside.exps == outside.load_bytes == 0


def test_trips_come_from_constants_and_from_the_plan(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    assert count_trips(loops, (16, 12)) == []
    assert [loop.total for loop in loops] == [16, 4, 12]
    assert [loop.entries for loop in loops] == [1, 1, 4]
    assert count_trips(loops, (16,)) == ["the plan gives 1 trip counts for 2 run-time loops"]


EXP = "MUFU.EX2 R1, R2"


def exps(count, line=5):
    return [(line, EXP)] * count


def test_a_plain_loop_runs_its_trips(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    count_trips(loops, (16, 12))
    code = sass(source, (2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(64), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, loops, warps=4)
    assert mapping.source == [0] and mapping.executions == [16] and mapping.unroll == [1] and mapping.notes == []


def test_an_unrolled_loop_runs_less_often(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    count_trips(loops, (16, 12))
    code = sass(source, (2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(128), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, loops, warps=4)
    assert mapping.executions == [8] and mapping.notes == ["line 3: unrolled 2 times"]


def test_the_rest_of_an_unrolled_loop_gets_what_is_left(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    count_trips(loops, (15, 12))
    code = sass(
        source,
        *[(2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(256), (3, "@P0 BRA `(.L_x_0)")],
        *[(3, ".L_x_1:"), *exps(64), (3, "@P0 BRA `(.L_x_1)"), (6, "EXIT")],
    )
    assert map_loops(code, loops, warps=4).executions == [3, 3]


def test_a_peeled_trip_is_not_counted_twice(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    count_trips(loops, (16, 12))
    code = sass(source, *exps(64), (3, ".L_x_0:"), *exps(64), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, loops, warps=4)
    assert mapping.executions == [15] and mapping.notes == ["line 3: 1 of 16 trips peeled"]


def test_inner_loops_multiply_and_keep_their_own_lines(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    count_trips(loops, (16, 12))
    code = sass(
        source,
        *[(7, ".L_x_0:"), (8, "STG.E.128 [R1], R4"), *[(8, "STG.E.128 [R1], R4")] * 15, (10, ".L_x_1:")],
        *[(10, "LDG.E.128 R1, [R2]"), (9, "@P0 BRA `(.L_x_1)"), (7, "@P1 BRA `(.L_x_0)"), (7, "EXIT")],
    )
    mapping = map_loops(code, loops, warps=4)
    assert mapping.source == [1, 2] and mapping.executions == [4, 12]


def test_a_loop_from_nowhere_is_a_note(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    count_trips(loops, (16, 12))
    code = sass("/elsewhere.py", (2, ".L_x_0:"), *exps(64), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    mapping = map_loops(code, loops, warps=4)
    assert mapping.executions == [1] and mapping.notes == ["a loop of 65 instructions has no source loop: counted once"]


def test_work_that_does_not_divide_is_a_note(source):
    loops, _ = read_ttir(TTIR.format(path=source))
    count_trips(loops, (16, 12))
    code = sass(source, (2, "MOV R1, RZ"), (3, ".L_x_0:"), *exps(90), (3, "@P0 BRA `(.L_x_0)"), (6, "EXIT"))
    assert "1.41 trips' work" in map_loops(code, loops, warps=4).notes[0]


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
