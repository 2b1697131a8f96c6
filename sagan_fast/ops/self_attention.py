"""The self-attention block y = x + gamma * o(softmax(theta(x) phi(x)ᵀ) g(x)) with a choice of backends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.kernels.attention import reference
from sagan_fast.kernels.checks import check_ndim, check_same_device, check_shape
from sagan_fast.kernels.projection.reference import project, unproject
from sagan_fast.ops.attention import LIBRARY, attention_on, define, gradients, lse_dtype
from sagan_fast.ops.backends import Choice, choose, product_dtype

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

    "triton" computes products in the dtype of x, or autocast's; the weights may be of another (float32 beside a
    bfloat16 x), gamma enters as it is. Beyond x it keeps, for backward, (N + M) * D_QK + M * D_V + N * D_V elements of
    that dtype, N float32 and, pooled, M * (D_QK + D_V) bytes an image, M = N/4 or N: for the default widths 0.78 to
    0.9 times the bytes of a bfloat16 x pooled, 1.4 unpooled, and never the N x M map.

    Raises ValueError for shapes that do not fit (a map too small to pool among them), unknown backends and widths
    "triton" has no tiles for (D_QK above 64, D_V above 256) where it is asked for, RuntimeError if it is asked for
    where it cannot run.
    """
    arguments = (x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o, pool)
    check_block(*arguments)
    return block_on(choose_block(x, w_theta, w_g, pool, backend).backend, *arguments)


def block_on(
    chosen: str, x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, b_o: Tensor | None, pool: bool,
) -> Tensor:  # fmt: skip
    """Run the block on a backend already chosen, without checks."""
    if chosen == "triton":
        return _fused_by_triton(x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o, pool)
    if chosen in ("sdpa", "blocks"):
        q, k, v = _project_together(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g, pool)
    else:
        q = project(x, w_theta, b_theta)
        k = project(x, w_phi, b_phi, pool)
        v = project(x, w_g, b_g, pool)
    return unproject(attention_on(chosen, q, k, v, 1.0), x, w_o, b_o, gamma)


def _project_together(
    x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return q, k and v as `project` does, from one convolution that reads x once."""
    weights, biases = (w_theta, w_phi, w_g), (b_theta, b_phi, b_g)
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
    maps = F.conv2d(x, torch.cat(weights), bias)
    D_QK = w_theta.shape[0]
    q, keys = maps[:, :D_QK], maps[:, D_QK:]
    if pool:
        keys = F.max_pool2d(keys, 2)
    q, k, v = (t.flatten(2).transpose(1, 2) for t in (q, keys[:, :D_QK], keys[:, D_QK:]))
    return q, k, v


def choose_block(x: Tensor, w_theta: Tensor, w_g: Tensor, pool: bool, backend: str) -> Choice:
    """Return the backend that runs the block on `x` (B, C, H, W), and why."""
    B, _, H, W = x.shape
    M = (H // 2) * (W // 2) if pool else H * W
    return choose(_OP, backend, x, B, H * W, M, w_theta.shape[0], w_g.shape[0])


def check_block(
    x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, b_o: Tensor | None, pool: bool,
) -> None:  # fmt: skip
    """Raise ValueError unless the arguments of `self_attention_2d` fit each other.

    What usually fits is compared right here: on small maps a call of a helper for each would be a tenth of the time.
    """
    if x.ndim != 4:
        check_ndim(_OP, "x", x, "B, C, H, W")
    _, C, H, W = x.shape
    D_QK, D_V = w_theta.shape[0], w_g.shape[0]
    if not (w_theta.shape == w_phi.shape == (D_QK, C, 1, 1) and w_g.shape == (D_V, C, 1, 1)):
        check_shape(_OP, "w_theta", w_theta, (D_QK, C, 1, 1), "D_QK, C, 1, 1")
        check_shape(_OP, "w_phi", w_phi, (D_QK, C, 1, 1), "D_QK, C, 1, 1")
        check_shape(_OP, "w_g", w_g, (D_V, C, 1, 1), "D_V, C, 1, 1")
    if w_o is not None:
        if w_o.shape != (C, D_V, 1, 1):
            check_shape(_OP, "w_o", w_o, (C, D_V, 1, 1), "C, D_V, 1, 1")
    elif D_V != C:
        raise ValueError(f"{_OP}: w_g must have as many rows as x has channels where w_o is None = {C}, got {D_V}")
    elif b_o is not None:
        raise ValueError(f"{_OP}: b_o must be absent where w_o is None = None, got shape {tuple(b_o.shape)}")
    if b_theta is not None:
        check_shape(_OP, "b_theta", b_theta, (D_QK,), "D_QK,")
    if b_phi is not None:
        check_shape(_OP, "b_phi", b_phi, (D_QK,), "D_QK,")
    if b_g is not None:
        check_shape(_OP, "b_g", b_g, (D_V,), "D_V,")
    if b_o is not None:
        check_shape(_OP, "b_o", b_o, (C,), "C,")
    if gamma.ndim > 1 or gamma.numel() != 1:
        raise ValueError(f"{_OP}: gamma must be a scalar of shape = () or (1,), got {tuple(gamma.shape)}")
    if pool and (H < 2 or W < 2):
        raise ValueError(f"{_OP}: x must be at least 2 x 2 to be pooled = H, W >= 2, got {(H, W)}")
    device = x.device
    for tensor in (w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o):
        if tensor is not None and tensor.device != device:
            check_same_device(
                _OP, "x", x, w_theta=w_theta, w_phi=w_phi, w_g=w_g, w_o=w_o, gamma=gamma,
                b_theta=b_theta, b_phi=b_phi, b_g=b_g, b_o=b_o,
            )  # fmt: skip


def _fused_by_triton(
    x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, b_o: Tensor | None, pool: bool,
) -> Tensor:  # fmt: skip
    dtype = product_dtype(x)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    w_theta, w_phi, w_g = (_matrix(w, dtype) for w in (w_theta, w_phi, w_g))
    w_o = None if w_o is None else _matrix(w_o, dtype)
    b_theta, b_phi, b_g, b_o = (None if b is None else b.to(dtype) for b in (b_theta, b_phi, b_g, b_o))
    args = (x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in args):
        return _TritonFunction.apply(*args, pool)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.sagan_fast.self_attention_2d_inference.default(*args, pool)  # type: ignore[no-any-return]


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (rows, columns, 1, 1) of a 1x1 convolution as a contiguous matrix of `dtype`."""
    weight = weight.flatten(1)
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    return weight if weight.is_contiguous() else weight.contiguous()


class _TritonFunction(torch.autograd.Function):
    """Our kernels both ways, unless a graph of the backward is asked for: then the reference."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, *kept = torch.ops.sagan_fast.self_attention_2d.default(*args)
        ctx.save_for_backward(*args[:-1], *kept)
        ctx.pool = args[-1]
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o = inputs
        wanted = ctx.needs_input_grad[:10]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.autocast(x.device.type, enabled=False):
                return (*gradients(_reference(inputs, ctx.pool), inputs, grads[0], wanted), None)
        d_x, d_w_qkv, d_b_qkv, d_w_o, d_b_o, d_gamma = torch.ops.sagan_fast.self_attention_2d_backward.default(
            grads[0], x, w_theta, w_phi, w_g, w_o, b_o, gamma, *kept,
            ctx.pool, wanted[0], any(wanted[1:5]), any(wanted[6:]),
        )  # fmt: skip
        D_QK, D_V = w_theta.shape[0], w_g.shape[0]
        d_w = d_w_qkv.split((D_QK, D_QK, D_V)) if any(wanted[1:5]) else (None,) * 3
        d_b = d_b_qkv.split((D_QK, D_QK, D_V)) if any(wanted[6:]) else (None,) * 3
        found = (d_x, *d_w, d_w_o, d_gamma, *d_b, d_b_o)
        return (*(grad if want else None for grad, want in zip(found, wanted, strict=True)), None)


def _reference(inputs: tuple[Tensor, ...], pool: bool) -> Tensor:
    """The block in plain PyTorch, on the inputs of the op."""
    x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o = inputs
    w_theta, w_phi, w_g = (w[:, :, None, None] for w in (w_theta, w_phi, w_g))
    w_o = None if w_o is None else w_o[:, :, None, None]
    cast = x.to(w_theta.dtype)
    q, k, v = project(cast, w_theta, b_theta), project(cast, w_phi, b_phi, pool), project(cast, w_g, b_g, pool)
    return unproject(reference.attention(q, k, v), x, w_o, b_o, gamma).to(x.dtype)


_INPUTS = (
    "Tensor x, Tensor w_theta, Tensor w_phi, Tensor w_g, Tensor? w_o, Tensor gamma, Tensor? b_theta, Tensor? b_phi,"
    " Tensor? b_g, Tensor? b_o, bool pool"
)
define(
    f"self_attention_2d({_INPUTS}) -> (Tensor y, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor argmax)",
)
define(f"self_attention_2d_inference({_INPUTS}) -> Tensor")  # six empty results would be a tenth of the host's time
define(
    "self_attention_2d_backward(Tensor d_y, Tensor x, Tensor w_theta, Tensor w_phi, Tensor w_g, Tensor? w_o,"
    " Tensor? b_o, Tensor gamma, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor argmax, bool pool,"
    " bool need_input, bool need_weights, bool need_biases)"
    " -> (Tensor d_x, Tensor d_w_qkv, Tensor d_b_qkv, Tensor d_w_o, Tensor d_b_o, Tensor d_gamma)",
)


@torch.library.impl(LIBRARY, "self_attention_2d", "CompositeExplicitAutograd")
def _self_attention_2d(
    x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, b_o: Tensor | None, pool: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from sagan_fast.kernels.attention.forward import block_fwd
    from sagan_fast.kernels.projection.forward import projection_fwd

    q, k, v, argmax = projection_fwd(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g, pool=pool)
    y, o, lse = block_fwd(x, q, k, v, w_o, gamma, b_o)
    assert o is not None and lse is not None  # as they are saved
    return y, q, k, v, o, lse, k.new_empty(0, dtype=torch.uint8) if argmax is None else argmax


@torch.library.register_fake("sagan_fast::self_attention_2d", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _self_attention_2d_fake(
    x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, b_o: Tensor | None, pool: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, _, H, W = x.shape
    D_QK, D_V, N = w_theta.shape[0], w_g.shape[0], H * W
    M = (H // 2) * (W // 2) if pool else N
    new = w_theta.new_empty
    return (
        torch.empty_like(x),
        new((B, N, D_QK)),
        new((B, M, D_QK)),
        new((B, M, D_V)),
        new((B, N, D_V)),
        new((B, N), dtype=lse_dtype(w_theta.dtype)),
        new((B, M, D_QK + D_V) if pool else 0, dtype=torch.uint8),
    )


@torch.library.impl(LIBRARY, "self_attention_2d_inference", "CompositeExplicitAutograd")
def _self_attention_2d_inference(
    x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor,
    b_theta: Tensor | None, b_phi: Tensor | None, b_g: Tensor | None, b_o: Tensor | None, pool: bool,
) -> Tensor:  # fmt: skip
    from sagan_fast.kernels.attention.forward import block_fwd
    from sagan_fast.kernels.projection.forward import projection_fwd

    q, k, v, _ = projection_fwd(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g, pool=pool, save_argmax=False)
    return block_fwd(x, q, k, v, w_o, gamma, b_o, save=False)[0]


@torch.library.register_fake("sagan_fast::self_attention_2d_inference", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _self_attention_2d_inference_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl(LIBRARY, "self_attention_2d_backward", "CompositeExplicitAutograd")
def _self_attention_2d_backward(
    d_y: Tensor, x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, b_o: Tensor | None,
    gamma: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, argmax: Tensor,
    pool: bool, need_input: bool, need_weights: bool, need_biases: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from sagan_fast.kernels.attention.backward import block_bwd

    with torch.autocast(x.device.type, enabled=False):
        d_x, d_w_qkv, d_b_qkv, d_w_o, d_b_o, d_gamma = block_bwd(
            d_y, x, torch.cat([w_theta, w_phi, w_g]), w_o, b_o, gamma, q, k, v, o, lse, argmax if pool else None,
            need_input=need_input, need_weights=need_weights, need_biases=need_biases,
        )  # fmt: skip
    absent = w_theta.new_empty
    return tuple(
        absent(0) if grad is None else grad
        for grad in (d_x, d_w_qkv, d_b_qkv, d_w_o, d_b_o, d_gamma.to(gamma.dtype).reshape(gamma.shape))
    )


@torch.library.register_fake("sagan_fast::self_attention_2d_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _self_attention_2d_backward_fake(
    d_y: Tensor, x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, b_o: Tensor | None,
    gamma: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, argmax: Tensor,
    pool: bool, need_input: bool, need_weights: bool, need_biases: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    D, C = 2 * w_theta.shape[0] + w_g.shape[0], w_theta.shape[1]
    new = w_theta.new_empty
    return (
        torch.empty_like(x) if need_input else new(0),
        new((D, C) if need_weights else 0),
        new(D if need_biases else 0),
        new(0 if w_o is None or not need_weights else w_o.shape),
        new(0 if w_o is None or not need_biases else C),
        gamma.new_empty(gamma.shape),
    )
