"""The reader of intermediate code, on a piece with every kind of loop and branch."""

from benchmarks.ttir import read_ttir

TTIR = """
#loc1 = loc("a.py":1:0)
#loc2 = loc("a.py":2:4)
#loc3 = loc("a.py":3:8)
#loc5 = loc("a.py":5:8)
#loc6 = loc("a.py":6:8)
#loc7 = loc("helper.py":70:4)
#loc8 = loc(callsite(#loc7 at #loc3))
#loc9 = loc("x"(#loc8))
#loc10 = loc(callsite(#loc7 at #loc6))
module {
  tt.func public @kernel(%n: i32 loc("n"(#loc1))) {
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c3_i32 = arith.constant 3 : i32 loc(#loc1)
    %c10_i32 = arith.constant 10 : i32 loc(#loc1)
    %w = scf.while (%i = %n) : (i32) -> i32 {
      %more = arith.cmpi slt, %i, %c10_i32 : i32 loc(#loc2)
      scf.condition(%more) %i : i32 loc(#loc2)
    } do {
    ^bb0(%i: i32 loc("a.py":2:4)):
      %d = tt.descriptor_load %desc[%i, %i] : !tt.tensordesc<tensor<64x32xbf16>> -> tensor<64x32xbf16> loc(#loc3)
      %t = arith.addf %d, %d : tensor<64x32xbf16> loc(#loc9)
      scf.yield %i : i32 loc(#loc2)
    } loc(#loc2)
    %s:2 = scf.for %j = %c1_i32 to %c10_i32 step %c3_i32 iter_args(%a = %w, %b = %w) -> (i32, i32)  : i32 {
      %q = tt.dot %x, %y, %z : tensor<2x256x16xf32> * tensor<2x16x512xf32> -> tensor<2x256x512xf32> loc(#loc6)
      %u = scf.if %p -> (i32) {
        %v = tt.load %ptr : !tt.ptr<f32> loc(#loc6)
        scf.yield %v : i32 loc(#loc6)
      } else {
        tt.store %ptr, %v : tensor<128x!tt.ptr<i8>> loc(#loc6)
        scf.yield %v : i32 loc(#loc6)
      } loc(#loc6)
      %r = arith.addf %q, %q : tensor<64x32xbf16> loc(#loc10)
      scf.yield %u, %u : i32, i32 loc(#loc5)
    } loc(#loc5)
    %e = math.exp2 %s : f32 loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc1)
} loc(#loc1)
"""


def test_while_and_for_with_constant_bounds():
    first, second = read_ttir(TTIR).loops
    assert (first.line, first.constant, first.parent) == (("a.py", 2), None, None)
    assert (second.line, second.constant, second.parent) == (("a.py", 5), 3, None)  # 1, 4, 7


def test_work_of_a_trip():
    read = read_ttir(TTIR)
    first, second = (loop.work for loop in read.loops)
    assert first.load_bytes == first.descriptor_bytes == 64 * 32 * 2 and first.flops == first.store_bytes == 0
    assert second.flops == 2 * 2 * 256 * 16 * 512
    assert second.mma == 2 * 2 * 2 * 2  # batch, 256 rows by 128, 512 columns by 256, 64 bytes of K by 32
    assert second.load_bytes == 4 and second.store_bytes == 128 and second.descriptor_bytes == 0
    assert read.outside.exps == 1


def test_lines_of_a_function_called_in_two_loops_belong_to_neither():
    owner = read_ttir(TTIR).owner
    assert owner["a.py", 3] == 0 and owner["a.py", 6] == 1 and owner["a.py", 1] is None
    assert ("helper.py", 70) not in owner
