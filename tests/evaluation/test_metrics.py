"""The scores against torch-fidelity's own functions and against their definitions, on random features."""

import pytest
import torch

from sagan_fast.evaluation.metrics import (
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)


def rows(count, width, generator, scale=1.0):
    mix = torch.randn(width, width, generator=generator)
    return (torch.randn(count, width, generator=generator) @ mix * scale + 0.5).relu()


def moments_of(values, batch=17):
    moments = Moments(values.shape[1])
    for part in values.split(batch):
        moments.update(part)
    return moments.gaussian()


@pytest.mark.parametrize("count", [300, 25], ids=["full rank", "fewer samples than features"])
def test_both_ways_to_a_gaussian_give_its_covariance(count, generator):
    values = rows(count, 40, generator)
    expected = torch.cov(values.double().T)
    for gaussian in (Gaussian.of_rows(values), moments_of(values)):
        torch.testing.assert_close(gaussian.factor.T @ gaussian.factor, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gaussian.mean, values.double().mean(0), rtol=1e-12, atol=1e-12)
        assert len(gaussian.factor) <= 40


@pytest.mark.parametrize(("n", "m"), [(500, 400), (30, 400), (20, 30)])
def test_fid_is_torch_fidelitys(n, m, generator):
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = rows(n, 48, generator), rows(m, 48, generator)
    expected = theirs.fid_statistics_to_metric(
        theirs.fid_features_to_statistics(a.double()), theirs.fid_features_to_statistics(b.double()), False
    )["frechet_inception_distance"]
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(Gaussian.of_rows(a), moments_of(b)) == pytest.approx(expected, rel=1e-5)


def test_fid_of_a_set_with_itself_is_zero_to_rounding(generator):
    for count in (400, 20):
        values = rows(count, 64, generator)
        gaussian = moments_of(values)
        scale = gaussian.factor.square().sum().item()
        assert abs(frechet_distance(gaussian, moments_of(values.flip(0)))) < 1e-9 * scale
        # Two normals of one variance: the distance of the means is all there is.
        moved = moments_of(values + 0.25)
        assert frechet_distance(gaussian, moved) == pytest.approx(64 * 0.25**2, rel=1e-5)


def test_one_sample_has_no_covariance():
    moments = Moments(3)
    moments.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        moments.gaussian()


@pytest.mark.parametrize(("count", "splits"), [(1000, 10), (103, 10), (50, 1)])
def test_inception_score_is_torch_fidelitys_though_it_streams(count, splits, generator):
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.randn(count, 20, generator=generator) * 3
    expected = theirs.isc_features_to_metric(logits, splits)
    score = InceptionScore(count, 20, splits)
    for start in range(0, count, 7):
        score.update(start, logits[start : start + 7])
    mean, deviation = score.result()
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-9)


def test_inception_score_survives_certainty():
    """Logits so far apart that some probabilities are 0."""
    score = InceptionScore(8, 4, 1)
    score.update(0, torch.eye(4).repeat(2, 1) * 1e5)
    assert score.result()[0] == pytest.approx(4)


def test_kid_is_torch_fidelitys(generator):
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = rows(150, 32, generator), rows(200, 32, generator) * 1.2
    expected = theirs.kid_features_to_metric(a, b, kid_subsets=9, kid_subset_size=60, verbose=False)
    mean, deviation = kernel_distance(a, b, 9, 60)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)


def test_precision_and_recall_are_torch_fidelitys(generator):
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    a, b = rows(1100, 8, generator), rows(1300, 8, generator) * 1.3  # more than one block of rows
    precision, recall = theirs.calculate_precision_recall_full(a.double(), b.double(), 4)
    mine = precision_recall_density_coverage(a, b, 4)
    assert mine[:2] == pytest.approx((precision, recall), abs=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1


def test_density_and_coverage_are_their_definitions(generator):
    a, b, k = rows(70, 6, generator).double(), rows(90, 6, generator).double(), 3
    radius = torch.stack([torch.linalg.norm(b - x, dim=1).sort().values[k] for x in b])
    inside = torch.stack([torch.linalg.norm(b - x, dim=1) < radius for x in a])  # (70, 90)
    _, _, density, coverage = precision_recall_density_coverage(a, b, k)
    assert density == pytest.approx(inside.double().mean().item() * 90 / k)
    assert coverage == pytest.approx(inside.any(0).double().mean().item())
    assert 0 < coverage < 1


def test_a_set_covers_itself(generator):
    values = rows(200, 16, generator)
    precision, recall, density, coverage = precision_recall_density_coverage(values, values, 5)
    assert (precision, recall, coverage) == (1, 1, 1) and density == pytest.approx(1, abs=0.02)


@pytest.mark.gpu
def test_scores_on_the_gpu_are_those_of_the_cpu(generator):
    a, b = rows(3000, 64, generator), rows(2000, 64, generator) * 1.1
    on_gpu = Moments(64, "cuda")
    on_gpu.update(a.cuda())
    other = Gaussian(*(t.cuda() for t in (moments_of(b).mean, moments_of(b).factor)))
    assert frechet_distance(on_gpu.gaussian(), other) == pytest.approx(
        frechet_distance(moments_of(a), moments_of(b)), rel=1e-6
    )
    assert kernel_distance(a.cuda(), b.cuda(), 5, 500) == pytest.approx(kernel_distance(a, b, 5, 500), rel=1e-3)
    mine = precision_recall_density_coverage(a.cuda(), b.cuda(), 5)
    assert mine == pytest.approx(precision_recall_density_coverage(a, b, 5), abs=2e-3)
