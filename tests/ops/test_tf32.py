import pytest
import torch

from sagan_fast.ops.tf32 import tf32

BACKENDS = torch.backends
MATMUL, CUDNN = BACKENDS.cuda.matmul, BACKENDS.cudnn
PLACES = (MATMUL, BACKENDS.mkldnn.matmul, CUDNN.conv, CUDNN.rnn)


def state():
    return [place.fp32_precision for place in PLACES]


def readable():
    """What the older settings say, "raises" where they do."""
    said = []
    for setting in (torch.get_float32_matmul_precision, lambda: MATMUL.allow_tf32, lambda: CUDNN.allow_tf32):
        try:
            said.append(setting())
        except RuntimeError:
            said.append("raises")
    return said


def old_way(allowed):
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = allowed


def new_way(precision):
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = precision


def everywhere(precision):
    BACKENDS.fp32_precision = precision


def in_cudnn(precision):
    CUDNN.fp32_precision = precision


SETTINGS = {
    "default": lambda: None,
    **{f"allow_tf32={a}": lambda a=a: old_way(a) for a in (False, True)},
    **{f"fp32_precision={p}": lambda p=p: new_way(p) for p in ("ieee", "tf32")},
    **{f"all={p}": lambda p=p: everywhere(p) for p in ("ieee", "tf32")},
    **{f"cudnn={p}": lambda p=p: in_cudnn(p) for p in ("ieee", "tf32")},
    **{name: lambda name=name: torch.set_float32_matmul_precision(name) for name in ("highest", "high", "medium")},
}


@pytest.fixture(autouse=True)
def as_before():
    before, general = state(), [BACKENDS.fp32_precision, CUDNN.fp32_precision]
    products, convolutions = torch.get_float32_matmul_precision(), CUDNN.allow_tf32
    yield
    BACKENDS.fp32_precision, CUDNN.fp32_precision = general
    torch.set_float32_matmul_precision(products)
    CUDNN.allow_tf32 = convolutions
    for place, said in zip(PLACES, before, strict=True):
        place.fp32_precision = said


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_all_ways_of_reading_agree_within_and_all_is_as_before_afterwards(allowed, setting):
    setting()
    before, said = state(), readable()
    with tf32(allowed):
        assert readable() == ["high" if allowed else "highest", allowed, allowed]
        assert [precision == "tf32" for precision in state()][::2] == [allowed] * 2
        if before[1] in ("none", "ieee"):
            assert state()[1] in ("none", "ieee"), "products on the CPU stay exact"
        with CUDNN.flags(enabled=True, benchmark=False, deterministic=False):
            pass
    assert state() == before
    assert all(now == then or then == "raises" for now, then in zip(readable(), said, strict=True))


def test_an_error_inside_restores_too():
    before = state()
    with pytest.raises(ZeroDivisionError), tf32(True):
        1 / 0  # noqa: B018
    assert state() == before
