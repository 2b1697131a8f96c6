"""Every part is in the list, in order of importance, and the dry run walks what a GPU is given."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.command import main
from benchmarks.run import PARTS


def test_every_part_of_every_bench_is_listed_once_the_most_important_first():
    names = [part.name for part in PARTS]
    assert names[:5] == ["gate", "attention", "spectral_norm", "attention-compiled", "train_step"]
    assert len(set(names)) == len(names) and {"sweep", "dtypes", "loader"} <= set(names)
    files = {path.stem for path in Path(__file__).parents[2].glob("benchmarks/bench_*.py")}
    assert files == {part.cases.__module__.split(".")[-1] for part in PARTS}


def test_a_dry_run_runs_our_kernels_and_records_nothing(tmp_path, capsys):
    assert main(PARTS, ["--dry-run", "--out", str(tmp_path), "--only", "gate official-D"]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: gate: 2 cases; nothing recorded" in out and not list(tmp_path.iterdir())
    assert "wrong" not in out and "cannot run" not in out and out.count("triton") == 2
    assert out.count("benchmarks: ") == 1


@pytest.mark.slow
def test_the_dry_run_walks_every_case_of_a_gpu(tmp_path, capsys):
    assert main(PARTS, ["--dry-run", "--out", str(tmp_path), "--minutes", "30"]) == 0
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
        from benchmarks.bench import Target
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
