"""What `benchmarks.run` chooses, records and goes on with, and that the dry run walks what a GPU is given."""

import itertools
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, run
from benchmarks.bench_spectral_norm import SMALL, cases
from benchmarks.gpu import TESTS_S
from benchmarks.harness import Case, Provider, Target
from benchmarks.journal import Journal
from benchmarks.records import ROOT, append_line
from benchmarks.run import PARTS, Part, main


def test_every_part_of_every_bench_is_listed_once_the_most_important_first():
    names = [part.name for part in PARTS]
    assert names[:6] == ["gate", "attention", "spectral_norm", "train_step", "float32", "attention-compiled"]
    assert len(set(names)) == len(names) and {"sweep", "dtypes", "loader"} <= set(names)
    files = {path.stem for path in Path(__file__).parents[2].glob("benchmarks/bench_*.py")}
    # they measure whole processes, processes over links, and forms of one layer
    alone = {"bench_interop", "bench_ddp", "bench_resized_conv"}
    assert files - alone == {part.build.__module__.split(".")[-1] for part in PARTS}


def test_a_dry_run_runs_our_kernels_and_records_nothing(monkeypatch, capsys):
    monkeypatch.setattr(run, "append", None)
    monkeypatch.setattr(run, "append_line", None)
    assert main(["--dry-run", "--part", "gate", "--only", "official-D"]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: gate: 2 cases; nothing recorded" in out
    assert "wrong" not in out and "cannot run" not in out and out.count("triton") == 2
    assert out.count("benchmarks: ") == 1


def lines_of(path):
    """The records of a file; each line must be whole."""
    text = path.read_text() if path.exists() else ""
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


DRY = ["--dry-run", "--only", "official-G", "--rounds", "1"]
PLAN = ["gate", "float32", "attention-compiled"]
"""Parts of a dry run that are over in seconds: two cases each, 4, 18 and 8 records."""


@pytest.mark.parametrize("kept", [1, *(pytest.param(kept, marks=pytest.mark.slow) for kept in (5, 25))])
def test_a_run_killed_at_any_moment_has_whole_records_of_all_before(tmp_path, kept):
    """SIGKILL as soon as so many records are there; the next run goes on in the same file."""
    file = tmp_path / "dry-run.jsonl"
    args = [*DRY, "--out", str(tmp_path), *(f"--part={name}" for name in PLAN)]
    command = [sys.executable, "-m", "benchmarks.run", *args]
    journal = ["--journal", str(tmp_path / "journal")]
    with subprocess.Popen([*command, *journal], stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        while process.poll() is None and len(file.read_bytes().splitlines() if file.exists() else ()) < kept:
            time.sleep(0.002)
        assert process.poll() is None, "it was over before"
        process.kill()
    records = lines_of(file)
    assert len(records) >= kept
    done = Journal(tmp_path / "journal").done
    titles = [f"{r['benchmark']} {r['shape']} {r['dtype']} {r['mode']}" for r in records]
    assert {name.split(": ")[1] for name in done} <= set(titles)
    assert list(dict.fromkeys(titles)) == list(dict.fromkeys(titles))[: len(done) + 1], "at most one is begun"
    with file.open("a") as torn:
        torn.write('{"benchmark": "gate", "sha')  # as if the disk had been full
    append_line(file, {"benchmark": "next"})
    *_, broken, last = file.read_text().splitlines()
    assert broken.startswith('{"benchmark": "gate"') and json.loads(last) == {"benchmark": "next"}


@pytest.mark.slow
@pytest.mark.parametrize("minute, part", [(2, "tests"), (4, "attention"), (6, "train_step")])
def test_a_cut_after_so_many_estimated_minutes_leaves_all_before(minute, part, tmp_path):
    """SIGKILL of the whole dry run, when as much is recorded as the estimates promise for this minute on a GPU."""
    found = run.estimates(PARTS, Target("cuda"), tests_s=TESTS_S)
    ends = list(itertools.accumulate(one.seconds for one in found))
    running = next(i for i, end in enumerate(ends) if end > 60 * minute)
    assert found[running].name == part
    begun = [other for other in PARTS if other.name in {one.name for one in found[: running + 1]}]
    planned = {other.name: list(other.cases(Target("cpu", True))) for other in begun}
    share = 1 - (ends[running] - 60 * minute) / found[running].seconds
    shares = {name: share if name == part else 1.0 for name in planned}
    promised = sum(int(shares[name] * sum(len(case.providers) for case in planned[name])) for name in planned)

    file = tmp_path / "new" / "dry-run.jsonl"
    command = [sys.executable, "-m", "benchmarks.run", "--dry-run", "--out", str(file.parent)]
    command += [f"--part={other.name}" for other in begun]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        while process.poll() is None and len(file.read_bytes().splitlines() if file.exists() else ()) < promised:
            time.sleep(0.002)
        process.kill()
    records = lines_of(file)
    assert len(records) >= promised
    told: dict[str, set[str]] = {}
    for r in records:
        told.setdefault(f"{r['benchmark']} {r['shape']} {r['dtype']} {r['mode']}", set()).add(r["provider"])
    cases = itertools.islice(itertools.chain.from_iterable(planned.values()), len(told))
    *whole, begun_last = ((case.title, {p.name for p in case.providers}) for case in cases)
    assert list(told.items())[:-1] == whole and list(told)[-1] == begun_last[0]


def test_estimates_count_providers_and_nothing_is_compiled_twice():
    def part(name, *compile_s, seconds=2.0):
        made = [Provider("triton" if s == 5 else f"p{s}", list, compile_s=s) for s in compile_s]
        return Part(name, lambda target: [Case("b", "s", "bf16", "forward", made, list)], seconds)

    parts = [part("gate", 5), part("one", 5, 0), part("two", 100, 0, seconds=1.0)]
    gate, tests, one, two = run.estimates(parts, Target("cuda"), tests_s=7.0)
    assert (gate.runs, gate.seconds) == (1, run.START_S + 2 + 5) and tests.seconds == 7
    assert (one.runs, one.run_s, one.compile_s) == (2, run.START_S + 4, 0.0)
    assert (two.run_s, two.compile_s, two.seconds) == (2.0, 20.0, 22.0)
    assert run.estimates(parts, Target("cuda"), cached=True)[0].compile_s == 0.0
    said = run.schedule([gate, tests, one, two._replace(compile_s=900.0)], 1.0)
    assert "--only two" in said and re.search(r": 34 s of a total of \d+ s fit the 60 s given", said)


def test_the_parts_of_most_value_fit_the_first_call():
    *found, _ = run.estimates(PARTS, Target("cuda"), tests_s=110.0)
    needed = found[: [one.name for one in found].index("float32") + 1]
    assert [one.name for one in needed] == [
        "gate", "tests", "attention", "spectral_norm", "train_step", "float32"
    ]  # fmt: skip
    assert sum(one.seconds for one in needed) <= 8.5 * 60


@pytest.mark.slow
def test_more_shapes_than_dynamo_keeps_are_all_compiled(tmp_path, monkeypatch, capsys):
    """Nine shapes of one function: from the ninth on torch.compile would quietly run it uncompiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def work(x):
        return x + 1

    def listed(target):
        for n in range(1, 12):

            def made(n=n):
                function = torch.compile(work, backend=backend, dynamic=False)
                return lambda i: [function(torch.zeros(n))]

            yield Case("b", str(n), "fp32", "forward", [Provider("p", made)], lambda n=n: [torch.ones(n)])

    args = ["--device", "cpu", "--part", "x", "--rounds", "1", "--out", str(tmp_path)]
    assert main(args, [Part("x", listed)]) == 0
    assert len(compiled) == 11


@pytest.mark.slow
def test_the_dry_run_walks_every_case_of_a_gpu(tmp_path, capsys):
    parts = [f"--part={part.name}" for part in PARTS if part.by_default]
    assert main(["--dry-run", "--out", str(tmp_path), "--minutes", "30", *parts]) == 0
    out = capsys.readouterr().out
    counts = dict(re.findall(r"benchmarks: (\S+): (\d+) cases", out))
    assert {name: int(count) for name, count in counts.items()} == {
        "gate": 18, "attention": 18, "spectral_norm": 2, "train_step": 1, "float32": 4,
        "attention-compiled": 18, "spectral_norm-compiled": 2, "train_step-compiled": 1,
        "sweep": 18, "train_step-large": 1, "dtypes": 16,
    }  # fmt: skip
    lost = {line.split()[0] for line in out.splitlines() if "cannot run" in line}
    assert lost <= {"sdpa-cudnn", "sdpa-efficient", "flex", "flex-flash", "flash-attention-4", "xformers"}, (
        "what a CPU has not"
    )
    assert "wrong" not in out and torch.compile.__module__ == "torch"


def test_what_a_gpu_is_given_is_listed_without_one():
    listed = {part.name: list(part.cases(Target("cuda"))) for part in PARTS}
    who = {
        name: list(dict.fromkeys(p.name for case in cases for p in case.providers)) for name, cases in listed.items()
    }
    assert who["gate"] == ["eager", "triton"] and (len(listed["gate"]), len(listed["dtypes"])) == (18, 48)
    assert {"sdpa-cudnn", "flex", "flex-flash", "xformers", "flash-attention-4"} <= set(who["attention"])
    assert who["attention-compiled"] == ["eager", "eager-compiled", "sdpa-compiled", "triton"]
    norms = ["parametrization", "parametrization-compiled", "biggan-compiled", "group"]
    assert who["spectral_norm-compiled"] == norms
    steps = ["eager-amp", "eager-amp-channels_last", "ours", "ours-cuda-graph"]
    assert (who["train_step"], set(who["train_step-compiled"])) == (steps, {*steps, "eager-amp-compiled"})
    assert not any("compiled" in name for part in who if "compiled" not in part for name in who[part])


def test_a_part_records_as_it_goes_and_goes_on_where_it_stopped(tmp_path, capsys):
    parts = [Part("norm", lambda target: cases(target, SMALL[:5]))]
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--part", "norm"]
    journal = tmp_path / "journal"
    assert main([*args, "--only", "none such", "--journal", str(journal)], parts) == 0
    assert "norm: 0 cases" in capsys.readouterr().out
    Journal(journal).lose("norm: spectral_norm 5-matrices fp32 forward", "biggan", "it crashed")
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


@pytest.mark.slow
def test_parts_run_in_a_process_of_their_own(tmp_path, capfd):
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
    assert Journal(tmp_path / "journal").last == ("norm: spectral_norm 2-matrices fp32 forward", "bad")


def test_fp32_cases_have_no_tf32_in_products_or_convolutions(monkeypatch, capsys):
    seen = []
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    monkeypatch.setattr(run, "measure", lambda *_: seen.append([b.allow_tf32 for b in backends]) or [])
    monkeypatch.setattr(run, "describe", str)
    cases = [Case("b", "s", dtype, "forward", [], list) for dtype in ("fp32", "tf32")]
    parts = [Part("x", lambda target: cases)]
    assert main(["--device", "cpu", "--part", "x", "--rounds", "1", "--dry-run"], parts) == 0
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
    assert chosen("--device", "cpu", "--only", "sweep,attention N256") == (["attention", "sweep"], "N256")
    assert chosen("--device", "cpu", "--only", "sweep,other") == (["attention", "sweep"], "sweep,other")
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
        return Provider(name, lambda: lambda i: ran.append(name), compile_s=compiles)

    def fails():
        raise RuntimeError("no compiler")

    def listed(target):
        yield Case("b", "s", "fp32", "forward", [made("a", 1.0), made("eager", 0.0), made("b", 1.0)], list)
        yield Case("b", "t", "fp32", "forward", [made("c", 1.0), Provider("bad", fails, compile_s=1.0)], list)

    for share, expected in (("0/2", ["a", "c"]), ("1/2", ["b"])):
        ran.clear()
        assert main(["--device", "cpu", "--warm", share], [Part("x", listed)]) == 0
        assert ran == expected
    assert capsys.readouterr().out == "t bad: RuntimeError\n"


def test_warmers_take_half_of_the_gpus_memory_at_most_and_one_set_of_inputs(monkeypatch, capsys):
    shares, targets = [], []

    def listed(target):
        targets.append(target)
        yield Case("b", "s", "fp32", "forward", [Provider("a", list, compile_s=1.0)], list)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    assert main(["--device", "cuda", "--warm", "1/4"], [Part("x", listed), Part("gate", None, timed=False)]) == 0
    assert shares == [0.125] and targets == [Target("cuda", compile_only=True)]


def test_parts_in_one_process_share_the_time(capsys):
    """With no minutes nothing is begun, in no part."""
    parts = [Part(name, lambda target: cases(target, SMALL[:2])) for name in ("one", "two")]
    args = ["--device", "cpu", "--minutes", "0", "--part", "one", "--part", "two"]
    assert main(args, parts) == 0
    out = capsys.readouterr().out
    assert "one: 0 cases, 2 not started for lack of time" in out and "two: 0 cases, 2 not started" in out
