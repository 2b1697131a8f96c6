"""An accelerated model under DistributedDataParallel: two processes equal one."""

from pathlib import Path

import torch
import torch.distributed as dist
from foreign_attention import Net
from torch import nn

import sagan_fast
from benchmarks.accuracy import rel_rms
from shared_by_tests import run_ranks


def train(model: nn.Module, images: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.5)
    for batch in images:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def made() -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng([]):
        torch.manual_seed(4)
        model = Net("biggan", norm=False).double()
    sagan_fast.accelerate(model, strict=True)
    return model, torch.randn(4, 4, 3, 8, 10, generator=generator, dtype=torch.float64)


def train_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, images = made()
    train(nn.parallel.DistributedDataParallel(model), images[:, 2 * rank : 2 * rank + 2])
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    assert run_ranks(train_rank, 2, tmp_path) == [0, 0]
    model, images = made()
    train(model, images)
    for rank in range(2):
        for key, value in torch.load(tmp_path / f"{rank}.pt").items():
            assert rel_rms(value, model.state_dict()[key]) < 1e-10, key
