import json

from benchmarks import bench_interop


def test_all_variants_train_alike_and_are_listed(tmp_path, capsys):
    small = ["--channels", "8", "--size", "16", "--classes", "3", "--batch", "2", "--rounds", "1", "--no-memory"]
    bench_interop.main([*small, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["variant"] for row in rows] == list(bench_interop.VARIANTS) and rows[0]["theirs / this"] == 1
    assert "theirs / this" in capsys.readouterr().out
