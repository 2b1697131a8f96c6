"""The 4x4 weights are made once for each version of the 3x3 ones, and never served when those have changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sagan_fast
from sagan_fast.layers import folded_weight
from sagan_fast.layers.folded_weight import FoldedWeight, is_foldable
from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock
from sagan_fast.ops.resized_conv import folded
from shared_by_tests import randn


@pytest.fixture
def made(monkeypatch):
    """A list that grows by one with each folding."""
    calls = []

    def counted(weight, direction, value=None):
        calls.append(value is None)
        return folded(weight, direction, value)

    monkeypatch.setattr(folded_weight, "folded", counted)
    return calls


@pytest.fixture
def weight(generator):
    return randn(4, 3, 3, 3, generator=generator)


@pytest.fixture
def fused(generator):
    """A block of float64 in training, its group, and an input."""
    block = GeneratorBlock(4, 6, 0).double()
    group = sagan_fast.fuse_spectral_norm(block)
    group.step()
    return block, group, randn(2, 4, 5, 5, generator=generator, dtype=torch.float64)


def agrees(block, *inputs):
    """Whether the block computes the same with and without folding; batch norm's averages do not matter here."""
    block.resizing = "folded"
    ours = block(*inputs)
    block.resizing = "plain"
    theirs = block(*inputs)
    block.resizing = "auto"
    return torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_one_version_is_folded_once_with_and_without_a_graph(weight, made):
    kept = FoldedWeight("down")
    first = kept.get(weight)
    linked = weight.detach().requires_grad_()
    assert kept.get(weight) is first and kept.get(linked).data_ptr() == first.data_ptr()
    assert kept.get(linked) is kept.get(linked) and kept.get(linked).requires_grad
    with torch.no_grad():
        assert not kept.get(linked).requires_grad
    assert made == [True, False]


def test_a_write_in_place_another_tensor_and_another_dtype_are_seen(weight, made):
    kept = FoldedWeight("up")
    for change in (lambda w: w.mul_(2), lambda w: w.clone(), lambda w: w.float(), lambda w: w.transpose(2, 3)):
        kept.get(weight)
        weight = change(weight)
        torch.testing.assert_close(kept.get(weight), folded(weight, "up"))
    assert made.count(True) == 5


def test_memory_given_to_another_tensor_is_not_taken_for_the_old_one(generator):
    kept = FoldedWeight("up")
    for _ in range(9):
        weight = randn(4, 3, 3, 3, generator=generator)
        torch.testing.assert_close(kept.get(weight), folded(weight, "up"))
        del weight


def test_a_parameter_is_never_kept_for_data_can_be_written_unseen(weight):
    kept, parameter = FoldedWeight("down"), nn.Parameter(weight)
    kept.get(parameter)
    parameter.data.mul_(3)
    torch.testing.assert_close(kept.get(parameter), folded(parameter, "down"))


def test_the_graph_of_one_step_is_shared_and_the_next_step_has_another(fused):
    block, group, x = fused
    for _ in range(3):
        block.resizing = "folded"
        losses = [block(x).square().sum(), block(x * 2).square().sum()]
        ours = torch.autograd.grad(losses[0] + losses[1], list(block.parameters()))
        block.resizing = "plain"
        theirs = torch.autograd.grad(block(x).square().sum() + block(x * 2).square().sum(), list(block.parameters()))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            for parameter, grad in zip(block.parameters(), ours, strict=True):
                parameter -= 1e-3 * grad
        group.step()


def test_micro_batches_go_backward_one_after_the_other_through_one_folding(fused, made):
    block, _, x = fused
    for _ in range(3):
        block(x).sum().backward()  # none retains the graph
    assert made == [True, False, False, False]  # made once, put into the graph of each backward


def test_loading_and_refreshing_are_seen(fused):
    block, group, x = fused
    block.eval()
    assert agrees(block, x)
    state = {name: value * 1.5 if "original" in name else value for name, value in block.state_dict().items()}
    block.load_state_dict(state)
    assert agrees(block, x)
    for chain in (block.conv1.parametrizations.weight,):
        chain.original.data.mul_(torch.linspace(0.5, 2, chain.original.numel()).view_as(chain.original))
    group.refresh()
    assert agrees(block, x)


def test_grad_mode_and_inference_mode_do_not_leak_into_each_other(fused):
    block, group, x = fused
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        group.refresh()
        with mode():
            assert agrees(block, x)
        assert agrees(block, x) and block(x).requires_grad
        block(x).sum().backward()


def test_autocast_does_not_change_what_is_kept(fused):
    block, _, x = fused
    block.float()
    block.resizing = "folded"
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x.float())
    out.sum().backward()
    assert block.folded_weight.get(block.conv1.weight).dtype == torch.float32


def test_copies_keep_nothing_of_the_original(fused):
    block, _, x = fused
    block.eval()(x)
    other = copy.deepcopy(block)
    assert block.folded_weight._made is not None and pickle.loads(pickle.dumps(block.folded_weight))._made is None
    assert other.folded_weight is not block.folded_weight and other.folded_weight._made is None
    with torch.no_grad():
        other.conv1.parametrizations.weight.original.mul_(torch.rand(()) + 2)
        other.conv1.bias.add_(1)
    assert agrees(other, x) and agrees(block, x) and not torch.allclose(other(x), block(x))


def test_replicas_that_share_the_keeper_get_their_own_weights(fused):
    block, _, x = fused
    block.eval()
    replica = block._replicate_for_data_parallel()
    assert replica.folded_weight is block.folded_weight
    replica._modules = dict(block._modules)
    replica._modules["conv1"] = nn.Conv2d(4, 6, 3, padding=1).double()
    for _ in range(2):
        assert agrees(block, x) and agrees(replica, x) and not torch.allclose(block(x), replica(x))


def test_the_state_dict_does_not_know_of_folding():
    for block in (GeneratorBlock(4, 6, 3), DiscriminatorBlock(4, 6)):
        assert not any("folded" in name for name in block.state_dict())


@pytest.mark.slow
def test_compiled_the_block_is_what_it_is_in_eager(fused):
    block, _, x = fused
    block.eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        block.conv1.parametrizations.weight.original.mul_(torch.linspace(0.5, 2, 9).view(3, 3).double())
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-10, atol=1e-10)


def test_what_else_wants_to_see_the_convolution_keeps_it_as_it_is():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert is_foldable(conv)
    for other in (nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3)):
        assert not is_foldable(other)
    assert not is_foldable(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    conv.register_forward_hook(lambda *_: None)
    assert not is_foldable(conv)
