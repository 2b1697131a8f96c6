"""What the command records of the kernels it compiles, and when it says that a chip has a fault."""

import importlib.metadata as metadata
import json

import evidence
import pytest

from benchmarks import compile, gates, records, tables
from benchmarks.machine import SHARED_BYTES
from sagan_fast.kernels.configs import WIDTHS


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function that runs the command on one kernel, whose code is what `uses` says: status and recorded lines."""
    plans = {arch: gates.shipped_plans("bf16", arch)[:3] for arch in (86, "gfx942")}
    file = tmp_path / f"{records.EXECUTED}.jsonl"
    file.write_text('{"kernel": "an older line, without the code", "arch": 86, "dtype": "bf16", "faults": []}\n')
    monkeypatch.setattr(gates, "shipped_plans", lambda dtype, arch: plans[arch])
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
    widths = {(plan.constexprs.get("D_QK"), plan.constexprs.get("D_V")) for plan in gates.shipped_plans("tf32", 90)}
    assert len(widths) >= len(WIDTHS)
    old = {plan.name.split()[0] for plan in gates.shipped_plans("fp32", 75)}
    assert old == {"spectral_norm"} and not gates.shipped_plans("bf16", 75)


def test_batch_norm_is_compiled_too_and_for_tf32_as_for_fp32():
    assert {
        plan.name for plan in gates.shipped_plans("bf16", 90) if plan.name.startswith("batch_norm")
    } == {
        "batch_norm_moments", "batch_norm_merge", "batch_norm_fwd", "batch_norm_bwd_sums", "batch_norm_bwd_totals",
        "batch_norm_bwd_tables", "batch_norm_bwd_input",
    }  # fmt: skip
    assert not any(plan.name.startswith("batch_norm") for plan in gates.shipped_plans("tf32", 90))


def test_a_record_is_of_today_only_with_the_hash_of_today_s_code(compiled):
    gates._codes.cache_clear()
    gates._sources.cache_clear()
    _, lines = compiled("86")
    assert lines and all(map(gates.is_today, lines))
    assert not any(gates.is_today({**line, "code": "of before"}) for line in lines)
    assert not any(gates.is_today({name: line[name] for name in line if name != "code"}) for line in lines)
    gates._codes.cache_clear()
    gates._sources.cache_clear()


def test_what_was_executed_counts_by_its_source_alone(monkeypatch):
    monkeypatch.setattr(gates, "_sources", lambda: {"sweep": "abc"})
    assert gates.is_today({"kernel": "sweep", "evidence": "executed", "code": "abc"})
    assert not gates.is_today({"kernel": "sweep", "evidence": "proved", "dtype": "fp32", "code": "abd"})
    assert not gates.is_today({"kernel": "another", "evidence": "executed", "code": "abc"})


def test_the_table_leaves_out_what_was_said_of_other_code(tmp_path, monkeypatch):
    said = {"kernel": "sweep", "triton": "3.8.0"}
    lines = [
        {**said, "evidence": "executed", "code": "now", "dtypes": ["fp16"]},
        {**said, "evidence": "executed", "code": "now", "dtypes": ["fp32"]},
        {**said, "evidence": "executed", "code": "then", "dtypes": ["bf16"]},
        {**said, "evidence": "compiled", "code": "now", "arch": 90, "dtype": "fp32", "faults": []},
        {**said, "evidence": "compiled", "code": "then", "arch": 90, "dtype": "fp32", "faults": ["spills"]},
        {**said, "evidence": "compiled", "code": "then", "arch": 80, "dtype": "fp32", "faults": []},
    ]
    (tmp_path / f"{records.EXECUTED}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(tables, "of_today", lambda found: [line for line in found if line["code"] == "now"])
    assert "| `sweep` | fp16, fp32 | no | 9.0 |" in tables.evidence_table(tmp_path)
