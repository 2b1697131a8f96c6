"""The ONNX file computes what the network does, at every size, also in int8; another file is refused."""

import numpy as np
import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.faces import Detector, FaceBoxes
from sagan_fast.faces.onnx import calibration_pictures, codes_of_onnx, export_onnx
from sagan_fast.faces.pictures import as_input


@pytest.mark.slow
def test_export_runs_at_every_size_and_int8_is_near(random_weights, tmp_path, rng):
    pytest.importorskip("onnxruntime")
    net = FaceBoxes().load_weights(random_weights)
    export_onnx(net, tmp_path / "f.onnx")
    pictures = [rng.integers(0, 256, (128, 160, 3), dtype=np.uint8) for _ in range(3)]
    export_onnx(net, tmp_path / "i.onnx", pictures)
    assert (tmp_path / "i.onnx").stat().st_size < (tmp_path / "f.onnx").stat().st_size / 2
    exact = Detector(random_weights)._codes
    run, run_int8 = (codes_of_onnx(tmp_path / name) for name in ("f.onnx", "i.onnx"))
    with torch.no_grad():
        for height, width in ((128, 160), (97, 33), (10, 300)):
            x = as_input(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            torch.testing.assert_close(run(x), exact(x), rtol=1e-3, atol=1e-4)
        x = as_input(pictures[0])
        assert 0 < float((run_int8(x) - exact(x)).norm() / exact(x).norm()) < 0.15
    boxes, scores = Detector(tmp_path / "f.onnx", min_score=0.4)(pictures[0])
    expected = Detector(random_weights, min_score=0.4)(pictures[0])
    torch.testing.assert_close(scores[:5], expected[1][:5], rtol=0, atol=1e-4)


def test_what_is_no_export(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(InputError, match=r"there is no ONNX file .*none\.onnx: sagan-fast faces export writes one"):
        Detector(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.onnx cannot be run by ONNX Runtime"):
        Detector(tmp_path / "bad.onnx")
    with pytest.raises(InputError, match="has its own precision and is not compiled"):
        Detector(tmp_path / "bad.onnx", precision="bf16")


def test_without_the_packages(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("sagan_fast.faces.onnx.import_module", missing)
    with pytest.raises(InputError, match=r'pip install "sagan_fast\[export\]".*onnxruntime'):
        codes_of_onnx(tmp_path / "x.onnx")


def test_calibration_takes_some_and_shrinks(rng):
    given = (rng.integers(0, 256, (100, side, 3), dtype=np.uint8) for side in (50, 400, 30))
    assert [p.shape for p in calibration_pictures(given, 2, side=200)] == [(100, 50, 3), (50, 200, 3)]
