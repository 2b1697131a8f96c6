import pytest
import torch

from sagan_fast import Generator
from sagan_fast.errors import InputError
from sagan_fast.evaluation.sampling import classes, latents, mixed_classes, sample, slerp, truncated
from shared_by_tests import randn


def test_latents_follow_the_seed_and_the_truncation():
    z = latents(4000, 8, seed=1)
    assert torch.equal(z, latents(4000, 8, seed=1)) and not torch.equal(z, latents(4000, 8, seed=2))
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    cut = latents(4000, 8, seed=1, truncation=0.5)
    assert cut.abs().max() <= 0.5 and cut.unique().numel() > 30000  # drawn inside, not clipped to the edge
    with pytest.raises(InputError, match="truncation must be positive, got 0"):
        latents(4, 8, 1, truncation=0.0)


@pytest.mark.parametrize("width", [1, 5, 100, 120, 128])
def test_a_larger_number_of_latents_starts_with_the_same_ones(width, seed):
    many = latents(9, width, seed)
    for count in range(9):
        assert torch.equal(latents(count, width, seed), many[:count])


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


def test_the_arc_turns_steadily_and_keeps_the_length(generator):
    a, b = (randn(5, 64, generator=generator) for _ in range(2))
    z = slerp(a, b, torch.linspace(0, 1, 7))
    assert z.shape == (5, 7, 64) and z.dtype == a.dtype
    torch.testing.assert_close(z[:, 0], a)
    torch.testing.assert_close(z[:, -1], b)
    unit = torch.nn.functional.normalize(z, dim=2)
    angles = (unit[:, 1:] * unit[:, :-1]).sum(2).acos()
    torch.testing.assert_close(angles, angles[:, :1].expand_as(angles))
    torch.testing.assert_close(z[:, 3].norm(dim=1), (a.norm(dim=1) + b.norm(dim=1)) / 2)
    assert (((a + b) / 2).norm(dim=1) < z[:, 3].norm(dim=1)).all()  # where a straight line would pass


def test_ends_without_an_arc_between_them(generator):
    a = randn(2, 8, generator=generator, dtype=torch.float32)
    torch.testing.assert_close(slerp(a, a, torch.linspace(0, 1, 3)), a[:, None].expand(-1, 3, -1))
    assert slerp(a, -a, torch.linspace(0, 1, 3)).isfinite().all()


def test_classes_are_mixed_between_their_embeddings(generator):
    model = Generator.from_preset("shapes-32", base_channels=4).eval()
    for norm in [module for module in model.modules() if hasattr(module, "gain")]:
        norm.gain.weight.data.normal_(1, 0.5, generator=generator)
        norm.bias.weight.data.normal_(generator=generator)
    z = randn(1, 128, generator=generator, dtype=torch.float32).expand(3, -1)
    start, end = torch.tensor([2]), torch.tensor([7])
    y = mixed_classes(start, end, torch.tensor([0.0, 0.25, 1.0]), 10)[0]
    assert y.shape == (3, 10) and y[1, 2] == 0.75 and y[1, 7] == 0.25
    with torch.no_grad():
        out = model(z, y)
        torch.testing.assert_close(out[[0, 2]], model(z[:2], torch.tensor([2, 7])))
        assert (out[1] - out[0]).abs().max() > 1e-3 < (out[1] - out[2]).abs().max()
        with pytest.raises(ValueError, match=r"weights y must have shape \(B, 10\), got \(3, 4\)"):
            model(z, torch.ones(3, 4))


def test_truncation_is_the_same_draw_nearer_to_the_middle(generator):
    z = randn(20000, 4, generator=generator, dtype=torch.float32)
    near, far = truncated(z, 0.5), truncated(z, 1.5)
    assert near.abs().max() <= 0.5 and far.abs().max() <= 1.5 and truncated(z, None) is z
    assert (near.sign() == z.sign()).float().mean() > 0.999 and (near.abs() <= far.abs() + 1e-6).all()
    reference = torch.empty(80000)
    torch.nn.init.trunc_normal_(reference, 0, 1, -1.5, 1.5, generator=generator)
    quantiles = torch.linspace(0.02, 0.98, 25)
    assert (far.flatten().quantile(quantiles) - reference.quantile(quantiles)).abs().max() < 0.03
    torch.testing.assert_close(truncated(z, 9.0), z, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="truncation must be positive, got 0"):
        truncated(z, 0.0)
