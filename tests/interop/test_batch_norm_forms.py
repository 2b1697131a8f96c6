"""Conditional batch norms of others by our op: the same training, and their own forward wherever ours does not fit."""

import copy
import io

import pytest
import torch
from foreign_layers import replica_of
from foreign_networks import CLASSES, GBlock, Generator, Z
from foreign_norms import NORMS, BigGANShared, C, condition
from torch import nn

import sagan_fast
from sagan_fast.interop.batch_norm_forms import parts_of
from sagan_fast.layers.conditional_batch_norm import ConditionalBatchNorm2d
from shared_by_tests import randn


def is_ours(out):
    return "BatchNormFunction" in type(out.grad_fn).__name__


@pytest.fixture(params=NORMS)
def pair(request):
    theirs = NORMS[request.param]().double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter))
    ours = copy.deepcopy(theirs)
    assert sagan_fast.accelerate(ours, spectral_norm=False, strict=True).rows[0].what == "batch norm"
    return ours, theirs


def test_maps_gradients_and_buffers_are_theirs(pair, generator):
    for training in (True, True, False):
        x, y = randn(4, C, 3, 5, generator=generator).requires_grad_(), condition(pair[1], generator)
        results = []
        for norm in pair:
            out = norm.train(training)(x, y)
            inputs = [x, *(p for p in norm.parameters() if p.requires_grad)]
            results.append([out, *torch.autograd.grad(out.cos().sum(), inputs), *norm.state_dict().values()])
        assert is_ours(results[0][0]) and not is_ours(results[1][0])
        for found, right in zip(*results, strict=True):
            torch.testing.assert_close(found, right)


def test_copies_files_replicas_and_undo(pair, generator):
    ours, theirs = pair
    x, y = randn(4, C, 3, 5, generator=generator), condition(theirs, generator)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    expected = copy.deepcopy(theirs)(x, y)
    for twin in (copy.deepcopy(ours), torch.load(stream, weights_only=False)):
        assert isinstance(twin, type(theirs)) and list(twin.state_dict()) == list(theirs.state_dict())
        torch.testing.assert_close(twin(x, y), expected)
        assert is_ours(twin(x, y))
    outs = [replica_of(norm, lambda p: p * 1.5)(x, y) for norm in (copy.deepcopy(ours), copy.deepcopy(theirs))]
    torch.testing.assert_close(*outs)
    assert is_ours(outs[0])


def test_undo_restores_the_class_and_every_attribute(generator):
    ours = nn.ModuleList(made() for made in NORMS.values())
    theirs = copy.deepcopy(ours)
    report = sagan_fast.accelerate(ours, spectral_norm=False)
    assert len(report.swapped) == len(NORMS) and f"{len(NORMS)} modules  batch norm  one op each" in str(report)
    assert not sagan_fast.accelerate(ours, spectral_norm=False).rows
    report.undo()
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(a) is type(b) and set(a.__dict__) == set(b.__dict__)


def test_other_calls_run_their_own_forward(generator):
    theirs = NORMS["voletiv"]()
    ours = copy.deepcopy(theirs)
    sagan_fast.accelerate(ours)
    x, y = randn(4, C, 3, 5, generator=generator, dtype=torch.float32), condition(theirs, generator)
    assert is_ours(ours(x, y)) and is_ours(ours(x, y=y)) and not is_ours(ours(x=x, y=y))
    for given in ((x, y[:1]), (x.bfloat16(), y)):  # one class for all images; no kernel for this dtype on the CPU
        out = ours(*given)
        assert not is_ours(out) and torch.equal(out, theirs(*given)) and out.dtype == theirs(*given).dtype
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(x[:1, :, :1, :1], y[:1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        ours(x, z=y)
    seen = []
    ours.bn.register_forward_hook(lambda *_: seen.append("bn"))
    ours.embed.register_forward_hook(lambda *_: seen.append("embed"))
    ours(x, y)
    assert seen == ["bn", "embed"] or seen == ["embed", "bn"]
    ours.bn = nn.SyncBatchNorm(C, affine=False).eval()
    assert not is_ours(ours.eval()(x, y))


def test_under_autocast_the_dtype_is_theirs(generator):
    theirs = NORMS["biggan-shared"]()
    ours = copy.deepcopy(theirs)
    sagan_fast.accelerate(ours)
    x = randn(4, C, 3, 5, generator=generator, dtype=torch.float32)
    y = condition(theirs, generator, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, right = ours(x, y), theirs(x, y)
    assert is_ours(found) and found.dtype == right.dtype
    torch.testing.assert_close(found, right, atol=0.05, rtol=0.05)


def test_changed_attributes_count(generator):
    theirs = NORMS["by attribute"]().double()
    ours = copy.deepcopy(theirs)
    sagan_fast.accelerate(ours)
    x, y = randn(4, C, 3, 5, generator=generator), condition(theirs, generator)
    for norm in (ours, theirs):
        norm.momentum = 0.7
        norm(x, y)
    torch.testing.assert_close(ours.stored_var, theirs.stored_var)


def test_what_may_be_a_conditional_batch_norm():
    assert parts_of(NORMS["voletiv"]())[:3] == (("embed",), "bn", ())
    assert parts_of(BigGANShared()) == (("gain", "bias"), None, ("stored_mean", "stored_var"), "y")
    for other in (
        nn.Sequential(nn.Linear(3, C), nn.Linear(C, C), nn.BatchNorm1d(C)),  # one argument
        GBlock("voletiv", C, C), nn.BatchNorm2d(C), nn.Bilinear(2, 2, 2), nn.LSTM(2, 2),
    ):  # fmt: skip
        assert parts_of(other) is None
    net = nn.ModuleList([ConditionalBatchNorm2d(C, CLASSES)])
    assert str(sagan_fast.accelerate(net)).startswith("accelerate found no attention, conditional")


@pytest.mark.parametrize("kind", ["biggan-pytorch", "studiogan", "voletiv", "mmgeneration"])
def test_a_whole_generator_trains_as_before(kind, generator):
    theirs = Generator(kind).double()
    ours = copy.deepcopy(theirs)
    report = sagan_fast.accelerate(ours, strict=True)
    assert sum(row.what == "batch norm" for row in report.rows) == 6
    optimizers = [torch.optim.SGD(net.parameters(), 1e-2, momentum=0.5) for net in (ours, theirs)]
    for _ in range(3):
        z, y = randn(4, Z, generator=generator), torch.randint(CLASSES, (4,), generator=generator)
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(z, y).square().sum().backward()
            optimizer.step()
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key, rtol=1e-9, atol=1e-10)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(z, y), theirs(z, y))
    report.undo()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(z, y), theirs(z, y))
