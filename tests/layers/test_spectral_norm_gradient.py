"""Buckets of the fused spectral norm's gradients: how weights are divided, the same bits, ready before the end."""

import math

import pytest
import torch
from normed_net import images, net
from torch import nn

from sagan_fast.layers.spectral_norm import fuse_spectral_norm, spectral_norm
from sagan_fast.layers.spectral_norm_gradient import Buckets


def test_buckets_are_full_from_the_last_weight_used_backwards():
    buckets = Buckets([torch.empty(size) for size in (4, 1, 2, 3, 1)])  # 4 bytes an element
    buckets.divide(12)
    assert [buckets.of(position) for position in range(5)] == [[0], [1, 2], [1, 2], [3, 4], [3, 4]]
    for position in (4, 0, 2):
        buckets.use(position)
    buckets.divide(12)  # in the order 4, 0, 2, 1, 3
    assert [buckets.of(position) for position in range(5)] == [[0], [1, 2], [1, 2], [3], [4]]
    buckets.divide(math.inf)
    assert buckets.of(3) == [0, 1, 2, 3, 4]


class Late(nn.Module):
    """Its modules are not used in the order in which they are named."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.middle = (spectral_norm(nn.Linear(6, 6)) for _ in range(3))

    def forward(self, x):
        return self.last(self.middle(self.first(x).relu()).relu())


def fused(model, bucket_bytes):
    group = fuse_spectral_norm(model)
    group._bucket_bytes = lambda: bucket_bytes
    group.step()
    return group


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_any_division_gives_the_same_gradients(generator, backend):
    model = net()
    state = model.state_dict()
    x = images(generator)
    found = []
    for bucket_bytes in (math.inf, 1, 1000):
        model = net()
        model.load_state_dict(state)
        group = fused(model, bucket_bytes)
        group.backend = backend
        group.refresh()
        for _ in range(2):  # the second time in the order of their use
            model.zero_grad()
            model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    limits = {"rtol": 0.0, "atol": 0.0} if backend == "eager" else {"rtol": 1e-5, "atol": 1e-6}
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, **limits)


def ready(model, loss):
    """Names of the modules whose weights have their gradients, in that order; a dot where a layer's backward began."""
    order, handles = [], []
    for name, module in model.named_children():
        handles.append(module.register_full_backward_pre_hook(lambda *_, n=name: order.append(f".{n}")))
        weight = module.parametrizations.weight.original
        handles.append(weight.register_post_accumulate_grad_hook(lambda _, n=name: order.append(n)))
    loss().backward()
    for handle in handles:
        handle.remove()
    return order


def test_a_bucket_is_ready_when_the_backward_has_left_its_weights(generator):
    model = Late()
    fused(model, 1)
    x = torch.randn(4, 6, generator=generator)
    for _ in range(2):  # also in later micro-batches, whose graph is younger than that of the first
        order = ready(model, lambda: model(x).square().sum())
        assert order.index("last") < order.index(".first") and order.index("middle") < order.index("first")
    alone = Late()
    fused(alone, math.inf)
    order = ready(alone, lambda: alone(x).square().sum())
    assert order.index(".first") < min(order.index(name) for name in ("last", "middle", "first"))


def test_two_forwards_before_one_backward_share_its_nodes(generator):
    model = Late()
    group = fused(model, 1)
    x = torch.randn(4, 6, generator=generator)
    calls = []
    for module in (model.last, model.first, model.middle):
        module.parametrizations.weight.original.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    graph = group._batches[0].graph
    (model(x).square().sum() + model(2 * x).sum()).backward()
    nodes = {node for node, _ in graph._places.values()}  # alive, so that no other has its place
    assert len(nodes) == len(calls) == 3
    model(x).sum().backward()
    assert not nodes & {node for node, _ in graph._places.values()}
