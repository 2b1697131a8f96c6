"""The block's benchmark, and that every peer is called so that it computes softmax(q kᵀ) v, no scale.

Libraries that need a GPU are replaced by functions with their signatures, checks of widths and layouts.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_attention
from benchmarks.bench_attention import COMPILE_S, CPU_SHAPES, blocks, case, inputs, runner, swept
from benchmarks.harness import Target, measure
from benchmarks.shapes import BLOCK_SHAPES
from sagan_fast.functional import self_attention_2d
from sagan_fast.kernels.attention import reference

CPU, CUDA, DRY = Target("cpu"), Target("cuda"), Target("cpu", dry_run=True)


@pytest.mark.parametrize("shape", [BLOCK_SHAPES[0], BLOCK_SHAPES[6]], ids=lambda s: s.name)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_providers_pass_the_gate_and_ours_keeps_less(shape, mode):
    records = measure(case(replace(shape, B=2, H=16, W=16), "fp32", mode, CPU), "cpu", rounds=1)
    assert [r.provider for r in records] == ["eager", "sdpa", "auto"]
    assert all(r.error == "" for r in records)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("side", [16, pytest.param(64, marks=pytest.mark.slow)], ids=["N256", "N4096"])
@pytest.mark.benchmark(group="attention block, unpooled")
def test_block_on_the_cpu(benchmark, side, mode, backend):
    """`--benchmark-enable` times it, `-m slow` at N = 4096; without it runs once."""
    shape = replace(CPU_SHAPES[0], B=2, H=side, W=side)

    def block(x, w_theta, w_phi, w_g, w_o, gamma):
        return self_attention_2d(x, w_theta, w_phi, w_g, w_o, gamma, pool=False, backend=backend)

    backward = mode != "forward"
    results = benchmark(runner(block, [inputs(shape, "fp32", "cpu", 0)], backward), 0)
    assert all(t.isfinite().all() for t in results) and len(results) == (6 if backward else 1)


def test_inputs_of_a_gpu_case_do_not_fit_its_cache():
    for shape in (*BLOCK_SHAPES, *swept(CUDA)):
        sets = case(shape, "bf16", "forward", CUDA).num_sets
        assert sets * shape.B * shape.C * shape.N * 2 >= 60 << 20, shape.name


def test_the_sweep_covers_small_and_large():
    shapes = swept(CUDA) + swept(CPU)
    assert {s.N for s in shapes} >= {256, 1024, 4096, 16384} and {s.B for s in shapes} >= {1, 4, 16, 256}
    assert len({s.name for s in (*shapes, *BLOCK_SHAPES, *CPU_SHAPES)}) == len(shapes) + len(BLOCK_SHAPES) + len(
        CPU_SHAPES
    )


def test_a_dry_run_has_a_gpus_providers_and_a_small_float32_shape():
    (one, *_) = bench_attention.cases(DRY, BLOCK_SHAPES[:1], ("bf16", "fp16"))
    assert [p.name for p in one.providers] == list(blocks(True, CUDA)) and one.providers[-1].name == "triton"
    assert one.dtype == "fp32" and (one.config["B"], one.config["H"], one.config["W"]) == (1, 8, 8)
    assert {p.name for p in one.providers if p.compile_s} == set(COMPILE_S)


def test_what_is_compiled_only_has_a_gpus_shapes_and_dtypes_and_one_set():
    (one, *_) = bench_attention.cases(Target("cpu", compile_only=True), BLOCK_SHAPES[:1])
    (real, *_) = bench_attention.cases(CUDA, BLOCK_SHAPES[:1])
    assert (one.title, one.config, one.num_sets) == (real.title, real.config, 1) and real.num_sets > 1


def test_flex_names_its_backend_where_pytorch_has_several(monkeypatch):
    from torch.nn.attention import flex_attention as library

    given = []
    monkeypatch.setattr(library, "flex_attention", lambda q, k, v, **options: given.append(options) or v)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=None))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    q = k = v = torch.randn(1, 8, 16)
    bench_attention.flex()(q, k, v)
    with pytest.raises(ImportError):
        bench_attention.flex("FLASH")
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace())
    bench_attention.flex("FLASH")(q, k, v)
    monkeypatch.delattr(library, "FlexKernelOptions")  # as before PyTorch 2.10
    bench_attention.flex()(q, k, v)
    with pytest.raises(RuntimeError, match="no backend FLASH in this PyTorch"):
        bench_attention.flex("FLASH")
    assert [one["kernel_options"] for one in given] == [{"BACKEND": "TRITON"}, {"BACKEND": "FLASH"}, None]


def of_eight(q, k, v, scale):
    """Attention as a library wants it: (B, rows, 1, D), no gaps within a row, widths in multiples of 8."""
    assert all(t.ndim == 4 and t.shape[2] == 1 and t.stride(3) == 1 and t.shape[3] % 8 == 0 for t in (q, k, v))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    return of_eight(query, key, value, scale)


def flash_attn_func(q, k, v, softmax_scale=None):
    return of_eight(q, k, v, softmax_scale), None


@pytest.fixture
def libraries(monkeypatch):
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("D_QK", [12, 24])
@pytest.mark.parametrize("name", ["sdpa", "padded", "flex", "flash_attention_4", "xformers"])
def test_peers_are_the_reference(name, D_QK, generator, libraries):
    peer = getattr(bench_attention, name)
    core = peer if name in ("sdpa", "padded") else peer()
    q, k, v = (torch.randn(2, n, d, generator=generator) for n, d in ((64, D_QK), (16, D_QK), (16, 48)))
    torch.testing.assert_close(core(q, k, v), reference.attention(q, k, v))


def test_what_is_not_installed_is_an_import_error(monkeypatch):
    for module in ("xformers", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    for peer in (bench_attention.xformers, bench_attention.flash_attention_4):
        with pytest.raises(ImportError):
            peer()
