"""Pictures with faces: drawn ones, and scikit-image's 25-pixel gray faces (LFW's) on its textures and photographs."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sagan_fast.faces.wider import Picture

TRAINED_ON = ("brick.png", "grass.png", "coffee.png", "chelsea.png")
HELD_OUT = ("motorcycle_left.png", "rocket.jpg", "gravel.png")
BACKGROUNDS = {True: TRAINED_ON, False: HELD_OUT}
FACES = {True: slice(0, 80), False: slice(80, 100)}
"""The first hundred of lfw_subset.npy are faces, the others parts of photographs without one."""


def drawn_picture(rng, size=256, most=3):
    """Return a drawn picture (size, size, 3) and its faces (N, 4): ovals with eyes and a mouth, one to `most`."""
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    draw, faces = ImageDraw.Draw(image), []
    while len(faces) < rng.integers(1, most + 1):
        side = int(rng.integers(size // 8, 3 * size // 8))
        x, y = (int(v) for v in rng.integers(4, size - side - 4, 2))
        box = (x, y, x + side, y + side)
        if any(x < f[2] and f[0] < box[2] and y < f[3] and f[1] < box[3] for f in faces):
            continue
        draw.ellipse(box, fill=(224, 180, 150), outline=(90, 60, 40))
        for left in (0.25, 0.6):
            draw.ellipse(
                (x + left * side, y + 0.3 * side, x + (left + 0.15) * side, y + 0.45 * side), fill=(20, 20, 30)
            )
        draw.rectangle((x + 0.3 * side, y + 0.7 * side, x + 0.7 * side, y + 0.78 * side), fill=(150, 30, 40))
        faces.append(box)
    return np.asarray(image), np.array(faces, np.float32)


def composed(folder: Path, training: bool, count: int, side: int, sizes: tuple[int, int], rng) -> list[Picture]:
    """Return `count` pictures of `side` pixels in memory, each with one to four faces of `sizes` pixels.

    Pictures for training and for scoring share no face and no background. Non-faces are pasted as well, so that the
    edge of a pasted square says nothing.
    """
    patches = np.load(folder / "lfw_subset.npy")
    patches = (patches / patches.max() * 255).astype(np.uint8)
    faces, others = patches[:100][FACES[training]], patches[100:][FACES[training]]
    grounds = [Image.open(folder / name).convert("RGB") for name in BACKGROUNDS[training]]
    pictures = []
    for _ in range(count):
        image = _part(grounds[rng.integers(len(grounds))], side, rng)
        taken, boxes = [], []
        for kind in ["face"] * int(rng.integers(1, 5)) + ["other"] * int(rng.integers(0, 4)):
            size = int(rng.integers(*sizes))
            x, y = (int(v) for v in rng.integers(0, side - size, 2))
            box = (x, y, x + size, y + size)
            if any(x < t[2] and t[0] < box[2] and y < t[3] and t[1] < box[3] for t in taken):
                continue
            source = faces if kind == "face" else others
            patch = Image.fromarray(source[rng.integers(len(source))]).resize((size, size), Image.Resampling.BICUBIC)
            image.paste(patch.convert("RGB"), box)
            taken.append(box)
            if kind == "face":
                boxes.append(box)
        pictures.append(Picture(Path("composed"), np.array(boxes, np.float32).reshape(-1, 4), np.asarray(image)))
    return pictures


def _part(ground: Image.Image, side: int, rng) -> Image.Image:
    """Return a random square of `ground`, half to all of it, as (side, side)."""
    part = int(min(ground.size) * rng.uniform(0.5, 1))
    x, y = (int(rng.integers(extent - part + 1)) for extent in ground.size)
    return ground.crop((x, y, x + part, y + part)).resize((side, side), Image.Resampling.BILINEAR)
