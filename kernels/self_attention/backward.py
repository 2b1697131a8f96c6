"""Gradients of the whole self-attention block in three launches and library products.

Attention's kernels compute dq, dk and dv straight into one buffer G (B, N, 2 * D_QK + D_V): dk and dv at the positions
that won the max-pool. The gradients of x and of the projections are then one matrix product each
(projection/backward.py). Oracle: autograd through reference.self_attention.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.backward import attention_bwd_dkv, attention_bwd_dq, describe_dkv, dkv_key, gradients_of_keys
from ..configs import LaunchConfig
from ..launch import Launch, launch, size_of
from ..projection.backward import projection_bwd_input, projection_bwd_weight, store_unpooled
from ..tiles import is_channels_last, locate
from .inputs import BlockGradients, BlockInputs, Saved
from .preprocess import block_bwd_preprocess


@triton.jit
def _bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, d_o_ptr, lse_ptr, delta_ptr,  # (B, N or M, D) each, (B, N), (B, N)
    argmax_ptr, dk_ptr, dv_ptr,  # (B, M, D_QK + D_V), (B, N, D) each: before the pool
    stride_q_b, stride_q_n, stride_q_d,
    stride_k_b, stride_k_m, stride_k_d,
    stride_v_b, stride_v_m, stride_v_d,
    stride_d_o_b, stride_d_o_n, stride_d_o_d,
    stride_dk_b, stride_dk_m, stride_dv_b, stride_dv_m,
    N, M, W, scale, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_m = locate(M, BLOCK_M, FLAT)
    mask_m = offs_m < M
    dk, dv, dv_rest = gradients_of_keys(
        b, offs_m, q_ptr, k_ptr, v_ptr, d_o_ptr, lse_ptr, delta_ptr,
        stride_q_b, stride_q_n, stride_q_d, stride_k_b, stride_k_m, stride_k_d,
        stride_v_b, stride_v_m, stride_v_d, stride_d_o_b, stride_d_o_n, stride_d_o_d,
        N, M, scale_log2, D_QK, D_V, PACKED, EVEN_N, EVEN_M,
        BLOCK_N, BLOCK_M, BLOCK_D_QK, BLOCK_D_V, BLOCK_REST, PRECISION, ACC,
    )  # fmt: skip
    dk_ptr += b * stride_dk_b
    dv_ptr += b * stride_dv_b
    argmax_k = argmax_ptr + b * M * (D_QK + D_V)
    argmax_v = argmax_k + D_QK
    store_unpooled(dk * scale, argmax_k, dk_ptr, D_QK + D_V, stride_dk_m, offs_m, mask_m, W, 0, D_QK, BLOCK_D_QK)
    store_unpooled(dv, argmax_v, dv_ptr, D_QK + D_V, stride_dv_m, offs_m, mask_m, W, 0, D_V, BLOCK_D_V)
    if BLOCK_REST > 0:
        store_unpooled(
            dv_rest, argmax_v, dv_ptr, D_QK + D_V, stride_dv_m, offs_m, mask_m, W, BLOCK_D_V, D_V, BLOCK_REST
        )


def _unpooled_dkv(
    saved: Saved, d_o: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, W: int, config: LaunchConfig | None
) -> None:
    """Fill dk (B, N, D_QK) and dv (B, N, D_V) of maps W wide, as they are before the max-pool."""
    q, k, v, _, lse, _, argmax = saved

    def describe() -> Launch:
        plain = describe_dkv(q, k, v, d_o, lse, delta, dk, dv, 1.0, config)
        needs = plain.needs()
        needs = replace(needs, bytes_read=needs.bytes_read + size_of(argmax), bytes_written=4 * needs.bytes_written)
        return replace(plain, numbers={**plain.numbers, "W": W}, needs=lambda: needs)

    tensors = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, d_o_ptr=d_o, lse_ptr=lse, delta_ptr=delta,
        argmax_ptr=argmax, dk_ptr=dk, dv_ptr=dv,
    )  # fmt: skip
    key = (W, *dkv_key(q, k, v, d_o, dk, dv, 1.0, config))
    launch("self_attention_bwd_dkv", _bwd_dkv_kernel, tensors, key, describe)


def self_attention_bwd(
    d_y: Tensor,
    inputs: BlockInputs,
    saved: Saved,
    *,
    need_input: bool = True,
    need_weights: bool = True,
    need_biases: bool = True,
    preprocess_config: LaunchConfig | None = None,
    dkv_config: LaunchConfig | None = None,
    dq_config: LaunchConfig | None = None,
) -> BlockGradients:
    """Return the gradients of the block for `d_y`, which has the shape and dtype of x and any strides.

    `inputs` and `saved` are those of `self_attention_fwd`. The gradients of weights and biases are in the products'
    dtype, that of gamma in the dtype of lse.
    """
    x, w_o, gamma, b_o = inputs.x, inputs.w_o, inputs.gamma, inputs.b_o
    q, k, v, o, lse, lost, argmax = saved
    (B, _, H, W), (_, N, D_QK), D_V = x.shape, q.shape, v.shape[2]
    channels_last = is_channels_last(x)
    d_y = d_y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    d_o, delta, d_gamma = block_bwd_preprocess(d_y, w_o, b_o, o, lost, gamma, config=preprocess_config)
    has_gaps = argmax is not None and (H % 2 == 1 or W % 2 == 1)  # rows and columns in no window
    allocate = torch.zeros if has_gaps else torch.empty
    G = allocate((B, N, 2 * D_QK + D_V), device=q.device, dtype=q.dtype)
    dq, dk, dv = G.split((D_QK, D_QK, D_V), dim=2)
    if argmax is None:
        attention_bwd_dkv(q, k, v, d_o, lse, delta, dk, dv, config=dkv_config)
    else:
        _unpooled_dkv(saved, d_o, delta, dk, dv, W, dkv_config)
    attention_bwd_dq(q, k, v, d_o, lse, delta, dq, config=dq_config)

    d_x = d_w_qkv = d_b_qkv = d_w_o = d_b_o = None
    if need_input:
        w_qkv = torch.cat([inputs.w_theta, inputs.w_phi, inputs.w_g])
        d_x = projection_bwd_input(G, w_qkv, d_y, channels_last)
    if need_weights:
        d_w_qkv = projection_bwd_weight(G, x, channels_last).to(G.dtype)
        if w_o is not None:
            d_w_o = (projection_bwd_weight(o, d_y, channels_last) * gamma).to(o.dtype).T.contiguous()
    if need_biases:
        d_b_qkv = G.sum((0, 1), dtype=lse.dtype).to(G.dtype)
        if w_o is not None:
            d_b_o = (d_y.sum((0, 2, 3), dtype=lse.dtype) * gamma).to(G.dtype)
    return BlockGradients(d_x, d_w_qkv, d_b_qkv, d_w_o, d_b_o, d_gamma)
