import os
import signal

import pytest

from sagan_fast.distributed import connected
from sagan_fast.training import signals
from sagan_fast.training.signals import StopVote, stop_on_signals
from shared_by_tests import run_ranks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_on_signals("stopping") as received:
        os.kill(os.getpid(), number)
        assert received == [number]
    assert signal.getsignal(number) is before


def test_an_echo_of_a_signal_is_not_impatience(monkeypatch):
    with stop_on_signals("stopping") as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun hands on what the terminal sent already
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
        monkeypatch.setattr(signals, "IMPATIENCE", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_is_answered_and_the_second_ends_the_step(monkeypatch, capfd):
    monkeypatch.setattr(signals, "IMPATIENCE", -1.0)
    with stop_on_signals("stopping soon") as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == "stopping soon\n" and received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGINT)  # the end takes too long
        assert ended.value.code == 130


def test_before_there_is_anything_to_lose_the_first_ctrl_c_ends_it(monkeypatch):
    with stop_on_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler's, who waits
        assert received == [signal.SIGTERM]
    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stop_on_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]


def vote_four_times():
    with connected("cpu", 60) as world:
        vote, granted = StopVote(world), []
        for call in range(4):
            granted.append(vote(world.rank == 1 and call == 1))
        assert granted == [False, False, True, False] and not vote.settle() and not vote.settle()


def test_a_wish_of_one_process_is_granted_to_all_at_the_next_call():
    assert run_ranks(vote_four_times, 3) == [0, 0, 0]
    with connected("cpu", 1) as world:
        assert StopVote(world)(True) and not StopVote(world)(False) and not StopVote(world).settle()
