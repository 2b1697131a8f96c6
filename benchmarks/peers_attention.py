"""The block done by everything a user would pick instead of our kernels, each called as fairly as it can be.

All take channels_last maps, so that rows of q, k and v lie without gaps and no fused backend of PyTorch refuses them,
scale 1, and one set of weights. What a backend cannot do raises, and is recorded with its reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sagan_fast import functional
from sagan_fast.kernels.attention import reference

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(q kᵀ) v on (B, N, D_QK), (B, M, D_QK), (B, M, D_V)."""

SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash-padded": SDPBackend.FLASH_ATTENTION,
}


def block(core: Core, pool: bool) -> Callable[..., Tensor]:
    """Return the block as people write it around `core`: a function of x and the weights of `self_attention_2d`."""

    def run(x: Tensor, w_theta: Tensor, w_phi: Tensor, w_g: Tensor, w_o: Tensor | None, gamma: Tensor) -> Tensor:
        q, k, v = F.conv2d(x, w_theta), F.conv2d(x, w_phi), F.conv2d(x, w_g)
        if pool:
            k, v = F.max_pool2d(k, 2), F.max_pool2d(v, 2)
        out = core(*(maps.permute(0, 2, 3, 1).flatten(1, 2) for maps in (q, k, v)))
        maps = out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return x + gamma * (maps if w_o is None else F.conv2d(maps, w_o))

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention by `scaled_dot_product_attention`, scale 1; PyTorch picks its backend."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `sdpa` with q, k and v zero-padded to one width, which FlashAttention-2 asks for."""
    width = max(q.shape[2], v.shape[2])
    width = -(-width // 8) * 8
    out = sdpa(*(F.pad(t, (0, width - t.shape[2])) for t in (q, k, v)))
    return out[..., : v.shape[2]]


def forced(name: str) -> Core:
    """Return `sdpa` on the backend `name` of SDPA_BACKENDS alone."""
    inner = padded if name == "sdpa-flash-padded" else sdpa

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA_BACKENDS[name]):
            return inner(q, k, v)

    return run


def widened(q: Tensor, k: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Return q and k with zero channels added up to a multiple of `multiple`."""
    missing = -q.shape[2] % multiple
    return (F.pad(q, (0, missing)), F.pad(k, (0, missing))) if missing else (q, k)


def flex() -> Core:
    """Return compiled FlexAttention, scale 1, q and k padded to the 16 channels that it asks for."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = widened(q, k, 16 if q.shape[2] < 16 else 1)
        return compiled(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]

    return run


def flash_attention_4() -> Core:
    """Return FlashAttention-4's function, scale 1, q and k zero-padded to the 8 channels it counts in; ImportError
    where it is not installed."""
    from flash_attn.cute import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = widened(q, k, 8)
        return flash_attn_func(*(t[:, :, None] for t in (q, k, v)), softmax_scale=1.0)[0][:, :, 0]

    return run


def xformers() -> Core:
    """Return xformers' attention, scale 1, q and k zero-padded to the 8 channels it counts in; ImportError without it.

    It picks its kernels itself: FlashAttention-3's on Hopper where that is installed, else CUTLASS's, which take v of
    another width than q and k too.
    """
    from xformers.ops import memory_efficient_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = widened(q, k, 8)
        return memory_efficient_attention(*(t[:, :, None] for t in (q, k, v)), scale=1.0)[:, :, 0]

    return run


def sdpa_choice(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return the name of the backend PyTorch picks for these."""
    chosen = torch._fused_sdp_choice(q[:, None], k[:, None], v[:, None], None, 0.0, False, scale=1.0)
    return {int(b): b.name for b in (*SDPA_BACKENDS.values(), SDPBackend.MATH)}.get(int(chosen), str(chosen))


def blocks(pool: bool, device: str) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Return, by provider, what makes the block's function; ours last."""

    def ours(backend: str) -> Callable[[], Callable[..., Tensor]]:
        def run(x, w_theta, w_phi, w_g, w_o, gamma):
            return functional.self_attention_2d(x, w_theta, w_phi, w_g, w_o, gamma, pool=pool, backend=backend)

        return lambda: run

    makers: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "eager": lambda: block(reference.attention, pool),
        "sdpa": lambda: block(sdpa, pool),
    }
    if device == "cpu":
        return {**makers, "auto": ours("auto")}
    makers["eager-compiled"] = lambda: torch.compile(block(reference.attention, pool), dynamic=False)
    makers["sdpa-compiled"] = lambda: torch.compile(block(sdpa, pool), dynamic=False)
    for name in SDPA_BACKENDS:
        makers[name] = lambda name=name: block(forced(name), pool)
    makers["flex"] = lambda: block(flex(), pool)
    makers["flash-attention-4"] = lambda: block(flash_attention_4(), pool)
    makers["xformers"] = lambda: block(xformers(), pool)
    makers["triton"] = ours("triton")
    return makers
