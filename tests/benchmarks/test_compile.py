"""Compiling a small attention-like kernel for three GPUs that are not here, and modelling it from what comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Compiled code cannot be made in this process, where kernels are imported for the interpreter.
SCRIPT = """
import dataclasses, json, sys
import triton
import triton.language as tl
from benchmarks.compile import compile_key, compile_plan, resources
from benchmarks.machine import MACHINES
from benchmarks.model import model
from benchmarks.ttir import read_ttir
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
    divisible_by_16=(*NAMES, "y_ptr", "M"), loops=(16,),
    flops=264 * (2 * 128 * 512 * 64 + 2 * 128 * 1024 * 128), exps=264 * 128 * 1024,
)
found = {}
for arch in (80, 90, 100):
    compiled = compile_plan(plan, arch)
    loops = read_ttir(compiled.ttir).loops
    m = model(plan, compiled, MACHINES[arch])
    found[arch] = {
        "resources": resources(compiled), "constants": [loop.constant for loop in loops], "notes": m.notes,
        "clocks": m.clocks, "runs": [r.executions for r in m.regions], "blocks": m.resident_blocks,
        "flops": m.flops_done / plan.flops, "exps": m.exps_done / plan.exps, "us": [m.limit_us, m.overlapped_us],
    }
same = dataclasses.replace(plan, grid=(1,), loops=(3,), flops=5)
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
    resources = found[arch]["resources"]
    tensor = {name: resources[name] for name in ("hmma", "hgmma", "utchmma")}
    assert tensor.pop(used) >= 5 and not any(tensor.values())
    assert resources["stack"] == resources["spills"] == 0
    assert 32 <= resources["registers"] <= 255 and resources["smem"] > 0 and resources["mufu"] >= 32
    assert (resources["tmem"] > 0) == (arch == "100")


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_trip_is_counted_once(found, arch):
    """Tensor and special-function clocks are those of the whole work, however the compiler peeled and unrolled."""
    one = found[arch]
    assert one["constants"] == [8, None]
    assert one["flops"] == one["exps"] == 1
    rate = {"80": 2048, "90": 4096, "100": 8192}[arch]
    assert one["clocks"]["tensor"] == pytest.approx((2 * 128 * 512 * 64 + 2 * 128 * 1024 * 128) / rate)
    assert one["clocks"]["mufu"] == pytest.approx(128 * 1024 / 16)
    assert one["us"][0] <= one["us"][1] * 1.0001 and one["blocks"] >= 1
    assert all("peeled" in note for note in one["notes"])


def test_plans_that_compile_alike_have_one_key(found):
    assert found["keys"] == [True, False]


def test_a_missing_argument_is_named(found):
    assert found["error"] == "compile_plan: plan sample must give argument x_ptr of its kernel"


def test_the_interpreters_kernels_are_refused():
    from benchmarks.compile import compile_plan

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET before sagan_fast is imported"):
        compile_plan(type("Plan", (), {"kernel": object()})(), 90)
