"""Mean and covariance of features in an .npz file, `mu` and `sigma`, in the form of pytorch-fid and StudioGAN."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sagan_fast.data import ImageDataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.metrics import Gaussian
from sagan_fast.files import explained, file_sha256, written

DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class StatisticsFile(ImageDataset):
    """Stands for real images of which only the statistics are there: FID can be had from it, and nothing else.

    Attributes:
        gaussian: mean (F,) and factor of the covariance.

    Raises InputError if the file holds no `mu` (F,) and `sigma` (F, F), finite and symmetric.
    """

    preprocessing = "not known: statistics in a file"

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        with explained(f"{path} cannot be read", kinds=DAMAGE), np.load(self.path, allow_pickle=False) as file:
            if "mu" not in file or "sigma" not in file:
                raise InputError(f"{path} must hold mu and sigma, and holds {', '.join(file)}")
            mean, covariance = (torch.from_numpy(np.asarray(file[key], np.float64)) for key in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise InputError(f"{path} must hold mu (F,) and sigma (F, F), and holds {shapes}")
        if not bool(mean.isfinite().all() and covariance.isfinite().all()):
            raise InputError(f"{path} holds numbers that are not finite")
        if not torch.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-6 * float(covariance.abs().max())):
            raise InputError(f"{path}: sigma must be symmetric")
        self.gaussian = Gaussian.of_covariance(mean, (covariance + covariance.T) / 2)
        super().__init__(f"statistics of {path}", resolution=1, class_names=[], labels=np.zeros(0, np.int64))

    def load(self, index: int) -> Tensor:
        """Raise IndexError: there are no images."""
        raise IndexError(index)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file."""
        return file_sha256(self.path)


def save_statistics(gaussian: Gaussian, path: Path) -> None:
    """Write `gaussian` as `mu` and `sigma`, float64, to the .npz file `path`; InputError if it cannot be written."""
    with written(path) as file:
        np.savez(file, mu=gaussian.mean.cpu().numpy(), sigma=(gaussian.factor.T @ gaussian.factor).cpu().numpy())
