"""The report is one file that needs nothing else."""

import re
from html.parser import HTMLParser

import torch

from sagan_fast.view.report import report

CPU = torch.device("cpu")


class Reader(HTMLParser):
    """Collects the tags, and the names of those that are open at the end."""

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader.tags


def headings(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_a_run_is_shown_whole_in_one_file(tiny_run):
    text = report(tiny_run, CPU)
    tags = read(text)
    assert headings(text) == [
        "Samples", "Truncation", "Between two samples", "Where the generator looks", "Where the discriminator looks",
        "Curves", "Scores", "Samples over time", "Configuration",
    ]  # fmt: skip
    names = {tag for tag, _ in tags}
    assert not names & {"script", "link", "iframe", "object", "form", "base"}
    images = [about for tag, about in tags if tag == "img"]
    assert len(images) > 100 and all(about["src"].startswith("data:image/png;base64,") for about in images)
    assert all(about["alt"] for about in images)
    assert not re.search(r"https?://|url\(|@import", text)
    policy = next(about["content"] for tag, about in tags if about.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert str(tiny_run.parent) not in text.partition("Configuration")[0]


def test_an_export_is_shown_without_a_run(export):
    text = report(export, CPU)
    read(text)
    assert headings(text) == ["Samples", "Truncation", "Between two samples", "Where the generator looks"]


def test_a_run_without_a_checkpoint_shows_its_curves(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "d_loss": 2.0}\n{"step": 2, "d_loss": 1.0}\n')
    text = report(tmp_path, CPU)
    read(text)
    assert headings(text) == ["Curves", "Scores", "Samples over time"] and "no checkpoint yet" in text
    assert "<polyline" in text
