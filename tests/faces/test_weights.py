"""A file that holds anything but FaceBoxes weights is refused with a sentence that says where they are described."""

import pickle

import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.faces import FaceBoxes
from sagan_fast.faces.weights import PUBLISHED, PUBLISHED_SHA256, read_weights


@pytest.fixture(scope="module")
def state():
    return FaceBoxes().state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"network": dict(state), "step": 3},
    ],
    ids=["as published", "of DataParallel", "of a training"],
)  # fmt: skip
def test_known_forms_are_read(state, tmp_path, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth", state)
    assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)


def cut(state):
    return {key: value for key, value in state.items() if key != "loc.1.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "loc.1.bias is missing"),
        (lambda s: {**s, "extra": torch.zeros(1)}, "extra is unknown"),
        (lambda s: {**s, "loc.1.bias": torch.zeros(5)}, r"loc.1.bias must have the shape \(4,\), got \(5,\)"),
        (lambda s: {**s, "loc.1.bias": torch.full((4,), torch.nan)}, "loc.1.bias is not finite"),
        (lambda s: [1, 2], "it is no state dict"),
        (lambda s: {}, "it is no state dict"),
    ],
)
def test_other_states_are_refused(state, tmp_path, change, message):
    torch.save(change(state), tmp_path / "w.pth")
    with pytest.raises(InputError, match=f"{message}.*{PUBLISHED}.*{PUBLISHED_SHA256}"):
        read_weights(tmp_path / "w.pth", state)


class Runs:
    def __reduce__(self):
        return (pytest.fail, ("a file of weights ran code",))


def test_files_that_are_no_weights_run_nothing(state, tmp_path):
    contents = {"text": b"no tensors\n", "empty": b"", "code": pickle.dumps(Runs()), "zip": b"PK\x03\x04rest"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="is no file of tensors written by PyTorch") as caught:
            read_weights(tmp_path / name, state)
        assert PUBLISHED in str(caught.value) and "\n" not in str(caught.value)
    for path, what in ((tmp_path / "none", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=f"{what}.*{PUBLISHED_SHA256}"):
            read_weights(path, state)
