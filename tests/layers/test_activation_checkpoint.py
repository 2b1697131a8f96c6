"""Activations computed again: the same bits in gradients and buffers, and less kept."""

import copy

import pytest
import torch

from sagan_fast.layers.activation_checkpoint import checkpointed
from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock
from sagan_fast.layers.spectral_norm import fuse_spectral_norm
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import new_state
from sagan_fast.training.step import train_step
from shared_by_tests import assert_same

CPU = torch.device("cpu")


def steps(images, labels, **overrides):
    narrow = {"base_channels": 4}
    options = dict(out="x", batch_size=4, generator=narrow, discriminator=narrow, **overrides)
    config = TrainConfig.from_preset("shapes-32", **options)
    state = new_state(config, CPU)
    for attention in (*state.generator.attentions.values(), *state.discriminator.attentions.values()):
        torch.nn.init.constant_(attention.gamma, 0.5)
    for _ in range(2):
        train_step(state, config, images, labels, CPU)
    return state.state_dict()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"micro_batch_size": 2}, {"r1_gamma": 0.5, "gp_weight": 1.0}],
    ids=["plain", "micro-batches", "second derivatives"],
)
def test_steps_have_the_same_bits(overrides, generator):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (4,), generator=generator)
    kept, again = (steps(images, labels, checkpoint_activations=on, **overrides) for on in (False, True))
    assert_same(again, kept)  # u and v, sigmas and running averages are part of it


def test_a_block_that_is_not_fused_moves_u_v_and_averages_once(generator):
    results = []
    for run in (lambda block, *inputs: block(*inputs), checkpointed):
        torch.manual_seed(3)
        block = GeneratorBlock(4, 6, 3).double()
        x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
        run(block, x, torch.tensor([0, 2, 1])).square().sum().backward()
        results.append(([*block.buffers()], [x.grad, *(p.grad for p in block.parameters())]))
    (buffers, grads), (same, again) = results
    assert all(torch.equal(a, b) for a, b in zip(buffers, same, strict=True))
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # sigma without an update is rounded otherwise


def kept_bytes(run):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(sizes.values()), out


def test_only_the_inputs_of_blocks_are_kept(generator):
    config = TrainConfig.from_preset("shapes-32", out="x", batch_size=4)
    state = new_state(config, CPU)
    z, y = torch.randn(4, 128, generator=generator), torch.randint(10, (4,), generator=generator)
    found = []
    for on in (False, True):
        state.generator.checkpoint_activations = on
        found.append(kept_bytes(lambda: state.generator(z, y))[0])
    assert found[1] < 0.6 * found[0]  # batch norm keeps no more than its input
    with torch.no_grad():
        assert state.generator(z, y).grad_fn is None


@pytest.mark.parametrize("update", [None, "forward", "step"])
def test_two_forwards_before_a_backward_have_their_own_weights(update, generator):
    block = GeneratorBlock(4, 6, 0).double()
    if update:
        fuse_spectral_norm(block, update=update).step()
    xs = [torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    state = copy.deepcopy(block.state_dict())
    grads = []
    for run in (lambda block, x: block(x, None), lambda block, x: checkpointed(block, x, None)):
        block.load_state_dict(state)
        loss = run(block, xs[0]).square().mean() - run(block, xs[1]).square().mean()
        grads.append(torch.autograd.grad(loss, list(block.parameters())))
    for kept, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-9, atol=1e-12)


def test_transforms_keep_everything(generator):
    block = DiscriminatorBlock(4, 6).double()
    fuse_spectral_norm(block).step()
    x = torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    block(x)
    there = torch.func.grad(lambda x: checkpointed(block, x).square().sum())(x)
    torch.testing.assert_close(there, torch.func.grad(lambda x: block(x).square().sum())(x))
