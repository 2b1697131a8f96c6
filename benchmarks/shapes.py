"""The shapes that everything is measured on, and the least that one block of such a shape needs."""

from dataclasses import dataclass

from sagan_fast.kernels.launch import DTYPES


@dataclass(frozen=True)
class BlockShape:
    """A self-attention block on x (B, C, H, W): q, k of D_QK channels, v of D_V, `pool` halves the map of k and v.

    "Needed" below is what no implementation can do without: products of unpadded sizes, one exponential per score,
    every input and output once. What a kernel pads, computes twice or stores in between is not needed.
    """

    name: str
    B: int
    C: int
    H: int
    W: int
    d_qk: int
    d_v: int
    pool: bool = True
    out_proj: bool = True
    bias: bool = False

    @property
    def N(self) -> int:
        """Queries of one image, H * W."""
        return self.H * self.W

    @property
    def M(self) -> int:
        """Keys of one image: N, or (H // 2) * (W // 2) with `pool`."""
        return (self.H // 2) * (self.W // 2) if self.pool else self.N

    @property
    def weight_elements(self) -> int:
        """Elements of theta, phi, g and o, without biases: C (2 D_QK + D_V), and D_V C with `out_proj`."""
        return self.C * (2 * self.d_qk + self.d_v) + (self.d_v * self.C if self.out_proj else 0)

    def flops(self, backward: bool = False) -> int:
        """Return needed floating-point operations (a multiply-add is two), forward or forward and backward.

        Forward: 2 B [N C (2 D_QK + D_V) + N M (D_QK + D_V) + N D_V C], the last term only with `out_proj`.
        Backward: every projection twice (gradients of its input and its weight), and 2 B N M (3 D_QK + 2 D_V) for
        the scores again, d_beta, d_v, d_q and d_k.
        """
        projections = 2 * self.B * self.N * self.weight_elements
        pairs = 2 * self.B * self.N * self.M
        forward = projections + pairs * (self.d_qk + self.d_v)
        return forward + (2 * projections + pairs * (3 * self.d_qk + 2 * self.d_v) if backward else 0)

    def exps(self, backward: bool = False) -> int:
        """Return needed exponentials: B N M forward, and again in the backward pass, which recomputes the map."""
        return self.B * self.N * self.M * (2 if backward else 1)

    def bytes(self, dtype: str, backward: bool = False) -> int:
        """Return needed bytes of global memory, each once.

        Forward: x and the weights in, y out. Backward adds x, dy and the weights in, dx and the weights' gradients
        out. Nothing is charged for what forward keeps for backward beyond x.
        """
        x = self.B * self.C * self.N
        count = 2 * x + self.weight_elements + (3 * x + 2 * self.weight_elements if backward else 0)
        return count * DTYPES[dtype].itemsize


def _block(name: str, B: int, C: int, size: int, d_v: int | None = None, **changes: bool) -> BlockShape:
    return BlockShape(name, B, C, size, size, C // 8, d_v or C // 2, **changes)


UNPOOLED = dict(pool=False, out_proj=False, bias=True)
STANDARD_SHAPES = (
    _block("official-G-32x32-C256", 64, 256, 32),
    _block("official-D-32x32-C128", 64, 128, 32),
    _block("feat64-G-64x64-C128", 64, 128, 64),
    _block("feat64-D-64x64-C64", 64, 64, 64),
    _block("biggan-G-64x64-C192", 64, 192, 64),
    _block("biggan-D-64x64-C96", 64, 96, 64),
    _block("unpooled-32x32-C64", 64, 64, 32, d_v=64, **UNPOOLED),
    _block("unpooled-16x16-C128", 64, 128, 16, d_v=128, **UNPOOLED),
)
"""The eight shapes that targets are stated for.

SAGAN as released (maps of 32x32) and with its attention at 64x64, BigGAN at 128x128 images, and the form of the
best-known PyTorch port (no pooling, v of C channels, no o, biases).
"""

LARGE_SHAPE = _block("large-128x128-C64", 8, 64, 128)
"""A map of 16,384 queries and 4,096 keys: 64 times the scores of the official shapes."""

BLOCK_SHAPES = (*STANDARD_SHAPES, LARGE_SHAPE)

# fmt: off
SAGAN_MATRICES = [
    # the 21 of the generator
    (16384, 128), (1024, 9216), (1024, 9216), (1024, 1024), (512, 9216), (512, 4608), (512, 1024), (256, 4608),
    (256, 2304), (256, 512), (128, 2304), (128, 1152), (128, 256), (64, 1152), (64, 576), (64, 128), (32, 256),
    (32, 256), (128, 256), (256, 128), (3, 576),
    # the 23 of the discriminator, with its projection of 1000 classes
    (64, 27), (64, 576), (64, 3), (128, 576), (128, 1152), (128, 64), (256, 1152), (256, 2304), (256, 128),
    (512, 2304), (512, 4608), (512, 256), (1024, 4608), (1024, 9216), (1024, 512), (1024, 9216), (1024, 9216),
    (16, 128), (16, 128), (64, 128), (128, 64), (1, 1024), (1000, 1024),
]
"""R and K of the 44 spectral-normed weights of the official SAGAN at 128x128, 287 MB in float32."""
# fmt: on
