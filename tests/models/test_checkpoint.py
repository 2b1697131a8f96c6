"""Reading: nothing in a file is run, and what is wrong with it is said."""

import pickle

import pytest
import torch
from PIL import Image

from sagan_fast import Discriminator, Generator
from sagan_fast.errors import InputError
from sagan_fast.files import link
from sagan_fast.models.checkpoint import (
    FORMAT,
    KEYS,
    checkpoints_of,
    find_checkpoint,
    holds_checkpoints,
    load_checkpoint,
    load_discriminator,
    load_generator,
)
from sagan_fast.training.config import TrainConfig


def content():
    config = TrainConfig.from_preset("shapes-32", out="x", generator={"base_channels": 4})
    torch.manual_seed(1)
    last, average = Generator(config.generator), Generator(config.generator)
    return {
        **dict.fromkeys(KEYS, 0),
        "format": FORMAT, "config": config.to_dict(), "generator": last.state_dict(), "ema": average.state_dict(),
    }, last, average  # fmt: skip


def test_the_generator_of_a_checkpoint_needs_no_trainer(tmp_path):
    saved, last, average = content()
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved, tmp_path / "checkpoints" / "last.pt")
    z, y = torch.randn(2, 128), torch.tensor([0, 9])
    loaded = load_generator(tmp_path)
    assert not loaded.training
    torch.testing.assert_close(loaded(z, y), average.eval()(z, y))
    torch.testing.assert_close(load_generator(tmp_path, average=False)(z, y), last.eval()(z, y))


def test_the_discriminator_and_the_names_of_the_classes(tmp_path):
    saved, _, _ = content()
    network = Discriminator(
        TrainConfig.from_preset("shapes-32", out="x", discriminator={"base_channels": 4}).discriminator
    )
    saved["config"]["discriminator"]["base_channels"] = 4
    saved["config"]["backend"] = "triton"  # of the machine that trained, not of this one
    torch.save({**saved, "discriminator": network.state_dict(), "class_names": ["a", "b"]}, tmp_path / "c.pt")
    loaded = load_discriminator(tmp_path / "c.pt")
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 9])
    assert not loaded.training
    torch.testing.assert_close(loaded(x, y), network.eval()(x, y))
    assert load_generator(tmp_path / "c.pt").class_names == ("a", "b")
    torch.save(saved, tmp_path / "old.pt")
    assert load_generator(tmp_path / "old.pt").class_names == ()


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path, mark = tmp_path / "evil.pt", tmp_path / "was_here"
    pickle.loads(pickle.dumps(Evil(mark)))
    mark.unlink()  # it does run where pickles are trusted
    torch.save({**content()[0], "rng": Evil(mark)}, path)
    with pytest.raises(InputError, match="evil.pt is no checkpoint of sagan-fast: cut off, or holding more than plain"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(InputError, match="is no checkpoint of sagan-fast"):
        load_checkpoint(path)
    assert not mark.exists()


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    torch.save(content()[0], path)
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match="is no checkpoint of sagan-fast"):
            load_checkpoint(path)


def test_other_files_are_refused_by_name(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt is no checkpoint of sagan-fast: it has no format, step, config"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({**content()[0], "format": 99}, tmp_path / "new.pt")
    with pytest.raises(InputError, match=f"has checkpoint format 99, this version reads {FORMAT}"):
        load_checkpoint(tmp_path / "new.pt")
    with pytest.raises(InputError, match="there is no checkpoint .*none.pt"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is no run folder: there is no"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="there is no run folder or checkpoint"):
        find_checkpoint(tmp_path / "none")


def test_what_a_file_is_instead_is_said_and_no_advice_to_run_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.pt", format="PNG")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08 an onnx model")
    (tmp_path / "config.yaml").write_text("steps: 3")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "script.pt")
    torch.save({"a": Evil(tmp_path / "x")}, tmp_path / "evil.pt")
    expected = {
        "picture.pt": "it is a PNG image; give a run folder",
        "model.onnx": "it is an ONNX model; give a run folder",
        "config.yaml": "it is a configuration; give",
        "script.pt": "it is a TorchScript model; give",
        "evil.pt": "cut off, or holding more than plain data (it holds more than plain data)",
    }
    for name, words in expected.items():
        with pytest.raises(InputError) as error:
            load_checkpoint(tmp_path / name)
        assert f"{name} is no checkpoint of sagan-fast: {words}" in str(error.value)
        assert "weights_only" not in str(error.value)


def save_step(run, step, last=True):
    path = run / "checkpoints" / f"step-{step:08d}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"step": step}, path)
    if last:
        link(path, path.parent / "last.pt")
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    last = tmp_path / "checkpoints" / "last.pt"
    first, second = save_step(tmp_path, 2), save_step(tmp_path, 4)
    assert checkpoints_of(tmp_path) == [last, first] and find_checkpoint(tmp_path) == last
    newer = save_step(tmp_path, 6, last=False)  # a crash came before it was named
    assert checkpoints_of(tmp_path) == [newer, last, first]
    newer.write_bytes(newer.read_bytes()[:-30])  # cut off
    assert checkpoints_of(tmp_path) == [last, first]
    last.unlink()
    assert checkpoints_of(tmp_path) == [second, first] and find_checkpoint(tmp_path) == second
    last.write_bytes(second.read_bytes()[:100])
    assert checkpoints_of(tmp_path) == [second, first]
    last.write_bytes(first.read_bytes())  # a copy: no links here
    assert checkpoints_of(tmp_path) == [last, second, first]
    for path in (first, second, newer):
        path.unlink()
    last.rename(last.with_name("best.pt"))
    assert checkpoints_of(tmp_path) == [last.with_name("best.pt")] and holds_checkpoints(tmp_path)
    last.with_name("best.pt").rename(last.with_name("stopped.pt"))
    assert checkpoints_of(tmp_path) == [] and not holds_checkpoints(tmp_path)
