"""`accelerate` on stand-ins of the structures in use: the same training, nothing else changed, all of it undone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from foreign_attention import BLOCKS, THETA, Block, Net, conv
from foreign_layers import BigGANConv, replica_of
from normed_net import is_same, state_of
from torch import nn
from torch.nn.utils.spectral_norm import spectral_norm as legacy

import sagan_fast
from benchmarks.accuracy import rel_rms
from shared_by_tests import randn


def first_of(out):
    return out[0] if isinstance(out, tuple) else out


def train(models, optimizers, generator, steps, dtype=torch.float64):
    for _ in range(steps):
        x = randn(2, 3, 8, 10, generator=generator, dtype=dtype)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            first_of(model(x)).square().sum().backward()
            optimizer.step()


def sgd(model):
    """Not Adam: the gradient of phi's bias is zero but for rounding, which Adam would turn into whole steps."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_ten_steps_are_those_of_the_original_and_undo_restores_it(kind, generator):
    theirs = Net(kind).double()
    ours = copy.deepcopy(theirs)
    optimizers = [sgd(ours), sgd(theirs)]
    before, kinds = state_of(ours), [type(m) for m in ours.modules()]
    identities = [id(x) for x in (*ours.modules(), *ours.parameters())]
    rng = torch.get_rng_state()
    report = sagan_fast.accelerate(ours, strict=True)
    assert torch.equal(torch.get_rng_state(), rng) and is_same(before, ours)
    assert "attention" in report.swapped and not report.left and report.largest_difference < 1e-10
    normed = 2 if kind == "heykeetae" else 5 if kind in ("rosinality", "fastai", "wrapper") else 6
    assert sum(row.what == "spectral norm" for row in report.rows) == normed == sum(len(g) for g in report.groups)
    assert f"{normed} weights" in str(report)
    assert all(isinstance(m, k) for m, k in zip(ours.modules(), kinds, strict=True))
    train([ours, theirs], optimizers, generator, 10)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and identities == [
        id(x) for x in (*ours.modules(), *ours.parameters())
    ]
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.shape == b.shape and rel_rms(a.double(), b.double()) < 1e-10, key
    ours.eval(), theirs.eval()
    x = randn(1, 3, 9, 7, generator=generator)
    outs = ours(x), theirs(x)
    for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in outs), strict=True):
        torch.testing.assert_close(a + 0, b)
    report.undo()
    assert [type(m) for m in ours.modules()] == kinds
    assert all(set(a.__dict__) == set(b.__dict__) for a, b in zip(ours.modules(), theirs.modules(), strict=True))
    theirs.load_state_dict(ours.state_dict())
    ours.train(), theirs.train()
    assert torch.equal(first_of(ours(x)), first_of(theirs(x)))


@pytest.mark.parametrize("kind", BLOCKS)
def test_float32_training_agrees_within_its_noise(kind, generator):
    theirs = Net(kind)
    exact, ours = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    sagan_fast.accelerate(ours)
    models = [ours, theirs, exact]
    for _ in range(10):
        x = randn(2, 3, 8, 10, generator=generator)
        for model in models:
            model.zero_grad()
            first_of(model(x.to(next(model.parameters()).dtype))).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad
    for key, truth in exact.state_dict().items():
        error, noise = (rel_rms(m.state_dict()[key].double(), truth.double()) for m in (ours, theirs))
        assert error <= 4 * noise + 1e-5, key


@pytest.mark.parametrize("kind", ["biggan", "heykeetae", "voletiv", "mmgeneration"])
def test_copies_files_and_checkpoints_both_ways(kind, generator):
    theirs = Net(kind).double()
    ours = copy.deepcopy(theirs)
    sagan_fast.accelerate(ours)
    x = randn(1, 3, 9, 7, generator=generator)
    with torch.no_grad():
        ours(x), theirs(x)
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(ours), torch.load(stream, weights_only=False)):
        assert type(twin.attention) is type(ours.attention) and type(twin.conv1).__name__ == type(ours.conv1).__name__
        twin.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(first_of(twin.eval()(x)), first_of(copy.deepcopy(theirs).eval()(x)))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(first_of(ours.eval()(x)), first_of(theirs.eval()(x)))


@pytest.mark.parametrize("kind", ["biggan", "voletiv", "fastai", "wrapper"])
def test_replicas_of_data_parallel_compute_with_their_own_weights(kind, generator):
    theirs = Net(kind, norm=False).double()
    ours = copy.deepcopy(theirs)
    sagan_fast.accelerate(nn.DataParallel(ours))
    x = randn(1, 3, 9, 7, generator=generator)
    outs = [first_of(replica_of(net, lambda p: p.detach() * 1.5 if p.ndim > 1 else p * 1)(x)) for net in (ours, theirs)]
    torch.testing.assert_close(*outs)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_hooks_of_the_block_run_and_hooks_put_on_its_convolutions_later_too(generator):
    net = Net("studiogan").double()
    seen = []
    net.attention.register_forward_hook(lambda *_: seen.append("block"))
    sagan_fast.accelerate(net)
    x = randn(1, 3, 8, 8, generator=generator)
    expected = net.eval()(x)
    net.attention.conv1x1_phi.register_forward_hook(lambda *_: seen.append("phi"))
    torch.testing.assert_close(net(x), expected)
    assert seen == ["block", "phi", "block"]  # none of them in the trials


class Scaled(Block):
    def forward(self, x):
        q, k, v = self.parts(x)
        beta = F.softmax(torch.bmm(q.transpose(1, 2), k) / q.shape[1] ** 0.5, -1)
        return self.output(torch.bmm(v, beta.transpose(1, 2)), x)


class NoResidual(Block):
    def forward(self, x):
        return super().forward(x) - x


class OverQueries(Block):
    def forward(self, x):
        q, k, v = self.parts(x)
        beta = F.softmax(torch.bmm(q.transpose(1, 2), k), 1)
        return self.output(torch.bmm(v, beta.permute(0, 2, 1)), x)


class ReadsClasses(Block):
    def forward(self, x, y):
        return super().forward(x) + y


class Random(Block):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)


class Detached(Block):
    def output(self, out, x):
        return super().output(out.detach(), x)


class Fixed(Block):
    def forward(self, x):
        return super().forward(x.view(-1, 16, 8, 8))


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked_block():
    block = Block(conv, THETA)
    block.phi.register_forward_hook(lambda *_: None)
    return block


DEVIATING = {
    "scales its scores": lambda: Scaled(conv, THETA),
    "adds no residual x": lambda: NoResidual(conv, THETA),
    "softmax runs over the queries": lambda: OverQueries(conv, THETA, pool=False),
    "theta is not a plain 1x1": lambda: Block(lambda i, o: nn.Conv2d(i, o, 7, padding=3), THETA),
    "theta is not a plain 1x1 ": lambda: Block(lambda i, o: nn.Conv2d(i, o, 1, groups=2), THETA),
    "forward reads 'y'": lambda: ReadsClasses(conv, THETA),
    "its output is random": lambda: Random(conv, THETA),
    "gradient differs": lambda: Detached(conv, THETA),
    "does not run on a map of 6 x 10": lambda: Fixed(conv, THETA),
    "phi has hooks": hooked_block,
    "unknown class Doubling": lambda: Block(lambda i, o: Doubling(i, o, 1), THETA),
    "keeps 2 singular values": lambda: Block(lambda i, o: BigGANConv(i, o, 1, num_svs=2), THETA),
}


@pytest.mark.parametrize("why", DEVIATING)
def test_deviating_attention_is_left_with_its_reason(why):
    net = nn.Sequential(DEVIATING[why]())
    before, kind = state_of(net), type(net[0])
    report = sagan_fast.accelerate(net)
    assert why.strip() in report.left["0"] and not report.swapped and type(net[0]) is kind and is_same(before, net)
    assert f"left alone: {report.left['0']}" in str(report)
    with pytest.raises(ValueError, match="conditional batch norm or spectral norm of another form, got 0: "):
        sagan_fast.accelerate(net, strict=True)


def test_a_layer_that_the_model_never_calls_stays_where_it_is(generator):
    theirs = Net("studiogan").double()
    theirs.unused = legacy(nn.Conv2d(3, 3, 1)).double()
    ours = copy.deepcopy(theirs)
    assert "unused" in sagan_fast.accelerate(ours).swapped
    train([ours, theirs], [sgd(ours), sgd(theirs)], generator, 3)
    ours.eval()(randn(1, 3, 8, 8, generator=generator))
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_strict_leaves_the_model_as_it_was():
    net = nn.Sequential(legacy(nn.Conv2d(16, 16, 1)), Block(conv, THETA), Scaled(conv, THETA))
    kinds, hooks = [type(m) for m in net.modules()], [*net[0]._forward_pre_hooks.values()]
    with pytest.raises(ValueError, match="2: it scales its scores"):
        sagan_fast.accelerate(net, strict=True)
    assert [type(m) for m in net.modules()] == kinds and [*net[0]._forward_pre_hooks.values()] == hooks


def test_what_is_no_attention_is_not_named_and_twice_is_once():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.shortcut = (nn.Conv2d(4, 4, 3) for _ in range(3))
            self.scale = nn.Parameter(torch.zeros(()))

    assert (
        str(sagan_fast.accelerate(Residual()))
        == "accelerate found no attention, conditional batch norm or spectral norm"
    )
    net = Net("studiogan")
    assert len(sagan_fast.accelerate(net).rows) == 7 and not sagan_fast.accelerate(net).rows


def test_parts_can_be_chosen_and_other_inputs_and_arguments_keep_the_original(generator):
    net = Net("fastai").double()
    twin = copy.deepcopy(net)
    report = sagan_fast.accelerate(net, spectral_norm=False)
    assert report.swapped == ["attention"] and not report.groups
    flat, deep = randn(2, 16, 7, generator=generator), randn(2, 16, 2, 3, 4, generator=generator)
    for x in (flat, deep):
        torch.testing.assert_close(net.attention(x), twin.attention(x))
    net = nn.ModuleDict({"g": Net("biggan"), "d": Net("studiogan")})
    report = sagan_fast.accelerate(net, attention=False)
    assert len(report.groups) == 2 and "g.conv1" in report.swapped and "g.attention" not in report.swapped


def test_unknown_spectral_norm_is_named():
    layer = nn.Linear(3, 3)
    layer.register_buffer("u0", torch.zeros(3))
    net = nn.Sequential(layer, BigGANConv(3, 3, 1, num_svs=2), legacy(nn.Linear(3, 3)))
    report = sagan_fast.accelerate(net)
    assert report.swapped == ["2"] and set(report.left) == {"0", "1"} and "2 singular values" in report.left["1"]
