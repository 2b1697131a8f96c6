"""What the command records of the kernels it compiles, and when it says that a chip has a fault."""

import importlib.metadata as metadata
import json

import evidence
import pytest

from benchmarks import compile, records
from benchmarks.machine import SHARED_BYTES
from sagan_fast.kernels.configs import WIDTHS


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function that runs the command on one kernel, whose code is what `uses` says: status and recorded lines."""
    plans = {arch: evidence.shipped_plans("bf16", arch)[:3] for arch in (86, "gfx942")}
    file = tmp_path / f"{records.EXECUTED}.jsonl"
    file.write_text('{"kernel": "an older line, without the code", "arch": 86, "dtype": "bf16", "faults": []}\n')
    monkeypatch.setattr(evidence, "shipped_plans", lambda dtype, arch: plans[arch])
    monkeypatch.setattr(records, "RESULTS", tmp_path)

    def run(arch, stack=0, shared=1000, footprint=None, looped=0):
        monkeypatch.setattr(compile, "looped_spills", lambda plan, arch: looped)
        monkeypatch.setattr(compile, "footprint", footprint or (lambda plan, arch: (stack, shared)))
        status = evidence.compile(["bf16"], [arch])
        return status, [json.loads(line) for line in file.read_text().splitlines()[1:]]

    for plan in (plan for several in plans.values() for plan in several):
        if not hasattr(plan.kernel, "cache_key"):  # the interpreter's functions have none
            monkeypatch.setattr(type(plan.kernel), "cache_key", "the source", raising=False)
    return run


def test_what_is_recorded_for_the_same_code_is_not_compiled_again(compiled):
    status, first = compiled("86")
    assert status == 0 and sum(line["launches"] for line in first) == 3
    assert {line["triton"] for line in first} == {metadata.version("triton")}
    assert compiled("86", stack=64) == (0, first), "nothing new"


@pytest.mark.parametrize("uses", [{"stack": 33}, {"stack": 8, "looped": 1}, {"shared": SHARED_BYTES[86] + 1}])
def test_a_fault_on_one_of_nvidia_s_chips_is_the_status(compiled, uses, capsys):
    status, lines = compiled("86", **uses)
    assert status == 1 and all(len(line["faults"]) == line["launches"] for line in lines)
    assert "on 86, bf16: 32x32 BLOCK_" in capsys.readouterr().out
    assert compiled("86", stack=32)[0] == 0, "repaired since, and spilled outside of loops only"


def test_amd_s_compiler_may_spill_but_not_refuse(compiled):
    status, lines = compiled("gfx942", stack=8)
    assert status == 0 and any(line["faults"] for line in lines)


def test_what_the_compiler_refuses_is_a_fault_everywhere(compiled, monkeypatch):
    def refuse(plan, arch):
        raise RuntimeError("no")

    monkeypatch.setattr(compile, "compile_kernel", refuse)
    status, lines = compiled("gfx942", footprint=compile.footprint)
    assert status == 1 and all(fault.endswith("RuntimeError") for line in lines for fault in line["faults"])


def test_every_width_is_compiled_and_before_8_0_spectral_norm_alone():
    widths = {(plan.constexprs.get("D_QK"), plan.constexprs.get("D_V")) for plan in evidence.shipped_plans("tf32", 90)}
    assert len(widths) >= len(WIDTHS)
    old = {plan.name.split()[0] for plan in evidence.shipped_plans("fp32", 75)}
    assert old == {"spectral_norm"} and not evidence.shipped_plans("bf16", 75)


def test_batch_norm_is_compiled_too_and_for_tf32_as_for_fp32():
    assert {
        plan.name for plan in evidence.shipped_plans("bf16", 90) if plan.name.startswith("batch_norm")
    } == {
        "batch_norm_moments", "batch_norm_merge", "batch_norm_fwd", "batch_norm_bwd_sums", "batch_norm_bwd_totals",
        "batch_norm_bwd_tables", "batch_norm_bwd_input",
    }  # fmt: skip
    assert not any(plan.name.startswith("batch_norm") for plan in evidence.shipped_plans("tf32", 90))
