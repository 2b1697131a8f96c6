"""TFRecord files of tf.train.Example, as the improved-GAN ImageNet recipe writes and the released SAGAN code reads.

A record is its length (8 bytes, little endian), the masked CRC-32C of these, the data, and the masked CRC-32C of the
data (https://www.tensorflow.org/tutorials/load_data/tfrecord); both sums are verified here. The recipe
(github.com/openai/improved-gan, imagenet/convert_imagenet_to_records.py) has the features `image_raw` (H * W * 3
bytes), `height`, `width`, `depth` and `label`; the released code takes the size for granted. JPEG, PNG and WebP under
the names of TensorFlow's own ImageNet converter and of TFDS are read as well.

The two formats take a page of code, where TensorFlow takes gigabytes and PyPI's `tfrecord` checks no sum.
"""

from __future__ import annotations

import functools
import gzip
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.sources.base import FilesSource, Image, check_label, fit, open_checked
from sagan_fast.errors import InputError

IMAGE_KEYS = ("image_raw", "image/encoded", "image")
LABEL_KEYS = ("label", "image/class/label")
HEIGHT_KEYS, WIDTH_KEYS, DEPTH_KEYS = ("height", "image/height"), ("width", "image/width"), ("depth", "image/channels")
GZIP = b"\x1f\x8b"
ENCODED = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
HEADER = struct.Struct("<QI")
FIXED_SIZES = {1: 8, 5: 4}
"""Bytes by wire type."""
Feature = list[Any]
"""bytes, int or float"""


@dataclass(frozen=True)
class RecordItem:
    """One record: where its data are, or the data themselves, or what is wrong with its frame."""

    number: int  # in its file
    file: int
    offset: int
    size: int
    position: int
    data: bytes | None = None  # with its sum
    broken: str = ""


class TFRecordSource(FilesSource):
    """The records of all files, in order.

    Raises:
        InputError: a file is no TFRecord file, the first record holds no image, or the package crc32c is missing.
    """

    kind = "tfrecord"

    def __init__(self, path: str, files: Sequence[str], first_label: int = 0) -> None:
        for name in files:
            with open_checked(name) as file:
                if not is_tfrecord(file.read(4096)):
                    raise InputError(f"{name} is no TFRecord file: its first record's length has a wrong check sum")
        super().__init__(path, files, first_label)
        first = next(item for item in self.items())
        try:
            features = parse_example(self._data(first))
        except BrokenImageError as error:
            raise InputError(f"{self.name_of(first)}: {error}") from error
        if not any(key in features for key in IMAGE_KEYS):
            raise InputError(
                f"{self.name_of(first)} has no image: its features are {', '.join(sorted(features)) or 'none'}, and "
                f"the image is looked for in {', '.join(IMAGE_KEYS)}"
            )
        self.class_names = None if any(key in features for key in LABEL_KEYS) else []

    def name_of(self, item: RecordItem) -> str:
        """Return file and number of the record."""
        return f"{self.files[item.file]}, record {item.number}"

    def read(self, item: RecordItem, resolution: int) -> tuple[Image, int]:
        """Return image and label; BrokenImageError if a sum is wrong or either is missing or no such thing."""
        features = parse_example(self._data(item))
        image = _image(features, resolution)
        label = _whole_number(features, LABEL_KEYS)
        if (label is None) != (self.class_names == []):
            raise BrokenImageError(f"it has {'no' if label is None else 'a'} label, unlike the first record")
        return image, 0 if label is None else check_label(label, self.first_label)

    def items_of(self, file: int, before: int) -> Iterator[RecordItem]:
        """Return the records of one file."""
        path, size = self.files[file], self._sizes[file]
        records, end = 0, before + size
        try:
            with open(path, "rb") as opened:
                packed = opened.read(len(GZIP)) == GZIP
                opened.seek(0)
                stream: Any = gzip.GzipFile(fileobj=opened) if packed else opened
                while start := stream.read(HEADER.size):
                    length = _length(start)
                    offset = 0 if packed else stream.tell()
                    if not packed and offset + length + 4 > size:
                        raise ValueError("the last record is cut short")
                    data = stream.read(length + 4) if packed else None
                    if data is not None and len(data) < length + 4:
                        raise ValueError("the last record is cut short")
                    position = before if packed else before + offset + length + 4
                    yield RecordItem(records, file, offset, length, position, data)
                    records += 1
                    if not packed:
                        stream.seek(offset + length + 4)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = f"the file is damaged or cut short here ({' '.join(str(error).split())})"
            yield RecordItem(records, file, 0, 0, end, broken=reason)

    def _data(self, item: RecordItem) -> memoryview:
        if item.broken:
            raise BrokenImageError(item.broken)
        data = self.bytes_at(item.file, item.offset, item.size + 4) if item.data is None else item.data
        content, stored = memoryview(data)[: item.size], data[item.size :]
        if masked_crc32c(content) != int.from_bytes(stored, "little"):
            raise BrokenImageError("its check sum is wrong")
        return content


def is_tfrecord(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a TFRecord file, plain or gzip.

    Raises InputError where that takes the package crc32c and it is missing.
    """
    if start.startswith(GZIP):
        try:
            start = zlib.decompressobj(31).decompress(start)
        except zlib.error:
            return False
    # Without the sum, which takes a package: no record has 4 GiB, and a tar file has its magic here.
    if len(start) < HEADER.size or any(start[4:8]) or start[257:262] == b"ustar":
        return False
    _, stored = HEADER.unpack_from(start)
    return bool(masked_crc32c(start[:8]) == stored)


def masked_crc32c(data: bytes | memoryview) -> int:
    """Return the CRC-32C of `data` as TFRecord files store it: rotated by 15 bits, plus a constant.

    Raises InputError where the package crc32c is missing.
    """
    crc = _crc32c()(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc32c() -> Callable[[bytes | memoryview], int]:
    try:
        from crc32c import crc32c
    except ImportError:
        raise InputError("TFRecord files need the package crc32c: pip install 'sagan_fast[tfrecord]'") from None
    return crc32c


def _length(start: bytes) -> int:
    if len(start) < HEADER.size:
        raise ValueError("the last record is cut short")
    length, stored = HEADER.unpack(start)
    if masked_crc32c(start[:8]) != stored:
        raise ValueError("the length of a record has a wrong check sum")
    return int(length)


def _image(features: dict[str, Feature], resolution: int) -> Image:
    found = next((features[key] for key in IMAGE_KEYS if key in features), [])
    if len(found) != 1 or not isinstance(found[0], bytes):
        raise BrokenImageError("it has no image")
    data = found[0]
    height, width = _whole_number(features, HEIGHT_KEYS), _whole_number(features, WIDTH_KEYS)
    depth = _whole_number(features, DEPTH_KEYS) or 3
    is_raw = height is not None and width is not None and len(data) == height * width * depth > 0
    if not is_raw and data.startswith(ENCODED):
        decoded: Image = read_image(io.BytesIO(data), resolution).numpy()
        return decoded
    if height is None or width is None:  # the released code asks for neither
        height = width = math.isqrt(len(data) // max(depth, 1))
        is_raw = len(data) == height * width * depth > 0
    if not is_raw or depth not in (1, 3):
        raise BrokenImageError(f"its {len(data)} bytes are no JPEG, PNG or WebP, nor {height}x{width}x{depth} pixels")
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, depth)
    return fit(np.broadcast_to(pixels, (height, width, 3)), resolution)


def _whole_number(features: dict[str, Feature], keys: Sequence[str]) -> int | None:
    for key in keys:
        values = features.get(key)
        if values and isinstance(values[0], int):
            return values[0]
    return None


def parse_example(data: memoryview) -> dict[str, Feature]:
    """Return the features of a serialised tf.train.Example by name.

    Example { Features features = 1 }, Features { map<string, Feature> feature = 1 }, Feature { BytesList = 1,
    FloatList = 2, Int64List = 3 }, each list { repeated value = 1 }; numbers may be packed
    (github.com/tensorflow/tensorflow, tensorflow/core/example/{example,feature}.proto).

    Raises:
        BrokenImageError: it is no such message.
    """
    try:
        found: dict[str, Feature] = {}
        for features in _messages(data, 1):
            for entry in _messages(features, 1):
                key = b"".join(list(_messages(entry, 1))[-1:])
                found[key.decode()] = [value for feature in _messages(entry, 2) for value in _values(feature)]
        return found
    except (ValueError, IndexError, struct.error) as error:
        raise BrokenImageError("it is no tf.train.Example") from error


def _values(feature: memoryview) -> Iterator[Any]:
    for values in _messages(feature, 1):
        yield from map(bytes, _messages(values, 1))
    for values in _messages(feature, 2):
        for _, value in _fields(values):  # 4 bytes each, packed or not
            yield from (number for (number,) in struct.iter_unpack("<f", _bytes(value)))
    for values in _messages(feature, 3):
        for _, value in _fields(values):
            packed = value if isinstance(value, memoryview) else None
            numbers = [value] if packed is None else _varints(packed)
            yield from (n - 2**64 if n >= 2**63 else n for n in numbers if isinstance(n, int))


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    """Yield the contents of the length-delimited fields `number` of a message."""
    return (_bytes(value) for field, value in _fields(data) if field == number)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a message (https://protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            size, at = _varint(data, at)
        elif tag & 7 in FIXED_SIZES:
            size = FIXED_SIZES[tag & 7]
        else:
            raise ValueError(f"wire type {tag & 7}")
        if at + size > len(data):
            raise ValueError("cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        octet = data[at]
        value, shift, at = value | (octet & 0x7F) << shift, shift + 7, at + 1
        if octet < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes must be")
    return value
