"""The attention block, ours against everything a user would take instead.

All providers get the same channels_last maps, weights and scale 1. So rows of q, k and v have no gaps, and no fused
backend of PyTorch refuses them. A provider that cannot do the work raises, and its reason is recorded.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Provider, Run, Target
from benchmarks.records import MODES
from benchmarks.shapes import BLOCK_SHAPES, STANDARD_SHAPES, BlockShape
from sagan_fast import functional
from sagan_fast.kernels.attention import reference
from sagan_fast.kernels.launch import DTYPES

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
"""softmax(q kᵀ) v on (B, N, D_QK), (B, M, D_QK), (B, M, D_V)."""
Inputs = list[Tensor | None]
"""d_y, x, w_theta, w_phi, w_g, w_o (or None) and gamma."""
Block = Callable[..., Tensor]
"""The block as a function of x, w_theta, w_phi, w_g, w_o (or None) and gamma."""

CACHE_BYTES = {"cuda": 150 << 20, "cpu": 0}
"""The input sets of a case together hold at least this much, 2.5 times the L2 of an H200, or there are MOST_SETS."""
MOST_SETS = 64

CPU_SHAPES = (
    BlockShape("cpu-unpooled-64x64-C64", 2, 64, 64, 64, 8, 64, pool=False, out_proj=False),
    BlockShape("cpu-feat64-G-64x64-C128", 2, 128, 64, 64, 16, 64),
    BlockShape("cpu-official-G-32x32-C256", 4, 256, 32, 32, 32, 128),
    BlockShape("cpu-shapes-16x16-C32", 32, 32, 16, 16, 4, 16),
)


def swept(target: Target) -> list[BlockShape]:
    """Return shapes over N from 256 to 16384, and over B from 1 to 256."""
    if target.gpu:
        base, B, prefix = BlockShape("", 64, 128, 64, 64, 16, 64), 16, "sweep"
    else:
        base, B, prefix = BlockShape("", 1, 32, 32, 32, 4, 16), 1, "cpu-sweep"
    sized = [replace(base, name=f"{prefix}-N{s * s}", B=B, H=s, W=s) for s in (16, 32, 64, 128)]
    return sized + [replace(base, name=f"{prefix}-B{b}", B=b) for b in (1, 4, 16, 64, 256)]


def cases(target: Target, shapes: Sequence[BlockShape], dtypes: Sequence[str] = ("bf16",)) -> Iterator[Case]:
    """Yield the block's cases: every dtype and shape, forward and forward+backward; on the CPU in float32 alone."""
    for dtype, shape, mode in product(dtypes if target.gpu and not target.dry_run else ("fp32",), shapes, MODES):
        yield case(replace(shape, B=1, H=8, W=8) if target.dry_run else shape, dtype, mode, target)


def gate(target: Target) -> Iterator[Case]:
    """Yield our kernels on every shape at a small batch: wrong results are known before anything is timed."""
    for one in cases(target, [replace(shape, B=min(shape.B, 4)) for shape in BLOCK_SHAPES]):
        yield replace(one, benchmark="gate").only(lambda p: p.name in ("eager", "triton"))


def standard(target: Target) -> Iterator[Case]:
    """Yield the shapes that targets are stated for."""
    return cases(target, BLOCK_SHAPES if target.gpu else CPU_SHAPES)


def sweep(target: Target) -> Iterator[Case]:
    """Yield the shapes of `swept`, without FlexAttention, which is compiled for each."""
    return (one.only(lambda p: "flex" not in p.name) for one in cases(target, swept(target)))


def float32(target: Target) -> Iterator[Case]:
    """Yield two of the standard shapes in float32 and TF32."""
    return cases(target, STANDARD_SHAPES[:4:3], ("fp32", "tf32"))


def dtypes(target: Target) -> Iterator[Case]:
    """Yield the standard shapes in the other precisions."""
    return cases(target, STANDARD_SHAPES, ("tf32", "fp16", "fp32"))


def case(shape: BlockShape, dtype: str, mode: str, target: Target) -> Case:
    """Return the case of one block. Its providers share inputs, made when the first of them is prepared."""
    backward, device = mode != "forward", target.device
    x_bytes = shape.B * shape.C * shape.N * DTYPES[dtype].itemsize
    num_sets = 1 if target.compile_only else max(1, min(MOST_SETS, -(-CACHE_BYTES[device] // x_bytes)))

    @functools.cache
    def sets() -> list[Inputs]:
        return [inputs(shape, dtype, device, seed) for seed in range(num_sets)]

    def chosen() -> str:
        sizes = ((shape.N, shape.d_qk), (shape.M, shape.d_qk), (shape.M, shape.d_v))
        q, k, v = (torch.empty(shape.B, *size, device=device, dtype=DTYPES[dtype]) for size in sizes)
        return sdpa_choice(*(t.requires_grad_(backward) for t in (q, k, v)))

    def provider(name: str, make: Callable[[], Block]) -> Provider:
        note = chosen if name == "sdpa" and device == "cuda" else str
        compile_s = COMPILE_S.get(name, 0.0) * (2 if backward else 1)
        return Provider(name, lambda: runner(make(), sets(), backward), note, compile_s=compile_s)

    def truth() -> Sequence[Tensor]:
        d_y, *given = (t if t is None else t.detach().double() for t in sets()[0])
        exact = [d_y, *(t if t is None else t.requires_grad_() for t in given)]
        whole = block(reference.attention, shape.pool)
        # four images at a time, so that float64 maps of 64x64 fit
        in_parts = lambda x, *weights: torch.cat([whole(part, *weights) for part in x.split(4)])  # noqa: E731
        return runner(in_parts, [exact], backward)(0)

    return Case(
        "attention", shape.name, dtype, mode,
        [provider(name, make) for name, make in blocks(shape.pool, target).items()],
        truth, num_sets, config=vars(shape) | {"channels_last": True},
        own=lambda: [t for t in sets()[0] if t is not None],
        needs=(shape.flops(backward), shape.exps(backward), shape.bytes(dtype, backward)),
    )  # fmt: skip


def inputs(shape: BlockShape, dtype: str, device: str, seed: int) -> Inputs:
    """Return d_y, x (both channels_last), the weights and gamma, random, scaled so that logits are of order one."""
    rng = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        drawn = (torch.randn(size, generator=rng, device=device) * scale).to(DTYPES[dtype])
        return drawn.contiguous(memory_format=torch.channels_last)

    C, small = shape.C, shape.C**-0.5
    d_y, x = (draw(shape.B, C, shape.H, shape.W) for _ in range(2))
    weights = [draw(d, C, 1, 1, scale=small) for d in (shape.d_qk, shape.d_qk, shape.d_v)]
    w_o = draw(C, shape.d_v, 1, 1, scale=shape.d_v**-0.5) if shape.out_proj else None
    gamma = torch.full((), 0.5, device=device, dtype=DTYPES[dtype])
    return [d_y, *(t if t is None else t.requires_grad_() for t in (x, *weights, w_o, gamma))]


def runner(function: Block, sets: Sequence[Inputs], backward: bool) -> Run:
    """Return what runs `function` on input set i, and with `backward` its gradients for all inputs too."""

    def run(i: int) -> list[Tensor]:
        d_y, *given = sets[i]
        with torch.set_grad_enabled(backward):
            y = function(*given)
        return [y.detach(), *(torch.autograd.grad(y, [t for t in given if t is not None], d_y) if backward else ())]

    return run


# Providers, ours last

COMPILE_S = {"eager-compiled": 5.0, "sdpa-compiled": 5.0, "flex": 6.0, "triton": 2.0}
"""Seconds to compile a forward pass, by provider; one with a backward pass takes twice as long."""
SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash-padded": SDPBackend.FLASH_ATTENTION,
}


def blocks(pool: bool, target: Target) -> dict[str, Callable[[], Block]]:
    """Return, by provider, what makes the block's function."""

    def ours(x, w_theta, w_phi, w_g, w_o, gamma):
        return functional.self_attention_2d(x, w_theta, w_phi, w_g, w_o, gamma, pool=pool, backend=target.backend)

    eager, fused = block(reference.attention, pool), block(sdpa, pool)
    makers: dict[str, Callable[[], Block]] = {"eager": lambda: eager, "sdpa": lambda: fused}
    if target.gpu:
        makers["eager-compiled"] = lambda: torch.compile(eager, dynamic=False)
        makers["sdpa-compiled"] = lambda: torch.compile(fused, dynamic=False)
        for name in SDPA_BACKENDS:
            makers[name] = functools.partial(block, forced(name), pool)
        flash = functools.partial(flex, "FLASH")
        for name, make in {
            "flex": flex, "flex-flash": flash, "flash-attention-4": flash_attention_4, "xformers": xformers,
        }.items():  # fmt: skip
            makers[name] = lambda make=make: block(make(), pool)
    return {**makers, target.backend: lambda: ours}


def block(core: Core, pool: bool) -> Block:
    """Return the block as people write it around `core`."""

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


def sdpa_choice(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return the name of the backend PyTorch picks for these."""
    chosen = torch._fused_sdp_choice(q[:, None], k[:, None], v[:, None], None, 0.0, False, scale=1.0)
    return {int(b): b.name for b in (*SDPA_BACKENDS.values(), SDPBackend.MATH)}.get(int(chosen), str(chosen))


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `sdpa` with q, k and v zero-padded to one width, a multiple of 8, which FlashAttention-2 asks for."""
    width = -(-max(q.shape[2], v.shape[2]) // 8) * 8
    return sdpa(*(F.pad(t, (0, width - t.shape[2])) for t in (q, k, v)))[..., : v.shape[2]]


def forced(name: str) -> Core:
    """Return `sdpa` on the backend `name` of SDPA_BACKENDS alone."""
    inner = padded if name == "sdpa-flash-padded" else sdpa

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA_BACKENDS[name]):
            return inner(q, k, v)

    return run


def widened(q: Tensor, k: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return q and k with zero channels added up to `width`."""
    missing = width - q.shape[2]
    return (F.pad(q, (0, missing)), F.pad(k, (0, missing))) if missing > 0 else (q, k)


def flex(backend: str = "TRITON") -> Core:
    """Return compiled FlexAttention, scale 1, q and k padded to the 16 channels that it asks for.

    `backend` is "TRITON" or "FLASH", FlashAttention-4's kernels. Raises ImportError or RuntimeError without the latter.
    """
    from torch.nn.attention import flex_attention as library

    offered = "BACKEND" in getattr(getattr(library, "FlexKernelOptions", None), "__annotations__", ())
    if backend == "FLASH":
        if not offered:
            raise RuntimeError("FlexAttention has no backend FLASH in this PyTorch")
        import flash_attn.cute  # noqa: F401 - without it PyTorch compiles before it says so
    options: Any = {"BACKEND": backend} if offered else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return library.flex_attention(q, k, v, scale=1.0, kernel_options=options)

    compiled = torch.compile(attend, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = widened(q, k, 16)
        return compiled(q[:, None], k[:, None], v[:, None])[:, 0]

    return run


def flash_attention_4() -> Core:
    """Return FlashAttention-4, scale 1; ImportError without it."""
    from flash_attn.cute import flash_attn_func

    return from_library(lambda q, k, v: flash_attn_func(q, k, v, softmax_scale=1.0)[0])


def xformers() -> Core:
    """Return xformers' attention, scale 1; ImportError without it.

    It picks its kernel itself: FlashAttention-3 on Hopper where that is installed, else CUTLASS, which takes v of
    another width than q and k.
    """
    from xformers.ops import memory_efficient_attention

    return from_library(functools.partial(memory_efficient_attention, scale=1.0))


def from_library(attention: Core) -> Core:
    """Return `attention` on (B, rows, 1 head, D), q and k zero-padded to a multiple of 8 channels."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = widened(q, k, -(-q.shape[2] // 8) * 8)
        return attention(*(t[:, :, None] for t in (q, k, v)))[:, :, 0]

    return run
