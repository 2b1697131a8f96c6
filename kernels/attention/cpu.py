"""softmax(scale q kᵀ) v on the CPU, a chunk of the map at a time, in PyTorch's products.

Each thread has chunks of its own. Only one chunk a thread is in memory, in the cache. Backward needs the base-2
log-sum-exp of each row, from which it makes a chunk again.

Why not PyTorch's fused kernel: on the CPU it wants q, k and v of one width, so q and k would be padded to D_V, nearly
twice the work at D_QK = D_V / 8. Why threads of our own: with each product split over the threads, every chunk would
wait for the slowest thread five times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import LOG2_E
from .chunks import Buffer, Chunk, KeySums, parts_of, share

SMALL = 60.0
"""If every |score| is below this (base 2), the row maximum is not subtracted: exp2 cannot overflow.

Sums of 2**60 are far from the largest float32, and 2**-60 is far above the smallest. It saves two passes over the map.
"""


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of `dtype` on `device` can be computed here: the CPU, single or double precision, now."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        # a trace would fix the loop over chunks for the batch size of its example
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and torch._C._len_torch_dispatch_stack() == 0  # which other threads do not see
    )


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether these are plain tensors of one dtype that `runs_on` accepts, with something to compute."""
    return (
        runs_on(q.device, q.dtype)
        and q.dtype == k.dtype == v.dtype
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.numel() > 0 for t in (q, k, v))
        and not torch.is_autocast_enabled("cpu")
    )


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), and each row's log2 of the sum of exponentials, (B, N, 1).

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V), what `supports` accepts, any strides. Not differentiable.
    """
    B, N, _ = q.shape
    M, D_V = v.shape[1:]
    with torch.no_grad():
        q = q * (scale * LOG2_E)  # exp2 takes half the time of exp
        out, lse = q.new_empty(B, N, D_V), q.new_empty(B, N, 1)
        small = bool(q.norm(dim=-1).amax() * k.norm(dim=-1).amax() < SMALL)  # not with a NaN

        k_t = k.transpose(1, 2)
        top = None if small else torch.empty_like(lse)

        def work(part: Sequence[Chunk]) -> None:
            scores = Buffer(q, part, M)
            for images, rows in part:
                p = scores(images, rows)
                torch.bmm(q[images, rows], k_t[images], out=p)
                if top is not None:
                    p.sub_(torch.amax(p, -1, keepdim=True, out=top[images, rows]))
                torch.sum(p.exp2_(), -1, keepdim=True, out=lse[images, rows])
                torch.bmm(p, v[images], out=out[images, rows])

        share(work, parts_of(q, M))
        out.div_(lse)  # the sums so far
        lse.log2_()
    return out, lse if top is None else lse.add_(top)


def attention_bwd(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for q, k and v of what `attention_fwd` computed, from its results and `d_out`.

    The same bits on every call with the same number of threads. Not differentiable.
    """
    B, N, D_QK = q.shape
    M, D_V = v.shape[1:]
    with torch.no_grad():
        # one more column takes the row's number off in the product itself
        ones = k.new_ones(B, M, 1)
        q_lse, k_one = torch.cat([q * (scale * LOG2_E), -lse], -1), torch.cat([k, ones], -1).transpose(1, 2)
        d_delta = torch.cat([d_out, -(d_out * out).sum(-1, keepdim=True)], -1)
        v_one = torch.cat([v, ones], -1).transpose(1, 2)
        k_t = k.transpose(1, 2).contiguous()
        parts = parts_of(q, M)
        # transposed, so that the short side is the rows of the products
        d_q = q.new_empty(B, D_QK, N)
        sums = KeySums(q, parts, B, M, (D_QK, D_V))

        def work(part: Sequence[Chunk]) -> None:
            for_p, for_d_s = Buffer(q, part, M), Buffer(q, part, M)
            for images, rows in part:
                p, d_s = for_p(images, rows), for_d_s(images, rows)
                q_rows, d_rows = q_lse[images, rows], d_delta[images, rows]
                d_k, d_v = sums.of(part, images)
                torch.bmm(q_rows, k_one[images], out=p).exp2_()
                d_v.baddbmm_(d_rows[..., :D_V].transpose(1, 2), p)
                torch.bmm(d_rows, v_one[images], out=d_s).mul_(p)
                torch.bmm(k_t[images], d_s.transpose(1, 2), out=d_q[images, :, rows])
                d_k.baddbmm_(q_rows[..., :D_QK].transpose(1, 2), d_s)

        share(work, parts)
        d_k, d_v = sums.total()
    return d_q.mul_(scale).transpose(1, 2), d_k.div_(LOG2_E), d_v
