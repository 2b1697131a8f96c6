import pytest
import torch

from sagan_fast.ops.tf32 import tf32

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def state():
    return [backend.fp32_precision for backend in (MATMUL, CUDNN.conv, CUDNN.rnn)]


def new_way(precision):
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = precision


def old_way(allowed):
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def as_before():
    before = state()
    yield
    MATMUL.allow_tf32, CUDNN.allow_tf32 = before[0] == "tf32", before[1] == "tf32"
    MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = before


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    "set_before", [lambda: None, *(lambda a=a: old_way(a) for a in (False, True)),
                   *(lambda p=p: new_way(p) for p in ("ieee", "tf32"))],
    ids=["default", "old-False", "old-True", "new-ieee", "new-tf32"],
)  # fmt: skip
def test_both_ways_of_reading_agree_within_and_all_is_as_before_afterwards(allowed, set_before):
    set_before()
    before = state()
    with tf32(allowed):
        assert MATMUL.allow_tf32 == CUDNN.allow_tf32 == allowed
        assert [precision == "tf32" for precision in state()] == [allowed] * 3
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
        with CUDNN.flags(enabled=True, benchmark=False, deterministic=False):
            pass
    assert state() == before


def test_what_was_consistent_before_can_be_read_afterwards():
    for allowed in (False, True):
        old_way(allowed)
        with tf32(not allowed):
            pass
        assert MATMUL.allow_tf32 == CUDNN.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


def test_an_error_inside_restores_too():
    before = state()
    with pytest.raises(ZeroDivisionError), tf32(True):
        1 / 0  # noqa: B018
    assert state() == before
