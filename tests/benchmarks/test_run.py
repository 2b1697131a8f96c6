"""What `benchmarks.run` chooses, records and goes on with, and that the dry run walks what a GPU is given."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, run
from benchmarks.bench_spectral_norm import SMALL, cases
from benchmarks.harness import Case, Provider, Target
from benchmarks.journal import Journal
from benchmarks.run import PARTS, Part, main


def test_every_part_of_every_bench_is_listed_once_the_most_important_first():
    names = [part.name for part in PARTS]
    assert names[:5] == ["gate", "attention", "spectral_norm", "attention-compiled", "train_step"]
    assert len(set(names)) == len(names) and {"sweep", "dtypes", "loader"} <= set(names)
    files = {path.stem for path in Path(__file__).parents[2].glob("benchmarks/bench_*.py")}
    assert files == {part.cases.__module__.split(".")[-1] for part in PARTS}


def test_a_dry_run_runs_our_kernels_and_records_nothing(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path), "--only", "gate official-D"]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: gate: 2 cases; nothing recorded" in out and not list(tmp_path.iterdir())
    assert "wrong" not in out and "cannot run" not in out and out.count("triton") == 2
    assert out.count("benchmarks: ") == 1


@pytest.mark.slow
def test_the_dry_run_walks_every_case_of_a_gpu(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path), "--minutes", "30"]) == 0
    out = capsys.readouterr().out
    counts = dict(re.findall(r"benchmarks: (\S+): (\d+) cases; nothing recorded", out))
    assert {name: int(count) for name, count in counts.items()} == {
        "gate": 18, "attention": 18, "spectral_norm": 2, "attention-compiled": 18, "train_step": 1,
        "sweep": 18, "dtypes": 16,
    }  # fmt: skip
    lost = {line.split()[0] for line in out.splitlines() if "cannot run" in line}
    assert lost <= {"sdpa-cudnn", "sdpa-efficient", "flex", "flash-attention-4", "xformers"}, "what a CPU has not"
    assert "wrong" not in out and torch.compile.__module__ == "torch"


def test_what_a_gpu_is_given_is_listed_without_one():
    """In a process without the tests' own torch.empty, on which the meta device does not work."""
    listing = """if True:
        from benchmarks.harness import Target
        from benchmarks.run import PARTS
        for part in PARTS:
            cases = list(part.cases(Target("cuda")))
            print(part.name, len(cases), *dict.fromkeys(p.name for case in cases for p in case.providers))
    """
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    parts = {name: (int(count), who) for name, count, *who in map(str.split, done.stdout.splitlines())}
    assert (
        list(parts) == [part.name for part in PARTS]
        and parts["gate"] == (18, ["eager", "triton"])
        and parts["dtypes"][0] == 48
    )
    assert {"sdpa-cudnn", "flex", "xformers", "flash-attention-4"} <= set(parts["attention-compiled"][1])
    assert "parametrization-compiled" in parts["spectral_norm"][1]


def test_a_part_records_as_it_goes_and_goes_on_where_it_stopped(tmp_path, capsys):
    parts = [Part("norm", lambda target: cases(target, SMALL[:5]))]
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--part", "norm"]
    journal = tmp_path / "journal"
    assert main([*args, "--only", "none such", "--journal", str(journal)], parts) == 0
    assert "norm: 0 cases" in capsys.readouterr().out
    Journal(journal).lose("spectral_norm 5-matrices fp32 forward", "biggan", "it crashed")
    assert main([*args, "--journal", str(journal)], parts) == 0
    assert "norm: 2 cases" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [r["shape"] for r in records[:3]] == ["copy 512 MiB", "2**20 exponentials", "product 2048"]
    records = records[3:]
    assert {r["provider"] for r in records} == {"parametrization", "legacy", "biggan", "function", "group"}
    assert all(r["bound_us"] > 0 and r["bound_by"] == "bytes" for r in records)
    lost = [r for r in records if r["error"]]
    assert [(r["provider"], r["error"]) for r in lost] == [("biggan", "cannot run: it crashed")]
    assert all(r["p50_us"] > 0 for r in records if not r["error"])
    assert main([*args, "--journal", str(journal)], parts) == 0
    assert "norm: 0 cases" in capsys.readouterr().out


def test_parts_run_in_processes_of_their_own(tmp_path, capfd):
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--only", "attention cpu-shapes"]
    assert main(args) == 0
    assert "benchmarks: attention: 2 cases" in capfd.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [r["benchmark"] for r in records] == ["ceilings"] * 3 + ["attention"] * 6


def test_a_device_that_a_provider_broke_ends_the_process_and_the_provider_is_to_blame(tmp_path, monkeypatch):
    def broken(device):
        raise RuntimeError("an illegal memory access was encountered")

    def broken_cases(target):
        for case in cases(target, SMALL[:2]):
            yield replace(case, providers=[Provider("bad", lambda: broken("cuda")), *case.providers])

    monkeypatch.setattr(harness, "_synchronize", broken)
    args = ["--device", "cpu", "--out", str(tmp_path), "--part", "norm", "--journal", str(tmp_path / "journal")]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main([*args, "--rounds", "1"], [Part("norm", broken_cases)])
    assert Journal(tmp_path / "journal").last == ("spectral_norm 2-matrices fp32 forward", "bad")


def test_fp32_cases_have_no_tf32_in_products_or_convolutions(monkeypatch, tmp_path, capsys):
    seen = []
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    monkeypatch.setattr(run, "measure", lambda *_: seen.append([b.allow_tf32 for b in backends]) or [])
    monkeypatch.setattr(run, "describe", str)
    cases = [Case("b", "s", dtype, "forward", [], list) for dtype in ("fp32", "tf32")]
    parts = [Part("x", lambda target: cases)]
    assert main(["--device", "cpu", "--part", "x", "--rounds", "1", "--dry-run", "--out", str(tmp_path)], parts) == 0
    assert seen == [[False, False], [True, True]]


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err


LISTED = (
    Part("gate", list, cpu=False),
    Part("attention", list),
    Part("attention-compiled", list, cpu=False),
    Part("sweep", list),
    Part("loader", list, by_default=False),
)


def chosen(*arguments):
    options = run.parse(arguments, LISTED)
    parts, text = run.choose(LISTED, Target("cpu" if options.dry_run else options.device, options.dry_run), options)
    return [part.name for part in parts], text


def test_only_names_a_part_or_is_text_in_a_title_or_both():
    assert chosen("--device", "cpu") == (["attention", "sweep"], "")
    assert chosen("--device", "cpu", "--only", "64x64") == (["attention", "sweep"], "64x64")
    assert chosen("--device", "cpu", "--only", "sweep N256") == (["sweep"], "N256")
    assert chosen("--device", "cpu", "--only", "loader") == (["loader"], "")
    assert chosen("--device", "cuda") == (["gate", "attention", "attention-compiled", "sweep"], "")
    assert chosen("--dry-run") == chosen("--device", "cuda")
    several = chosen("--device", "cpu", "--part", "sweep", "--part", "attention", "--only", "N256")
    assert several == (["attention", "sweep"], "N256")


def test_what_is_not_run_here_and_bad_arguments_are_a_sentence(capsys):
    assert main(["--device", "cpu", "--only", "gate"]) == 2
    assert capsys.readouterr().err == "benchmarks: gate is not run on the CPU\n"
    with pytest.raises(SystemExit, match="2"):
        main(["--part", "layers"])
    assert "invalid choice: 'layers'" in capsys.readouterr().err


def test_warming_compiles_its_share_and_times_nothing(capsys):
    ran = []

    def made(name, compiles):
        return Provider(name, lambda: lambda i: ran.append(name), compiles=compiles)

    def fails():
        raise RuntimeError("no compiler")

    def listed(target):
        yield Case("b", "s", "fp32", "forward", [made("a", True), made("eager", False), made("b", True)], list)
        yield Case("b", "t", "fp32", "forward", [made("c", True), Provider("bad", fails, compiles=True)], list)

    for share, expected in (("0/2", ["a", "c"]), ("1/2", ["b"])):
        ran.clear()
        assert main(["--device", "cpu", "--warm", share], [Part("x", listed)]) == 0
        assert ran == expected
    assert capsys.readouterr().out == "t bad: RuntimeError\n"


def test_parts_in_one_process_share_the_time(capsys):
    """With no minutes nothing is begun, in no part."""
    parts = [Part(name, lambda target: cases(target, SMALL[:2])) for name in ("one", "two")]
    args = ["--device", "cpu", "--minutes", "0", "--part", "one", "--part", "two"]
    assert main(args, parts) == 0
    out = capsys.readouterr().out
    assert "one: 0 cases, 2 not started for lack of time" in out and "two: 0 cases, 2 not started" in out
