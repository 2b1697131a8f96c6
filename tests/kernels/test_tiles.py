"""Widths of tiles, grids, that programs stand where they should on both kinds of grid, and products in TF32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from block_by_hand import arguments, by_hand, leaves_of
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.accuracy import RMS_TOLERANCE, rel_rms
from sagan_fast.kernels import configs, tiles
from sagan_fast.kernels.attention import reference
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.attention.second import attention_second
from sagan_fast.kernels.self_attention.backward import self_attention_bwd
from sagan_fast.kernels.self_attention.forward import self_attention_fwd
from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.kernels.tiles import dense, grid_of, is_channels_last, padded, split, strides_of
from sagan_fast.ops.tf32 import tf32
from shared_by_tests import randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_tiles_are_powers_of_two_of_at_least_sixteen():
    assert [padded(size) for size in (1, 3, 16, 17, 24, 48, 96, 256)] == [16, 16, 16, 32, 32, 64, 128, 256]


def test_two_tiles_where_one_would_be_wider():
    found = {size: split(size) for size in range(1, 257)}
    known = {1: (16, 0), 33: (32, 16), 48: (32, 16), 64: (64, 0), 96: (64, 32), 97: (128, 0), 160: (128, 32)}
    assert found.items() >= known.items() and found[192] == (128, 64)
    for size, (first, rest) in found.items():
        assert first >= 16 and size <= first + rest <= padded(size)
        assert rest == 0 or (rest >= 16 and first < size)


def test_many_images_go_on_one_axis():
    assert grid_of(3, 65535) == (3, 65535) and grid_of(3, 65536) == (196608,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_flat_grid_computes_the_same(dtype, generator, monkeypatch):
    q, k, v = (randn(*size, generator=generator).to(DEVICE, dtype) for size in ((3, 150, 8), (3, 40, 8), (3, 40, 48)))
    out, lse, lost = attention_fwd(q, k, v)
    monkeypatch.setattr(tiles, "MAX_IMAGES", 2)
    flat = attention_fwd(q, k, v)
    assert torch.equal(flat[0], out) and torch.equal(flat[1], lse)
    assert lost is flat[2] is None or torch.equal(flat[2], lost)


def test_strides_do_not_trust_axes_of_size_one():
    x = torch.zeros(2, 6, 5, 1)
    assert strides_of(x) == (30, 5, 1)
    last = torch.zeros(2, 5, 1, 6).permute(0, 3, 1, 2)
    assert is_channels_last(last) and strides_of(last) == (30, 1, 6)
    assert dense(x) is x and dense(last) is last
    cut = torch.zeros(2, 6, 5, 8)[..., ::2]
    assert dense(cut).is_contiguous()


def nearest_tf32(values):
    """As the instruction cvt.rna.tf32 rounds: ten bits of mantissa, halves away from zero."""
    return ((values.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


@pytest.fixture
def interpreter_with_tf32(monkeypatch):
    """Let the interpreter round products in TF32 as the tensor cores do. Return the precisions it met.

    Three products are what Triton's compiler makes of "tf32x3": the parts beyond TF32 are multiplied too, but for the
    product of two such parts. The tensor cores cut off what they are given.
    """
    multiply, met = InterpreterBuilder.create_dot, set()

    def cut(values):
        return (np.ascontiguousarray(values).view(np.uint32) & 0xFFFFE000).view(np.float32)

    def create_dot(self, a, b, acc, precision, most):
        def dot(left, right, acc):
            handles = (type(a)(cut(left), a.dtype), type(b)(cut(right), b.dtype))
            return multiply(self, *handles, acc, precision, most)

        met.add(kind := precision.name)
        if kind == "TF32":
            return dot(a.data, b.data, acc)
        if kind != "TF32x3":
            return multiply(self, a, b, acc, precision, most)
        big_a, big_b = (nearest_tf32(np.ascontiguousarray(t.data)) for t in (a, b))
        acc = dot(a.data - big_a, big_b, acc)
        return dot(big_a, big_b, dot(big_a, b.data - big_b, acc))

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return met


@pytest.mark.skipif(DEVICE == "cuda", reason="what the tensor cores round is in the GPU tests of float32")
@pytest.mark.parametrize("precision", ["TF32x3", "TF32"])
def test_three_tf32_products_are_as_near_as_float32_and_one_is_not(
    precision, generator, interpreter_with_tf32, monkeypatch
):
    rows = {key: replace(row, tf32x3=precision == "TF32x3") for key, row in configs._configs().items()}
    monkeypatch.setattr(configs, "_configs", lambda: rows)
    configs.lookup.cache_clear()
    made = arguments((1, 192, 8, 10, 24, 96), generator, bias=False, dtype=torch.float32)
    leaves = leaves_of({name: t if t is None else t.double() for name, t in made.items()})
    truth = by_hand(**leaves)
    d_y = randn(*truth.shape, generator=generator).float()
    truth.backward(d_y.double())

    inputs = BlockInputs(**{name: t.flatten(1) if name.startswith("w_") else t for name, t in made.items()})
    with tf32(precision == "TF32"):
        y, saved = self_attention_fwd(inputs, pool=True)
        d_x, d_w_qkv, _, d_w_o, *_ = self_attention_bwd(d_y, inputs, saved)
    configs.lookup.cache_clear()
    d_truth = torch.cat([leaves[name].grad.flatten(1) for name in ("w_theta", "w_phi", "w_g")])
    errors = [
        rel_rms(y - made["x"], truth - leaves["x"]), rel_rms(d_x, leaves["x"].grad), rel_rms(d_w_qkv, d_truth),
        rel_rms(d_w_o, leaves["w_o"].grad.flatten(1)),
    ]  # fmt: skip
    assert interpreter_with_tf32 == {precision}
    assert (max(errors) < RMS_TOLERANCE["fp32"]) == (precision == "TF32x3")


@pytest.mark.skipif(DEVICE == "cuda", reason="what the tensor cores round is in the GPU tests of float32")
@pytest.mark.parametrize("D_QK, D_V", [(24, 96), (32, 128), (64, 128)])
def test_second_gradients_in_three_tf32_products_are_as_near_as_float32(D_QK, D_V, generator, interpreter_with_tf32):
    sizes = ((40, D_QK), (33, D_QK), (33, D_V), (40, D_V), (40, D_QK), (33, D_QK), (33, D_V))
    q, k, v, d_o, *tangents = [randn(1, *size, generator=generator) for size in sizes]
    exact = reference.attention_second(d_o, q * D_QK**-0.5, k, v, *tangents, 1.0)
    q, k, v, d_o, *tangents = (t.float() for t in (q * D_QK**-0.5, k, v, d_o, *tangents))
    found = attention_second(d_o, q, k, v, *attention_fwd(q, k, v), *tangents)
    assert "TF32x3" in interpreter_with_tf32  # the row of these widths says so
    for ours, right in zip(found, exact, strict=True):
        assert rel_rms(ours, right) < RMS_TOLERANCE["fp32"]
