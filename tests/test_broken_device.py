"""After an illegal access a worker of the GPU tests dies, and another one goes on."""

import os

import pytest
import torch

from shared_by_tests import leave_broken_device


def broken():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_computes_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("it ended"))
    leave_broken_device(in_worker=True)
    leave_broken_device(in_worker=False)


def test_a_worker_dies_with_its_device(monkeypatch):
    def exits(status):
        raise SystemExit(status)

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(os, "_exit", exits)
    with pytest.raises(SystemExit, match="1"):
        leave_broken_device(in_worker=True)


def test_without_workers_the_session_ends_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(pytest.exit.Exception, match="lost to this process: CUDA error.*pytest-xdist"):
        leave_broken_device(in_worker=False)
