import json

from benchmarks.records import Record, append, environment, read, results_file


def made(**values):
    return Record("attention", "s", "fp32", "forward", "eager", "wall", **values)


def test_records_are_appended_with_their_environment_and_the_last_counts(tmp_path):
    for time in (3.0, 2.0):
        append(made(p50_us=time), "cpu", tmp_path)
    append(Record("attention", "s", "fp32", "forward", "sdpa", "wall", error="cannot run: no"), "cpu", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and {"device", "torch", "triton", "commit", "date"} <= set(lines[0])
    assert [(r["provider"], r["p50_us"]) for r in read(tmp_path / "cpu.jsonl")] == [("eager", 2.0), ("sdpa", None)]


def test_a_line_cut_off_is_passed_over(tmp_path):
    append(made(p50_us=1.0), "cpu", tmp_path)
    with (tmp_path / "cpu.jsonl").open("a") as file:
        file.write('{"benchmark": "atten')
    assert len(read(tmp_path / "cpu.jsonl")) == 1
    assert read(tmp_path / "none.jsonl") == []


def test_the_environment_names_the_device():
    assert environment("cpu")["device"].endswith("threads")
    assert results_file("cpu").name == "cpu.jsonl"
