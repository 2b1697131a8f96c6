import copy
import pickle

import pytest
import torch
from normed_net import gradients, images, is_same, net, state_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import spectral_norm as legacy_spectral_norm

from benchmarks.accuracy import rel_rms
from sagan_fast.kernels.spectral_norm import reference
from sagan_fast.layers.spectral_norm import fuse_spectral_norm, spectral_norm
from shared_by_tests import assert_close_to_truth

EVERY = [spectral_norm, parametrizations.spectral_norm, legacy_spectral_norm]


def formula(model, x):
    """The output of `net()` with every weight normalised on its own, by plain autograd."""
    w = []
    for layer, dim in ((model[0], 0), (model[2], 1), (model[4], 0)):
        chain = layer.parametrizations.weight
        rows = chain.original.movedim(dim, 0)
        out, _ = reference.normalise(rows.flatten(1), chain[0]._u, chain[0]._v)
        w.append(out.view(rows.shape).movedim(0, dim))
    x = nn.functional.conv2d(x, w[0], model[0].bias).relu()
    x = nn.functional.conv_transpose2d(x, w[1], model[2].bias)
    return nn.functional.linear(x.flatten(1), w[2], model[4].bias)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_close_to_truth("gradient", a, b.double(), precision="tf32")


@pytest.mark.parametrize("norm", EVERY)
def test_moves_only_in_step(generator, norm):
    model = net(norm)
    group = fuse_spectral_norm(model)
    group.step()
    before = state_of(model)
    for _ in range(3):  # accumulation, evaluation and no_grad among them
        model(images(generator)).sum().backward()
        with torch.no_grad():
            model.eval()(images(generator))
        model.train()
    assert is_same(before, model)
    group.step()
    moved = [key for key, value in before.items() if not torch.equal(value, model.state_dict()[key])]
    assert len(moved) == 6 and all(key.endswith(("_u", "_v")) for key in moved)


def test_every_access_between_steps_is_the_same_memory():
    model = net()
    group = fuse_spectral_norm(model)
    pointers = {model[0].weight.data_ptr(), model.eval()[0].weight.data_ptr()}
    with torch.no_grad():
        pointers.add(model[0].weight.data_ptr())
    group.step()
    pointers.add(model[0].weight.data_ptr())
    assert len(pointers) == 1  # also over steps: a CUDA graph finds it again


@pytest.mark.parametrize("separate", [False, True])
def test_two_forwards_with_one_backward_and_with_two(generator, separate):
    model = net()
    fuse_spectral_norm(model).step()
    real, fake = images(generator), images(generator)
    expected = gradients(formula(model, real).square().sum() + formula(model, fake).sum(), model)
    first, second = model(real).square().sum(), model(fake).sum()
    if separate:
        first.backward()
        second.backward()
    else:
        (first + second).backward()
    assert_close([p.grad for p in model.parameters()], expected)


def test_backward_then_forward_and_backward_again(generator):
    """The graph of the first access is shared with the later ones, and no backward uses it up."""
    model = net()
    fuse_spectral_norm(model).step()
    x = images(generator)
    expected = gradients(formula(model, x).square().sum(), model)
    for _ in range(3):
        assert_close(gradients(model(x).square().sum(), model), expected)


def test_double_backward(generator):
    model = net()
    fuse_spectral_norm(model)
    x = images(generator).requires_grad_()

    def penalty(out):
        (d_x,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return d_x.square().sum() + torch.stack([g.square().sum() for g in torch.autograd.grad(
            out.square().sum(), [model[0].parametrizations.weight.original], create_graph=True)]).sum()  # fmt: skip

    weights = [layer.parametrizations.weight.original for layer in (model[0], model[2], model[4])]
    ours = torch.autograd.grad(penalty(model(x)), weights)
    theirs = torch.autograd.grad(penalty(formula(model, x)), weights)
    assert_close(ours, theirs)


def test_weight_changed_in_place_is_noticed(generator):
    model = net()
    group = fuse_spectral_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = images(generator)
    model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model(x), formula(model, x))
    other = net()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), formula(other, x))
    assert group.sigmas()["4"] == pytest.approx(fuse_spectral_norm(other).sigmas()["4"], rel=1e-5)
    model.load_state_dict(net().state_dict(), assign=True)
    torch.testing.assert_close(model(x), formula(model, x))


def test_model_moved_to_other_dtypes_and_layouts(generator):
    model = net()
    group = fuse_spectral_norm(model)
    x = images(generator)
    model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), formula(model, x))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    group.step()
    assert_close(gradients(model(x).square().sum(), model), gradients(formula(model, x).square().sum(), model))
    model.double()
    assert model[0].weight.dtype == torch.float64
    torch.testing.assert_close(model(x.double()), formula(model, x.double()))
    model.half()
    assert model[0].weight.dtype == torch.float16


def test_backward_through_weights_of_an_earlier_step_is_refused(generator):
    model = net()
    group = fuse_spectral_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = images(generator)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    group.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_weights_get_no_gradient_and_thawed_ones_do(generator):
    model = net()
    fuse_spectral_norm(model)
    x = images(generator).requires_grad_()
    model.requires_grad_(False)
    model(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model.requires_grad_(False)
    model(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_first_access_without_gradient_or_in_inference_mode(generator):
    model = net()
    fuse_spectral_norm(model)
    x = images(generator)
    with torch.inference_mode():
        expected = model(x).clone()
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert model[0].parametrizations.weight.original.grad is not None


def test_float32_under_autocast(generator):
    model = net()
    group = fuse_spectral_norm(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        group.step()
        out = model(images(generator))
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and model[0].weight.dtype == torch.float32
    chain = model[4].parametrizations.weight
    truth, _ = reference.normalise(chain.original.double(), chain[0]._u.double(), chain[0]._v.double())
    assert rel_rms(model[4].weight, truth) < 1e-6


@pytest.mark.parametrize("norm", EVERY)
@pytest.mark.parametrize("update", ["step", "forward"])
def test_deep_copy_is_free_of_the_group(generator, norm, update):
    model = net(norm)
    group = fuse_spectral_norm(model, update=update)
    group.step()
    x = images(generator)
    with torch.no_grad():  # torch's older hook cannot be copied with a weight that has history
        model.eval()(x)
        ema = copy.deepcopy(model).eval()
        before = state_of(ema)
        torch.testing.assert_close(ema(x), model(x))
        model.train()
        group.step()
        assert is_same(before, ema)
        ema(x)
        assert is_same(before, ema)
        ema.load_state_dict(model.state_dict())
        torch.testing.assert_close(ema(x), model.eval()(x))
        # In training the copy is a plain spectral norm, on its own.
        mine = state_of(model)
        ema.train()(x)
        assert is_same(mine, model) and not is_same(mine, ema)
    assert fuse_spectral_norm(ema).names == group.names


def test_copied_modules_can_be_pickled():
    model = net(legacy_spectral_norm)
    fuse_spectral_norm(model).step()
    with torch.no_grad():
        model(torch.ones(1, 3, 8, 8))
    again = pickle.loads(pickle.dumps(model)).eval()
    torch.testing.assert_close(again(torch.ones(1, 3, 8, 8)), model.eval()(torch.ones(1, 3, 8, 8)))


def test_per_forward_moves_once_per_training_forward_of_the_model(generator):
    model = net()
    fuse_spectral_norm(model, update="forward")
    x = images(generator)
    before = state_of(model)
    model.eval()(x)
    model[0].weight  # noqa: B018
    assert is_same(before, model)
    first = model.train()(x).square().sum()
    moved = state_of(model)
    assert not is_same(before, model)
    second = model(x).sum()
    assert not is_same(moved, model)
    reference_model = net()
    reference_model.load_state_dict(before)
    expected = gradients(reference_model(x).square().sum() + reference_model(x).sum(), reference_model)
    (first + second).backward()
    assert_close([p.grad for p in model.parameters()], expected)


def test_fusing_again_hands_over(generator):
    model = net()
    old = fuse_spectral_norm(model, update="forward")
    model(images(generator))
    new = fuse_spectral_norm(model, update="step")
    before = state_of(model)
    model(images(generator))
    assert is_same(before, model) and len(model._forward_pre_hooks) == 1
    new.step()
    assert not is_same(before, model) and len(old) == len(new)


def test_sigmas_are_those_of_the_weights(generator):
    model = net()
    group = fuse_spectral_norm(model)
    for _ in range(200):
        group.step()
    for name, sigma in group.sigmas().items():
        weight = model.get_submodule(name).parametrizations.weight.original.detach()
        rows = weight.movedim(1, 0) if name == "2" else weight
        assert sigma == pytest.approx(torch.linalg.matrix_norm(rows.flatten(1), 2).item(), rel=1e-3)


def test_functional_call_with_other_weights(generator):
    model, other = net(), net()
    fuse_spectral_norm(model)
    x = images(generator)
    substitutes = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(model, substitutes, (x,)), formula(other, x))


@pytest.mark.parametrize("update", ["step", "forward"])
def test_triton_backend_trains_as_eager(generator, update):
    ours = net()
    theirs = copy.deepcopy(ours)
    groups = [fuse_spectral_norm(ours, update=update, backend="triton"), fuse_spectral_norm(theirs, update=update)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (ours, theirs)]
    for _ in range(3):
        x = images(generator)
        for model, optimizer, group in zip((ours, theirs), optimizers, groups, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            if update == "step":
                group.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert rel_rms(a, b) < 1e-4


def test_backward_through_earlier_weights_is_refused_with_triton_too(generator):
    model = net()
    group = fuse_spectral_norm(model, backend="triton")
    loss = model(images(generator)).square().sum()
    group.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_saved_sigmas_give_the_same_bits_back(generator, backend):
    model = net()
    group = fuse_spectral_norm(model)
    group.backend = backend
    group.step()
    expected = [module.weight.detach().clone() for module in model if hasattr(module, "parametrizations")]
    saved, sigmas = copy.deepcopy(model.state_dict()), group.state_dict()
    resumed = net()
    resumed_group = fuse_spectral_norm(resumed)
    resumed_group.backend = backend
    resumed.load_state_dict(saved)
    resumed_group.load_state_dict(sigmas)
    found = [module.weight for module in resumed if hasattr(module, "parametrizations")]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for g in (group, resumed_group):
        g.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="state_dict must name "):
        resumed_group.load_state_dict({})


def test_weights_too_large_for_the_kernels_are_a_pass_of_their_own(monkeypatch):
    monkeypatch.setattr("sagan_fast.ops.backends.MAX_COLUMNS", 100)
    group = fuse_spectral_norm(net())
    lines = group.explain()
    assert len(group) == 3 and [line.split(": ")[0] for line in lines] == [
        "spectral norm of 2 weights", "spectral norm of 4"
    ]  # fmt: skip


def test_per_forward_memory_is_used_again_once_nobody_holds_it(generator):
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    group = fuse_spectral_norm(model, update="forward")
    x = images(generator)
    losses = [[m(x).square().sum() for _ in range(4)] for m in (model, twin)]  # four graphs alive
    ours, theirs = (gradients(sum(loss), m) for loss, m in zip(losses, (model, twin), strict=True))
    assert_close(ours, theirs)
    del losses
    seen = set()
    for _ in range(6):
        model(x).sum().backward()
        seen |= {batch.flat.data_ptr() for batch in group._batches}
    assert len(seen) <= 2 * len(group._batches)
