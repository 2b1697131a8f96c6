"""Statistics in files: pytorch-fid's form, what it gives, and what is refused."""

import numpy as np
import pytest
import torch

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.evaluate import evaluate
from sagan_fast.evaluation.features import open_extractor
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.statistics_file import StatisticsFile
from sagan_fast.evaluation.streams import StoredImages
from shared_by_tests import tiny_extractor_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path / "cache"))


def test_the_fid_is_that_of_the_images(tmp_path):
    extractor = open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))
    real, fake = (open_dataset("shapes", resolution=16) for _ in range(2))
    fake.labels = fake.labels[:60]
    protocol = Protocol.preset("clean", count=60, reference_count=200)
    path = tmp_path / "out" / "real.npz"

    def found(dataset, **options):
        return evaluate(StoredImages(fake, 60), dataset, extractor, protocol, metrics=("fid", "is", "kid"), **options)

    whole = found(real, save_to=path)
    stored = np.load(path)
    images = torch.stack([real[i][0] for i in StoredImages(real, 200).indices])
    features = extractor(images)[0].double().numpy()
    assert np.allclose(stored["mu"], features.mean(0)) and np.allclose(stored["sigma"], np.cov(features, rowvar=False))
    from_file = found(StatisticsFile(str(path)))
    assert from_file["fid"] == pytest.approx(whole["fid"], rel=1e-6) and from_file["is"] == whole["is"]
    assert "kid" not in from_file and not any("wants" in note for note in from_file["notes"])
    assert from_file["protocol"]["real"]["fingerprint"] == StatisticsFile(str(path)).fingerprint()
    with pytest.raises(InputError, match="give FID only, and kid need the real images"):
        evaluate(StoredImages(fake, 60), StatisticsFile(str(path)), extractor, protocol, metrics=("kid",))
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match=r"are of 3 features, and f\.pt has 24: choose the features"):
        found(StatisticsFile(str(path)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"m": np.zeros(2), "s": np.eye(2)}, "must hold mu and sigma, and holds m, s"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"must hold mu \(F,\) and sigma \(F, F\), and holds \(2,\) and"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, np.nan], [0, 1]])}, "numbers that are not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "sigma must be symmetric"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "cannot be read: could not convert"),
    ],
)
def test_other_contents(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        StatisticsFile(str(tmp_path / "a.npz"))
