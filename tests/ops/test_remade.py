"""Maps that backward makes again: the same derivatives, nothing kept, and no hook of another's pushed aside."""

import copy
from functools import partial

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from sagan_fast.layers.batch_norm import batch_norm_relu
from sagan_fast.layers.residual_blocks import GeneratorBlock
from sagan_fast.models.config import GeneratorConfig
from sagan_fast.models.generator import Generator
from sagan_fast.ops import batch_norm
from sagan_fast.ops.remade import remade
from shared_by_tests import randn

CONFIG = GeneratorConfig(
    num_classes=3, z_dim=5, base_channels=4, channel_multipliers=(2, 1, 1), attention_resolutions=()
)


@pytest.fixture
def results(monkeypatch):
    """The memory of every map that batch norm returns."""
    found, make = [], batch_norm.output

    def output(*args):
        out = make(*args)
        found.append(StorageWeakRef(out.untyped_storage()))
        return out

    monkeypatch.setattr(batch_norm, "output", output)
    return found


def networks(generator):
    """Return a generator in float64 that makes maps again, one that does not, and their inputs."""
    ours = Generator(CONFIG).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(randn(*p.shape, generator=generator))
    plain = copy.deepcopy(ours)
    for module in plain.modules():
        module.remakes = False
    return ours, plain, randn(4, 5, generator=generator), torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("folded", ["plain", "folded"])
def test_a_generator_keeps_no_result_of_its_norms_and_has_the_same_derivatives(training, folded, generator, results):
    *both, z, y = networks(generator)
    alive, found = [], []
    for network in both:
        network.train(training)
        for block in network.blocks:
            block.resizing = folded
        x = z.clone().requires_grad_()
        results.clear()
        out = network(x, y)
        alive.append(sum(not each.expired() for each in results))
        assert len(results) == 5
        wanted = [x, *network.parameters()]
        grads = torch.autograd.grad(out.square().sum(), wanted, retain_graph=True)
        again = torch.autograd.grad(out.square().sum(), wanted, retain_graph=True)
        assert all(map(torch.equal, grads, again))
        linked = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in linked), wanted)
        found.append([out, *grads, *linked, *second])
    assert alive == [0, 5]
    largest = max(each.abs().max().item() for each in found[1])  # a bias ahead of a norm has rounding for a gradient
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12 * largest)


def test_backward_leaves_nothing_of_what_it_made(generator, results):
    ours, _, z, y = networks(generator)
    out = ours(z, y)
    out.square().sum().backward(retain_graph=True)
    assert len(results) == 10 and all(each.expired() for each in results)


@pytest.mark.parametrize(
    ("changed", "folded"),
    [("input", "plain"), ("conv1", "plain"), ("conv2", "plain"), ("input", "folded"), ("conv2", "folded")],
)
def test_changes_in_place_before_backward_are_an_error_still(changed, folded, generator):
    block = GeneratorBlock(4, 4, 0).double()
    for conv in (block.conv1, block.conv2, block.shortcut):
        parametrize.remove_parametrizations(conv, "weight")
    block.resizing = folded
    x = randn(2, 4, 4, 4, generator=generator).requires_grad_()
    moved = x * 1
    out = block(moved)
    with torch.no_grad():
        (moved if changed == "input" else getattr(block, changed).weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), [x, block.conv1.weight, block.conv2.weight])


def test_in_eval_mode_the_statistics_of_the_forward_count(generator):
    block = GeneratorBlock(4, 4, 0).double().eval()
    x = randn(2, 4, 4, 4, generator=generator).requires_grad_()
    wanted = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), wanted)
    out = block(x)
    block.norm1.train(), block.norm2.train()
    block(x)
    for ours, right in zip(torch.autograd.grad(out.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("frozen", ["conv", "norm", "shortcut"])
@pytest.mark.parametrize("folded", ["plain", "folded"])
def test_frozen_parts_and_batches_of_gradients(frozen, folded, generator):
    block = GeneratorBlock(4, 4, 3).double()
    block.resizing = folded
    for name, p in block.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    x, y = randn(2, 4, 4, 4, generator=generator).requires_grad_(), torch.tensor([2, 0])
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    found = []
    batch = randn(3, 2, 4, 8, 8, generator=generator)
    for block.remakes in (True, False):
        out = block.eval()(x, y)
        batched = torch.autograd.grad(out, wanted, batch, is_grads_batched=True, retain_graph=True)
        linked = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in linked), wanted)
        found.append([*batched, *linked, *second])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled_autograd_differentiates_it(generator):
    block = GeneratorBlock(4, 4, 0).double().eval()
    x = randn(2, 4, 4, 4, generator=generator).requires_grad_()
    wanted = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), wanted)
    for p in wanted:
        p.grad = None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        block(x).square().sum().backward()
    for p, right in zip(wanted, expected, strict=True):
        torch.testing.assert_close(p.grad, right)


def test_gradients_of_the_weights_alone_leave_no_map(generator, results):
    ours, _, z, y = networks(generator)
    out = ours(z, y)
    weights = [p for name, p in ours.named_parameters() if "conv" in name and "original" in name]
    torch.autograd.grad(out.sum(), weights, retain_graph=True)
    assert all(each.expired() for each in results)
    torch.autograd.grad(out.sum(), ours.conv.parametrizations.weight.original, retain_graph=True)
    assert all(each.expired() for each in results)
    del out
    out = ours(z, y)
    del out  # no cycle holds the graph, nor does what was folded
    assert all(each.expired() for each in results)


def test_hooks_of_others_stay_in_charge(generator):
    block = GeneratorBlock(4, 4, 0).double()
    x = randn(2, 4, 4, 4, generator=generator).requires_grad_()
    kept, seen = copy.deepcopy(block.state_dict()), []
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])

    def offloaded():
        with save_on_cpu():
            return block(x)

    def unsaved():
        with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return block(x)

    def watched():
        handles = [conv.register_forward_pre_hook(lambda _, args: seen.append(*args)) for conv in convs]
        out = block(x)
        for handle in handles:
            handle.remove()
        torch.autograd.grad(seen[-1].sum(), x)  # frees what made the map, not what convolves it
        return out

    convs = block.conv1, block.conv2
    runs = [offloaded, unsaved] + [partial(checkpoint, block, x, use_reentrant=False)]
    for run in runs:
        block.load_state_dict(kept)
        found = torch.autograd.grad(run().square().sum(), [x, *block.parameters()])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    block.load_state_dict(kept)
    (found,) = torch.autograd.grad(watched().square().sum(), block.conv2.bias)
    torch.testing.assert_close(found, expected[[n for n, _ in block.named_parameters()].index("conv2.bias") + 1])


def test_a_result_that_was_not_made_so_has_no_recipe(generator):
    x = randn(2, 3, 4, 4, generator=generator).requires_grad_()
    norm = torch.nn.BatchNorm2d(3).double()
    assert remade(x) is None and remade(x * 1) is None and remade(batch_norm_relu(norm, x)) is None
    assert remade(batch_norm_relu(norm, x, remakes=True)) is not None
    with torch.no_grad():
        assert remade(batch_norm_relu(norm, x, remakes=True)) is None
