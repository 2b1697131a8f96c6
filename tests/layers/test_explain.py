import torch
from foreign_attention import Net
from torch import nn

from sagan_fast import SelfAttention2d, accelerate, explain, fuse_spectral_norm, spectral_norm
from shared_by_tests import randn


def test_explain_says_which_and_why(generator):
    block = SelfAttention2d(16)
    assert "auto (has not run yet)" in explain(block)
    x = randn(1, 16, 6, 6, generator=generator, dtype=torch.float32)
    block(x)
    assert explain(nn.Sequential(block)).startswith("0: eager (")
    weights = (block.theta.weight, block.phi.weight, block.g.weight, None, block.gamma)
    assert explain(x, *weights) == "self_attention_2d: " + str(block.last_choice)
    q = torch.zeros(4, 4096, 8)
    assert explain(q, q, torch.zeros(4, 4096, 64)).startswith("attention: cpu (")
    assert explain(nn.ReLU()) == "ReLU has no attention and no spectral norm of sagan_fast"


def test_explain_speaks_about_spectral_norm():
    model = nn.Sequential(spectral_norm(nn.Linear(8, 6)), nn.utils.spectral_norm(nn.Linear(6, 4)), nn.Linear(4, 2))
    assert explain(model).startswith("spectral norm of 1 weight: one at a time")
    fuse_spectral_norm(model)
    assert explain(model).splitlines() == [
        "spectral norm of 0: eager (the weights are on cpu)",
        "spectral norm of 1: eager (the weights are on cpu)",
    ]


def test_explain_speaks_about_accelerated_attention(generator):
    model = Net("biggan")
    report = accelerate(model)
    assert "attention: auto (has not run yet)" in explain(model)
    model(randn(1, 3, 8, 8, generator=generator, dtype=torch.float32))
    assert explain(model).startswith("attention: eager (") and "spectral norm of 6 weights" in explain(model)
    report.undo()
    assert explain(model) == "Net has no attention and no spectral norm of sagan_fast"
