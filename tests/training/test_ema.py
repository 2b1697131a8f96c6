import copy

import torch

from sagan_fast import Generator
from sagan_fast.training.ema import update_ema


def test_parameters_and_statistics_are_averaged_u_and_v_copied():
    model = Generator.from_preset("shapes-32", base_channels=4)
    average = copy.deepcopy(model)
    before = copy.deepcopy(average.state_dict())
    model(torch.randn(4, 128), torch.tensor([0, 1, 2, 3]))  # moves u, v and the running statistics
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    update_ema(average, model, decay=0.75, step=1000)
    now, new = average.state_dict(), model.state_dict()
    for name, value in now.items():
        if name.endswith(("_u", "_v", "num_batches_tracked")):
            assert torch.equal(value, new[name]), name
        else:
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * new[name], msg=name)


def test_the_first_steps_forget_the_random_weights():
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0), average.weight.data.fill_(0.0)
    update_ema(average, model, decay=0.9999, step=1)
    torch.testing.assert_close(average.weight.item(), 1 - 2 / 11)
