"""CRC-32C against the vectors of RFC 3720 (appendix B.4) and TensorBoard's own."""

import pytest

from sagan_fast.data.sources.crc32c import BLOCK, crc32c, masked_crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_vectors(data, expected):
    assert crc32c(data) == crc32c(memoryview(data)) == expected


def test_every_length_as_tensorboard_has_it(rng):
    theirs = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow").masked_crc32c
    sizes = [
        *range(12),
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        2 * BLOCK,
        3 * BLOCK + 5,
        *rng.integers(1, 9000, 8).tolist(),
        49152,
    ]
    for size in sizes:
        data = rng.bytes(size)
        assert masked_crc32c(data) == theirs(data), size


def test_every_flipped_bit_is_seen(rng):
    data = bytearray(rng.bytes(3000))
    expected = crc32c(bytes(data))
    for bit in rng.integers(0, 24000, 50).tolist():
        data[bit // 8] ^= 1 << bit % 8
        assert crc32c(bytes(data)) != expected
        data[bit // 8] ^= 1 << bit % 8
    assert crc32c(bytes(data)) == expected
