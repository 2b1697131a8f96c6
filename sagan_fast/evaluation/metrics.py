"""Computes the scores from features and logits: FID, IS, KID, precision, recall, density and coverage.

PyTorch and NumPy only, so that they run where torchmetrics and torch-fidelity are not installed; the tests hold them to
torch-fidelity's own numbers. torchmetrics keeps every feature (IS, KID) or cannot start from stored moments (FID).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHUFFLE_SEED = 2020
"""Of IS's splits and KID's subsets; torch-fidelity's default."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and a factor (K, F) of the covariance, factorᵀ factor, both float64."""

    mean: Tensor
    factor: Tensor

    def to(self, device: torch.device) -> Gaussian:
        """Return the same on `device`."""
        return Gaussian(self.mean.to(device), self.factor.to(device))

    @classmethod
    def of_rows(cls, rows: Tensor) -> Gaussian:
        """Return the fit to `rows` (n, F), n >= 2; the covariance is the unbiased one. Exact at any rank."""
        rows = rows.double()
        mean = rows.mean(0)
        factor = (rows - mean) / (len(rows) - 1) ** 0.5
        if len(rows) > rows.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R
        return cls(mean, factor)

    @classmethod
    def of_covariance(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """Return the Gaussian of a float64 `mean` (F,) and symmetric `covariance` (F, F)."""
        values, vectors = torch.linalg.eigh(covariance)
        real = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps  # the rest is rounding
        return cls(mean, values[real].sqrt()[:, None] * vectors[:, real].T)


class Moments:
    """Count, sum and sum of outer products of features, in float64: what FID needs, whatever the count."""

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add `features` (B, F)."""
        rows = features.double()
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def gaussian(self) -> Gaussian:
        """Return the fit; ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"Moments: count must be at least 2, got {self.count}")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian.of_covariance(mean, covariance)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |mean difference|² + tr(A + B - 2 sqrt(A B)) (Heusel et al. 2017, https://arxiv.org/abs/1706.08500).

    tr sqrt(A B) is the sum of the singular values of `a.factor b.factorᵀ`: no square root of a matrix that is not
    symmetric, so no complex numbers and no loss of digits where the covariance is singular.
    """
    overlap = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum() - 2 * overlap
    return float(distance)


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) over splits (Salimans et al. 2016), streaming: one distribution a split is kept.

    Samples are dealt to splits as torch-fidelity deals them: shuffled with a fixed seed, then cut into equal parts.
    """

    def __init__(self, count: int, num_logits: int, splits: int, device: torch.device | str = "cpu") -> None:
        order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
        ends = np.arange(1, splits + 1) * count // splits
        split = np.empty(count, np.int64)
        split[order] = np.searchsorted(ends, np.arange(count), side="right")
        self._split = torch.from_numpy(split)
        self._sizes = torch.bincount(self._split, minlength=splits).double()
        self._sum = torch.zeros(splits, num_logits, dtype=torch.float64, device=device)
        self._negative_entropy = torch.zeros(splits, dtype=torch.float64, device=device)

    def update(self, start: int, logits: Tensor) -> None:
        """Add the `logits` (B, C) of samples start, start + 1, ..."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        split = self._split[start : start + len(logits)].to(p.device)
        self._sum.index_add_(0, split, p)
        self._negative_entropy.index_add_(0, split, (p * log_p).sum(1))

    def result(self) -> tuple[float, float]:
        """Return mean and standard deviation (of a population, as everyone reports it) over the splits."""
        sizes = self._sizes.to(self._sum.device)
        q = self._sum / sizes[:, None]
        divergence = self._negative_entropy / sizes - torch.special.xlogy(q, q).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))


def kernel_distance(generated: Tensor, real: Tensor, subsets: int, subset_size: int) -> tuple[float, float]:
    """Return KID (Bińkowski et al. 2018): mean and deviation over subsets of the unbiased MMD², kernel (x·y/F + 1)³.

    Of `generated` (n, F) and `real` (m, F); subsets are torch-fidelity's: drawn without replacement by its seed.
    """
    rng = np.random.RandomState(SHUFFLE_SEED)
    values = []
    for _ in range(subsets):
        x, y = (
            rows[torch.from_numpy(rng.choice(len(rows), subset_size, replace=False)).to(rows.device)].float()
            for rows in (generated, real)
        )
        within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
        across = _kernel(x, y).sum()
        values.append(within / (subset_size * (subset_size - 1)) - 2 * across / subset_size**2)
    distances = torch.stack(values)
    return float(distances.mean()), float(distances.std(correction=0))


def precision_recall_density_coverage(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, ...]:
    """Return precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Of `generated` (n, F) and `real` (m, F), each with more than `neighbours` rows; a sample's ball reaches to its
    k-th neighbour in its own set. Distances in float64, a block of rows at a time.
    """
    generated, real = generated.double(), real.double()
    real_radius, generated_radius = _radii(real, neighbours), _radii(generated, neighbours)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    nearest = torch.full((len(real),), torch.inf, dtype=torch.float64, device=real.device)
    precise = inside = 0
    for block, radius in zip(torch.split(generated, BLOCK), torch.split(generated_radius, BLOCK), strict=True):
        distance = torch.cdist(block, real)  # (b, m)
        precise += int((distance <= real_radius).any(1).sum())
        inside += int((distance < real_radius).sum())
        recalled |= (distance <= radius[:, None]).any(0)
        nearest = torch.minimum(nearest, distance.amin(0))
    recall, coverage = (float(hit.double().mean()) for hit in (recalled, nearest < real_radius))
    return precise / len(generated), recall, inside / (neighbours * len(generated)), coverage


BLOCK = 1024


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    return torch.cat(
        [torch.cdist(block, rows).kthvalue(neighbours + 1, dim=1).values for block in torch.split(rows, BLOCK)]
    )


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).double().div(x.shape[1]).add(1).pow(3)
