"""Every width has configs; plans are the launches; what they compile to neither spills nor exceeds a block's memory."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.shipped import block_plans
from sagan_fast.kernels.attention import backward, delta, forward
from sagan_fast.kernels.attention.configs import lookup_delta, lookup_dkv, lookup_dq, lookup_forward
from sagan_fast.kernels.projection import forward as projection

LAUNCHES = ["projection_fwd", "attention_block_fwd", "attention_bwd_delta", "attention_bwd_dkv", "attention_bwd_dq"]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "tf32", "fp16", "bf16"])
def test_every_width_and_size_has_configs(arch, precision):
    for D_QK in (1, 16, 32, 33, 64):
        for D_V in (1, 32, 64, 128, 129, 256):
            for size in (1, 256, 257, 16384):
                for lookup in (lookup_forward, lookup_dkv, lookup_dq):
                    config = lookup(arch, precision, D_QK, D_V, size)
                    assert config.BLOCK_N >= 16 and config.BLOCK_M >= 16 and config.num_warps in (4, 8)
                assert lookup_forward(arch, precision, D_QK, D_V, size).BLOCK_C >= 16
            assert lookup_delta(arch, precision, D_V).BLOCK_C >= 16


def test_wider_heads_are_refused():
    for lookup in (lookup_forward, lookup_dkv, lookup_dq):
        with pytest.raises(ValueError, match=r"attention_.wd: D_QK and D_V must be at most = 64 and 256 .*'sdpa'"):
            lookup(90, "bf16", 8, 257, 64)
    with pytest.raises(ValueError, match="at most"):
        lookup_delta(90, "bf16", 257)


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
    for module in (projection, forward, delta, backward):
        for name, kernel in vars(module).copy().items():
            if name.startswith("_") and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Spy(kernel, seen))
    B, C, H, W, D_QK = 2, 16, 6, 8, 2
    D_V = 8 if out_proj else C
    x = torch.randn(B, C, H, W).contiguous(memory_format=torch.channels_last)
    w_theta, w_phi, w_g = torch.randn(D_QK, C), torch.randn(D_QK, C), torch.randn(D_V, C)
    w_o = torch.randn(C, D_V) if out_proj else None
    b_theta, b_phi, b_g = (torch.randn(D) if bias else None for D in (D_QK, D_QK, D_V))
    b_o = torch.randn(C) if bias and out_proj else None
    gamma = torch.ones(())
    q, k, v, argmax = projection.projection_fwd(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g, pool=pool)
    y, o, lse = forward.block_fwd(x, q, k, v, w_o, gamma, b_o)
    w_qkv = torch.cat([w_theta, w_phi, w_g])
    backward.block_bwd(y, x, w_qkv, w_o, b_o, gamma, q, k, v, o, lse, argmax)

    found = block_plans(B, C, H, W, D_QK, D_V, pool=pool, out_proj=out_proj, bias=bias, dtype="fp32")
    assert [plan.name for plan in found] == LAUNCHES and len(seen) == len(found)
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
    forward_plan = found["attention_block_fwd"]
    assert all(plan.exps == (scores if i in (1, 3, 4) else 0) for i, plan in enumerate(found.values()))
    assert forward_plan.flops == 2 * scores * 40 + 2 * 4 * 4096 * 64 * 32
    assert forward_plan.loops[0] * forward_plan.constexprs["BLOCK_M"] == 1024
    assert found["projection_fwd"].bytes_read == 2 * (4 * 4096 * 64 + 48 * 64)
    assert found["attention_bwd_dkv"].flops + found["attention_bwd_dq"].flops == 2 * scores * (4 * 8 + 3 * 32)


COMPILE = """
import sys
from benchmarks.compile import compile_plan, resources
from benchmarks.shipped import block_plans
from sagan_fast.kernels.projection.configs import WIDTHS

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
    assert complaints("90", "bf16", *LAUNCHES[1:]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_width_compiles_without_spills_on_ragged_maps(arch, dtype):
    assert complaints(arch, dtype) == ""
