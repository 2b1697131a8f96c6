"""TFRecord files of tf.train.Example, as the improved-GAN ImageNet recipe writes and the released SAGAN code reads.

A record is its length (8 bytes, little endian), the masked CRC-32C of these, the data, and the masked CRC-32C of the
data (https://www.tensorflow.org/tutorials/load_data/tfrecord); both sums are verified here. The recipe
(github.com/openai/improved-gan, imagenet/convert_imagenet_to_records.py) has the features `image_raw` (H * W * 3
bytes), `height`, `width`, `depth` and `label`; the released code takes the size for granted. JPEG, PNG and WebP under
the names of TensorFlow's own ImageNet converter and of TFDS are read as well.

The frames take a page of code: TensorFlow takes gigabytes, and PyPI's `tfrecord` checks no sum.
"""

import functools
import gzip
import io
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sagan_fast.data.images import BrokenImageError, read_image
from sagan_fast.data.labels import SUSPICIOUS
from sagan_fast.data.sources.base import GZIP, UNLABELLED, FilesSource, Image, check_label, fit, start_of
from sagan_fast.errors import InputError
from sagan_fast.words import list_some

IMAGE_KEYS = ("image_raw", "image/encoded", "image")
LABEL_KEYS = ("label", "image/class/label")
HEIGHT_KEYS, WIDTH_KEYS, DEPTH_KEYS = ("height", "image/height"), ("width", "image/width"), ("depth", "image/channels")
ENCODED = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
SURVEYED_BYTES = 4 * 2**30
"""Of records whose labels are read before the work begins."""
MOST_FAULTS = 20
HEADER = struct.Struct("<QI")


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

    Raises InputError if a file is no TFRecord file, the first record holds no image, or the package crc32c is missing.
    """

    kind = "tfrecord"

    def __init__(
        self, path: str, files: Sequence[str], first_label: int | None = None, unlabelled: bool = False
    ) -> None:
        for name in files:
            if not is_tfrecord(start_of(name)):
                raise InputError(f"{name} is no TFRecord file: its first record's length has a wrong check sum")
        super().__init__(path, files, first_label or 0)
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
        self._unlabelled = unlabelled
        self._labelled = not unlabelled and any(key in features for key in LABEL_KEYS)
        self.class_names = None if self._labelled else []
        self.labels_from = "nothing: no labels"
        if self._labelled:
            self.labels_from = next(key for key in LABEL_KEYS if key in features)
            self._survey()
        elif hints := [key for key in sorted(features) if SUSPICIOUS.search(key)] if not unlabelled else []:
            raise InputError(
                f"{self.name_of(first)} has no label in {', '.join(LABEL_KEYS)}, and {list_some(hints)} may be it: "
                f"write whole numbers to label; {UNLABELLED}"
            )

    def name_of(self, item: RecordItem) -> str:
        return f"{self.files[item.file]}, record {item.number}"

    def read(self, item: RecordItem, resolution: int) -> tuple[Image, int]:
        features = parse_example(self._data(item))
        image = _image(features, resolution)
        if not self._labelled and not self._unlabelled and any(features.get(key) for key in LABEL_KEYS):
            raise BrokenImageError("it has a label, unlike the first record")
        return image, self._label(features) if self._labelled else 0

    def _label(self, features: dict[str, list[Any]]) -> int:
        found = next((features[key] for key in LABEL_KEYS if features.get(key)), None)
        if found is None:
            raise BrokenImageError("it has no label, unlike the first record")
        return check_label(found, self.first_label)

    def _survey(self) -> None:
        """Read the labels before the work begins: of all records, or of the first ones of each file of a large set."""
        counts: Counter[int] = Counter()
        faults: list[tuple[str, str]] = []
        budget, whole = SURVEYED_BYTES // len(self.files), True
        for file in range(len(self.files)):
            end = 0
            for item in self.items_of(file, 0):
                end += item.size
                if end > budget:
                    whole = False
                    break
                try:
                    counts[self._label(parse_example(self._data(item)))] += 1
                except BrokenImageError as error:
                    whole &= not item.broken
                    if not item.broken and len(faults) < MOST_FAULTS:
                        faults.append((self.name_of(item), str(error)))
        self.faults = faults
        if whole:
            self.label_counts = counts
        elif counts and not counts[0]:  # of the classes only this is known: none of the first records has label 0
            self.label_counts = dict.fromkeys(range(1, max(counts, default=0) + 1), 1)

    def items_of(self, file: int, before: int) -> Iterator[RecordItem]:
        size, records = self._sizes[file], 0
        try:
            with open(self.files[file], "rb") as opened:
                packed = opened.read(len(GZIP)) == GZIP
                opened.seek(0)
                stream: Any = gzip.GzipFile(fileobj=opened) if packed else opened
                while start := stream.read(HEADER.size):
                    length, offset = _length(start), stream.tell()
                    end = offset + length + 4
                    data = stream.read(length + 4) if packed else None
                    if end > (stream.tell() if packed else size):
                        raise ValueError("the last record is cut short")
                    yield RecordItem(records, file, offset, length, before if packed else before + end, data)
                    records += 1
                    stream.seek(end)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = f"the file is damaged or cut short here ({' '.join(str(error).split())})"
            yield RecordItem(records, file, 0, 0, before + size, broken=reason)

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
    try:
        from crc32c import crc32c
    except ImportError:
        raise InputError("TFRecord files need the package crc32c: pip install 'sagan_fast[tfrecord]'") from None
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _length(start: bytes) -> int:
    if len(start) < HEADER.size:
        raise ValueError("the last record is cut short")
    length, stored = HEADER.unpack(start)
    if masked_crc32c(start[:8]) != stored:
        raise ValueError("the length of a record has a wrong check sum")
    return int(length)


def _image(features: dict[str, list[Any]], resolution: int) -> Image:
    found = next((features[key] for key in IMAGE_KEYS if key in features), [])
    if len(found) != 1 or not isinstance(found[0], bytes):
        raise BrokenImageError("it has no image")
    data = found[0]
    height, width = _whole_number(features, HEIGHT_KEYS), _whole_number(features, WIDTH_KEYS)
    depth = _whole_number(features, DEPTH_KEYS) or 3
    is_raw = height is not None and width is not None and len(data) == height * width * depth > 0
    if not is_raw and data.startswith(ENCODED):
        return read_image(io.BytesIO(data), resolution).numpy()
    if height is None or width is None:  # the released code asks for neither
        height = width = math.isqrt(len(data) // max(depth, 1))
        is_raw = len(data) == height * width * depth > 0
    if not is_raw or depth not in (1, 3):
        raise BrokenImageError(f"its {len(data)} bytes are no JPEG, PNG or WebP, nor {height}x{width}x{depth} pixels")
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, depth)
    return fit(np.broadcast_to(pixels, (height, width, 3)), resolution)


def _whole_number(features: dict[str, list[Any]], keys: Sequence[str]) -> int | None:
    return next((features[key][0] for key in keys if features.get(key) and isinstance(features[key][0], int)), None)


def parse_example(data: bytes | memoryview) -> dict[str, list[Any]]:
    """Return the features of a serialised tf.train.Example by name, each a list of bytes, floats or ints.

    Raises BrokenImageError if `data` is no such message.
    """
    from google.protobuf.message import DecodeError

    try:
        found = _example_class().FromString(bytes(data)).features.feature
    except DecodeError as error:
        raise BrokenImageError("it is no tf.train.Example") from error
    kinds = ("bytes", "floats", "ints")
    return {each.key: [n for kind in kinds for n in getattr(each.value, kind).value] for each in found}


# tensorflow/core/example/{example,feature}.proto; on the wire a map is a list of entries
EXAMPLE_PROTO = """name: "example.proto" syntax: "proto3"
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".Features" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".Entry" } }
message_type { name: "Entry"
  field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".Feature" } }
message_type { name: "Feature"
  field { name: "bytes" number: 1 type: TYPE_MESSAGE type_name: ".Bytes" }
  field { name: "floats" number: 2 type: TYPE_MESSAGE type_name: ".Floats" }
  field { name: "ints" number: 3 type: TYPE_MESSAGE type_name: ".Ints" } }
message_type { name: "Bytes" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Floats" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Ints" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
"""


@functools.cache
def _example_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))
