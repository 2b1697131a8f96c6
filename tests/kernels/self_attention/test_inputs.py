import torch

from sagan_fast.kernels.self_attention.inputs import BlockInputs


def test_sizes_and_widths():
    weights = torch.zeros(2, 16, 1, 1), torch.zeros(2, 16, 1, 1), torch.zeros(8, 16, 1, 1), torch.zeros(16, 8, 1, 1)
    inputs = BlockInputs(torch.zeros(3, 16, 5, 7), *weights, torch.zeros(()))
    assert inputs.widths == (2, 8) and inputs.b_o is None
    assert inputs.sizes(pool=True) == (3, 35, 2 * 3) and inputs.sizes(pool=False) == (3, 35, 35)
