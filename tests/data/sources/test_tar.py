"""Tar shards as `tarfile` writes them: labels, order, compression, and everything that can be wrong with one."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.packed_check import check
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import open_source
from sagan_fast.errors import InputError


def image_bytes(rng, kind="PNG", mode="RGB"):
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).convert(mode).save(out, kind)
    return out.getvalue()


def write(path, members, mode="w"):
    """Write (name, bytes) members; returns the path."""
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def samples(rng):
    """Ten samples of odd names and kinds: key, extension, image, label."""
    kinds = [("jpg", "JPEG", "RGB"), ("JPEG", "JPEG", "CMYK"), ("png", "PNG", "L"), ("webp", "WEBP", "RGB")]
    made = []
    for i in range(10):
        extension, kind, mode = kinds[i % 4]
        made.append((f"part {i // 5}/dör, {i}’&", extension, image_bytes(rng, kind, mode), i * 7 % 4))
    return made


def members(samples, labels="cls"):
    for key, extension, image, label in samples:
        yield f"{key}.{extension}", image
        if labels == "cls":
            yield f"{key}.cls", b"%d\n" % label
        elif labels == "json":
            yield f"{key}.json", json.dumps({"label": label, "width": 12}).encode()


def expect(out, samples, resolution=8):
    """Assert that the packed set in `out` holds exactly `samples`, in order."""
    data = open_dataset(f"packed:{out}", resolution=resolution)
    assert len(data) == len(samples)
    for (image, label), (_, _, encoded, wanted) in zip(data, samples, strict=True):
        assert label == wanted and (image == read_image(io.BytesIO(encoded), resolution)).all()
    check(out)


def pack(source, out, **options):
    return prepare(source, out, **{"resolution": 8, "num_workers": 0, **options})


@pytest.mark.parametrize("labels", ["cls", "json"])
@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar", "w:gz")])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_several_shards(samples, tmp_path, labels, suffix, mode, num_workers):
    (tmp_path / "in").mkdir()
    for number, part in enumerate((samples[:4], samples[4:5], samples[5:])):
        write(tmp_path / "in" / f"train-{number:04}.{suffix}", members(part, labels), mode)
    for number, pattern in enumerate(("", f"train-{{0000..0002}}.{suffix}", "train-*", f"train-000{{0,1,2}}.{suffix}")):
        source = open_source(str(tmp_path / "in" / pattern))
        assert source.kind == "tar"
        manifest = pack(source, tmp_path / f"out{number}", num_workers=num_workers)
        assert manifest.class_names == ["0", "1", "2", "3"] and manifest.num_broken == 0
        expect(tmp_path / f"out{number}", samples)


def test_interrupted_and_continued(samples, tmp_path, monkeypatch):
    import sagan_fast.data.prepare as module

    monkeypatch.setattr(module, "TASK_BYTES", 1)
    for mode in ("w", "w:gz"):
        shards = [
            write(tmp_path / f"{mode[2:]}{n}.tar", members(part), mode)
            for n, part in enumerate((samples[:5], samples[5:]))
        ]
        out = tmp_path / f"out{mode[2:]}"
        positions = []
        for _ in range(4):
            source = open_source("{" + ",".join(map(str, shards)) + "}")
            seen = []
            pack(source, out, on_progress=lambda p, to=seen: to.append(p.position), stop=lambda to=seen: len(to) == 4)
            positions += seen
        assert positions == sorted(positions) and positions[-1] <= source.total
        expect(out, samples)


def test_unlabelled(samples, tmp_path):
    flat = [(key.partition("/")[2], *rest) for key, *rest in samples]
    manifest = pack(open_source(write(tmp_path / "a.tar", members(flat, None))), tmp_path / "out")
    assert manifest.class_names == [] and manifest.num_images == 10


def test_class_folders_in_a_tar_are_not_taken_for_one_class(samples, tmp_path):
    for mode in ("w", "w:gz"):
        with pytest.raises(
            InputError, match=r"no labels .*, but folders of images \(part 0, part 1, \.\.\.\): .*unpack"
        ):
            open_source(write(tmp_path / "a.tar", members(samples, None), mode))


def test_labels_counted_from_one_and_names(samples, tmp_path):
    shifted = [(*rest, label + 1) for *rest, label in samples]
    source = open_source(write(tmp_path / "a.tar", members(shifted)), first_label=1)
    manifest = pack(source, tmp_path / "out", class_names=["a", "b", "c", "d"])
    assert manifest.class_names == ["a", "b", "c", "d"]
    expect(tmp_path / "out", samples)


def broken_of(source, out):
    manifest = pack(source, out, on_broken="skip")
    check(out)
    path = out / "broken.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return manifest.num_images, [line.partition(".tar/")[2] for line in lines]


def test_what_is_wrong_with_single_samples(rng, tmp_path):
    image = image_bytes(rng)
    listed = [
        ("good.png", image), ("good.cls", b"0"),
        ("._good.png", b"hidden"), ("__MACOSX/x.png", image), ("readme.txt", b"ignored"), ("no_extension", b""),
        ("words.png", image), ("words.cls", b"cat"),
        ("none.png", image),
        ("negative.png", image), ("negative.cls", b"-1"),
        ("huge.png", image), ("huge.cls", b"99999999999999999999"),
        ("noimage.cls", b"1"),
        ("twice.png", image), ("twice.v2.png", image), ("twice.cls", b"0"),
        ("cut.png", image[:60]), ("cut.cls", b"0"),
        ("good.png", image), ("good.cls", b"0"),
        ("empty.png", b""), ("empty.cls", b"0"),
        ("badjson.png", image), ("badjson.json", b"{"),
        ("last.png", image), ("last.json", b'{"cls": "1"}'), ("last.cls", b" 1 \n"),
    ]  # fmt: skip
    images, lines = broken_of(open_source(write(tmp_path / "a.tar", listed)), tmp_path / "out")
    assert images == 2
    expected = [
        ("words.png", "its label 'cat' is not a whole number"),
        ("none.png", "it has no label, and others have one"),
        ("negative.png", "its label -1 is not in 0..1000000"),
        ("huge.png", "its label 99999999999999999999 is not in"),
        ("twice.png", "it has a second image, twice.v2.png (a key ends at the first dot)"),
        ("cut.png", ""),
        ("good.png", "another sample of its shard has the same key"),
        ("empty.png", "it is not an image that Pillow can read"),
        ("badjson.png", "it has no label"),
    ]
    assert len(lines) == len(expected)
    for line, (name, reason) in zip(lines, expected, strict=True):
        assert line.startswith(f"{name}: {reason}")


def test_a_label_where_there_are_none(rng, tmp_path):
    image = image_bytes(rng)
    path = write(tmp_path / "a.tar", [("a.png", image), ("b.png", image), ("b.cls", b"1")])
    assert broken_of(open_source(str(path)), tmp_path / "out") == (
        1,
        ["a.png: it has no label, and others have one"],
    )


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_cut_short_anywhere(samples, tmp_path, mode, rng):
    whole = write(tmp_path / "whole.tar", members(samples), mode).read_bytes()
    end = len(whole) if mode == "w:gz" else len(whole.rstrip(b"\0")) // 512 * 512 + 512
    second = write(tmp_path / "second.tar", [("z.png", image_bytes(rng)), ("z.cls", b"3")])
    sizes = [700, 1600, 2100, 2700, *rng.integers(700, end - 1, 8).tolist(), end // 512 * 512 - 512]
    for number, size in enumerate(sorted(sizes)):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(whole[:size])
        source = open_source(f"{{{path},{second}}}", kind="tar")
        images, lines = broken_of(source, tmp_path / f"out{number}")
        assert any("the shard is damaged or cut short after" in line for line in lines), (size, lines)
        assert len(lines) <= 2 and 1 <= images <= 11  # the second shard loses nothing
        assert np.load(tmp_path / f"out{number}" / "labels.npy")[-1] == 3


def test_a_set_without_labels_cut_short(rng, tmp_path):
    whole = write(tmp_path / "a.tar", [("a.png", image_bytes(rng)), ("b.png", image_bytes(rng))]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"no sample .* can be found: .*cut\.tar/a\.png: the shard ends within it"):
        open_source(str(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(whole[:1200])
    assert broken_of(open_source(str(tmp_path / "cut.tar")), tmp_path / "out")[0] == 1


def test_a_shard_that_ends_between_two_members(samples, tmp_path):
    path = write(tmp_path / "a.tar", members(samples))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    cut = tmp_path / "b.tar"
    cut.write_bytes(path.read_bytes()[:offset])
    images, lines = broken_of(open_source(str(cut)), tmp_path / "out")
    assert images == 3 and lines == ["*: the shard is damaged or cut short after 3 keys (it has no end mark)"]


def test_a_flipped_bit_in_a_compressed_shard_is_seen(samples, tmp_path):
    path = write(tmp_path / "a.tar", members(samples), "w:gz")
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the check sum at the end
    path.write_bytes(content)
    images, lines = broken_of(open_source(str(path)), tmp_path / "out")
    assert images == 10 and len(lines) == 1 and "CRC check failed" in lines[0]


def test_a_file_that_changed_meanwhile(samples, tmp_path):
    path = write(tmp_path / "a.tar", members(samples))
    source = open_source(str(path))
    last = list(source.items())[-1]
    path.write_bytes(path.read_bytes()[: last.offset + 5])
    with pytest.raises(BrokenImageError, match="the shard ends within it"):
        source.read(last, 8)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BrokenImageError, match="No such file"):
        source.read(last, 8)


def test_no_tar_files(tmp_path, rng):
    def message(data, kind="tar"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(InputError) as caught:
            open_source(str(tmp_path / "x"), kind=kind)
        return str(caught.value)

    assert "is no tar file" in message(rng.bytes(2000)) and "is no tar file" in message(b"")
    assert "is compressed with zstd: unpack it" in message(b"\x28\xb5\x2f\xfd" + bytes(600))
    assert "holds no sample" in message(write(tmp_path / "empty.tar", [("a.txt", b"x")]).read_bytes(), "auto")
    assert "holds no sample" in message(gzip.compress(bytes(10240)))
    assert "is no tar" in message(gzip.compress(b"no tar" * 300)) or "holds no sample" in message(
        gzip.compress(b"x" * 99)
    )
