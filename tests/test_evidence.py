"""What the command records of the kernels it compiles, and when it says that a chip has a fault."""

import importlib.metadata as metadata
import json
from types import SimpleNamespace

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
    monkeypatch.setattr(gates, "shipped_plans", lambda dtype, arch: plans.get(arch, []))
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
    _, lines = compiled("86")
    now = gates.hash_today(["bf16/86"])
    assert lines and all(map(now.said, lines))
    assert not any(now.said({**line, "code": "of before"}) for line in lines)
    assert not any(now.said({name: line[name] for name in line if name != "code"}) for line in lines)


def test_what_was_executed_counts_by_its_source_alone():
    now = gates.Today({"sweep": "abc"}, {})
    assert now.said({"kernel": "sweep", "evidence": "executed", "code": "abc"})
    assert not now.said({"kernel": "sweep", "evidence": "proved", "dtype": "fp32", "code": "abd"})
    assert not now.said({"kernel": "another", "evidence": "executed", "code": "abc"})


def test_chips_with_the_same_rows_have_the_same_launches_and_others_have_others():
    for dtype, one, other in (("bf16", 100, 110), ("fp32", "gfx90a", "gfx1201")):
        assert gates.choices(dtype, one) == gates.choices(dtype, other)
        assert gates.plan_all(dtype, one) == gates.plan_all(dtype, other)
    assert len({gates.choices("bf16", arch) for arch in (75, 80, 86, 90, 100, 120, "gfx942")}) == 7
    assert gates.choices("fp32", 90) != gates.choices("tf32", 90)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that returns the tables of given records, where today's code of every kernel has the hash "now"."""

    def write(lines, kernels):
        (tmp_path / f"{records.EXECUTED}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        names = dict.fromkeys(kernels, "now")
        monkeypatch.setattr(tables, "today", lambda cases: gates.Today(names, dict.fromkeys(cases, names)))
        return tables.evidence_table(tmp_path)

    return write


def test_the_table_leaves_out_what_was_said_of_other_code(table):
    said = {"kernel": "sweep", "triton": "3.8.0"}
    lines = [
        {**said, "evidence": "executed", "code": "now", "dtypes": ["fp16"]},
        {**said, "evidence": "executed", "code": "now", "dtypes": ["fp32"]},
        {**said, "evidence": "executed", "code": "then", "dtypes": ["bf16"]},
        {**said, "evidence": "compiled", "code": "now", "arch": 90, "dtype": "fp32", "faults": []},
        {**said, "evidence": "compiled", "code": "then", "arch": 90, "dtype": "fp32", "faults": ["spills"]},
        {**said, "evidence": "compiled", "code": "then", "arch": 80, "dtype": "fp32", "faults": []},
    ]
    assert "| `sweep` | fp16, fp32 | no | 9.0 |" in table(lines, ["sweep"])


def test_a_triton_has_a_chip_only_with_all_kernels_of_the_family_that_today_s_code_has(table):
    lines = [
        {"kernel": kernel, "triton": triton, "arch": arch, "dtype": "bf16", "faults": faults}
        for triton, arch, kernels in (
            ("3.6.0", 80, "fwd"), ("3.6.0", 90, "fwd"), ("3.8.0", 80, "fwd bwd"), ("3.8.0", 90, "fwd then"),
            ("3.8.0", "gfx942", "fwd bwd"), ("3.9.0", 80, "batch_norm_fwd"),
        )
        for kernel in kernels.split()
        for faults in ([["spills"] if kernel == "bwd" and arch == "gfx942" else []])
    ]  # fmt: skip
    lines = [{**line, "evidence": "compiled", "code": "now"} for line in lines]
    found = table(lines, ["fwd", "bwd", "batch_norm_fwd"])
    assert "| `fwd` | no | no | 8.0, 9.0, gfx942 |" in found
    assert "| 3.6.0 | attention | not all kernels | no record |" in found
    assert "| 3.8.0 | attention | 8.0, gfx942\\* | no record |" in found, "and the other families do not matter"
    assert "| 3.9.0 | batch_norm | 8.0 | no record |" in found
    assert "3.9.0 | attention" not in found


def test_the_hashes_of_today_come_from_a_process_that_does_not_interpret(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command[1:])
        assert options["env"]["TRITON_INTERPRET"] == "0"
        return SimpleNamespace(stdout='{"sources": {"fwd": "abc"}, "codes": {"fp32/75": {}}}')

    monkeypatch.setattr(gates.subprocess, "run", run)
    for _ in range(2):
        assert gates.today(frozenset(["fp32/75"])) == gates.Today({"fwd": "abc"}, {"fp32/75": {}})
    assert asked == [["-m", "benchmarks.gates", "fp32/75"]], "once a process"
    gates.today.cache_clear()
