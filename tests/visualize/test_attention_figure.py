import torch

from sagan_fast import SelfAttention2d
from sagan_fast.visualize import drawing
from sagan_fast.visualize.attention_figure import GAP, figure, figure_row, sweep_frames, sweep_path
from sagan_fast.visualize.grids import to_uint8


def looking_at_itself(side):
    """A block, and an input of one channel a place, of which every query attends to the pooled key it lies in."""
    block = SelfAttention2d(side**2, qk_channels=side**2, v_channels=1)
    with torch.no_grad():
        block.theta.weight.copy_(50 * torch.eye(side**2)[:, :, None, None])
        block.phi.weight.copy_(torch.eye(side**2)[:, :, None, None])
    return block, torch.eye(side**2).reshape(1, side**2, side, side)


def test_the_row_shows_the_image_with_all_dots_then_each_where_it_looks():
    block, x = looking_at_itself(8)
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    queries = [9, 30, 63]
    row = figure_row(image, block, x, queries, "ring")
    size = 160
    assert row.shape[2] == 4 * size + 3 * GAP and row.dtype == torch.uint8
    shown = row[:, :size, :size]
    untouched = drawing.enlarged(to_uint8(image[None])[0], size)
    assert (shown != untouched).any(0).float().mean() < 0.02  # the image, but for three dots
    for i, query in enumerate(queries):
        left = (i + 1) * (size + GAP)
        panel = row[:, :size, left : left + size].float()
        y, x_ = (int((n + 0.5) * size / 8) for n in divmod(query, 8))
        colour = torch.tensor(drawing.COLOURS[i]).float()
        assert torch.equal(panel[:, y, x_], colour) and torch.equal(shown[:, y, x_].float(), colour)
        cell = size // 4
        top, start = (n // 2 * cell for n in divmod(query, 8))
        inside = panel[:, top : top + cell, start : start + cell].mean()
        mask = torch.ones(size, size, dtype=torch.bool)
        mask[max(0, top - cell) : top + 2 * cell, max(0, start - cell) : start + 2 * cell] = False
        assert inside > 2 * panel[:, mask].mean()  # lit around the dot, dim elsewhere
    assert row[:, size:, :size].min() < 100  # the title's ink
    whole = figure([row, row])
    assert whole.shape[2] == row.shape[2] + 2 * GAP and whole.shape[1] > 2 * row.shape[1] + 3 * GAP


def test_the_sweep_goes_over_the_whole_map_in_small_steps():
    path = sweep_path((32, 32), 96)
    assert 60 < len(path) <= 96 and len(set(path)) == len(path)
    places = torch.tensor([divmod(query, 32) for query in path]).float()
    assert places.amin(0).max() <= 3 and places.amax(0).min() >= 28
    assert (places.diff(dim=0).abs().sum(1) <= 4).all()
    assert sweep_path((4, 4), 1000) != [] and max(sweep_path((4, 4), 1000)) == 15 and len(sweep_path((8, 8), 1)) == 1


def test_the_light_follows_the_dot():
    block, x = looking_at_itself(8)
    images = torch.zeros(3, 3, 32, 32)
    frames = sweep_frames(images, block, x.expand(3, -1, -1, -1), 16)
    assert len(frames) == 16 and len({frame.shape for frame in frames}) == 1
    assert frames[0].shape[1] > 2 * 160 and frames[0].shape[2] > 4 * 160  # two columns of image and map
    for query, frame in zip(sweep_path((8, 8), 16), frames, strict=True):
        seen = frame[:, GAP : GAP + 160, GAP + 160 + GAP : GAP + 320 + GAP].float().mean(0)
        light = (seen > 90).nonzero().float().mean(0)
        y, x_ = ((n // 2 * 2 + 1) * 20.0 for n in divmod(query, 8))
        assert (light - torch.tensor([y, x_])).abs().max() < 16
    (alone,) = sweep_frames(images[:1], block, x, 1)
    assert alone.shape[2] > 2 * 240  # one image fills the animation too


def test_even_attention_is_said_and_not_drawn_black():
    block, x = looking_at_itself(8)
    with torch.no_grad():
        block.theta.weight.zero_()  # every weight is 1/M
    row = figure_row(torch.zeros(3, 32, 32), block, x, [9], "ring").float()
    panel = row[:, :160, 166:326]
    assert panel[:, 100:150, 100:150].amin() < panel[:, 100:150, 100:150].amax()  # lit in the dot's colour
    assert panel.mean() > 60 and (row[:, 160:, 166:].amin(0) < 128).sum() > 100  # and words below


def test_many_points_go_into_lines_and_none_is_lost():
    block, x = looking_at_itself(8)
    row = figure_row(torch.zeros(3, 32, 32), block, x, list(range(0, 64, 5)), "ring")
    assert row.shape[2] == 7 * 160 + 6 * GAP and row.shape[1] > 3 * 160
    last = row[:, 2 * (row.shape[1] + GAP) // 3 :]
    assert (last[:, :100, :160] == 255).all() and (last[:, :100, 170:320] != 255).any()  # the 13th, under the 7th
