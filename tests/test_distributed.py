"""What processes tell each other, how they find each other, and what one alone does without any."""

import os

import pytest
import torch

from sagan_fast.distributed import World, connected, current_world, environment_of_one, pick_device
from sagan_fast.errors import InputError
from shared_by_tests import run_ranks

CPU = torch.device("cpu")


def words(folder):
    with connected("cpu", 60) as world:
        r, n = world.rank, world.size
        assert (world.is_main, n, world.device) == (r == 0, 3, CPU)
        assert world.agrees([5, 2**60]) and not world.agrees([5, r])
        assert world.gather(b"x" * r) == [b"", b"x", b"xx"] and world.gather(b"") == [b""] * 3
        assert world.share(b"bytes" if r == 0 else None) == b"bytes" and world.share(None) is None
        assert world.share(b"") == b"" and world.share({"rank": r}) == {"rank": 0} and current_world(CPU) is world
        assert world.by_main(lambda: 7) == (7 if r == 0 else None) and world.from_main(lambda: ("a", r)) == ("a", 0)
        with pytest.raises(InputError, match="^of the first$"):
            world.from_main(lambda: (_ for _ in ()).throw(InputError("of the first" if r == 0 else "never asked")))
        found = world.gather_tensors(torch.full((2, 3), float(r)))
        assert torch.equal(torch.stack(found), torch.arange(3.0)[:, None, None].expand(3, 2, 3))
        tensors = [torch.full((2, 3, 4, 4), float(r)).to(memory_format=torch.channels_last), torch.ones(()) * 3 * r]
        world.average(tensors)()
        assert torch.equal(tensors[0], torch.ones(2, 3, 4, 4)) and tensors[1].item() == 3.0

        def fail():
            if r == 2:
                raise InputError("no such folder")

        try:
            world.together(fail)
        except InputError as error:
            assert r == 0
            (folder / "said").write_text(str(error))
            raise SystemExit(2) from error


def test_what_processes_tell_each_other(tmp_path):
    assert run_ranks(words, 3, tmp_path) == [2, 2, 2]
    assert (tmp_path / "said").read_text() == "no such folder (process 2 of 3)"


def test_an_apple_gpu_is_taken_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == CPU and pick_device("mps") == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match="device mps runs one process only, and torchrun started 2"),
        connected("mps", 1),
    ):
        pass
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="^device mps was asked for, but PyTorch finds no Apple GPU here"):
        pick_device("mps")


def restarted(port, start):
    os.environ.update({"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    with connected("cpu", 60) as world:
        assert world.gather(1.0) == [1.0, 1.0]
        if start == 0:
            os._exit(9)  # leaves its addresses in the store


def test_processes_started_again_on_the_same_store_do_not_look_for_the_dead():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("sagan_fast/hello/1", "of one that never got an answer")
    assert run_ranks(restarted, 2, store.port, 0) == [9, 9]
    assert run_ranks(restarted, 2, store.port, 1) == [0, 0]


def test_alone_nothing_is_asked_of_anyone():
    with connected("auto", 1) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.agrees([1]) and world.gather(b"a") == [b"a"]
        assert world.share(b"a") == b"a" and world.share(None) is None
        tensor = torch.ones(3)
        world.average([tensor])()
        assert tensor.sum() == 3 and world.gather_tensors(tensor) == [tensor] and world.from_main(lambda: 5) == 5
        assert current_world(CPU) == World(CPU)
        with pytest.raises(InputError, match="^it$"):
            world.by_main(lambda: (_ for _ in ()).throw(InputError("it")))


def test_more_processes_than_devices_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("WORLD_SIZE", 4), ("RANK", 3), ("LOCAL_RANK", 3), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="was given 4 processes but has 2 CUDA devices"), connected("cuda", 1):
        pass


def test_cuda_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="device cuda was asked for, but PyTorch finds no CUDA device"):
        pick_device("cuda")


def test_torchruns_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "3")
    assert environment_of_one()["OMP_NUM_THREADS"] == "3"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(environment_of_one())


@pytest.mark.gpu
def test_one_process_under_torchrun_takes_its_device(monkeypatch):
    for name, value in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    with connected("cuda", 60) as world:
        assert world == World(torch.device("cuda"))
