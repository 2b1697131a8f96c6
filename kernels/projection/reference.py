"""The projections of the attention block in plain PyTorch: 1x1 convolution, 2x2 max-pool, flattening to rows.

Source: the released code, brain-research/self-attention-gan non_local.py:48-81 (the paper's text leaves the pooling
and the width of v out).
"""

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
