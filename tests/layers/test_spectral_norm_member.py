import copy

import torch
from torch import nn

from sagan_fast.layers.spectral_norm import fuse_spectral_norm, spectral_norm
from sagan_fast.layers.spectral_norm_member import Link, rows_first


def test_a_copied_link_points_to_no_group():
    model = nn.Sequential(spectral_norm(nn.Linear(3, 2)))
    group = fuse_spectral_norm(model)
    link = model[0].parametrizations.weight[0].link
    assert link.group is group and copy.deepcopy(link).group is None
    assert Link().updates(True) and not Link().updates(False)
    assert link.updates(True)  # a replica moves as the unfused model, until the group does
    group.step()
    assert not link.updates(True)


def test_rows_come_first_and_lie_densely(generator):
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    assert rows_first(weight, 0) is weight
    rows = rows_first(weight, 1)
    assert rows.shape == (3, 4, 2, 2) and torch.equal(rows, weight.movedim(1, 0))
    assert rows_first(weight[:, :2], 0).is_contiguous()
