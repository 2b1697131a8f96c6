"""TFRecord files, written by the format's description and with Google's protobuf, and read back by TensorBoard."""

import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.packed_check import check
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import open_source
from sagan_fast.data.sources.base import fit
from sagan_fast.data.sources.tfrecord import masked_crc32c, parse_example
from sagan_fast.errors import InputError

masked_crc = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow").masked_crc32c


def example_class():
    """Return tf.train.Example, made from its description by Google's protobuf."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="test", syntax="proto3")
    types = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, (field, kind, repeated, of) in enumerate(fields, 1):
            added = made.field.add(name=field, number=number, type=kind, label=3 if repeated else 1)
            if of:
                added.type_name = f".test.{of}"
        return made

    message("BytesList", ("value", types.TYPE_BYTES, True, ""))
    message("FloatList", ("value", types.TYPE_FLOAT, True, ""))
    message("Int64List", ("value", types.TYPE_INT64, True, ""))
    kinds = [(f"{k}_list", types.TYPE_MESSAGE, False, f"{k.title()}List") for k in ("bytes", "float", "int64")]
    message("Feature", *kinds)
    features = message("Features", ("feature", types.TYPE_MESSAGE, True, "Features.Entry"))
    entry = features.nested_type.add(name="Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=types.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=types.TYPE_MESSAGE, label=1, type_name=".test.Feature")
    message("Example", ("features", types.TYPE_MESSAGE, False, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Example"))


Example = example_class()


def example(**features):
    made = Example()
    for name, value in features.items():
        feature = made.features.feature[name.replace("__", "/")]
        values = value if isinstance(value, list) else [value]
        kind = {bytes: feature.bytes_list, int: feature.int64_list, float: feature.float_list}[type(values[0])]
        kind.value.extend(values)
    return made.SerializeToString(deterministic=True)


def frame(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def write(path, examples, compress=False):
    content = b"".join(map(frame, examples))
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)


def recipe(images, first=0):
    """Yield examples as improved-GAN's convert_imagenet_to_records.py makes them; image i has label i % 4."""
    for i, image in enumerate(images):
        height, width, depth = image.shape
        yield example(height=height, width=width, depth=depth, image_raw=image.tobytes(), label=first + i % 4)


def pack(source, out, **options):
    return prepare(source, out, **{"resolution": 8, "num_workers": 0, **options})


def test_the_writer_here_writes_what_tensorboard_reads(images, tmp_path):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    records = list(recipe(images[:3]))
    reader = PyRecordReader_New(str(write(tmp_path / "a.tfrecords", records)))
    for record in records:
        reader.GetNext()
        assert reader.record() == record


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_improved_gan_recipe_in_several_files(images, tmp_path, num_workers, compress):
    (tmp_path / "in").mkdir()
    records = list(recipe(images))
    for number, part in enumerate((records[:2], records[2:3], records[3:])):
        write(tmp_path / "in" / f"imagenet_train_labeled_{number}.tfrecords", part, compress)
    source = open_source(str(tmp_path / "in"))
    assert source.kind == "tfrecord"
    manifest = pack(source, tmp_path / "out", num_workers=num_workers)
    assert manifest.class_names == ["0", "1", "2", "3"] and manifest.num_broken == 0
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8)
    assert np.array_equal(np.stack([image.permute(1, 2, 0).numpy() for image, _ in data]), images)
    assert data.labels.tolist() == [i % 4 for i in range(9)]
    check(tmp_path / "out")


def test_the_released_code_asks_for_no_size(images, tmp_path):
    records = [example(image_raw=image.tobytes(), label=0) for image in images]
    pack(open_source(write(tmp_path / "a", records)), tmp_path / "out")
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8)
    assert np.array_equal(data[5][0].permute(1, 2, 0).numpy(), images[5])


def test_other_sizes_and_one_channel(rng, tmp_path):
    wide, gray = rng.integers(0, 256, (9, 20, 3), dtype=np.uint8), rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)
    pack(open_source(write(tmp_path / "a", recipe([wide, gray]))), tmp_path / "out")
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8)
    assert np.array_equal(data[0][0].numpy(), fit(wide, 8))
    assert np.array_equal(data[1][0].numpy(), gray.repeat(3, 2).transpose(2, 0, 1))


@pytest.mark.parametrize("image_key", ["image_raw", "image__encoded", "image"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_encoded_images(images, tmp_path, image_key, kind):
    encoded = []
    for image in images:
        out = io.BytesIO()
        Image.fromarray(image).save(out, kind)
        encoded.append(out.getvalue())
    label = "image__class__label" if image_key == "image__encoded" else "label"
    extra = {"image__height": 8, "image__width": 8, "image__filename": b"x", "box": [0.5, 1.5]}
    records = [example(**{image_key: data, label: 1 + i % 4}, **extra) for i, data in enumerate(encoded)]
    pack(open_source(write(tmp_path / "a", records), first_label=1), tmp_path / "out")
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8, num_classes=4)
    for i, (image, number) in enumerate(data):
        assert number == i % 4 and (image == read_image(io.BytesIO(encoded[i]), 8)).all()


def test_raw_pixels_that_begin_like_a_jpeg(images, tmp_path):
    images[0].reshape(-1)[:3] = 0xFF, 0xD8, 0xFF
    pack(open_source(write(tmp_path / "a", recipe(images))), tmp_path / "out")
    data = open_dataset(f"packed:{tmp_path / 'out'}", resolution=8)
    assert np.array_equal(data[0][0].permute(1, 2, 0).numpy(), images[0])


def test_unlabelled(images, tmp_path):
    path = write(tmp_path / "a", [example(image_raw=image.tobytes()) for image in images])
    assert pack(open_source(str(path)), tmp_path / "out").class_names == []


def test_labels_from_one_without_saying_so_are_refused_before_the_work(images, tmp_path, monkeypatch):
    path = write(tmp_path / "a", recipe(images, first=1))
    with pytest.raises(InputError, match=r"the labels of \S+ are 1 to 4: add --first-label 1 if they are counted from"):
        open_source(path)
    monkeypatch.setattr("sagan_fast.data.sources.tfrecord.SURVEYED_BYTES", 700)  # a large set is read in part
    with pytest.raises(InputError, match=r"add --first-label 1"):
        open_source(path)
    assert open_source(write(tmp_path / "b", recipe(images))).label_counts is None
    assert pack(open_source(path, first_label=1), tmp_path / "from 1").class_counts == [3, 2, 2, 2]
    manifest = pack(open_source(path, first_label=0), tmp_path / "out")
    assert manifest.class_counts == [0, 3, 2, 2, 2]
    with pytest.raises(InputError, match=r"1 of its 5 classes \(0\) have no images: .*--first-label 1"):
        open_dataset(f"packed:{tmp_path / 'out'}", resolution=8, num_classes=5)


def test_forms_of_labels(images, tmp_path):
    def labels(forms, **options):
        records = [example(image_raw=image.tobytes(), label=label) for image, label in zip(images, forms, strict=False)]
        source = open_source(write(tmp_path / "a", records), **options)
        pack(source, tmp_path / str(len(list(tmp_path.iterdir()))))
        return source.label_counts

    one_hot = [[int(i == label) for i in range(4)] for label in (2, 0, 3, 1)]
    assert labels(one_hot) == labels([[float(n) for n in row] for row in one_hot]) == dict.fromkeys(range(4), 1)
    assert labels([1.0, 0.0, b"2"]) == dict.fromkeys(range(3), 1)
    for forms, message in (
        ([0, 0.7], r"record 1 cannot be read: its label '0\.6\d+' is not a whole number; nothing is packed yet"),
        ([[0, 1], [1, 1]], "record 1 cannot be read: its label is a vector of 2 numbers that is not one-hot"),
        ([float("nan")], "its label 'nan' is not a whole number"),
        ([b"cat"], "its label 'cat' is not a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            labels(forms)


def test_what_looks_like_a_label_is_not_passed_over(images, tmp_path):
    records = [example(image=image.tobytes(), image__class__text=b"cat") for image in images]
    path = write(tmp_path / "a", records)
    with pytest.raises(InputError, match=r"no label in label, image/class/label, and image/class/text may be it"):
        open_source(path)
    assert pack(open_source(path, unlabelled=True), tmp_path / "out").class_names == []
    labelled = write(tmp_path / "b", recipe(images))
    assert pack(open_source(labelled, unlabelled=True), tmp_path / "flat").class_names == []


def broken_of(path, out):
    manifest = pack(open_source(str(path)), out, on_broken="skip")
    check(out)
    return manifest.num_images, [line.partition(", ")[2] for line in (out / "broken.txt").read_text().splitlines()]


def test_every_damaged_byte_of_the_data_is_seen(images, tmp_path, rng):
    path = tmp_path / "a"
    whole = write(path, recipe(images)).read_bytes()
    size = len(whole) // 9
    for record, offset in [
        (1, 12),
        (4, size - 5),
        (8, size - 1),
        *((3, int(n)) for n in rng.integers(12, size - 1, 5)),
    ]:
        content = bytearray(whole)
        content[record * size + offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        out = tmp_path / f"out{record}-{offset}"
        assert broken_of(path, out) == (8, [f"record {record}: its check sum is wrong"])


def test_a_damaged_length_ends_its_file_but_not_the_next(images, tmp_path):
    records = list(recipe(images))
    content = bytearray(write(tmp_path / "a", records[:6]).read_bytes())
    content[len(content) // 6 * 2] ^= 4
    (tmp_path / "a").write_bytes(content)
    write(tmp_path / "b", records[6:])
    images_left, lines = broken_of(f"{tmp_path}/[ab]", tmp_path / "out")
    assert images_left == 2 + 3 and len(lines) == 1
    assert lines[0].startswith("record 2: the file is damaged or cut short here (the length of a record has a wrong")


@pytest.mark.parametrize("compress", [False, True])
def test_a_file_cut_short_anywhere(images, tmp_path, rng, compress):
    path = tmp_path / "a"
    whole = write(path, recipe(images), compress).read_bytes()
    sizes = set(rng.integers(len(whole) // 4, len(whole) - 1, 8).tolist())
    if not compress:
        sizes -= set(np.cumsum([len(frame(record)) for record in recipe(images)]).tolist())  # see the next test
    for number, size in enumerate(sizes):
        path.write_bytes(whole[:size])
        images_left, lines = broken_of(path, tmp_path / f"out{number}")
        assert len(lines) == 1 and "the file is damaged or cut short here" in lines[0]
        assert images_left < 9 + compress  # gzip has a check sum after the last record


def test_a_file_cut_after_a_record_is_a_shorter_file(images, tmp_path, rng):
    """The format has no end mark."""
    records = list(recipe(images))
    left = int(rng.integers(1, 9))
    path = write(tmp_path / "a", records)
    path.write_bytes(path.read_bytes()[: sum(len(frame(record)) for record in records[:left])])
    manifest = pack(open_source(str(path)), tmp_path / "out", on_broken="skip")
    assert manifest.num_images == left and manifest.num_broken == 0


def test_what_is_wrong_with_single_records(images, tmp_path):
    raw = images[0].tobytes()
    good = example(image_raw=raw, label=0, height=8, width=8, depth=3)
    records = [
        good,
        example(image_raw=raw[:-1], label=0, height=8, width=8, depth=3),
        example(image_raw=b"\xff\xd8\xff" + raw, label=0),
        example(image_raw=raw, height=8, width=8, depth=3),
        example(label=0),
        example(image_raw=5, label=0),
        example(image_raw=[raw, raw], label=0),
        example(image_raw=raw, label=-3, height=8, width=8, depth=3),
        example(image_raw=b"", label=0),
        b"\xff\xff\xff",
        good,
    ]
    images_left, lines = broken_of(write(tmp_path / "a", records), tmp_path / "out")
    assert images_left == 2
    reasons = [
        "its 191 bytes are no JPEG, PNG or WebP, nor 8x8x3 pixels", "", "it has no label, unlike the first record",
        "it has no image", "it has no image", "it has no image", "its label -3 is not in 0..1000000", "its 0 bytes are",
        "it is no tf.train.Example",
    ]  # fmt: skip
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True), 1):
        assert line.startswith(f"record {number}: {reason}")


def test_messages_are_parsed_as_protobuf_does(rng):
    data = example(a=[1, -1, 2**63 - 1, -(2**63), 300], b=[b"", b"x\0y"], c=[1.5, -2.0], **{"é": [0]})
    assert parse_example(memoryview(data)) == {
        "a": [1, -1, 2**63 - 1, -(2**63), 300], "b": [b"", b"x\0y"], "c": [1.5, -2.0], "é": [0],
    }  # fmt: skip
    unpacked = b"\x0a\x0e\x0a\x0c\x0a\x01a\x12\x07\x1a\x05\x08\x05\x08\xac\x02"  # as old writers do it
    assert parse_example(memoryview(unpacked)) == {"a": [5, 300]}
    assert parse_example(memoryview(b"")) == {}
    for _ in range(300):  # anything may come, only one kind of error may leave
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            parse_example(memoryview(bytes(damaged))[: int(rng.integers(len(data) + 1))])
        except BrokenImageError as error:
            assert str(error) == "it is no tf.train.Example"


def test_no_tfrecord_files(tmp_path, images):
    (tmp_path / "a").write_bytes(b"no record at all")
    with pytest.raises(InputError, match="is no TFRecord file: its first record's length has a wrong check sum"):
        open_source(str(tmp_path / "a"), kind="tfrecord")
    with pytest.raises(
        InputError, match=r"record 0 has no image: its features are picture, and .*looked for in image_raw"
    ):
        open_source(write(tmp_path / "a", [example(picture=b"x")]))
    with pytest.raises(InputError, match=r"record 0: it is no tf\.train\.Example"):
        open_source(write(tmp_path / "a", [b"\xff"]))


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_check_sums_of_rfc_3720_masked(data, crc):
    """Appendix B.4; the mask is that of tensorflow/core/lib/hash/crc32c.h."""
    assert masked_crc32c(data) == masked_crc32c(memoryview(data)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def test_check_sums_of_any_bytes_are_tensorboards(rng):
    for size in [*range(12), *rng.integers(1, 9000, 8).tolist(), 49152]:
        data = rng.bytes(size)
        assert masked_crc32c(data) == masked_crc(data), size
