import pytest
import torch

from sagan_fast import Generator
from sagan_fast.errors import InputError
from sagan_fast.evaluation.sampling import classes, latents, sample


def test_latents_follow_the_seed_and_the_truncation():
    z = latents(4000, 8, seed=1)
    assert torch.equal(z, latents(4000, 8, seed=1)) and not torch.equal(z, latents(4000, 8, seed=2))
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    cut = latents(4000, 8, seed=1, truncation=0.5)
    assert cut.abs().max() <= 0.5 and cut.unique().numel() > 30000  # drawn inside, not clipped to the edge
    with pytest.raises(InputError, match="truncation must be positive, got 0"):
        latents(4, 8, 1, truncation=0.0)


def test_classes_are_an_even_share_in_order():
    assert torch.equal(classes(80, 10), torch.arange(10).repeat_interleave(8))
    assert classes(4, 10).tolist() == [0, 1, 2, 3]
    assert torch.bincount(classes(25, 10)).tolist() == [3, 2, 3, 2, 3, 2, 3, 2, 3, 2] or (
        torch.bincount(classes(25, 10)).max() == 3
    )
    assert classes(3, 10, 7).tolist() == [7, 7, 7]
    assert classes(3, 0) is None
    with pytest.raises(InputError, match="class-id must be 0 to 9, got 10"):
        classes(3, 10, 10)
    with pytest.raises(InputError, match="class-id cannot be given to a model trained without classes"):
        classes(3, 0, 1)


def test_samples_do_not_depend_on_the_batch_size():
    model = Generator.from_preset("shapes-32", base_channels=4).eval()
    z, y = latents(7, 128, 0), classes(7, 10)
    whole = torch.cat(list(sample(model, z, y, batch_size=7)))
    parts = list(sample(model, z, y, batch_size=3))
    assert [len(p) for p in parts] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
