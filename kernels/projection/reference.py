"""The projections of the attention block in plain PyTorch: 1x1 convolution, 2x2 max-pool, flattening to rows.

Source: the released code, brain-research/self-attention-gan non_local.py:48-81 (the paper's text leaves the pooling
and the width of v out).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, pool: bool = False) -> Tensor:
    """Return conv1x1(`x`) as rows, (B, positions, D), positions = H*W or (H//2)*(W//2) with `pool` (2x2, stride 2).

    `x` (B, C, H, W), `weight` (D, C, 1, 1), `bias` (D,). The pool is `max_pool2d`'s: odd last rows and columns are
    dropped, of equal values the first takes the gradient.
    """
    out = F.conv2d(x, weight, bias)
    if pool:
        out = F.max_pool2d(out, 2)
    return out.permute(0, 2, 3, 1).flatten(1, 2)


def unproject(rows: Tensor, x: Tensor, w_o: Tensor | None, b_o: Tensor | None, gamma: Tensor) -> Tensor:
    """Return x + gamma * o(rows), (B, C, H, W), from `rows` (B, H*W, D_V) and `x` (B, C, H, W).

    `w_o` (C, D_V, 1, 1) and `b_o` (C,) are the output projection; with `w_o` None, D_V must equal C. `gamma` is a
    scalar, of shape () or (1,). The result has the dtype of x.
    """
    B, _, H, W = x.shape
    maps = rows.reshape(B, H, W, rows.shape[2]).permute(0, 3, 1, 2)  # channels_last, also of one image
    if w_o is not None:
        maps = F.conv2d(maps, w_o, b_o)
    if x.dtype == gamma.dtype == maps.dtype:
        # one pass over y instead of two; its derivative is the slower one
        return x + gamma * maps if torch.is_grad_enabled() else torch.addcmul(x, gamma, maps)
    return (x + gamma.reshape(1) * maps).to(x.dtype)  # one axis, so that a float32 gamma is not rounded to half
