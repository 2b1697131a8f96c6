"""Maps that backward makes again: the same derivatives, nothing kept, and no hook of another's pushed aside."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock
from sagan_fast.models.config import GeneratorConfig
from sagan_fast.models.generator import Generator
from sagan_fast.ops import batch_norm
from sagan_fast.ops.remade import avg_pool2d, can_remake, made_again
from shared_by_tests import randn

CONFIG = GeneratorConfig(
    num_classes=3, z_dim=5, base_channels=4, channel_multipliers=(2, 1, 1), attention_resolutions=()
)


@pytest.fixture
def results(monkeypatch):
    """The memory of every map that batch norm returns."""
    found, make = [], batch_norm._output

    def output(*args):
        found.append(make(*args))
        found[-1], out = StorageWeakRef(found[-1].untyped_storage()), found[-1]
        return out

    monkeypatch.setattr(batch_norm, "_output", output)
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
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9 * (1 + plain.abs().max().item()))


def test_backward_leaves_nothing_of_what_it_made(generator, results):
    ours, _, z, y = networks(generator)
    out = ours(z, y)
    out.square().sum().backward(retain_graph=True)
    assert len(results) == 10 and all(each.expired() for each in results)


def test_changes_in_place_before_backward_are_an_error_still(generator):
    block = GeneratorBlock(4, 4, 0).double()
    x = randn(2, 4, 4, 4, generator=generator).requires_grad_()
    moved = x * 1
    out = block(moved)
    moved.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_hooks_of_others_stay_in_charge(generator):
    block = GeneratorBlock(4, 4, 0).double()
    x = randn(2, 4, 4, 4, generator=generator).requires_grad_()
    kept = copy.deepcopy(block.state_dict())
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not can_remake()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert not can_remake() and avg_pool2d(x).requires_grad
    runs = [lambda: checkpoint(block, x, use_reentrant=False)]
    for hooks in (save_on_cpu(), torch.autograd.graph.disable_saved_tensors_hooks("none here")):

        def run(hooks=hooks):
            with hooks:
                return block(x)

        runs.append(run)
    for run in runs:
        block.load_state_dict(kept)
        found = torch.autograd.grad(run().square().sum(), [x, *block.parameters()])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_what_is_written_to_in_the_context_is_kept(generator):
    x = randn(3, generator=generator).requires_grad_()
    h = x * 1
    with made_again(h, lambda: pytest.fail("made again")):
        h.mul_(2)
        out = h.square()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 8 * x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_average_pooling_keeps_no_map(memory_format, generator):
    x = randn(2, 3, 6, 4, generator=generator).contiguous(memory_format=memory_format).requires_grad_()
    h = x * 1
    storage = StorageWeakRef(h.untyped_storage())
    out = avg_pool2d(h)
    torch.testing.assert_close(out, F.avg_pool2d(x, 2))
    del h
    assert storage.expired()
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(F.avg_pool2d(x, 2).square().sum(), x)[0])
    assert grad.is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradcheck(avg_pool2d, x) and torch.autograd.gradgradcheck(avg_pool2d, x)


def test_a_discriminator_block_keeps_its_input_rectified_alone(generator):
    block = DiscriminatorBlock(4, 6)
    x = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    h = x * 1
    storage = StorageWeakRef(h.untyped_storage())
    out = block(h)
    del h
    assert storage.expired() and out.requires_grad
