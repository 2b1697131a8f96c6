import numpy as np
import pytest
import torch
from torch import nn

from sagan_fast.errors import InputError
from sagan_fast.interop.sources import read_source


def test_tensors_come_in_float32_by_their_own_names(tmp_path):
    state = {"module.a": torch.ones(2, dtype=torch.float64), "module.n": torch.tensor(3), "module.other": torch.ones(1)}
    found = read_source(state, "generator", True)
    assert found["a"].dtype == torch.float32 and found["n"].dtype == torch.int64 and list(found) == ["a", "n", "other"]
    assert list(read_source(nn.Linear(2, 2), "discriminator", True)) == ["weight", "bias"]
    np.savez(tmp_path / "a.npz", **{"scope/model/g_bn/gamma": np.ones(2), "scope/model/d_x/u": np.ones(1)})
    assert list(read_source(tmp_path / "a.npz", "generator", True)) == ["g_bn/gamma"]
    assert list(read_source(tmp_path / "a.npz", "discriminator", True)) == ["d_x/u"]


def test_numbers_of_numpy_beside_the_weights_are_no_code(tmp_path):
    best = {"fid": np.float64(3.5), "is": np.float32(2), "step": np.int64(7), "done": np.bool_(True)}
    torch.save({"state_dict": {"a": torch.ones(2)}, **best}, tmp_path / "a.pth")
    assert list(read_source(tmp_path / "a.pth", "generator", True)) == ["a"]


def test_safetensors_and_broken_ones(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert read_source(tmp_path / "a.safetensors", "generator", True)["a"].sum() == 2
    (tmp_path / "b.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="b.safetensors cannot be read"):
        read_source(tmp_path / "b.safetensors", "generator", True)
    with pytest.raises(InputError, match="holds no tensors of a generator"):
        read_source({"D": {"a": torch.ones(1)}}, "generator", True)
