import copy
import io

import torch
from torch import nn

from sagan_fast.layers.instance_class import change_class, restore_class


class Plus:
    def forward(self, x):
        return super().forward(x) + 1


def test_an_instance_changes_and_its_class_looks_the_same(tmp_path):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = module(x) + 1
    change_class(module, Plus)
    assert torch.equal(module(x), expected) and isinstance(module, nn.Linear) and type(other) is nn.Linear
    assert repr(module) == repr(other) and type(module).__name__ == "Linear"
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert type(twin) is type(module) and torch.equal(twin(x), expected)
    replica = module._replicate_for_data_parallel()
    assert type(replica) is type(module)
    restore_class(module)
    assert type(module) is nn.Linear
    restore_class(module)
    assert type(module) is nn.Linear
