import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sagan_fast.layers.spectral_norm import fuse_spectral_norm, spectral_norm
from shared_by_tests import run_ranks


def _train_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), spectral_norm(nn.Linear(288, 2)))
    group = fuse_spectral_norm(model)
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(rank + 1)
    for _ in range(4):
        optimizer.zero_grad()
        (parallel(torch.randn(2, 3, 8, 8)).relu().sum() - parallel(torch.randn(2, 3, 8, 8)).sum()).backward()
        optimizer.step()
        group.step()
    torch.save(model.state_dict(), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_ranks_stay_identical_without_a_broadcast(tmp_path):
    assert run_ranks(_train_rank, 2, tmp_path) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
