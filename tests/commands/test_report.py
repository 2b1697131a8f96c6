"""`sagan-fast report` writes one file, or nothing."""

import pytest

from sagan_fast import cli


def test_a_report_is_written(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sagan_fast.view.report.report", lambda source, device: f"<p>{source.name} on {device} é")
    out = tmp_path / "new" / "report.html"
    assert cli.main(["report", str(tiny_run), "--out", str(out), "--device", "cpu"]) == 0
    assert out.read_text(encoding="utf-8") == "<p>run on cpu é" and str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("run", "report.pdf", "--out must name a .html file"),
        ("none", "report.html", "there is no run folder or checkpoint"),
        ("run", None, "--out must be given"),
    ],
)
def test_bad_input_is_a_sentence(tiny_run, tmp_path, sentence, source, out, message):
    args = ["report", str(tiny_run.parent / source), *([] if out is None else ["--out", str(tmp_path / out)])]
    assert cli.main(args) == 2
    assert message in sentence() and list(tmp_path.iterdir()) == []
