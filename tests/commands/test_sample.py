"""What `sagan-fast sample` writes and refuses."""

import pytest

from sagan_fast import cli


def test_sample_writes_a_grid_or_single_images(tiny_run, tmp_path, capsys):
    assert cli.main(["sample", str(tiny_run), "--out", str(tmp_path / "g.png"), "--count", "12", "--grid"]) == 0
    assert (tmp_path / "g.png").stat().st_size > 1000
    one = [
        "sample",
        str(tiny_run / "checkpoints" / "last.pt"),
        "--count",
        "3",
        "--class-id",
        "7",
        "--truncation",
        "0.5",
    ]
    for folder in ("a", "b"):
        assert cli.main([*one, "--out", str(tmp_path / folder), "--seed", "5"]) == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000000_class7.png", "000001_class7.png", "000002_class7.png"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert "3 images in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x.png", "--class-id", "10", "--grid"], "class-id must be 0 to 9, got 10"),
        (["--out", "x.png", "--count", "0", "--grid"], "count must be positive, got 0"),
        (["--out", "x.png", "--truncation", "-1", "--grid"], "truncation must be positive, got -1.0"),
        (["--out", "x.jpg", "--grid"], "must name a .png file with --grid, got x.jpg"),
    ],
)
def test_bad_sampling_options(args, message, tiny_run, tmp_path, monkeypatch, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", str(tiny_run), *args]) == 2
    assert message in sentence() and list(tmp_path.iterdir()) == []
