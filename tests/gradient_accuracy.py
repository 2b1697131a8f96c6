"""How near the block's first gradients are to float64, beside eager's in the same dtype.

python tests/gradient_accuracy.py adds what it finds to benchmarks/results/executed.jsonl, for docs/derivatives.md.
"""

import os
import sys
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from block_by_hand import arguments, leaves_of

from sagan_fast.functional import self_attention_2d
from sagan_fast.kernels.attention import reference

SHAPE = (2, 32, 12, 14, 4, 16)
"""B, C, H, W, D_QK, D_V: small, for Triton's interpreter."""

NAMES = ("x", "w_theta", "w_phi", "w_g", "w_o", "gamma", "b_theta", "b_phi", "b_g", "b_o")


def errors(dtype: torch.dtype, pool: bool, seed: int, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Return, for each gradient, the relative error of Triton's and of eager's against float64 on the same inputs.

    The logits' standard deviation is about 1/2: attention is nearly even, as when a training begins. b_phi's is truly 0
    (a number added to all keys changes no weight), so its error is taken relative to b_theta's gradient. That of gamma
    is one number, left over of many: its error is relative to the root of the sum of their squares. Eager computes
    float16's scores in float16 here, as plain PyTorch does; our backend "eager" computes them in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    made = arguments(SHAPE, generator) | {"gamma": torch.tensor(0.7)}
    for name in ("w_theta", "w_phi", "b_theta", "b_phi"):
        made[name] = made[name] / 2
    made = {name: t.to(device, dtype) for name, t in made.items()}
    d_out = torch.randn(made["x"].shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def gradients(backend: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = leaves_of({name: t.to(kind) for name, t in made.items()})
        with mock.patch.object(reference, "_is_half", lambda x: False):
            y = self_attention_2d(**leaves, pool=pool, backend=backend)
            y.backward(d_out.to(kind))
        summands = (y - leaves["x"]).detach().double() / 0.7 * d_out.double()
        return {name: leaves[name].grad.double() for name in NAMES} | {"summands": summands}

    truth, ours, eager = gradients("eager", torch.float64), gradients("triton", dtype), gradients("eager", dtype)
    scales = {"b_phi": "b_theta", "gamma": "summands"}
    sizes = {name: truth[scales.get(name, name)].norm() for name in NAMES}
    return {
        name: tuple(float((found[name] - truth[name]).norm() / sizes[name]) for found in (ours, eager))
        for name in NAMES
    }


def ratios(found: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Return, for each gradient, the median and the 95th percentile of ours and of eager's errors over some seeds."""
    table = {}
    for name in NAMES:
        ours, eager = (torch.tensor([errors[name][i] for errors in found], dtype=torch.float64) for i in range(2))
        table[name] = {
            f"{who}_{what}": float(values.quantile(share))
            for who, values in (("ours", ours), ("eager", eager))
            for what, share in (("median", 0.5), ("p95", 0.95))
        }
    return table


def main() -> None:
    """Record thirty draws of every dtype, pooled and unpooled."""
    from evidence import record

    from benchmarks.accuracy import DTYPE_NAMES
    from shared_by_tests import teach_interpreter_bfloat16

    teach_interpreter_bfloat16()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for pool in (True, False):
            found = ratios([errors(dtype, pool, seed) for seed in range(30)])
            found = {name: {key: float(f"{value:.3g}") for key, value in one.items()} for name, one in found.items()}
            kind = {"dtype": DTYPE_NAMES[dtype], "width": "pooled" if pool else "unpooled"}
            record("self_attention_2d", "gradients", "triton", **kind, draws=30, errors=found)


if __name__ == "__main__":
    main()
