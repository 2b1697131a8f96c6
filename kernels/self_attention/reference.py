"""The self-attention block in plain PyTorch, the N x M map in memory: the truth the kernels are held against.

Source: Zhang et al. 2019, section 3, in the form of the released code (brain-research/self-attention-gan,
non_local.py:48-81). Differentiable any number of times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.reference import attention
from ..projection.reference import project
from .inputs import BlockInputs


def self_attention(inputs: BlockInputs, pool: bool) -> Tensor:
    """Return x + gamma * o(softmax(q kᵀ) v), (B, C, H, W) in the dtype of x; weights have the shape (D, C, 1, 1)."""
    return unproject(attention(*projections(inputs, pool)), inputs.x, inputs.w_o, inputs.b_o, inputs.gamma)


def projections(inputs: BlockInputs, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, N, D_QK), k (B, M, D_QK) and v (B, M, D_V)."""
    x, w_theta, w_phi, w_g, _, _, b_theta, b_phi, b_g, _ = inputs
    return project(x, w_theta, b_theta), project(x, w_phi, b_phi, pool), project(x, w_g, b_g, pool)


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
