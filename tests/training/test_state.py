import copy

import torch

from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import new_state


def small(**overrides):
    narrow = {"base_channels": 4}
    return TrainConfig.from_preset("shapes-32", out="x", generator=narrow, discriminator=narrow, **overrides)


def flat(tree):
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in flat(tree[key])]
    return [leaf for item in tree for leaf in flat(item)] if isinstance(tree, (list, tuple)) else [tree]


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    first = new_state(small(seed=3), torch.device("cpu"))
    drawn = torch.rand(3)
    second = new_state(small(seed=3), torch.device("cpu"))
    other = new_state(small(seed=4), torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    weights = [s.generator.linear.parametrizations.weight.original for s in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_state_is_what_its_dictionary_says(tmp_path):
    state, other = (new_state(small(seed=s), torch.device("cpu")) for s in (1, 2))
    for model, optimizer in ((state.generator, state.g_optimizer), (state.discriminator, state.d_optimizer)):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    state.step = 17
    torch.save(state.state_dict(), tmp_path / "s.pt")
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    for a, b in zip(flat(state.state_dict()), flat(other.state_dict()), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_checkpoint_of_contiguous_tensors_goes_on_as_one_of_channels_last():
    """Fused Adam pairs moments and weights by their place in memory, so the moments must take the weights' strides."""

    def contiguous(tree):
        if isinstance(tree, dict):
            return {key: contiguous(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(contiguous(value) for value in tree)
        return tree.clone(memory_format=torch.contiguous_format) if isinstance(tree, torch.Tensor) else tree

    def step(state):
        generator = torch.Generator().manual_seed(2)
        for model, optimizer in ((state.generator, state.g_optimizer), (state.discriminator, state.d_optimizer)):
            for p in model.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()

    state, same, other = (new_state(small(), torch.device("cpu")) for _ in range(3))
    step(state)
    saved = copy.deepcopy(state.state_dict())
    same.load_state_dict(saved)
    other.load_state_dict(contiguous(saved))
    for resumed in (same, other):
        step(resumed)
    for a, b in zip(flat(same.state_dict()), flat(other.state_dict()), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_averaged_generator_starts_as_the_generator_and_learns_nothing_itself():
    state = new_state(small(), torch.device("cpu"))
    assert not state.ema.training and not any(p.requires_grad for p in state.ema.parameters())
    z, y = torch.randn(2, 128), torch.tensor([1, 2])
    torch.testing.assert_close(state.ema(z, y), state.generator.eval()(z, y))


def test_maps_are_channels_last_as_the_weights_are_and_stay_contiguous_with_others():
    def formats(model, *inputs):
        found = []
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda _, __, out: (
                        found.append(out.is_contiguous(memory_format=torch.channels_last))
                        if min(out.shape[1:]) > 1
                        else None
                    )
                )
        model(*inputs)
        return found

    state = new_state(small(), torch.device("cpu"))
    labels = torch.zeros(2, dtype=torch.long)
    inputs = {"generator": (torch.randn(2, 128), labels), "discriminator": (torch.randn(2, 3, 32, 32), labels)}
    for name, given in inputs.items():
        model = getattr(state, name)
        assert len(formats(model, *given)) > 5 and all(formats(model, *given))
        assert not any(formats(model.to(memory_format=torch.contiguous_format), *given))
