"""The faces' benchmark: the published pipeline finds what the detector finds, rows answer, records become tables."""

import io
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_faces, faces_rows
from benchmarks.bench_faces import Row, cases, measure_rows, records_of
from benchmarks.faces_tables import faces_block
from benchmarks.harness import Target, measure
from benchmarks.published_faceboxes import Published, anchors_in_python
from sagan_fast.faces import Detector, FaceBoxes, anchors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the rows read, without ONNX files: random weights and two noisy pictures."""
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(0)
    torch.save(FaceBoxes().state_dict(), folder / "weights.pth")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
    (folder / "pictures").mkdir()
    for name in ("picture.png", "picture.jpg", "pictures/a.png"):
        noise.save(folder / name)
    (folder / "annotations.txt").write_text("a.png\n1\n10 10 50 50 0 0 0 0 0 0\n")
    return folder


def test_the_published_pipeline_finds_the_same(folder):
    pixels = faces_rows.picture(folder)
    torch.testing.assert_close(
        torch.tensor(anchors_in_python(96, 130)).view(-1, 4) * torch.tensor([130.0, 96, 130, 96]), anchors(96, 130),
        rtol=0, atol=1e-3,
    )  # fmt: skip
    with torch.no_grad():
        level = float(Published(folder / "weights.pth").net(torch.zeros(1, 3, 96, 128))[1][..., 1].quantile(0.5))
    boxes, scores = Published(folder / "weights.pth", level)(pixels[:, :, ::-1])
    found, values = Detector(folder / "weights.pth", min_score=level)(pixels)
    assert len(boxes) > 3 and abs(len(boxes) - len(found)) <= 2
    assert values[:3].numpy() == pytest.approx(scores[:3], abs=1e-5)
    assert found[:3].numpy() == pytest.approx(boxes[:3], abs=0.05)


def test_a_row_answers_until_the_pipe_is_closed(folder, monkeypatch, capsys):
    threads = torch.get_num_threads()
    try:
        for provider, mode in (
            ("ours", "network"), ("published", "pixels"), ("ours", "file"), ("ours", "candidates"),
        ):  # fmt: skip
            monkeypatch.setattr(sys, "stdin", io.StringIO("time 2\naccuracy\n"))
            assert faces_rows.main([provider, mode, "1", str(folder)]) == 0
            ready, times, found = map(json.loads, capsys.readouterr().out.splitlines())
            assert ready == "ready" and list(times) == (["0", "50", "700"] if mode == "candidates" else [""])
            assert all(len(taken) == 2 and min(taken) > 0 for taken in times.values())
            assert found is None if mode in ("network", "candidates") else found["faces"] == 1
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)


def test_candidates_are_as_many_as_they_are_called(folder, monkeypatch):
    seen = []

    def counted(self, codes, height, width):
        seen.append(int((codes[:, 4] > self._logit).sum()))
        return torch.zeros(0, 4), torch.zeros(0)

    monkeypatch.setattr(Detector, "_found", counted)
    with torch.no_grad():
        for run in faces_rows.at_candidates("ours", folder).values():
            run()
    # the small picture of the test has fewer anchors than 700
    assert seen == [0, 50, len(anchors(96, 128)) - 1]


def test_the_published_row_reads_blue_first_and_finds_what_it_does(folder, monkeypatch):
    given = []
    monkeypatch.setattr(Published, "__call__", lambda self, pixels: given.append(pixels))
    faces_rows.on_pixels(faces_rows.finder("published", folder), "published", folder)()
    assert np.array_equal(given[0][:, :, ::-1], faces_rows.picture(folder)) and given[0].flags.c_contiguous


def answering(code):
    """A process that says it is ready, then answers as `code` does."""
    program = f"import sys, json\nprint(json.dumps('ready'), flush=True)\nfor line in sys.stdin:\n    {code}\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], **pipes)


def test_rows_take_turns_and_a_dead_one_says_why(tmp_path):
    found = {"found": 1, "faces": 2, "wrong": 0}
    times = f"print(json.dumps({{'': [9, 0.001, 0.003]}} if 'time' in line else {found}), flush=True)"
    errors = (tmp_path / "errors").open("w+b")
    errors.write(b"Traceback\nModuleNotFoundError: No module named 'mtcnn'\n")
    rows = [
        Row("ours", "pixels", answering(times), errors, {}),
        Row("mtcnn", "pixels", answering("sys.exit(1)"), errors, {}),
    ]
    for row in rows:
        row.ask("")
    measure_rows(rows, 2)
    good, bad = (records_of(row, 1, 2)[0] for row in rows)
    assert good.p50_us == pytest.approx(2000) and good.samples == 4 and good.mode == "pixels-1"
    assert good.config["accuracy"]["found"] == 1
    assert bad.p50_us is None and bad.error == "cannot run: ModuleNotFoundError: No module named 'mtcnn'"
    for row in rows:
        row.process.kill()
        row.process.wait()


def test_records_of_a_kind_are_written_before_the_next_is_measured(tmp_path, monkeypatch):
    row = Row("ours", "file", answering("print('{\"\": [9, 0.001]}', flush=True)"), None, {})
    row.ask("")
    monkeypatch.setattr(bench_faces, "rows", lambda *args: [row])
    options = Namespace(threads=torch.get_num_threads(), rounds=1, only="", out=tmp_path)
    shown = bench_faces.measured(tmp_path, "file", options)
    assert shown[0][:3] == [f"file-{options.threads}", "ours", pytest.approx(1)] and row.process.returncode is not None
    (record,) = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert record["provider"] == "ours" and record["p50_us"] == pytest.approx(1000)


def test_a_row_of_several_kinds_has_a_record_of_each():
    row = Row("ours", "candidates", None, None, {"0": [1e-3, 3e-3], "700": [4e-3]})
    found = records_of(row, 2, 5)
    assert [(r.mode, r.p50_us, r.samples) for r in found] == [
        ("candidates-0-2", pytest.approx(2000), 2), ("candidates-700-2", pytest.approx(4000), 1),
    ]  # fmt: skip


def record(provider, mode, time, **more):
    config = {"threads": int(mode[-1]), "accuracy": more.pop("accuracy", None), "batch_size": 8}
    where = {"device": "CPU", "torch": "2", "date": "today", "commit": "abc", "error": "", "dtype": "fp32"}
    where |= {"method": "wall", "benchmark": "faces", "shape": "640x480", "config": config}
    return {**where, "provider": provider, "mode": mode, "p50_us": time, **more}


def test_records_become_tables():
    found = {"found": 3, "faces": 4, "wrong": 1, "ap": 0.7}
    cpu = [
        record("published", "network-1", 20_000.0), record("ours", "network-1", 8_000.0),
        record("published", "pixels-1", 30_000.0, accuracy=found),
        record("mtcnn", "pixels-1", None, error="cannot run: x"),
        record("ours", "candidates-0-1", 8_000.0), record("ours", "candidates-700-1", 8_400.0),
        record("gone", "pixels-1", 1.0),
    ]  # fmt: skip
    text = faces_block(cpu, [])
    assert "| **rewrite, eager** | 8.00 | 125 | 2.50 |  |" in text
    assert "| as published, eager PyTorch | 30.00 | 33 | 1.00 | 3 of 4, 1 wrong |" in text
    assert "| MTCNN (facenet-pytorch) | cannot run: x |" in text
    assert "On a GPU, CUDA graphs of 1, 8 and 32 pictures: not measured." in text
    assert "| provider | ms, 0 | ms, 700 | excess |" in text and "| **rewrite, eager** | 8.00 | 8.40 | 5 % |" in text
    assert "gone" not in text  # of a provider that is measured no more
    gpu = [record("ours", "forward-1", 1000.0, method="graph", device="GPU", shape="640x480-B8")]
    assert "| GPU | 640x480-B8 | fp32 | graph | **rewrite, eager** | 8000 |" in faces_block([], [gpu])
    assert "On a CPU: not measured." in faces_block([], [])


def test_the_cases_of_a_gpu_hold_on_the_cpu():
    """Walked on the CPU at small size: both providers agree with float64."""
    dry = list(cases(Target("cpu", dry_run=True)))
    assert [case.shape for case in dry] == ["128x96-B1", "128x96-B8", "128x96-B32"]
    for found in measure(dry[0], "cpu", 0):
        assert not found.error and found.relative_rms < 1e-5
    assert len(list(cases(Target("cuda")))) == 6


def test_every_provider_has_a_name():
    from benchmarks.faces_tables import NAMES, WORK

    assert {provider for providers in faces_rows.MODES.values() for provider in providers} == set(NAMES)
    assert set(faces_rows.MODES) == set(WORK) and Path(bench_faces.__file__).exists()
