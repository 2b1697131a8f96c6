"""Evaluation during training: what it leaves behind, and that the training does not notice it."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import sagan_fast.training.loop as loop
from sagan_fast import cli
from sagan_fast.data.shapes import CLASS_NAMES
from sagan_fast.errors import InputError
from sagan_fast.models.checkpoint import load_checkpoint
from sagan_fast.training import evaluation
from sagan_fast.training.config import TrainConfig
from shared_by_tests import assert_same, tiny_extractor_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def settings(tmp_path):
    return {
        "eval_features": str(tiny_extractor_file(tmp_path / "f.pt")), "eval_count": 24, "eval_reference_count": 40,
        "eval_every": 2,
    }  # fmt: skip


def train(out, **overrides):
    narrow = {"base_channels": 4}
    defaults = dict(batch_size=8, steps=4, log_every=3, sample_every=9, checkpoint_every=3, device="cpu", keep=1)
    config = TrainConfig.from_preset(
        "shapes-32", out=str(out), generator=narrow, discriminator=narrow, **{**defaults, **overrides}
    )
    return loop.train(config)


def scores(run):
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry for entry in entries if "eval/fid" in entry}


@pytest.mark.parametrize("mode", ["inline", pytest.param("background", marks=pytest.mark.slow)])
def test_the_training_does_not_notice(mode, tmp_path, settings):
    """Weights, averages, u, v, batch norms, optimizers, random numbers and guard are the same bit for bit."""
    torch.manual_seed(0)
    train(tmp_path / "off")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run = tmp_path / "on"
    train(run, eval_mode=mode, **settings)
    assert torch.equal(before, torch.get_rng_state())
    without, with_it = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("off", "on"))
    assert without.pop("config") != with_it.pop("config")
    assert_same(without, with_it)

    found = scores(run)
    assert 4 in found and {"eval/fid", "eval/is", "eval/kid"} <= set(found[4])
    stored = json.loads((run / "evaluation" / "step-00000004.json").read_text())
    assert stored["fid"] == found[4]["eval/fid"] and stored["protocol"]["generated"]["step"] == 4
    assert len(stored["protocol"]["generated"]["sha256"]) == 64
    assert not list((run / "evaluation").glob("*.pt")) and not list((run / "evaluation").glob("*.log"))
    training = [line for line in (run / "log.jsonl").read_text().splitlines() if "d_loss" in line]
    assert [json.loads(line)["step"] for line in training] == [3, 4]  # no line more than without
    # The same as `sagan-fast evaluate` of the checkpoint.
    what = ["evaluate", str(run), "--data", "shapes", "--count", "24", "--reference-count", "40"]
    what += ["--features", settings["eval_features"], "--metrics", "fid,is,kid", "--json", str(tmp_path / "s.json")]
    assert cli.main(what) == 0
    assert json.loads((tmp_path / "s.json").read_text())["fid"] == pytest.approx(stored["fid"], rel=1e-4)


def test_the_lowest_fid_is_kept(tmp_path, settings, monkeypatch, capsys):
    fids = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: {"fid": next(fids), "notes": []})
    run = tmp_path / "run"
    train(run, **{**settings, "steps": 5})  # after steps 2, 4 and 5; one checkpoint besides the best is kept
    best = load_checkpoint(run / "checkpoints" / "best.pt")
    assert best["step"] == 4
    assert json.loads((run / "checkpoints" / "best.json").read_text()) == {"step": 4, "metric": "fid", "score": 3.0}
    assert {step: entry["eval/fid"] for step, entry in scores(run).items()} == {2: 5.0, 4: 3.0, 5: 4.0}
    said = capsys.readouterr().out
    assert "evaluation of step 4: fid 3  (best so far)" in said and "evaluation of step 5: fid 4\n" in said
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/fid")] == [(2, 5.0), (4, 3.0), (5, 4.0)]


def test_a_failed_evaluation_does_not_end_the_run(tmp_path, settings, capsys):
    real = tmp_path / "real"
    for name in CLASS_NAMES:
        (real / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(real / name / f"{i}.png")
    (real / "ring" / "1.png").write_bytes(b"broken")
    settings |= {"eval_data": f"folder:{real}", "eval_reference_count": 0}
    state = train(tmp_path / "run", **settings, steps=3)
    assert state.step == 3
    said = capsys.readouterr().out
    assert f"the evaluation of step 2 failed: {real}/ring/1.png cannot be read" in said
    assert f"folder:{real} has the classes of shapes in another order" in said
    assert not scores(tmp_path / "run")
    train(tmp_path / "skipping", **settings, steps=2, on_broken="skip")
    assert "eval/fid" in scores(tmp_path / "skipping")[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_features": "none.pt"}, "there is no feature file none.pt"),
        ({"eval_data": "folder:none"}, "folder:none does not exist"),
        ({"eval_count": 4}, "splits must be at most the count"),
        ({"eval_metrics": "is"}, "eval_metrics must be fid and any of fid,is,kid,prdc,intra_fid, got 'is'"),
        ({"eval_mode": "later"}, "eval_mode must be one of inline, background"),
        ({"eval_every": -1}, "eval_every must be at least 0"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(changes, message, tmp_path, settings):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", **{**settings, **changes})
    assert not list(tmp_path.glob("run/checkpoints/*.pt"))


class _Endless:
    """Stands for `sagan-fast evaluate` that takes long, or says why it fails."""

    def __init__(self, monkeypatch, program):
        popen = evaluation.subprocess.Popen
        self.processes = []

        def start(command, **kwargs):
            self.processes.append(popen(["/bin/sh", "-c", program], **kwargs))
            return self.processes[-1]

        monkeypatch.setattr(evaluation.subprocess, "Popen", start)


def test_a_background_evaluation_that_fails_is_said(tmp_path, settings, monkeypatch, capsys):
    _Endless(monkeypatch, "echo 'sagan-fast: no such luck' >&2; exit 2")
    train(tmp_path / "run", **settings, eval_mode="background", steps=3)
    said = capsys.readouterr().out
    assert said.count("the evaluation of step 3 failed: no such luck") == 1, said
    assert not list((tmp_path / "run" / "evaluation").glob("*.pt"))


def test_a_slow_background_evaluation_is_neither_doubled_nor_left_behind(tmp_path, settings, monkeypatch, capsys):
    started = _Endless(monkeypatch, "sleep 60")
    train_step = loop.train_step

    def step(state, *args):
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return train_step(state, *args)

    monkeypatch.setattr(loop, "train_step", step)
    state = train(tmp_path / "run", **settings, eval_mode="background", steps=20)
    assert state.step == 5 and len(started.processes) == 1
    assert "step 4 is not evaluated: the evaluation of step 2 is not done" in capsys.readouterr().out
    assert started.processes[0].returncode is not None
    assert not list((tmp_path / "run" / "evaluation").glob("*.pt"))


def test_other_classes_of_eval_data_are_refused_at_once(tmp_path, settings):
    for name in ("ant", "bee"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((32, 32, 3), 90 * i, np.uint8)).save(tmp_path / "real" / name / f"{i}.png")
    with pytest.raises(InputError, match=r"real has other classes than shapes: it lacks .* and it has ant, bee \(2 ag"):
        train(tmp_path / "run", eval_data=f"folder:{tmp_path / 'real'}", **settings)
    (tmp_path / "real" / "ant").rename(tmp_path / "flat")
    settings["eval_reference_count"] = 2
    train(tmp_path / "other", eval_data=f"folder:{tmp_path / 'flat'}", **settings)
    assert "eval/fid" in scores(tmp_path / "other")[4]


def test_scores_of_a_run_on_an_apple_gpu_are_summed_on_the_cpu():
    assert evaluation._scored_on(torch.device("mps")) == torch.device("cpu")
    assert evaluation._scored_on(torch.device("cuda", 1)) == torch.device("cuda", 1)
