import json
import os
import subprocess
import sys
import tempfile

import pytest

from benchmarks.shapes import SAGAN_MATRICES
from benchmarks.shipped import norms_plans, spectral_norm_plans
from sagan_fast.kernels.spectral_norm.tables import MAX_COLUMNS, WIDTHS, width_of

WIDE = [(64, 13824), (3, 13825), (5, 5)]


def test_plans_count_each_byte_once():
    found = spectral_norm_plans(SAGAN_MATRICES, "fp32", "bf16")
    by_name = {plan.name: plan for plan in reversed(found)}
    weights = 4 * sum(R * K for R, K in SAGAN_MATRICES)
    assert weights == 286_624_000
    sweep, scale = by_name["spectral_norm sweep, u first"], by_name["spectral_norm scale, u first"]
    assert weights < sweep.bytes_read < 1.01 * weights and sweep.bytes_written < 0.08 * weights
    assert weights < scale.bytes_read < 1.01 * weights and weights / 2 < scale.bytes_written < 0.51 * weights
    assert {plan.kernel.__name__ for plan in found} == {
        "_sweep_kernel", "_sweep_columns_kernel", "_reduce_kernel", "_scale_kernel", "_dot_kernel", "_d_weight_kernel",
        "_write_kernel",
    }  # fmt: skip
    for plan in found:
        assert set(plan.signature) | set(plan.constexprs) == set(plan.kernel.arg_names)
        assert plan.programs > 0


def test_widths():
    widths = {1: 128, 128: 128, 129: 1024, 1024: 1024, 1152: 2304, 9216: 9216, MAX_COLUMNS: 16384}
    assert {K: width_of(K) for K in widths} == widths
    assert list(WIDTHS) == sorted(WIDTHS) and width_of(0) == 0


def test_norms_of_updates_read_them_once_and_scaling_reads_and_writes_them_once():
    by_name = {plan.name: plan for plan in reversed(norms_plans(SAGAN_MATRICES, "bf16"))}
    updates = 2 * sum(R * K for R, K in [*SAGAN_MATRICES, *[SAGAN_MATRICES[0]] * 3])
    sweep, rescale = by_name["spectral_norm sweep, u first"], by_name["spectral_norm rescale"]
    assert updates < sweep.bytes_read < 1.01 * updates
    assert updates == rescale.bytes_written < rescale.bytes_read < 1.01 * updates
    assert {
        "spectral_norm finish, u first",
        "spectral_norm finish, v first",
        "spectral_norm addresses of stacks",
    } <= set(by_name)
    for plan in by_name.values():
        assert set(plan.signature) | set(plan.constexprs) == set(plan.kernel.arg_names) and plan.programs > 0


COMPILE = """
import json, sys
from benchmarks.compile import compile_plan
from benchmarks.shipped import norms_plans, spectral_norm_plans

lists, dtype, out_dtype, arch, limit = json.loads(sys.argv[1])
found = []
for matrices in lists:
    matrices = [tuple(matrix) for matrix in matrices]
    if out_dtype is None:
        plans = [plan for plan in norms_plans(matrices, dtype, arch) if "rescale" in plan.name or "finish" in plan.name]
    else:
        plans = spectral_norm_plans(matrices, dtype, out_dtype, arch)
    some = [plan for plan in plans if limit is None or "addresses" not in plan.name][:limit]
    done = [(plan.name, compile_plan(plan, arch)) for plan in some]
    found.append([
        (name, code.stack, " ".join(op for op in code.opcodes for _ in range(code.opcodes[op])))
        for name, code in done
    ])
print(json.dumps(found))
"""


def compiled(lists, dtype, out_dtype, arch, limit=None):
    """Return name, bytes of stack and opcodes of the first `limit` launches of each of `lists` of matrices.

    In a process of its own, without the interpreter.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", COMPILE, json.dumps([lists, dtype, out_dtype, arch, limit])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found, stack_bytes=0):
    assert found
    for name, stack, code in found:
        assert stack <= stack_bytes, f"{name} spills {stack} bytes"
        assert stack_bytes or ("STL" not in code and "LDL" not in code), f"{name} spills"
        if "reduce" not in name and "addresses" not in name:
            assert "LDG.E.128" in code, f"{name} loads element by element"
        if "scale" in name or "dW" in name:
            assert "STG.E.128" in code, f"{name} stores element by element"


def test_sweep_of_sagan_keeps_rows_in_registers_and_loads_128_bits():
    check(compiled([SAGAN_MATRICES], "fp32", "bf16", 90, 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scaling_in_place_loads_and_stores_128_bits_at_once(arch, dtype):
    (found,) = compiled([[(64, 64)]], dtype, None, arch)
    assert len([name for name, _, _ in found if name == "spectral_norm rescale"]) == 2
    for name, stack, code in found:
        assert stack == 0, f"{name} spills {stack} bytes"
        assert "rescale" not in name or ("LDG.E.128" in code and "STG.E.128" in code)


@pytest.mark.slow
def test_rows_that_start_anywhere_are_not_loaded_as_if_aligned():
    lists = [[(64, 27)], [(64, 27), (64, 64)], [(64, 64)]]
    unaligned, both, aligned = (code for ((_, _, code),) in compiled(lists, "fp32", "fp32", 90, 1))
    assert "LDG.E.128" not in unaligned
    assert both.count("LDG.E.128") == aligned.count("LDG.E.128") > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "out_dtype"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("matrices", [SAGAN_MATRICES, WIDE], ids=["sagan", "wide"])
def test_nothing_spills(matrices, dtype, out_dtype, arch):
    # Rows of more than 9216 floats, which SAGAN does not have, are two registers too many on Blackwell.
    known = 8 if (matrices is WIDE and dtype == "fp32" and arch == 100) else 0
    check(compiled([matrices], dtype, out_dtype, arch)[0], known)
