"""The command line: what it chooses, records and goes on with, on parts of a few small cases."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import command, harness
from benchmarks.bench import Part, Target
from benchmarks.bench_spectral_norm import SMALL, cases
from benchmarks.command import main
from benchmarks.harness import Case, DeviceLost, Provider
from benchmarks.journal import Journal
from benchmarks.run import PARTS


def test_a_part_records_as_it_goes_and_goes_on_where_it_stopped(tmp_path, capsys):
    parts = [Part("norm", lambda target: cases(target, SMALL[:5]))]
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--part", "norm"]
    journal = tmp_path / "journal"
    assert main(parts, [*args, "--only", "none such", "--journal", str(journal)]) == 0
    assert "norm: 0 cases" in capsys.readouterr().out
    Journal(journal).lose("spectral_norm 5-matrices fp32 forward", "biggan", "it crashed")
    assert main(parts, [*args, "--journal", str(journal)]) == 0
    assert "norm: 2 cases" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [r["shape"] for r in records[:3]] == ["copy 512 MiB", "2**20 exponentials", "product 2048"]
    records = records[3:]
    assert {r["provider"] for r in records} == {"parametrization", "legacy", "biggan", "function", "group"}
    assert all(r["bound_us"] > 0 and r["bound_by"] == "bytes" for r in records)
    lost = [r for r in records if r["error"]]
    assert [(r["provider"], r["error"]) for r in lost] == [("biggan", "cannot run: it crashed")]
    assert all(r["p50_us"] > 0 for r in records if not r["error"])
    assert main(parts, [*args, "--journal", str(journal)]) == 0
    assert "norm: 0 cases" in capsys.readouterr().out


def test_parts_run_in_processes_of_their_own(tmp_path, capfd):
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--only", "attention cpu-shapes"]
    assert main(PARTS, args) == 0
    assert "benchmarks: attention: 2 cases" in capfd.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [r["benchmark"] for r in records] == ["ceilings"] * 3 + ["attention"] * 6


def test_a_provider_that_takes_the_device_along_is_lost_and_said(tmp_path, monkeypatch, capsys):
    def broken(device, provider, why):
        raise DeviceLost(provider, why)

    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    def broken_cases(target):
        for case in cases(target, SMALL[:2]):
            yield replace(case, providers=[Provider("bad", fail), *case.providers])

    monkeypatch.setattr(harness, "_check_device", broken)
    parts = [Part("norm", broken_cases)]
    args = ["--device", "cpu", "--out", str(tmp_path), "--part", "norm", "--journal", str(tmp_path / "journal")]
    assert main(parts, [*args, "--rounds", "1"]) == 75
    assert "bad took the device along: an illegal memory access" in capsys.readouterr().out
    assert main(parts, [*args, "--rounds", "1"]) == 75  # the other mode
    assert main(parts, [*args, "--rounds", "1"]) == 0
    assert "illegal memory access" in (tmp_path / "cpu.jsonl").read_text()


def test_fp32_cases_have_no_tf32_in_products_or_convolutions(monkeypatch, tmp_path, capsys):
    seen = []
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    monkeypatch.setattr(command, "measure", lambda *_: seen.append([b.allow_tf32 for b in backends]) or [])
    monkeypatch.setattr(command, "describe", str)
    cases = [Case("b", "s", dtype, "forward", [], list) for dtype in ("fp32", "tf32")]
    parts = [Part("x", lambda target: cases)]
    assert main(parts, ["--device", "cpu", "--part", "x", "--rounds", "1", "--dry-run", "--out", str(tmp_path)]) == 0
    assert seen == [[False, False], [True, True]]


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(PARTS, ["--device", "cuda"]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err


LISTED = (
    Part("gate", list, cpu=False),
    Part("attention", list),
    Part("attention-compiled", list, cpu=False),
    Part("sweep", list),
    Part("loader", list, by_default=False),
)


def chosen(*arguments):
    options = command.parse(LISTED, arguments)
    parts, text = command.choose(LISTED, Target("cpu" if options.dry_run else options.device, options.dry_run), options)
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
    only_when_named = [part for part in LISTED if not part.by_default]
    assert command.choose(only_when_named, Target("cpu"), command.parse(only_when_named, []))[0] == only_when_named


def test_what_is_not_run_here_and_bad_arguments_are_a_sentence(capsys):
    assert main(PARTS, ["--device", "cpu", "--only", "gate"]) == 2
    assert capsys.readouterr().err == "benchmarks: gate is not run on the CPU\n"
    with pytest.raises(SystemExit, match="2"):
        main(PARTS, ["--part", "layers"])
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
        assert main([Part("x", listed)], ["--device", "cpu", "--warm", share]) == 0
        assert ran == expected
    assert capsys.readouterr().out == "t bad: RuntimeError\n"


def test_parts_in_one_process_share_the_time(capsys):
    """With no minutes nothing is begun, in no part."""
    parts = [Part(name, lambda target: cases(target, SMALL[:2])) for name in ("one", "two")]
    args = ["--device", "cpu", "--minutes", "0", "--part", "one", "--part", "two"]
    assert main(parts, args) == 0
    out = capsys.readouterr().out
    assert "one: 0 cases, 2 not started for lack of time" in out and "two: 0 cases, 2 not started" in out
