"""Queries, rows and pictures line up: checked with a block whose attention is known."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sagan_fast import Discriminator, Generator, SelfAttention2d
from sagan_fast.errors import InputError
from sagan_fast.visualize import attention_maps as maps
from shared_by_tests import randn


def looking_at_itself(H, W, pool):
    """A block, and an input of one channel a place, of which every query attends to the key that it lies in."""
    block = SelfAttention2d(H * W, qk_channels=H * W, v_channels=1, pool=pool)
    with torch.no_grad():
        block.theta.weight.copy_(50 * torch.eye(H * W)[:, :, None, None])
        block.phi.weight.copy_(torch.eye(H * W)[:, :, None, None])
    return block, torch.eye(H * W).reshape(1, H * W, H, W)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(("H", "W"), [(6, 6), (4, 8), (5, 7)])
def test_a_query_that_attends_to_itself_lights_up_under_its_dot(H, W, pool):
    block, x = looking_at_itself(H, W, pool)
    height, width = 12 * H, 12 * W
    queries = list(range(H * W))
    pictures = maps.on_picture(maps.rows_of(block, x, queries), (H, W), pool, height, width)
    assert pictures.shape == (H * W, height, width)
    cell = 2 if pool else 1
    for query, picture in zip(queries, pictures, strict=True):
        row, column = divmod(query, W)
        if row >= H // cell * cell or column >= W // cell * cell:
            continue  # an odd last row or column is no key, so its queries have nothing of their own to look at
        assert picture.max() > 0.9
        peak = divmod(int(picture.argmax()), width)
        assert peak[0] // (12 * cell) == row // cell and peak[1] // (12 * cell) == column // cell
        x_dot, y_dot = maps.centre_of(query, (H, W), height, width)
        assert picture[int(y_dot), int(x_dot)] > 0.5


def test_each_key_is_drawn_where_it_is():
    rows = torch.eye(6)  # the 2 x 3 keys of a pooled 5 x 7 map
    pictures = maps.on_picture(rows, (5, 7), True, 50, 70)
    for key, picture in enumerate(pictures):
        top, left = 20 * (key // 3), 20 * (key % 3)
        assert picture[top + 9 : top + 11, left + 9 : left + 11].min() > 0.9
        if key == 1:  # not at a border, where the value is held
            weight = picture.sum(0)
            assert abs((weight * (torch.arange(70) + 0.5)).sum() / weight.sum() - (left + 10)) < 0.1
        assert picture[40:].abs().sum() == 0 and picture[:, 60:].abs().sum() == 0
    torch.testing.assert_close(pictures.sum(0)[:40, :60], torch.ones(40, 60))


def test_points_are_pixels_of_the_image():
    assert maps.positions_at([(0, 0), (63, 0), (0, 63), (33.5, 20)], (32, 32), 64) == [0, 31, 31 * 32, 10 * 32 + 16]
    for point in ((64, 0), (0, -1)):
        with pytest.raises(InputError, match="points must lie in the image, x and y in 0 to 63, got"):
            maps.positions_at([point], (32, 32), 64)


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_only_the_rows_asked_for_are_computed_and_nothing_moves(network, generator):
    model = network.from_preset("official-128-feat64", num_classes=3, base_channels=4).train()
    before = copy.deepcopy(model.state_dict())
    name, layer = maps.attention_layer(model)
    images = randn(2, 3, 128, 128, generator=generator, dtype=torch.float32)
    z = randn(2, 128, generator=generator, dtype=torch.float32)
    x, out = maps.attention_input(model, layer, z if network is Generator else images, torch.tensor([0, 2]))
    assert name == "attentions.64" and x.shape[2:] == (64, 64)
    with Sizes() as sizes:
        rows = maps.rows_of(layer, x[:1], [5, 4095, 77])
        maps.spread_queries(layer, x[:1], 5)
    assert rows.shape == (3, 1024) and sizes.largest < 4096 * 1024 / 8
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    expected = model.eval()(z if network is Generator else images, torch.tensor([0, 2]))
    torch.testing.assert_close(out, expected.detach())
    whole = layer.attention_map(x[:1])[0]
    torch.testing.assert_close(rows, whole[[5, 4095, 77]])


def test_modes_are_put_back_after_an_error():
    model = Generator.from_preset("shapes-32", base_channels=4).train()
    model.norm.eval()
    _, layer = maps.attention_layer(model)
    with pytest.raises(ValueError, match="z must have shape"):
        maps.attention_input(model, layer, torch.zeros(1, 3), torch.tensor([0]))
    assert not model.norm.training and model.blocks[0].training and not layer._forward_pre_hooks


def test_layers_are_found_by_name_and_by_size():
    config = {"base_channels": 4, "attention_resolutions": (8, 16)}
    model = Generator.from_preset("shapes-32", **config)
    assert maps.attention_layer(model)[0] == "attentions.16"
    assert maps.attention_layer(model, "8")[1] is maps.attention_layer(model, "attentions.8")[1]
    with pytest.raises(InputError, match="has no attention layer '64': it has attentions.8, attentions.16"):
        maps.attention_layer(model, "64")
    with pytest.raises(InputError, match="the generator has no attention layer, so there is nothing to look at"):
        maps.attention_layer(Generator.from_preset("shapes-32", base_channels=4, attention_resolutions=()))


def test_spread_queries_start_where_attention_is_concentrated(generator):
    block, x = looking_at_itself(8, 8, False)
    with torch.no_grad():
        block.theta.weight.mul_(0.02)  # all the same and mild
        block.theta.weight[27] *= 40.0  # but at one place
    chosen = maps.spread_queries(block, x, 5)
    assert chosen[0] == 27 and len(set(chosen)) == 5
    places = torch.tensor([divmod(query, 8) for query in chosen]).float()
    assert torch.pdist(places).min() >= 2
    assert len(maps.spread_queries(SelfAttention2d(2), torch.zeros(1, 2, 2, 2), 9)) == 4  # no more than there are


def test_even_attention_looks_even():
    pictures = torch.stack([torch.linspace(0.1, 0.2, 6).reshape(2, 3), torch.full((2, 3), 0.25)])
    warm = maps.heat(pictures, torch.tensor([3.0, 1.0]))
    assert warm[0].min() == 0 and warm[0].max() == 1 and warm[1].eq(0).all()
    assert maps.heat(pictures, torch.tensor([1.25, 1.0]))[0].max() == pytest.approx(0.5)
