"""The self-attention block y = x + gamma * o(softmax(theta(x) phi(x)ᵀ) g(x)) with a choice of backends."""

from __future__ import annotations

from torch import Tensor

from sagan_fast.kernels.checks import check_ndim, check_same_device, check_shape
from sagan_fast.kernels.projection.reference import project, unproject
from sagan_fast.ops.attention import attention_on
from sagan_fast.ops.backends import Choice, choose

_OP = "self_attention_2d"


def self_attention_2d(
    x: Tensor,
    w_theta: Tensor,
    w_phi: Tensor,
    w_g: Tensor,
    w_o: Tensor | None,
    gamma: Tensor,
    *,
    b_theta: Tensor | None = None,
    b_phi: Tensor | None = None,
    b_g: Tensor | None = None,
    b_o: Tensor | None = None,
    pool: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Return x + gamma * o(softmax(q kᵀ) v), (B, C, H, W), with q = theta(x), k = phi(x), v = g(x) by 1x1 convolution.

    With `pool`, k and v are max-pooled 2x2 with stride 2 first (odd last rows and columns are dropped). No 1/sqrt(d).
    Source: Zhang et al. 2019, §3, in the form of the released code (brain-research/self-attention-gan,
    non_local.py:48-81).

    `x` (B, C, H, W) of any strides; `w_theta`, `w_phi` (D_QK, C, 1, 1); `w_g` (D_V, C, 1, 1); `w_o` (C, D_V, 1, 1),
    or None: then v has C channels and is the output of the attention; `gamma` of shape () or (1,); biases `b_theta`,
    `b_phi` (D_QK,), `b_g` (D_V,), `b_o` (C,). `backend` as in `attention`. The result has the dtype of x.

    Raises ValueError for shapes that do not fit (a map too small to pool among them) and unknown backends,
    RuntimeError if "triton" is asked for where it cannot run.
    """
    _check(x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o, pool)
    chosen = choose_block(x, w_theta, w_g, pool, backend).backend
    q = project(x, w_theta, b_theta)
    k = project(x, w_phi, b_phi, pool)
    v = project(x, w_g, b_g, pool)
    return unproject(attention_on(chosen, q, k, v, 1.0), x, w_o, b_o, gamma)


def choose_block(x: Tensor, w_theta: Tensor, w_g: Tensor, pool: bool, backend: str) -> Choice:
    """Return the backend that runs the block on `x` (B, C, H, W), and why."""
    B, _, H, W = x.shape
    M = (H // 2) * (W // 2) if pool else H * W
    return choose(_OP, backend, x, B, H * W, M, w_theta.shape[0], w_g.shape[0])


def _check(
    x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, b_o: Tensor | None, pool: bool,
) -> None:  # fmt: skip
    check_ndim(_OP, "x", x, "B, C, H, W")
    C, H, W = x.shape[1:]
    D_QK, D_V = w_theta.shape[0], w_g.shape[0]
    check_shape(_OP, "w_theta", w_theta, (D_QK, C, 1, 1), "D_QK, C, 1, 1")
    check_shape(_OP, "w_phi", w_phi, (D_QK, C, 1, 1), "D_QK, C, 1, 1")
    check_shape(_OP, "w_g", w_g, (D_V, C, 1, 1), "D_V, C, 1, 1")
    if w_o is not None:
        check_shape(_OP, "w_o", w_o, (C, D_V, 1, 1), "C, D_V, 1, 1")
    elif D_V != C:
        raise ValueError(f"{_OP}: w_g must have as many rows as x has channels where w_o is None = {C}, got {D_V}")
    elif b_o is not None:
        raise ValueError(f"{_OP}: b_o must be absent where w_o is None = None, got shape {tuple(b_o.shape)}")
    for name, bias, size, letters in (
        ("b_theta", b_theta, D_QK, "D_QK,"), ("b_phi", b_phi, D_QK, "D_QK,"), ("b_g", b_g, D_V, "D_V,"),
        ("b_o", b_o, C, "C,"),
    ):  # fmt: skip
        if bias is not None:
            check_shape(_OP, name, bias, (size,), letters)
    if gamma.numel() != 1 or gamma.ndim > 1:
        raise ValueError(f"{_OP}: gamma must be a scalar of shape = () or (1,), got {tuple(gamma.shape)}")
    if pool and (H < 2 or W < 2):
        raise ValueError(f"{_OP}: x must be at least 2 x 2 to be pooled = H, W >= 2, got {(H, W)}")
    check_same_device(
        _OP, "x", x, w_theta=w_theta, w_phi=w_phi, w_g=w_g, w_o=w_o, gamma=gamma,
        b_theta=b_theta, b_phi=b_phi, b_g=b_g, b_o=b_o,
    )  # fmt: skip
