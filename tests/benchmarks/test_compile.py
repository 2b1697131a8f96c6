"""Compiling a small attention-like kernel for three GPUs that are not here, and reading what comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile import Compiled, compile_plan, opcodes, spills_in_loops

ROOT = Path(__file__).parents[2]

# Compiled code cannot be made in this process, where kernels are imported for the interpreter.
SCRIPT = """
import dataclasses, json, sys
import triton
import triton.language as tl
from benchmarks.compile import compile_key, compile_plan, resources
from sagan_fast.kernels.launch import Plan


@triton.jit
def kernel(x_ptr, w_ptr, k_ptr, y_ptr, M, C: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, 64)
    q = tl.zeros((128, 64), tl.float32)
    for c in range(0, C, 64):
        x = tl.load(x_ptr + tl.arange(0, 128)[:, None] * C + c + offs_d[None, :])
        w = tl.load(w_ptr + (c + offs_d)[:, None] * 64 + offs_d[None, :])
        q = tl.dot(x, w, q)
    acc = tl.zeros((128, 64), tl.float32)
    q = q.to(tl.bfloat16)
    for m in range(0, M, BLOCK):
        k = tl.load(k_ptr + (m + offs)[:, None] * 64 + offs_d[None, :], mask=(m + offs)[:, None] < M, other=0.0)
        p = tl.math.exp2(tl.dot(q, tl.trans(k)))
        acc = tl.dot(p.to(tl.bfloat16), k, acc)
    tl.store(y_ptr + tl.arange(0, 128)[:, None] * 64 + offs_d[None, :], acc)


NAMES = ("x_ptr", "w_ptr", "k_ptr")
plan = Plan(
    name="sample", kernel=kernel, dtype="bf16", config="-", num_warps=8, num_stages=2, grid=(264,),
    signature={**dict.fromkeys(NAMES, "*bf16"), "y_ptr": "*fp32", "M": "i32"}, constexprs={"C": 512, "BLOCK": 64},
    divisible_by_16=(*NAMES, "y_ptr", "M"), flops=1,
)
found = {arch: resources(compile_plan(plan, arch)) for arch in (80, 90, 100)}
assert resources(compile_plan(plan, 90)) == found[90]  # from the cache now
same = dataclasses.replace(plan, grid=(1,), flops=5)
found["keys"] = [compile_key(same, 90) == compile_key(plan, 90), compile_key(plan, 80) == compile_key(plan, 90)]
try:
    compile_plan(dataclasses.replace(plan, signature={}), 90)
except RuntimeError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = tmp_path_factory.mktemp("compile") / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch, used", [("80", "hmma"), ("90", "hgmma"), ("100", "utchmma")])
def test_resources(found, arch, used):
    resources = found[arch]
    tensor = {name: resources[name] for name in ("hmma", "hgmma", "utchmma")}
    assert tensor.pop(used) >= 5 and not any(tensor.values())
    assert resources["stack"] == resources["spills"] == 0
    assert 32 <= resources["registers"] <= 255 and resources["smem"] > 0 and resources["mufu"] >= 32
    assert (resources["tmem"] > 0) == (arch == "100")


def test_plans_that_compile_alike_have_one_key(found):
    assert found["keys"] == [True, False]


def test_a_missing_argument_is_named(found):
    assert found["error"] == "compile_kernel: plan sample must give argument x_ptr of its kernel"


def test_the_interpreters_kernels_are_refused():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET before sagan_fast is imported"):
        compile_plan(type("Plan", (), {"kernel": object()})(), 90)


SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!PT LDS RZ, [RZ] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0030*/                   MUFU.EX2 R4, R5 ;
        /*0040*/               @P1 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0060*/                   STL.64 [R1], R8 ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
"""


NESTED = """
.L_x_0:
        /*0000*/                   STL [R1], R8 ;
.L_x_1:
        /*0010*/                   LDL.64 R8, [R1+0x8] ;
        /*0020*/               @P4 BRA `(.L_x_1);
        /*0028*/              @!P0 LDL R9, [R1] ;
        /*0030*/               @P1 BRA `(.L_x_1);
        /*0040*/               @P2 BRA `(.L_x_2);
        /*0050*/               @P3 BRA `(.L_x_0);
.L_x_2:
        /*0060*/                   LDL R8, [R1] ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_local_memory_is_counted_in_innermost_loops_only():
    assert spills_in_loops(NESTED) == 2, "not what comes before or after, nor in the outer loop"
    assert spills_in_loops(SASS) == 0, "the branch to itself at the end is no loop"
    with pytest.raises(ValueError, match="must name a label of the code"):
        spills_in_loops(NESTED.replace(".L_x_1:", ".M_1:"))


def test_opcodes_are_counted_without_what_never_runs():
    assert opcodes(SASS) == {
        "LDC": 1, "HGMMA.64x128x16.F32.BF16": 1, "MUFU.EX2": 1, "LDG.E.128": 2, "STL.64": 1, "BRA": 1,
    }  # fmt: skip
    compiled = Compiled(90, warps=4, registers=32, stack=0, local=16, shared=0, tmem=0, opcodes=opcodes(SASS))
    assert compiled.count("HGMMA", "MUFU") == 2 and compiled.spills == 17
    with pytest.raises(ValueError, match="sass must hold at least one instruction"):
        opcodes("nothing here")
