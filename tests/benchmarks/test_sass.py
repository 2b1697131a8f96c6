"""The reader of machine code, on small pieces of it."""

import pytest

from benchmarks.sass import parse

LOOP = """
        .size           kernel,(.L_x_4 - kernel)
.text.kernel:
	//## File "/src/kernel.py", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R1, 0x1, PT ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
	//## File "/src/kernel.py", line 5
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
	//## File "/site/standard.py", line 287
        /*0050*/                   MUFU.EX2 R4, R5 ;
.L_x_3:
        /*0060*/               @P1 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12], R4 ;
        /*00a0*/              @!P0 BRA `(.L_x_2) ;
        /*00b0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
        /*00d0*/                   NOP;
.L_x_4:
"""

NESTED = """
        /*0000*/                   MOV R1, RZ ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/                   FFMA R2, R2, R3, R4 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   BRA.U UP0, `(.L_x_2) ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R8 ;
.L_x_2:
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


def test_instructions_have_opcode_predicate_and_line():
    code = parse(LOOP)
    assert [i.address for i in code.instructions] == list(range(0, 0xE0, 16))
    lds, hgmma, mufu, ldg = code.instructions[3:7]
    assert lds.never and lds.base == "LDS"
    assert hgmma.op == "HGMMA.64x128x16.F32.BF16" and hgmma.line == ("src/kernel.py", 5) and not hgmma.predicate
    assert mufu.line == ("site/standard.py", 287)
    assert ldg.predicate == "P1" and not ldg.never


def test_counts_leave_out_what_never_runs():
    code = parse(LOOP)
    assert code.count("LDS") == 0
    assert code.count("HGMMA", "MUFU") == 2
    assert code.opcodes()["BRA"] == 5


def test_a_wait_placed_behind_the_kernel_is_no_loop_around_it():
    code = parse(LOOP)
    assert len(code.loops) == 1
    assert [i.base for i in code.own_instructions(0)] == ["LDS", "HGMMA", "MUFU", "LDG", "BRA"]
    assert "EXIT" in [i.base for i in code.own_instructions(None)]
    assert "NOP" not in [i.base for i in code.own_instructions(None)]  # cannot be reached


def test_nested_loops_know_each_other():
    code = parse(NESTED)
    outer, inner = code.loops
    assert outer.parent is None and outer.children == [1] and inner.parent == 0
    assert [i.base for i in code.own_instructions(1)] == ["FFMA", "BRA"]
    assert [i.base for i in code.own_instructions(0)] == ["IADD3", "BRA", "STG", "BRA"]


def test_lines_are_told_apart_by_folder_and_name():
    """The same in every checkout, and attention/forward.py is not projection/forward.py."""
    here, there, other = (
        parse(LOOP.replace("/src/kernel.py", path)).instructions[4].line
        for path in ("/a/kernels/attention/forward.py", "/b/c/attention/forward.py", "/a/kernels/projection/forward.py")
    )
    assert here == there == ("attention/forward.py", 5) and other == ("projection/forward.py", 5)


def test_text_without_code_is_an_error():
    with pytest.raises(ValueError, match="sass: text must hold at least one instruction"):
        parse("nothing here")
