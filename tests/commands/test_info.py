"""What `sagan-fast info` prints."""

import json
import shutil

import torch

from sagan_fast import cli


def test_info_says_versions_device_and_why(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out and "device" in out
    assert "64x64, 128 channels, pooled: " in out and "(1 map of 4096 x 1024: " in out


def test_a_run_is_described(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    best = {"step": 2, "metric": "fid", "score": 34.25}
    (run / "checkpoints" / "best.json").write_text(json.dumps(best))
    assert cli.main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    for line in ("preset      shapes-32", "data        shapes", "images      32x32, attention at G [16], D [16]",
                 "step        2 of 2", "checkpoints last.pt, 2", "best FID    34.25 at step 2, checkpoints/best.pt",
                 "pictures    1 in samples/, the newest ", "samples/0000002.png", "10: 0 circle, "):  # fmt: skip
        assert line in said, line
    assert cli.main(["info", str(run / "checkpoints" / "last.pt")]) == 0
    said = capsys.readouterr().out
    assert "step        2 of 2" in said and "10: 0 circle" in said
    (run / "data.json").unlink()  # an older run
    (run / "checkpoints" / "best.json").unlink()
    assert cli.main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "10: 0 circle" in said and "not evaluated; --eval-every N" in said


def test_a_score_in_other_features_than_those_of_papers_says_so(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 2, "metric": "fid", "score": 34.25}))
    config = (run / "config.yaml").read_text()
    assert "eval_features: inception" in config
    (run / "config.yaml").write_text(config.replace("eval_features: inception", "eval_features: dinov2"))
    assert cli.main(["info", str(run)]) == 0
    assert "best FID    34.25 in the features of dinov2 at step 2, checkpoints/best.pt" in capsys.readouterr().out


def test_an_exported_generator_is_described(tiny_run, tmp_path, capsys):
    assert cli.main(["export", str(tiny_run), "--out", str(tmp_path / "g")]) == 0
    capsys.readouterr()
    assert cli.main(["info", str(tmp_path / "g")]) == 0
    said = capsys.readouterr().out
    assert "step        2, averaged weights" in said and "data        shapes" in said and "9 four dots" in said


def test_what_is_no_run_is_refused(tmp_path, sentence):
    (tmp_path / "tiny").mkdir()
    assert cli.main(["info", str(tmp_path / "tiny")]) == 2
    assert "tiny is no run folder: there is no" in sentence()
    assert cli.main(["info", str(tmp_path / "tinny")]) == 2
    assert "tinny: did you mean 'tiny'?" in sentence()
