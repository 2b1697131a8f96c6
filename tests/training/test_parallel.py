"""Networks in DistributedDataParallel: gradients are means for every loss, and travel during the backward pass.

Every start of a process takes seconds, so each launch holds many checks.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sagan_fast.distributed import connected
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.parallel import Replica
from sagan_fast.training.state import new_state
from sagan_fast.training.step import Noise, discriminator_gradient, generator_parts, generator_step, train_step
from shared_by_tests import assert_same, run_ranks

SIZES = dict(
    resolution=16,
    generator={"base_channels": 4, "channel_multipliers": [4, 2, 1], "attention_resolutions": [8]},
    discriminator={"base_channels": 4, "channel_multipliers": [1, 2, 2], "attention_resolutions": [8]},
)
SMALL = 0.002
"""MiB: several buckets in networks as small as these."""
VARIANTS = (
    {},
    {"micro_batch_size": 2},
    {"r1_gamma": 0.5},  # two forwards of the discriminator before one backward, and a double backward
    {"r1_gamma": 0.5, "r2_gamma": 0.25, "gp_weight": 1.0, "loss": "relativistic", "micro_batch_size": 2},
    {"num_classes": 0, "lecam_weight": 0.5},
)


def config(**overrides):
    options = {"out": "x", "batch_size": 12, "bucket_cap_mb": SMALL, "data": "shapes", **SIZES, **overrides}
    return TrainConfig.from_preset("shapes-32", **options)


def batch(made, seed):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=rng)
    return images, torch.randint(max(made.num_classes, 1), (12,), generator=rng)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def take_steps(state, made, world, seeds):
    mine = slice(world.rank, None, world.size)
    for seed in seeds:
        images, labels = batch(made, seed)
        train_step(state, made, images[mine], labels[mine], world.device)
    return state


def connected_state(made, world, dtype=torch.float32):
    state = new_state(made, world.device)
    for model in (state.generator, state.discriminator, state.ema, state.lecam):
        model.to(dtype)
    state.connect(world, made)
    return state


def means_of_plain_gradients(world):
    """Steps in DistributedDataParallel have the means of the gradients that each process computes alone."""
    for overrides in VARIANTS:
        made = config(**overrides)
        state, alone = connected_state(made, world), new_state(made, world.device)
        assert min(len(state.g_replica.buckets), len(state.d_replica.buckets)) > 2
        for model in (*state.g_replica.network.modules(), *alone.generator.modules()):
            model.momentum = 0.0 if isinstance(model, nn.BatchNorm2d) else None  # means of averages are not asked here
        images, labels = (x[world.rank :: world.size] for x in batch(made, 5))
        noises = [Noise(made, 0, world.device, world) for _ in range(2)]
        real = images.float() / 127.5 - 1
        y = labels if made.num_classes else None
        found = []
        for each, noise in zip((state, alone), noises, strict=True):
            noise.world = each.world
            discriminator_gradient(each, real, y, noise)
            each.d_replica.finish()
            d_grads = gradients(each.discriminator)
            generator_step(each, noise, generator_parts(each, real, y, noise))
            found.append([*d_grads, *gradients(each.generator)])
        for ours, mine in zip(*found, strict=True):
            mean = torch.stack(world.gather_tensors(mine)).double().mean(0)
            torch.testing.assert_close(ours.double(), mean, rtol=1e-4, atol=1e-6)
        for network in (state.generator, state.discriminator):
            assert not any("module." in key for key in network.state_dict())


def gradients_that_do_not_travel(world):
    """Neither `torch.autograd.grad` nor a frozen discriminator starts a reduction, which would wait for the others."""
    made = config()
    state = connected_state(made, world)
    if world.rank == 0:  # alone, and nobody is waited for
        x = torch.randn(2, 3, 16, 16, requires_grad=True)
        scores = state.d_replica(x, torch.zeros(2, dtype=torch.long))
        torch.autograd.grad(scores.sum(), x, create_graph=True)
        torch.autograd.grad(scores.sum(), list(state.discriminator.parameters()))
        state.discriminator.requires_grad_(False)
        state.discriminator(x, torch.zeros(2, dtype=torch.long)).sum().backward()
        state.discriminator.requires_grad_(True)
        assert not state.d_replica._travelling
    take_steps(state, made, world, [3, 4])


def resumption(world):
    """A resumed run has the bits of one that went on, though DistributedDataParallel orders its buckets as it runs."""
    made = config()
    straight = take_steps(connected_state(made, world), made, world, [1, 2])
    saved = copy.deepcopy(straight.state_dict())
    take_steps(straight, made, world, [3, 4])
    resumed = new_state(made, world.device)
    resumed.load_state_dict(saved)
    resumed.connect(world, made)
    assert resumed.g_replica.buckets == straight.g_replica.buckets
    assert_same(take_steps(resumed, made, world, [3, 4]).state_dict(), straight.state_dict())


def overlap(world):
    """The first bucket is on its way before the first layers of the network have their gradients."""
    made = config()
    state = connected_state(made, world)
    for replica, first in ((state.d_replica, state.discriminator.blocks[0]), (state.g_replica, state.generator.linear)):
        sent = []
        hook = first.register_full_backward_hook(lambda *_, of=replica, to=sent: to.append(len(of._travelling)))
        x = torch.randn(2, 3, 16, 16) if replica is state.d_replica else torch.randn(2, 128)
        for part in range(2):
            with replica.accumulating(part, 2):
                replica(x, torch.zeros(2, dtype=torch.long)).sum().backward()
        hook.remove()
        assert sent[0] == 0 and 0 < sent[1] < len(replica.buckets) == len(replica._travelling)
        replica.finish()


def compression(world):
    """Gradients rounded to bfloat16 on their way are close to the others, and not the same."""
    found = []
    for name in ("none", "bf16"):
        made = config(gradient_compression=name)
        state = connected_state(made, world)
        images, labels = batch(made, 9)
        noise = Noise(made, 0, world.device, world)
        discriminator_gradient(state, images[world.rank :: world.size].float() / 127.5 - 1,
                               labels[world.rank :: world.size], noise)[1]()  # fmt: skip
        found.append(torch.cat([g.flatten() for g in gradients(state.discriminator)]))
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 1e-2


def a_parameter_without_a_gradient(world):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match=r"every parameter must get a gradient, got none for \['unused.weight'"):
        Replica(Net()).connect(world, 25.0, "none", nullcontext(), torch.ones(2, 3))


def checks(folder):
    with connected("cpu", 60) as world:
        for check in (
            means_of_plain_gradients, gradients_that_do_not_travel, resumption, overlap, compression,
        ):  # fmt: skip
            check(world)
            assert world.gather(check.__name__) == [check.__name__] * world.size
        (folder / f"{world.rank}").touch()
        a_parameter_without_a_gradient(world)


def test_three_processes(tmp_path):
    assert run_ranks(checks, 3, tmp_path) == [0, 0, 0]


def test_alone_a_replica_is_its_network():
    with connected("cpu", 1) as world:
        replica = Replica(network := nn.Linear(2, 1))
        replica.connect(world, 25.0, "none", nullcontext(), torch.ones(1, 2))
        assert not dist.is_initialized() and replica.parallel is None and replica.buckets == []
        assert torch.equal(replica(torch.ones(1, 2)), network(torch.ones(1, 2)))
        with replica.accumulating(0, 2):
            replica(torch.ones(1, 2)).sum().backward()
        replica.finish()
        assert torch.equal(network.weight.grad, torch.ones(1, 2))
