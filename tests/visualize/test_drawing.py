import torch

from sagan_fast.visualize import drawing


def test_a_dot_is_where_it_should_be_and_shows_on_anything():
    for ground in (0, 128, 255):
        picture = torch.full((3, 40, 60), ground, dtype=torch.uint8)
        out = drawing.with_dot(picture, 30.0, 10.0, (255, 0, 0), 6.0)
        assert out[:, 10, 30].tolist() == [255, 0, 0] and out.dtype == torch.uint8
        changed = (out != picture).any(0).nonzero().float() + 0.5
        assert (changed.mean(0) - torch.tensor([10.0, 30.0])).abs().max() < 0.6
        assert (changed - torch.tensor([10.0, 30.0])).norm(dim=1).max() < 7.5
        ring = out[:, 10, 30:37].float().mean(0)
        assert ring.max() > 200 and ring.min() < 130  # white and dark beside each other
    assert torch.equal(drawing.with_dot(picture, -50.0, 10.0, (255, 0, 0), 6.0), picture)


def test_what_is_looked_at_is_brighter_and_of_the_colour():
    picture = torch.randint(256, (3, 8, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    heat = torch.linspace(0, 1, 100).expand(8, -1)
    out = drawing.lit(picture, heat, (255, 60, 50)).float()
    gray = (picture.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    torch.testing.assert_close(out[0, :, 0], 0.3 * gray[:, 0], atol=0.51, rtol=0)
    assert torch.equal(out[0, :, 0], out[2, :, 0])  # no colours where nothing is looked at
    light = drawing.lit(torch.full((3, 8, 100), 90, dtype=torch.uint8), heat, (255, 60, 50)).float().mean(0)[0]
    assert (light.diff() >= -0.5).all() and light[-1] > 200
    assert (out[0] - out[2])[:, 55:65].min() > 80


def test_pictures_are_put_together():
    red, blue = torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(3, 4, 3, dtype=torch.uint8)
    red[0], blue[2] = 255, 255
    row = drawing.beside([red, blue], 2)
    assert row.shape == (3, 4, 10) and row[:, 0, 5].tolist() == [255] * 3 and row[2, 3, 7] == 255
    column = drawing.framed(drawing.below([red, blue], 1), 3)
    assert column.shape == (3, 15, 11) and column[:, 0, 0].tolist() == [255] * 3
    assert column[:, 8, 3].tolist() == [0, 0, 255] and column[:, 8, 7].tolist() == [255] * 3
    assert drawing.enlarged(red[None], 11).shape == (1, 3, 12, 15)


def test_text_fits():
    words = drawing.text("goldfish", 14)
    assert (words.amin(0) < 100).sum() > 30 and words[:, 0].min() == 255  # ink, and none at the edge
    short = drawing.shortened("a very long name of a class", 14, 60)
    assert short.endswith("...") and drawing.text(short, 14).shape[2] <= 62
    assert drawing.shortened("ring", 14, 60) == "ring"


def test_any_number_of_colours_lie_apart():
    colours = torch.tensor([drawing.colour(i) for i in range(24)]).float()
    apart = torch.cdist(colours, colours) + 1e3 * torch.eye(24)
    assert [tuple(c) for c in colours[:8].int().tolist()] == list(drawing.COLOURS)
    assert apart.min() > 24, divmod(int(apart.argmin()), 24)


def test_a_paragraph_is_never_cut():
    words = "mirrored triangles of an unconventionallylongword"
    picture = drawing.paragraph(words, 13, 90)
    assert picture.shape[2] <= 90 and picture.shape[1] >= 4 * 18
    ink = (picture.amin(0) < 128).sum()
    whole = (drawing.text(words, 13).amin(0) < 128).sum()
    assert abs(int(ink) - int(whole)) < 0.15 * whole  # every letter is there
    assert drawing.paragraph("ring", 13, 90).shape == drawing.text("ring", 13).shape
