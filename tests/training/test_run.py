"""What a checkpoint says on the way back, and what is refused."""

import pytest
import torch

from sagan_fast.data import open_dataset
from sagan_fast.data.shapes import CLASS_NAMES
from sagan_fast.distributed import World, connected
from sagan_fast.errors import Diverged, InputError
from sagan_fast.models.checkpoint import load_checkpoint
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.folder import RunFolder
from sagan_fast.training.health import Guard
from sagan_fast.training.run import Run, bit_sums
from sagan_fast.training.state import new_state
from shared_by_tests import run_ranks


def run_in(path, world=None, **overrides):
    narrow = {"base_channels": 2}
    config = TrainConfig.from_preset(
        "shapes-32", out=str(path), generator=narrow, discriminator=narrow, **{"batch_size": 8, **overrides}
    )
    world = world or World(torch.device("cpu"))
    folder = RunFolder(path, config.keep)
    dataset = open_dataset("shapes", resolution=32)
    return Run(config, world, dataset, new_state(config, world.device), Guard(5), folder)


def test_all_that_was_comes_back(tmp_path):
    before = run_in(tmp_path)
    before.state.step, before.state.rollbacks, before.guard.lines_won = 7, 2, 3
    before.state.generator.conv.bias.data.fill_(0.5)
    torch.manual_seed(11)
    before.save()
    drawn = torch.rand(3)
    after = run_in(tmp_path)
    assert after.resume() == []
    assert (after.state.step, after.state.rollbacks, after.guard.lines_won) == (7, 2, 3)
    assert after.state.generator.conv.bias.unique().tolist() == [0.5] and torch.equal(torch.rand(3), drawn)
    assert run_in(tmp_path / "new").resume() == [
        f"there is no checkpoint in {tmp_path / 'new'} yet: the run starts at step 0"
    ]


def test_a_checkpoint_from_before_an_option_was_there_is_one_with_its_default(tmp_path):
    before = run_in(tmp_path)
    before.state.step = 3
    before.save()
    path = tmp_path / "checkpoints" / "last.pt"
    content = load_checkpoint(path)
    del content["lecam"]
    for name in ("loss", "r1_gamma", "penalty_every", "lecam_decay"):
        del content["config"][name]
    torch.save(content, path)
    after = run_in(tmp_path)
    assert after.resume() == [] and after.state.step == 3
    with pytest.raises(InputError, match=r"cannot be resumed: loss \(was hinge, now relativistic\)"):
        run_in(tmp_path, loss="relativistic").resume()


def checkpoint_with(path, names):
    """Write a checkpoint of the shapes whose classes have these names."""
    before = run_in(path)
    before.dataset.class_names = list(names)
    before.save()


def test_a_run_goes_on_with_its_own_labels(tmp_path):
    names = list(CLASS_NAMES)
    checkpoint_with(tmp_path, names[::-1])
    after = run_in(tmp_path)
    before = after.dataset.labels.copy()
    (said,) = after.resume()
    assert "has the classes of the checkpoint" in said and "10 of 10 labels are mapped by name" in said
    assert after.dataset.class_names == names[::-1] and (after.dataset.labels == 9 - before).all()
    checkpoint_with(tmp_path, ["ant", *names[1:]])
    other = run_in(tmp_path)
    other.state.generator.conv.bias.data.fill_(0.5)
    with pytest.raises(InputError, match=r"shapes has other classes than the checkpoint \S+last\.pt: it lacks ant and"):
        other.resume()
    assert other.state.generator.conv.bias.unique().tolist() == [0.5]  # nothing was loaded
    checkpoint_with(tmp_path, [])  # written before checkpoints named their classes
    assert run_in(tmp_path).resume() == []


def take_classes(folder):
    with connected("cpu", 60) as world:
        run = run_in(folder / "run", world)
        said = run.resume()
        run.check_start()
        (folder / f"rank-{world.rank}").write_text(f"{said} {run.dataset.labels[:3].tolist()}")


def test_every_process_maps_the_labels(tmp_path):
    checkpoint_with(tmp_path / "run", CLASS_NAMES[::-1])
    assert run_ranks(take_classes, 2, tmp_path) == [0, 0]
    said = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert all("10 of 10 labels are mapped by name" in text and text.endswith(" [9, 8, 7]") for text in said)


def test_what_is_not_as_it_was_is_said(tmp_path):
    before = run_in(tmp_path)
    before.state.step = 1
    before.save()
    path = tmp_path / "checkpoints" / "last.pt"
    content = load_checkpoint(path)
    assert content["images"] == 5000 and content["norm_batch"] == 8 and len(content["ranks"]) == 1
    content["images"], content["versions"]["torch"] = 4999, "1.0"
    content["ranks"] = content["ranks"] * 4
    torch.save(content, path)
    said = run_in(tmp_path, micro_batch_size=2).resume()
    assert [sentence.split(":")[0] for sentence in said] == [
        "resumed with 1 process instead of 4",
        "batch norm now sees 2 images at a time instead of 8, which changes the training",
        "the data set has 5000 images instead of 4999",
        f"resumed with PyTorch {torch.__version__} instead of 1.0",
    ]
    with pytest.raises(InputError, match=r"cannot be resumed: batch_size \(was 8, now 16\)"):
        run_in(tmp_path, batch_size=16).resume()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="no checkpoint in .*checkpoints is whole: all are cut off; to start anew"):
        run_in(tmp_path).resume()


def test_a_rollback_takes_the_newest_checkpoint_from_before_the_trouble(tmp_path):
    run = run_in(tmp_path, on_divergence="rollback", max_rollbacks=2, keep=9)
    for step in (10, 20, 30):
        run.state.step = step
        run.save()
    assert "rolled back to step 20, rollback 1 of 2" in run.roll_back(Diverged("d_loss is nan", healthy_until=25))
    assert run.folder.checkpoints.steps() == [10, 20] and run.state.rollbacks == 1
    assert load_checkpoint(run.folder.checkpoints.last)["rollbacks"] == 1
    assert "step 10, rollback 2 of 2" in run.roll_back(Diverged("d_loss is nan", healthy_until=5))
    with pytest.raises(Diverged, match="d_loss is nan; stopped after 2 rollbacks, with the state in .*stopped.pt"):
        run.roll_back(Diverged("d_loss is nan", healthy_until=5))


def test_how_a_batch_is_shared_is_said(tmp_path):
    four = World(torch.device("cpu"), 1, 4)
    assert run_in(tmp_path).division() == ""
    assert run_in(tmp_path, micro_batch_size=2).division() == "1 process x 4 x 2 images a step, "
    assert run_in(tmp_path, four, micro_batch_size=1).division() == "4 processes x 2 x 1 images a step, "


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    before = run_in(tmp_path)
    before.save()
    path, mark = before.folder.checkpoints.last, tmp_path / "was_here"
    content = load_checkpoint(path)
    for bad in ({**content, "guard": Evil(mark)}, {**content, "ranks": [Evil(mark)]}):
        torch.save(bad, path)
        with pytest.raises(InputError, match="last.pt is no checkpoint of sagan-fast: cut off, or holding more than"):
            run_in(tmp_path).resume()
    assert not mark.exists()


def unequal(folder):
    with connected("cpu", 60) as world:
        run = run_in(folder, world)
        run.check_replicas()
        if world.rank == 1:
            run.state.ema.conv.bias.data[0] = torch.nextafter(run.state.ema.conv.bias.data[0], torch.tensor(1.0))
        with pytest.raises(ConnectionError, match="2 processes of this run no longer have the same weights at step 0"):
            run.save()
    assert not (folder / "checkpoints").exists()


def test_a_bit_that_differs_between_processes_is_noticed_and_not_saved(tmp_path):
    assert run_ranks(unequal, 2, tmp_path) == [0, 0]


def unlike(folder):
    import dataclasses

    with connected("cpu", 60) as world:
        run = run_in(folder / str(world.rank), world, num_workers=world.rank)
        run.check_start()
        other = dataclasses.replace(run, config=dataclasses.replace(run.config, g_lr=0.1 * (1 + world.rank)))
        run.dataset.labels = run.dataset.labels[world.rank :]
        for wrong, said in (
            (other, "with different options: the line"),
            (run, "on different images: shapes must hold"),
        ):
            with pytest.raises((InputError, SystemExit)) as error:
                wrong.check_start()
            assert error.type is (SystemExit if world.rank else InputError)
            assert world.rank or f"the 2 processes of this run were started {said}" in str(error.value)


def test_processes_that_are_not_alike_are_refused(tmp_path):
    assert run_ranks(unlike, 2, tmp_path) == [0, 0]


def test_bit_sums_show_a_single_bit_and_an_exchange(generator):
    a, b = (torch.randn(5, 7, generator=generator) for _ in range(2))
    changed = a.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    prints = [bit_sums(t) for t in ([a, b], [changed, b], [b, a], [])]
    assert len({tuple(p) for p in prints}) == 4 and bit_sums([a.clone(), b.clone()]) == prints[0]
