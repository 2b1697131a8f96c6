"""Launch tables of the spectral-norm kernels, and what each launch of a model's weights is (`plans`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..plan import POINTER_TYPES, Plan

WIDTHS = (128, 1024, 2304, 4608, 9216, 16384)
"""Widths of the sweep's row tiles. The 3x3 convolutions of 64 to 1024 channels fill theirs: 2304 = 2048 + 256, ...

Each width is one branch of `sweep._sweep_kernel`; those wider than the widest matrix of the list are not compiled.
"""

MAX_SIZE = 16384
"""Most rows and most columns of a matrix."""


@dataclass(frozen=True)
class SpectralNormConfig:
    """How much one program does, in elements, and with how many warps."""

    sweep_elements: int = 2**18  # of W: the more, the fewer partial sums of t; 2**18 gives the 44 matrices 300 programs
    sweep_warps: int = 8
    sweep_maxnreg: int | None = 128  # two programs a multiprocessor, one loads while the other adds
    columns: int = 32  # of the mirrored sweep: 128 bytes of a row
    chunk: int = 1024  # of u or v, in the reduction: at most MAX_SIZE / 16
    scale_elements: int = 2**15
    num_warps: int = 8


def config_for(widest: int) -> SpectralNormConfig:
    """Return the config for a list whose widest matrix has `widest` columns."""
    # A row of 16384 and its sums are 48K registers: only sixteen warps hold them without spilling.
    return SpectralNormConfig(sweep_warps=16, sweep_maxnreg=None) if widest > 9216 else SpectralNormConfig()


def width_of(K: int) -> int:
    """Return the width of the row tiles that hold K columns."""
    return next(width for width in WIDTHS if width >= K)


def vector(dtype_bytes: int) -> int:
    """Return how many elements 128 bits hold."""
    return 16 // dtype_bytes


def widest(sizes: Sequence[int]) -> int:
    """Return the width of the widest of `sizes` columns, 0 for none."""
    return width_of(max(sizes)) if sizes else 0


def plans(
    matrices: Sequence[tuple[int, int]], dtype: str = "fp32", out_dtype: str = "fp32", arch: int = 90
) -> list[Plan]:
    """Return every launch of W/sigma and of its gradient for `matrices` (R, K), as `Plan`s.

    `dtype` of the weights, `out_dtype` of W/sigma and of the gradient that comes back: "fp32", "fp16" or "bf16". Both
    orders of the iteration, the evaluation (which only reads u and v) and the second iteration are among them. One
    config serves all architectures, so `arch` changes nothing.
    """
    import triton.language as tl

    from . import backward, forward, sweep, tables

    triton_dtypes = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
    sizes = {"fp32": 4, "fp16": 2, "bf16": 2}
    unit = vector(sizes[dtype])
    shapes = tuple(tables.Shape(R, K, K, 1, K % unit == 0) for R, K in matrices)
    elements = sum(R * K for R, K in matrices)
    rows, columns = sum(R for R, _ in matrices), sum(K for _, K in matrices)
    found = []

    def add(
        name: str, kernel: object, signature: dict[str, str], constexprs: dict[str, Any], warps: int, grid: int, **rest
    ) -> None:
        found.append(
            Plan(
                name=name,
                kernel=kernel,
                dtype=dtype,
                config=", ".join(f"{key}={value}" for key, value in constexprs.items()),
                signature=signature,
                constexprs=constexprs,
                num_warps=warps,
                num_stages=3,
                grid=(grid,),
                divisible_by_16=tuple(key for key, kind in signature.items() if kind.startswith("*")),
                **rest,
            )
        )

    for v_first in (False, True):
        layout = tables.layout_of(shapes, v_first)
        config, partial = layout.config, layout.sizes[3]
        vectors = dict.fromkeys(("z_ptr", "t_ptr", "norms_ptr"), "*fp32") | {"eps": "fp32"}
        shared = {"matrices_ptr": "*i64", "items_ptr": "*i32"} | vectors
        order = "v first" if v_first else "u first"
        for first, advance in (
            ((True, True), (False, True)) if v_first else ((True, True), (False, True), (True, False))
        ):
            constexprs = sweep.sweep_constexprs(layout, triton_dtypes[dtype], first)
            options: dict[str, Any] = {"enable_fp_fusion": True}
            if not v_first:
                constexprs["ADVANCE"] = advance
                if config.sweep_maxnreg is not None:
                    options["maxnreg"] = config.sweep_maxnreg
            add(
                f"spectral_norm sweep, {order}",
                sweep._sweep_columns_kernel if v_first else sweep._sweep_kernel,
                shared | {"partial_ptr": "*fp32"},
                constexprs,
                config.num_warps if v_first else config.sweep_warps,
                len(layout.sweep),
                flops=4 * elements if advance else 2 * elements,
                bytes_read=elements * sizes[dtype] + 4 * (rows if v_first else columns),
                bytes_written=4 * ((columns if v_first else rows) + (partial if advance else 0)),
                options=options,
            )
        for advance in (True,) if v_first else (True, False):
            constexprs = {"V_FIRST": v_first, "ADVANCE": advance, "BLOCK": config.chunk}
            options = {"enable_fp_fusion": True}
            add(
                f"spectral_norm reduce, {order}",
                forward._reduce_kernel,
                shared | {"partial_ptr": "*fp32"},
                constexprs,
                config.num_warps,
                len(layout.reduce),
                flops=partial if advance else 0,
                bytes_read=4 * (partial + rows + columns if advance else rows),
                bytes_written=4 * (rows + columns) if advance else 0,
                options=options,
            )
            add(
                f"spectral_norm scale, {order}",
                forward._scale_kernel,
                shared | {"out_ptr": POINTER_TYPES[out_dtype], "sigma_ptr": "*fp32"},
                constexprs | {"W_DTYPE": triton_dtypes[dtype], "ELEMENTS": config.scale_elements},
                config.num_warps,
                len(layout.flat),
                flops=elements,
                bytes_read=elements * sizes[dtype] + 4 * (rows + columns),
                bytes_written=elements * sizes[out_dtype] + 8 * (rows + columns),
                options=options,
            )
    layout = tables.layout_of(shapes, False)
    config = layout.config
    table = {"matrices_ptr": "*i64", "items_ptr": "*i32", "grads_ptr": "*i64"}
    options = {"enable_fp_fusion": True}
    add(
        "spectral_norm gradient, <G, W>",
        backward._dot_kernel,
        table | {"partial_ptr": "*fp32"},
        {"W_DTYPE": triton_dtypes[dtype], "G_DTYPE": triton_dtypes[out_dtype], "BLOCK": 4 * config.chunk,
         "ELEMENTS": config.scale_elements},
        config.num_warps,
        len(layout.flat),
        flops=2 * elements,
        bytes_read=elements * (sizes[dtype] + sizes[out_dtype]),
        bytes_written=4 * len(layout.flat),
        options=options,
    )  # fmt: skip
    add(
        "spectral_norm gradient, dW",
        backward._d_weight_kernel,
        table
        | dict.fromkeys(("partial_ptr", "sigma_ptr", "u_ptr", "v_ptr"), "*fp32")
        | {"firsts_ptr": "*i32", "d_weight_ptr": POINTER_TYPES[dtype]},
        {"UNIT": vector(min(sizes[dtype], sizes[out_dtype])), "G_DTYPE": triton_dtypes[out_dtype],
         "BLOCK": config.chunk},
        config.num_warps,
        len(tables.tiles_of(layout)),
        flops=3 * elements,
        bytes_read=elements * sizes[out_dtype] + 4 * (rows + columns),
        bytes_written=elements * sizes[dtype],
        options=options,
    )  # fmt: skip
    add(
        "spectral_norm gradient, addresses",
        backward._write_addresses_kernel,
        {"table_ptr": "*i64", "count": "i32"} | {f"a{i}": "i64" for i in range(16)},
        {},
        1,
        -(-len(matrices) // 16),
        bytes_written=8 * len(matrices),
    )
    return found
