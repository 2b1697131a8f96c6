import pytest

from benchmarks.records import Record, append, environment
from benchmarks.report import END, START, document, main, readme_block
from benchmarks.text import replaced


def fill(folder):
    for provider, time, kept in (("eager", 30.0, 2**22), ("sdpa", 20.0, 2**21), ("auto", 10.0, 2**20)):
        append(
            Record("attention", "cpu-x", "fp32", "forward", provider, "wall", p50_us=time, saved_bytes=kept),
            "cpu",
            folder,
        )
    append(
        Record("attention", "cpu-x", "fp32", "forward", "flex", "wall", error="cannot run: no compiler"), "cpu", folder
    )


def test_without_records_everything_reads_not_measured(tmp_path):
    text = document(tmp_path)
    assert "## GPU\n\nNot measured: there is no record of a GPU." in text and "Measured on" not in text
    assert "On a GPU: not measured." in readme_block(tmp_path) and "On a CPU: not measured." in readme_block(tmp_path)


def test_every_gpu_with_records_has_its_sections_and_the_readme_the_one_with_most(tmp_path, monkeypatch):
    def measured(device, shapes):
        monkeypatch.setattr("benchmarks.records.device_name", lambda _: device)
        environment.cache_clear()
        for shape in shapes:
            for provider, time in (("eager", 30.0), ("triton", 10.0)):
                append(Record("attention", shape, "bf16", "forward", provider, "graph", p50_us=time), "cuda", tmp_path)

    measured("NVIDIA H100 80GB HBM3", ["feat64-G-64x64-C128", "feat64-D-64x64-C64"])
    measured("NVIDIA A100-SXM4-40GB", ["feat64-G-64x64-C128"])
    environment.cache_clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "nvidia-a100-sxm4-40gb.jsonl", "nvidia-h100-80gb-hbm3.jsonl",
    ]  # fmt: skip
    text = document(tmp_path)
    assert text.index("## NVIDIA H100 80GB HBM3") < text.index("## NVIDIA A100-SXM4-40GB") < text.index("## CPU")
    rows = [line for line in text.splitlines() if line.startswith("| feat64-G-64x64-C128 | forward |")]
    assert [row.count("3.00") for row in rows] == [2, 0, 2, 0]  # graphs, and calls from Python, which nobody timed
    assert rows[1].count("not measured") == 7
    assert "figures/nvidia-h100-80gb-hbm3-peers.png" in text
    block = readme_block(tmp_path)
    assert "Attention block on one NVIDIA H100 80GB HBM3, bfloat16" in block and "A100" not in block


def test_tables_are_ratios_of_the_records(tmp_path):
    fill(tmp_path)
    row = next(line for line in document(tmp_path).splitlines() if line.startswith("| cpu-x | forward |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["cpu-x", "forward", "30.0", "20.0 (sdpa)", "10.0", "3.00", "2.00", "not measured", "1.0"]
    assert "| flex | cpu-x | forward | cannot run: no compiler |" in document(tmp_path)


def test_commits_of_one_device_and_day_are_named_together(tmp_path, monkeypatch):
    for commit in ("bbb", "aaa"):
        monkeypatch.setattr(
            "benchmarks.records._output", lambda *command, c=commit: c if "rev-parse" in command else ""
        )
        environment.cache_clear()
        append(Record("attention", commit, "fp32", "forward", "ours", "wall", p50_us=1.0), "cpu", tmp_path)
    environment.cache_clear()
    assert document(tmp_path).count("Measured on") == 1 and ", commit aaa, bbb.\n" in document(tmp_path)


def test_the_readme_block_comes_back_byte_for_byte_and_a_stale_one_is_found(tmp_path):
    fill(tmp_path / "results")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/derivatives.md", "docs/performance.md"):
        (tmp_path / name).write_text(f"# x\n\n{START}\nold\n{END}\n\nrest\n")
    args = ["--results", str(tmp_path / "results"), "--root", str(tmp_path)]
    assert main([*args, "--check"]) == 1
    assert main(args) == 0 and main([*args, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# x\n\n" + START) and text.endswith(END + "\n\nrest\n") and "old" not in text
    block = f"\n\n{readme_block(tmp_path / 'results')}\n\n"
    assert replaced(tmp_path / "README.md", START, END, block) == text


def test_the_committed_pages_are_what_the_committed_records_say():
    assert main(["--check"]) == 0


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/derivatives.md", "docs/performance.md"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(ValueError, match="must hold these lines once each"):
        main(["--results", str(tmp_path), "--root", str(tmp_path)])


def test_ours_stands_against_each_peer_as_images_a_second(tmp_path):
    for provider, time in (("eager", 4e6), ("other", 3e6), ("ours", 2e6)):
        record = Record("train_step", "x", "fp32", "both", provider, "wall", p50_us=time, config={"batch_size": 8})
        append(record, "cpu", tmp_path)
    rows = [line for line in document(tmp_path).splitlines() if line.startswith("| x | both |")]
    assert rows == [
        "| x | both | eager | 2.0 | 4.0 | 2.00 | not measured |",
        "| x | both | other | 2.7 | 4.0 | 1.50 | not measured |",
    ]
