"""Weights & Biases gets what TensorBoard gets; wandb itself is not needed here."""

import io
import sys
import types

import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.training.log import RunLog
from sagan_fast.training.wandb_log import WandbBoard

VALUES = {"d_loss": 1.0, "g_loss": -0.5, "d_real": 0.25, "d_fake": -0.25, "images_per_s": 12.0}


class Wandb(types.ModuleType):
    """What the board calls of wandb, written down."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.ended = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            id=options["id"] or "abc", define_metric=lambda *_, **__: None, log=self.logged.append, finish=self.finish
        )

    def finish(self):
        self.ended += 1

    def Image(self, pixels):
        return pixels.shape


def test_numbers_and_pictures_arrive_by_step_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (10, 20):
        board = WandbBoard("gans", tmp_path, {"steps": 30})
        with RunLog(tmp_path, step - 10, 30, io.StringIO(), boards=[board]) as log:
            log.line(step, VALUES)
            log.picture("samples", torch.zeros(3, 4, 8, dtype=torch.uint8), step)
            log.words("config", "steps: 30")
    assert [(o["project"], o["name"], o["id"], o["resume"]) for o in wandb.started] == [
        ("gans", tmp_path.name, None, "allow"), ("gans", tmp_path.name, "abc", "allow")
    ]  # fmt: skip
    assert wandb.logged[0]["step"] == 10 and wandb.logged[0]["loss/discriminator"] == 1.0
    assert wandb.logged[1] == {"step": 10, "samples": (4, 8, 3)} and wandb.ended == 2


def test_without_the_package_or_a_login_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--wandb needs the package wandb: pip install"):
        WandbBoard("gans", tmp_path, {})
    wandb = Wandb()
    wandb.init = lambda **_: (_ for _ in ()).throw(RuntimeError("api_key not configured\nmore"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(InputError, match="--wandb gans cannot start: api_key not configured$"):
        WandbBoard("gans", tmp_path, {})
