"""Batch norm over several processes against nn.BatchNorm2d over their images together."""

import pytest
import torch
from torch import nn

from benchmarks.accuracy import rel_rms
from sagan_fast.layers.conditional_batch_norm import ConditionalBatchNorm2d
from sagan_fast.layers.synced_batch_norm import SyncedBatchNorm2d, sync_batch_norms
from shared_by_tests import run_ranks

SPLIT = (3, 2)
"""Images of each process: as many here as there, or not."""


def make(affine=True):
    norm = nn.BatchNorm2d(5, momentum=0.3, eps=1e-3, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, -1, 2)
        nn.init.normal_(norm.bias)
    return norm


def inputs(dtype):
    torch.manual_seed(3)
    x = (torch.randn(sum(SPLIT), 5, 3, 4, dtype=torch.float64) * 2 + 10).to(dtype)  # far from 0: cancellation shows
    return x, torch.randn(sum(SPLIT), 5, 3, 4, dtype=torch.float64).to(dtype)


def as_rank(folder, dtype, affine):
    from sagan_fast.distributed import connected

    x, d_out = inputs(dtype)
    torch.manual_seed(4)
    model = nn.Sequential(make(affine).to(dtype))
    assert sync_batch_norms(model) == 1
    with connected("cpu", 60) as world:
        mine = torch.arange(sum(SPLIT)).split(SPLIT)[world.rank]
        part = x[mine].clone(memory_format=torch.channels_last).requires_grad_(True)
        out = model(part)
        out.backward(d_out[mine])
        grads = [p.grad for p in model.parameters()]
        if affine:
            world.average(grads)()  # what the trainer does: means over processes
        saved = [out.detach(), part.grad, *grads, *model.buffers()]
        torch.save(saved, folder / f"{world.rank}.pt")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("affine", [True, False])
def test_two_processes_are_one_batch(tmp_path, dtype, limit, affine):
    assert run_ranks(as_rank, 2, tmp_path, dtype, affine) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x, d_out = inputs(dtype)
    x = x.double().requires_grad_(True)
    torch.manual_seed(4)
    norm = make(affine).to(dtype).double()
    norm(x).backward(d_out.double())
    out = norm.eval().train()(x).detach()
    assert rel_rms(torch.cat([first[0], second[0]]), out) < limit
    assert rel_rms(torch.cat([first[1], second[1]]), x.grad) < limit
    for mean, parameter in zip(first[2 : 2 + 2 * affine], norm.parameters(), strict=True):
        assert rel_rms(2 * mean, parameter.grad) < limit
    once = make(affine).double()
    once(x)
    for buffer, other, expected in zip(first[2 + 2 * affine :], second[2 + 2 * affine :], once.buffers(), strict=True):
        assert torch.equal(buffer, other) and rel_rms(buffer, expected) < limit


def empty_everywhere(folder):
    from sagan_fast.distributed import connected

    norm = make()
    norm.running_mean.fill_(2.0)
    sync_batch_norms(model := nn.Sequential(norm))
    with connected("cpu", 60) as world:
        out = model(x := torch.zeros(0, 5, 3, 4, requires_grad=True))
        out.sum().backward()
        torch.save([*model.buffers(), x.grad, norm.weight.grad], folder / f"{world.rank}.pt")


def test_empty_batches_everywhere_leave_the_statistics_alone(tmp_path):
    assert run_ranks(empty_everywhere, 2, tmp_path) == [0, 0]
    for rank in range(2):
        mean, var, batches, d_x, d_weight = torch.load(tmp_path / f"{rank}.pt")
        assert (mean == 2).all() and (var == 1).all() and batches == 0
        assert d_x.shape == (0, 5, 3, 4) and (d_weight == 0).all()


def test_alone_and_in_evaluation_it_is_plain_batch_norm(generator):
    x = torch.randn(4, 5, 3, 3, generator=generator)
    norm, synced = nn.BatchNorm2d(5), SyncedBatchNorm2d(5)
    assert torch.equal(norm(x), synced(x)) and torch.equal(norm.eval()(x), synced.eval()(x))
    assert norm.state_dict().keys() == synced.state_dict().keys()


def test_every_batch_norm_is_replaced_and_the_parameters_stay(generator):
    block = nn.ModuleList([ConditionalBatchNorm2d(5, 3), ConditionalBatchNorm2d(5, 0), nn.BatchNorm2d(5), nn.ReLU()])
    block.eval()
    parameters, state = list(block.parameters()), block.state_dict()
    assert sync_batch_norms(block) == 3 and sync_batch_norms(block) == 0
    assert all(a is b for a, b in zip(parameters, block.parameters(), strict=True))
    assert state.keys() == block.state_dict().keys()
    assert not block[0].norm.training and block[0].norm.momentum == 0.1
    assert block[2].running_mean.data_ptr() == state["2.running_mean"].data_ptr()


def test_images_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(
        ValueError, match=r"SyncedBatchNorm2d: input must have 4 dimensions \(B, C, H, W\), got \(2, 5\)"
    ):
        SyncedBatchNorm2d(5)(torch.ones(2, 5))
    with pytest.raises(ValueError, match="momentum must be a number, got None"):
        SyncedBatchNorm2d(5, momentum=None)(torch.ones(2, 5, 1, 1))
