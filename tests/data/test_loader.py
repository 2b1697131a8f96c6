"""The order of samples: exact after a resume, the same for any workers and ranks, complete in every epoch."""

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast.data import ImageDataset, batches, open_dataset
from sagan_fast.data.loader import epoch_order, sample_order
from sagan_fast.errors import InputError


class Numbers(ImageDataset):
    """Image i is filled with i, its label is i % 3."""

    def __init__(self, size=23):
        super().__init__(
            "numbers", resolution=2, class_names=("a", "b", "c"), labels=np.arange(size, dtype=np.int64) % 3
        )

    def load(self, index):
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of six images, every one of another gray; returns the root."""
    for label, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (4, 4), (100 * label + 10 * i,) * 3).save(tmp_path / name / f"{i}.png")
    return tmp_path


def take(number, stream):
    return list(itertools.islice(stream, number))


def numbers(stream, count):
    return [images[:, 0, 0, 0].tolist() for images, _ in take(count, stream)]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_epochs_are_permutations_that_differ(generator):
    seed = int(torch.randint(2**62, (), generator=generator))
    orders = [epoch_order(1000, seed, epoch) for epoch in range(3)] + [epoch_order(1000, seed + 1, 0)]
    for order in orders:
        assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(1000))
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.02


def test_order_is_the_same_on_every_machine():
    assert epoch_order(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(10, -1, 7).tolist() == [3, 0, 7, 4, 6, 9, 8, 1, 5, 2]


def test_types_and_shapes():
    images, labels = next(batches(Numbers(), batch_size=5, seed=0))
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 2, 2)
    assert labels.dtype == torch.int64 and torch.equal(labels, images[:, 0, 0, 0].long() % 3)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 60])
def test_every_epoch_is_complete_and_no_batch_short(batch_size):
    flat = sum(numbers(batches(Numbers(), batch_size=batch_size, seed=3), 23 * 3), [])
    assert len(flat) == 23 * 3 * batch_size
    for epoch in range(3):
        assert flat[23 * epoch : 23 * epoch + 23] == epoch_order(23, 3, epoch).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [28, 31])
def test_resume_is_exact(folder, num_workers, start):
    dataset = open_dataset(f"folder:{folder}", resolution=4)
    straight = take(12, batches(dataset, batch_size=4, seed=7, start=start % 4))
    resumed = take(5, batches(dataset, batch_size=4, seed=7, start=start, num_workers=num_workers))
    assert equal(resumed, straight[7:])
    assert not equal(resumed, straight[:5])


@pytest.mark.parametrize("start", [0, 17])
def test_ranks_share_every_global_batch(start):
    whole = numbers(batches(Numbers(), batch_size=12, seed=1, start=start), 5)
    parts = [numbers(batches(Numbers(), batch_size=4, seed=1, start=start, rank=r, world_size=3), 5) for r in range(3)]
    for step in range(5):
        for rank in range(3):
            assert parts[rank][step] == whole[step][rank::3]


def test_far_into_a_run():
    far = 10**15
    order = sample_order(23, batch_size=4, seed=1, start=far)
    assert next(order)[0] == epoch_order(23, 1, far // 23)[far % 23]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_left_alone(num_workers):
    torch_state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    take(3, batches(Numbers(), batch_size=4, seed=1, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), torch_state) and pickle.dumps(np.random.get_state()) == numpy_state


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_image_ends_with_its_sentence_at_its_batch(folder, num_workers):
    (folder / "b" / "3.png").write_text("no image")
    dataset = open_dataset(f"folder:{folder}", resolution=4)
    batch_of_it = epoch_order(12, 5, 0).tolist().index(9) // 2
    stream = batches(dataset, batch_size=2, seed=5, num_workers=num_workers)
    assert len(take(batch_of_it, stream)) == batch_of_it
    said = r"^\S+b.3\.png cannot be read: .*; on_broken=skip leaves such images out$"
    with pytest.raises(InputError, match=said):
        next(stream)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_counted_here_and_resume_stays_exact(folder, num_workers, caplog):
    (folder / "b" / "5.png").write_text("no image")
    (folder / "a" / "0.png").write_text("no image")
    straight = take(12, batches(open_dataset(f"folder:{folder}", resolution=4, on_broken="skip"), batch_size=2, seed=5))
    dataset = open_dataset(f"folder:{folder}", resolution=4, on_broken="skip")
    caplog.clear()
    resumed = take(8, batches(dataset, batch_size=2, seed=5, start=8, num_workers=num_workers))
    assert equal(resumed, straight[4:])
    assert dataset.num_broken == 2
    assert [record.message.count("cannot be read") for record in caplog.records] == [1, 1]
    for images, labels in resumed:
        assert torch.equal(images[:, 0, 0, 0] >= 100, labels == 1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of a process group")
def test_workers_outlive_the_signals_that_stop_a_run():
    before = set(multiprocessing.active_children())
    stream = batches(Numbers(), batch_size=2, seed=1, num_workers=2)
    found = numbers(stream, 1)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert found + numbers(stream, 19) == numbers(batches(Numbers(), batch_size=2, seed=1), 20)
    stream.close()
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0
    assert list(stream) == []


@pytest.mark.slow
def test_process_with_open_workers_exits_at_once():
    script = (
        "from sagan_fast.data import *\n"
        "if __name__ == '__main__':\n"
        "    stream = batches(open_dataset('shapes', resolution=16), batch_size=4, seed=0, num_workers=2)\n"
        "    print(len(next(stream)))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "2\n", "")


@pytest.mark.slow
def test_spawned_workers(folder):
    script = (
        "import multiprocessing, sys\n"
        "from sagan_fast.data import *\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    data = open_dataset('folder:' + sys.argv[1], resolution=4)\n"
        "    stream = batches(data, batch_size=12, seed=0, num_workers=1)\n"
        "    print(sorted(next(stream)[0][:, 0, 0, 0].tolist()))\n"
    )
    path = folder / "script.py"
    path.write_text(script)
    run = subprocess.run([sys.executable, path, folder], capture_output=True, text=True, timeout=120)
    assert run.stdout == f"{[*range(0, 60, 10), *range(100, 160, 10)]}\n", run.stderr


@pytest.mark.gpu
def test_pinned_batches():
    images, labels = next(batches(Numbers(), batch_size=4, seed=0, num_workers=1, pin_memory=True))
    assert images.is_pinned() and labels.is_pinned()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in range\(world_size\), range\(2\), got 2"),
        ({"rank": -1}, r"rank must be in range\(world_size\), range\(1\), got -1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=f"^batches: {message}$"):
        batches(Numbers(), **{"batch_size": 4, "seed": 0, **options})


def test_empty_set():
    with pytest.raises(ValueError, match=r"batches: len\(dataset\) must be at least 1, got 0"):
        batches(Numbers(0), batch_size=1, seed=0)
