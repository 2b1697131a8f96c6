"""Reading: nothing in a file is run, and what is wrong with it is said."""

import pickle

import pytest
import torch

from sagan_fast import Discriminator, Generator
from sagan_fast.errors import InputError
from sagan_fast.models.checkpoint import (
    FORMAT,
    KEYS,
    find_checkpoint,
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
    with pytest.raises(InputError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="there is no run folder or checkpoint"):
        find_checkpoint(tmp_path / "none")
