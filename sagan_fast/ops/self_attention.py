"""The self-attention block y = x + gamma * o(softmax(theta(x) phi(x)ᵀ) g(x)) with a choice of backends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.kernels.checks import check_ndim, check_same_device, check_shape
from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.kernels.self_attention import reference
from sagan_fast.kernels.self_attention.inputs import BlockGradients, BlockInputs, Saved
from sagan_fast.ops.attention import attention_on, gradients
from sagan_fast.ops.backends import Choice, choose, product_dtype
from sagan_fast.ops.library import LIBRARY, define, is_transformed

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
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return x + gamma * o(softmax(scale q kᵀ) v), (B, C, H, W).

    1x1 convolutions give q = theta(x), k = phi(x), v = g(x). With `pool`, k and v are max-pooled 2x2 with stride 2
    first (odd last rows and columns are dropped). `scale` is 1, as in SAGAN, not 1/sqrt(D_QK). Source: Zhang et al.
    2019, §3, in the form of the released code (brain-research/self-attention-gan, non_local.py:48-81).

    `x` (B, C, H, W) of any strides; `w_theta`, `w_phi` (D_QK, C, 1, 1); `w_g` (D_V, C, 1, 1); `w_o` (C, D_V, 1, 1),
    or None: then v has C channels and is the output of the attention; `gamma` of shape () or (1,); biases `b_theta`,
    `b_phi` (D_QK,), `b_g` (D_V,), `b_o` (C,). `backend` as in `attention`. The result has the dtype of x.

    "triton" computes products in the dtype of x, or autocast's; the weights may be of another (float32 beside a
    bfloat16 x), gamma enters as it is. Beyond x it keeps, for backward, (N + M) * D_QK + M * D_V + N * D_V elements of
    that dtype, N * D_V more of a 16-bit one (what o lost by rounding), N float32 and, pooled, M * (D_QK + D_V) bytes an
    image, M = N/4 or N. For the default widths that is 1.3 to 1.4 times the bytes of a bfloat16 x pooled, 1.8 unpooled,
    3.3 unpooled without w_o, and never the N x M map. Derivatives beyond the first: docs/derivatives.md.

    Raises ValueError for shapes that do not fit (a map too small to pool among them), unknown backends and widths
    "triton" has no tiles for (D_QK above 64, D_V above 256) where it is asked for, RuntimeError if it is asked for
    where it cannot run.
    """
    inputs = BlockInputs(x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o)
    check_block(inputs, pool)
    if scale != 1.0:
        inputs = inputs._replace(w_theta=w_theta * scale, b_theta=None if b_theta is None else b_theta * scale)
    return block_on(choose_block(inputs, pool, backend).backend, inputs, pool)


def block_on(chosen: str, inputs: BlockInputs, pool: bool) -> Tensor:
    """Run the block on a backend already chosen, without checks."""
    if chosen == "triton":
        return _fused_by_triton(inputs, pool)
    if chosen == "eager":
        return reference.self_attention(inputs, pool)
    q, k, v = _project_together(inputs, pool)
    return reference.unproject(attention_on(chosen, q, k, v, 1.0), inputs.x, inputs.w_o, inputs.b_o, inputs.gamma)


def _project_together(inputs: BlockInputs, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as `project` does, from one convolution that reads x once."""
    weights, biases = inputs[1:4], inputs[6:9]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
    maps = F.conv2d(inputs.x, torch.cat(weights), bias)
    D_QK, _ = inputs.widths
    q, keys = maps[:, :D_QK], maps[:, D_QK:]
    if pool:
        keys = F.max_pool2d(keys, 2)
    q, k, v = (t.flatten(2).transpose(1, 2) for t in (q, keys[:, :D_QK], keys[:, D_QK:]))
    return q, k, v


def choose_block(inputs: BlockInputs, pool: bool, backend: str) -> Choice:
    """Return the backend that runs the block, and why."""
    return choose(_OP, backend, inputs.x, *inputs.sizes(pool), *inputs.widths)


def check_block(inputs: BlockInputs, pool: bool) -> None:
    """Raise ValueError unless the arguments of `self_attention_2d` fit each other.

    What usually fits is compared right here: on small maps a call of a helper for each would be a tenth of the time.
    """
    x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o = inputs
    if x.ndim != 4:
        check_ndim(_OP, "x", x, "B, C, H, W")
    _, C, H, W = x.shape
    D_QK, D_V = inputs.widths
    if not (w_theta.shape == w_phi.shape == (D_QK, C, 1, 1) and w_g.shape == (D_V, C, 1, 1)):
        check_shape(_OP, "w_theta", w_theta, (D_QK, C, 1, 1), "D_QK, C, 1, 1")
        check_shape(_OP, "w_phi", w_phi, (D_QK, C, 1, 1), "D_QK, C, 1, 1")
        check_shape(_OP, "w_g", w_g, (D_V, C, 1, 1), "D_V, C, 1, 1")
    if w_o is not None:
        if w_o.shape != (C, D_V, 1, 1):
            check_shape(_OP, "w_o", w_o, (C, D_V, 1, 1), "C, D_V, 1, 1")
    elif D_V != C:
        raise ValueError(f"{_OP}: w_g must have as many rows as x has channels, {C}, where w_o is None, got {D_V}")
    elif b_o is not None:
        raise ValueError(f"{_OP}: b_o must be absent where w_o is None, got shape {tuple(b_o.shape)}")
    for name, bias, rows in (("b_theta", b_theta, D_QK), ("b_phi", b_phi, D_QK), ("b_g", b_g, D_V), ("b_o", b_o, C)):
        if bias is not None and bias.shape != (rows,):
            check_shape(_OP, name, bias, (rows,), "C," if name == "b_o" else "D_V," if name == "b_g" else "D_QK,")
    if gamma.ndim > 1 or gamma.numel() != 1:
        raise ValueError(f"{_OP}: gamma must be a scalar of shape () or (1,), got {tuple(gamma.shape)}")
    if pool and (H < 2 or W < 2):
        raise ValueError(f"{_OP}: x must be at least 2 x 2 to be pooled, got {(H, W)}")
    device = x.device
    for tensor in inputs:
        if tensor is not None and tensor.device != device:
            check_same_device(_OP, "x", x, **inputs._asdict())


def _fused_by_triton(inputs: BlockInputs, pool: bool) -> Tensor:
    dtype = product_dtype(inputs.x)
    x, w_theta, w_phi, w_g, w_o, gamma, *biases = inputs
    if not is_transformed() and not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    w_theta, w_phi, w_g = (_matrix(w, dtype) for w in (w_theta, w_phi, w_g))
    w_o = None if w_o is None else _matrix(w_o, dtype)
    biases = [None if b is None else b.to(dtype).contiguous() for b in biases]
    flat = BlockInputs(x, w_theta, w_phi, w_g, w_o, gamma, *biases)
    if is_transformed():
        return _in_parts(flat, pool)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in flat):
        return _TritonFunction.apply(*flat, pool)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.sagan_fast.self_attention_2d_inference.default(*flat, pool)  # type: ignore[no-any-return]


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (rows, columns, 1, 1) of a 1x1 convolution as a contiguous matrix of `dtype`."""
    weight = weight.flatten(1)
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    return weight if weight.is_contiguous() else weight.contiguous()


class _TritonFunction(torch.autograd.Function):
    """Our kernels both ways; where a graph of the backward is asked for, that of attention alone between the rest."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, *saved = torch.ops.sagan_fast.self_attention_2d.default(*args)
        ctx.save_for_backward(*args[:-1], *saved)
        ctx.pool = args[-1]
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: activation checkpointing gives them a single time
        inputs, saved = BlockInputs(*kept[:10]), kept[10:]
        wanted = ctx.needs_input_grad[:10]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # views: one input may be made of another, or be another, and its gradient is not that one's
            views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
            inputs = BlockInputs(*views)
            return (*gradients(_in_parts(inputs, ctx.pool), inputs, grads[0], wanted), None)
        need_weights, need_biases = any(wanted[1:5]), any(wanted[6:])
        found = BlockGradients(
            *torch.ops.sagan_fast.self_attention_2d_backward.default(
                grads[0], *inputs, *saved, ctx.pool, wanted[0], need_weights, need_biases
            )
        )
        (D_QK, D_V), nothing = inputs.widths, (None,) * 3
        rows = [D_QK, D_QK, D_V]
        d_w = torch.split(found.w_qkv, rows) if need_weights and found.w_qkv is not None else nothing
        d_b = torch.split(found.b_qkv, rows) if need_biases and found.b_qkv is not None else nothing
        d_inputs = (found.x, *d_w, found.w_o, found.gamma, *d_b, found.b_o)
        return (*(grad if want else None for grad, want in zip(d_inputs, wanted, strict=True)), None)


def _in_parts(inputs: BlockInputs, pool: bool) -> Tensor:
    """The block on the inputs of the op, differentiable as often as `functional.attention` on Triton is."""
    x, w_theta, w_phi, w_g, w_o, gamma, *biases = inputs
    w_theta, w_phi, w_g = (w[:, :, None, None] for w in (w_theta, w_phi, w_g))
    w_o = None if w_o is None else w_o[:, :, None, None]
    cast = BlockInputs(x.to(w_theta.dtype), w_theta, w_phi, w_g, w_o, gamma, *biases)
    with torch.autocast(x.device.type, enabled=False):
        q, k, v = reference.projections(cast, pool)
        return reference.unproject(attention_on("triton", q, k, v, 1.0), x, w_o, inputs.b_o, gamma).to(x.dtype)


_INPUTS = (
    "Tensor x, Tensor w_theta, Tensor w_phi, Tensor w_g, Tensor? w_o, Tensor gamma, Tensor? b_theta, Tensor? b_phi,"
    " Tensor? b_g, Tensor? b_o"
)
_SAVED = "Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor lost, Tensor argmax"
define(f"self_attention_2d({_INPUTS}, bool pool) -> (Tensor y, {_SAVED})")
define(f"self_attention_2d_inference({_INPUTS}, bool pool) -> Tensor")  # six empty results would cost a tenth more
define(
    f"self_attention_2d_backward(Tensor d_y, {_INPUTS}, {_SAVED}, bool pool,"
    " bool need_input, bool need_weights, bool need_biases)"
    " -> (Tensor d_x, Tensor d_w_qkv, Tensor d_b_qkv, Tensor d_w_o, Tensor d_b_o, Tensor d_gamma)",
)


@torch.library.impl(LIBRARY, "self_attention_2d", "CompositeExplicitAutograd")
def _self_attention_2d(*args: Any) -> tuple[Tensor, ...]:
    from sagan_fast.kernels.self_attention.forward import self_attention_fwd

    *inputs, pool = args
    y, saved = self_attention_fwd(BlockInputs(*inputs), pool=pool)
    assert saved is not None  # as it was asked for
    new = saved.k.new_empty
    lost = new(0) if saved.lost is None else saved.lost
    return (y, *saved[:-2], lost, new(0, dtype=torch.uint8) if saved.argmax is None else saved.argmax)


@torch.library.register_fake("sagan_fast::self_attention_2d", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _self_attention_2d_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, pool = BlockInputs(*args[:-1]), args[-1]
    (B, N, M), (D_QK, D_V) = inputs.sizes(pool), inputs.widths
    new, wide = inputs.w_theta.new_empty, accumulator_dtype(inputs.w_theta.dtype)
    return (
        torch.empty_like(inputs.x),
        new((B, N, D_QK)),
        new((B, M, D_QK)),
        new((B, M, D_V)),
        new((B, N, D_V)),
        new((B, N), dtype=wide),
        new(0 if inputs.w_theta.dtype == wide else (B, N, D_V)),
        new((B, M, D_QK + D_V) if pool else 0, dtype=torch.uint8),
    )


@torch.library.impl(LIBRARY, "self_attention_2d_inference", "CompositeExplicitAutograd")
def _self_attention_2d_inference(*args: Any) -> Tensor:
    from sagan_fast.kernels.self_attention.forward import self_attention_fwd

    *inputs, pool = args
    return self_attention_fwd(BlockInputs(*inputs), pool=pool, save=False)[0]


@torch.library.register_fake("sagan_fast::self_attention_2d_inference", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _self_attention_2d_inference_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl(LIBRARY, "self_attention_2d_backward", "CompositeExplicitAutograd")
def _self_attention_2d_backward(*args: Any) -> tuple[Tensor, ...]:
    from sagan_fast.kernels.self_attention.backward import self_attention_bwd

    d_y, inputs, saved = args[0], BlockInputs(*args[1:11]), Saved(*args[11:18])
    pool, need_input, need_weights, need_biases = args[18:]
    lost, argmax = args[16:18]
    saved = saved._replace(lost=lost if lost.numel() else None, argmax=argmax if pool else None)
    with torch.autocast(d_y.device.type, enabled=False):
        found = self_attention_bwd(
            d_y, inputs, saved, need_input=need_input, need_weights=need_weights, need_biases=need_biases
        )
    gamma = inputs.gamma
    found = found._replace(gamma=found.gamma.to(gamma.dtype).reshape(gamma.shape))
    return tuple(inputs.w_theta.new_empty(0) if grad is None else grad for grad in found)


@torch.library.register_fake("sagan_fast::self_attention_2d_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _self_attention_2d_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, (need_input, need_weights, need_biases) = BlockInputs(*args[1:11]), args[19:]
    D, C = 2 * inputs.w_theta.shape[0] + inputs.w_g.shape[0], inputs.w_theta.shape[1]
    new, w_o = inputs.w_theta.new_empty, inputs.w_o
    return (
        torch.empty_like(inputs.x) if need_input else new(0),
        new((D, C) if need_weights else 0),
        new(D if need_biases else 0),
        new(0 if w_o is None or not need_weights else w_o.shape),
        new(0 if w_o is None or not need_biases else C),
        inputs.gamma.new_empty(inputs.gamma.shape),
    )
