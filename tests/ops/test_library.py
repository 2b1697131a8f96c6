"""When an op has to keep tangents: under torch.func and in forward mode, and at no other time."""

import torch
from torch.autograd import forward_ad

from sagan_fast.ops.library import is_transformed


def test_every_transform_is_seen_and_forgotten():
    seen = []

    def function(x):
        seen.append(is_transformed())
        return x.sum()

    x = torch.ones(3)
    for use in (torch.func.grad, torch.func.vmap, torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        use(function)(x)
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))
    assert seen == [True] * 5 and not is_transformed()
    x.requires_grad_()
    torch.autograd.grad(function(x), x)
    assert seen[-1] is False
