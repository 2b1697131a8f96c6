import torch

from sagan_fast.training.losses import discriminator_hinge, generator_hinge


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert torch.isclose(discriminator_hinge(real, fake), torch.tensor((0 + 0.5 + 2.0) / 3 + (0 + 1.0 + 2.0) / 3))
    assert torch.isclose(generator_hinge(fake), torch.tensor(2.0 / 3))


def test_half_precision_logits_are_averaged_in_float32():
    logits = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    for loss in (discriminator_hinge(logits, logits), generator_hinge(logits)):
        assert loss.dtype == torch.float32
    assert torch.isclose(generator_hinge(logits), -logits[0].float())
