"""Plans are the launches; what they compile to neither spills nor exceeds a program's memory."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.shipped import block_plans
from sagan_fast.kernels.attention import backward as attention_backward
from sagan_fast.kernels.projection import forward as projection
from sagan_fast.kernels.self_attention import backward, forward, preprocess
from sagan_fast.kernels.self_attention.inputs import BlockInputs

UNPOOLED = [
    "projection_fwd", "self_attention_fwd", "self_attention_bwd_preprocess", "attention_bwd_dkv", "attention_bwd_dq"
]  # fmt: skip
POOLED = [*UNPOOLED[:3], "self_attention_bwd_dkv", UNPOOLED[4]]


class Spy:
    """A kernel that notes the names and compile-time values of its arguments before it runs."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def run(**kwargs):
            self.seen.append((grid, kwargs))
            return self.kernel[grid](**kwargs)

        return run


@pytest.mark.parametrize("pool, out_proj, bias", [(True, True, False), (False, False, True)])
def test_plans_are_what_the_launchers_launch(pool, out_proj, bias, monkeypatch):
    seen = []
    for module in (projection, forward, preprocess, backward, attention_backward):
        for name, kernel in vars(module).copy().items():
            if name.startswith("_") and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Spy(kernel, seen))
    B, C, H, W, D_QK = 2, 16, 6, 8, 2
    D_V = 8 if out_proj else C
    x = torch.randn(B, C, H, W).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(D_QK, C), torch.randn(D_QK, C), torch.randn(D_V, C), torch.randn(C, D_V)
    biases = [torch.randn(D) if bias else None for D in (D_QK, D_QK, D_V, C)]
    if not out_proj:
        weights, biases = (*weights[:3], None), [*biases[:3], None]
    inputs = BlockInputs(x, *weights, torch.ones(()), *biases)
    y, saved = forward.self_attention_fwd(inputs, pool=pool)
    backward.self_attention_bwd(y, inputs, saved)

    found = block_plans(B, C, H, W, D_QK, D_V, pool=pool, out_proj=out_proj, bias=bias, dtype="fp32")
    assert [plan.name for plan in found] == (POOLED if pool else UNPOOLED) and len(seen) == len(found)
    for plan, (grid, kwargs) in zip(found, seen, strict=True):
        assert plan.options["enable_fp_fusion"]
        options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, **plan.options}
        assert grid == plan.grid and {name: kwargs.pop(name) for name in options} == options
        assert set(kwargs) == {*plan.signature, *plan.constexprs}
        assert set(kwargs) == set(plan.kernel.kernel.arg_names)
        for name, value in plan.constexprs.items():
            assert kwargs[name] == value, f"{plan.name}: {name}"
        for name, kind in plan.signature.items():
            assert kind.startswith("*") == isinstance(kwargs[name], torch.Tensor), f"{plan.name}: {name}"


def test_needs_are_counted_without_padding():
    found = {plan.name: plan for plan in block_plans(4, 64, 64, 64, 8, 32)}
    scores = 4 * 4096 * 1024
    forward_plan = found["self_attention_fwd"]
    assert all(plan.exps == (scores if i in (1, 3, 4) else 0) for i, plan in enumerate(found.values()))
    assert forward_plan.flops == 2 * scores * 40 + 2 * 4 * 4096 * 64 * 32
    assert found["projection_fwd"].bytes_read == 2 * (4 * 4096 * 64 + 48 * 64)
    assert found["self_attention_bwd_dkv"].flops + found["attention_bwd_dq"].flops == 2 * scores * (4 * 8 + 3 * 32)


COMPILE = """
import sys
from benchmarks.compile import compile_plan, resources
from benchmarks.shipped import block_plans
from sagan_fast.kernels.configs import WIDTHS

CAP = {80: 101376, 90: 232448, 100: 232448}
arch, dtype, *names = int(sys.argv[1]), sys.argv[2], *sys.argv[3:]
shapes = [(2, 128, 64, 64, 16, 64)] if names else [(2, max(32, 2 * v), 63, 64, q, v) for q, v in WIDTHS]
for i, shape in enumerate(shapes):
    for plan in block_plans(*shape, dtype=dtype, arch=arch, channels_last=i % 2 == 0):
        if names and plan.name not in names:
            continue
        uses = resources(compile_plan(plan, arch))
        what = f"{shape} {plan.name} {plan.config}"
        if uses["stack"] or uses["smem"] > CAP[arch]:
            print(f"{what}: {uses['stack']} bytes of stack, {uses['smem']} of shared memory", flush=True)
        if dtype != "fp32" and not uses["hgmma"] + uses["hmma"] + uses["utchmma"]:
            print(f"{what}: no tensor cores")
        if names and not uses["hgmma"]:
            print(f"{what}: no wgmma")
"""


def complaints(*args):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_four_kernels_compile_for_hopper_without_spills():
    assert complaints("90", "bf16", *POOLED[1:]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_width_compiles_without_spills_on_ragged_maps(arch, dtype):
    assert complaints(arch, dtype) == ""
