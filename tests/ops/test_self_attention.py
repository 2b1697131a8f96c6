"""The block on every backend against float64: pooled and unpooled, odd and oblong maps, both layouts, errors."""

import os
import sys

import pytest
import torch
from block_by_hand import arguments, by_hand, gradient_terms, leaves_of
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from benchmarks.accuracy import DTYPE_NAMES, RMS_TOLERANCE
from sagan_fast.functional import self_attention_2d
from shared_by_tests import assert_close_to_truth, on_a_real_gpu, randn

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on the CPU the Triton kernels need TRITON_INTERPRET=1"
)
DEVICES = (pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu))
BACKENDS = ("eager", "sdpa", pytest.param("triton", marks=needs_interpreter))
SHAPES = [  # B, C, H, W, D_QK, D_V
    (2, 16, 8, 8, 2, 8),
    (1, 12, 7, 9, 3, 5),  # odd
    (2, 8, 4, 10, 1, 8),  # oblong
    (1, 24, 2, 2, 3, 12),  # one key when pooled
]
NAMES = ("x", "w_theta", "w_phi", "w_g", "w_o", "gamma", "b_theta", "b_phi", "b_g", "b_o")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "unpooled"])
@pytest.mark.parametrize("out_proj", [True, False], ids=["o", "no_o"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_all_gradients_match_float64(shape, out_proj, pool, backend, generator):
    single = leaves_of(arguments(shape, generator, out_proj=out_proj, dtype=torch.float32))
    exact = leaves_of({name: t if t is None else t.double() for name, t in single.items()})
    truth = by_hand(**exact, pool=pool)
    d_out = randn(*truth.shape, generator=generator, dtype=torch.float32)
    truth.backward(d_out.double())
    out = self_attention_2d(**single, pool=pool, backend=backend)
    out.backward(d_out)
    assert_close_to_truth("y", out, truth)
    summands = (truth - exact["x"]).norm() / 0.7 * d_out.norm()
    assert abs(single["gamma"].grad - exact["gamma"].grad) <= 1e-6 * summands  # one number, left over of many
    terms = gradient_terms(**exact, pool=pool, d_out=d_out.double())
    for name in NAMES:
        if exact[name] is not None and name != "gamma":
            assert_close_to_truth(f"d_{name}", single[name].grad, exact[name].grad, terms=terms.get(name))


@pytest.mark.parametrize(
    "backend", [*BACKENDS[:2], pytest.param("triton", marks=[needs_interpreter, pytest.mark.slow])]
)
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "unpooled"])
def test_gradcheck_and_gradgradcheck(pool, backend, generator):
    made = leaves_of(arguments((1, 4, 4, 3, 2, 3), generator))

    def function(*tensors):
        return self_attention_2d(**dict(zip(NAMES, tensors, strict=True)), pool=pool, backend=backend)

    tensors = [made[name] for name in NAMES]
    fast = backend == "triton"  # the interpreter is slow
    assert gradcheck(function, tensors, fast_mode=fast)
    assert gradgradcheck(function, tensors, fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_memory_formats_give_the_same_and_keep_theirs(backend, generator):
    made = arguments((2, 16, 8, 6, 2, 8), generator, dtype=torch.float32)
    plain = self_attention_2d(**made, backend=backend)
    made["x"] = made["x"].to(memory_format=torch.channels_last)
    last = self_attention_2d(**made, backend=backend)
    assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last)


def test_gamma_of_shape_one_and_of_float32_beside_half(generator):
    made = arguments((1, 16, 4, 4, 2, 8), generator, dtype=torch.bfloat16)
    made["gamma"] = torch.tensor([0.1234567])
    out = self_attention_2d(**made, backend="eager")
    assert out.dtype == torch.bfloat16
    exact = {name: t if t is None else t.double() for name, t in made.items()}
    assert_close_to_truth("y", out, by_hand(**exact))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_residual_stays_float32(dtype, backend, generator):
    made = leaves_of(arguments((2, 16, 8, 8, 2, 8), generator, dtype=torch.float32))
    with torch.autocast("cpu", dtype):
        out = self_attention_2d(**made, backend=backend)
    assert out.dtype == torch.float32
    exact = {name: t.double() for name, t in made.items()}
    assert_close_to_truth("y", out, by_hand(**exact), precision="bf16")
    out.square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in made.values())


def test_an_empty_batch(generator):
    made = leaves_of(arguments((0, 16, 4, 4, 2, 8), generator))
    out = self_attention_2d(**made)
    assert out.shape == (0, 16, 4, 4)
    out.sum().backward()
    assert made["w_theta"].grad.eq(0).all()


def test_compiles_without_a_break(generator):
    made = leaves_of(arguments((1, 16, 6, 6, 2, 8), generator, dtype=torch.float32))
    compiled = torch.compile(self_attention_2d, fullgraph=True, backend="aot_eager")
    for backend in ("eager", "sdpa"):
        torch.testing.assert_close(compiled(**made, backend=backend), self_attention_2d(**made))


@needs_interpreter
@pytest.mark.parametrize("channels_last", [False, True])
def test_triton_compiles_without_a_break_forward_and_backward(channels_last, generator):
    made = arguments((1, 16, 6, 6, 2, 8), generator, dtype=torch.float32)
    if channels_last:
        made["x"] = made["x"].to(memory_format=torch.channels_last)
    compiled = torch.compile(self_attention_2d, fullgraph=True, backend="aot_eager")
    found = {}
    for name, function in (("compiled", compiled), ("plain", self_attention_2d)):
        leaves = leaves_of(made)
        out = function(**leaves, backend="triton")
        out.square().sum().backward()
        found[name] = [out, *(t.grad for t in leaves.values())]
    torch.testing.assert_close(found["compiled"], found["plain"])
    assert found["compiled"][0].stride() == made["x"].stride()


@needs_interpreter
@torch.no_grad()
def test_triton_compiles_in_one_graph_without_gradients_too(generator):
    made = arguments((2, 16, 8, 6, 2, 8), generator, dtype=torch.float32)
    made["x"] = made["x"].to(memory_format=torch.channels_last)
    compiled = torch.compile(self_attention_2d, fullgraph=True, backend="aot_eager")
    out, plain = (function(**made, backend="triton") for function in (compiled, self_attention_2d))
    torch.testing.assert_close(out, plain)
    assert out.stride() == made["x"].stride()


@needs_interpreter
@pytest.mark.parametrize(
    "pool, out_proj, bias, channels_last", [(True, True, True, True), (False, False, False, False)]
)
def test_the_ops_of_triton_pass_opcheck(pool, out_proj, bias, channels_last, generator):
    made = arguments((2, 16, 5, 6, 2, 8), generator, bias=bias, out_proj=out_proj, dtype=torch.float32)
    if channels_last:
        made["x"] = made["x"].to(memory_format=torch.channels_last)
    args = [t if t is None or t.ndim != 4 or name == "x" else t.flatten(1) for name, t in made.items()]
    forward = torch.ops.sagan_fast.self_attention_2d.default
    inference = torch.ops.sagan_fast.self_attention_2d_inference.default
    for op in (forward, inference):
        opcheck(op, (*args, pool))
    y, *kept = forward(*args, pool)
    assert torch.equal(inference(*args, pool), y)
    backward = torch.ops.sagan_fast.self_attention_2d_backward.default
    for needs in ((True, True, bias), (False, False, False)):
        opcheck(backward, (torch.ones_like(args[0]), *args, *kept, pool, *needs))


@on_a_real_gpu  # ttsem's device is the CPU in the thread of a backward pass, where the block runs again
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_triton_under_activation_checkpointing(use_reentrant, device, generator):
    made = arguments((2, 16, 6, 6, 2, 8), generator, dtype=torch.float32)
    made = {name: t.to(device) for name, t in made.items()}
    x = made.pop("x").requires_grad_()

    def block(x):
        return self_attention_2d(x, **made, backend="triton")

    plain, checkpointed = block(x), checkpoint(block, x, use_reentrant=use_reentrant)
    d_y = torch.randn(plain.shape, generator=generator).to(device)
    (truth,) = torch.autograd.grad(plain, x, d_y)
    checkpointed.backward(d_y)
    assert torch.equal(checkpointed, plain) and torch.equal(x.grad, truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stretch", [lambda b: b.repeat_interleave(2)[::2], lambda b: b[:1].expand(len(b))])
def test_triton_takes_biases_of_any_stride(stretch, device, generator):
    made = arguments((2, 16, 6, 6, 2, 8), generator, dtype=torch.float32)
    made = {name: t.to(device) for name, t in made.items()}
    made |= {name: stretch(made[name]) for name in ("b_theta", "b_phi", "b_g", "b_o")}
    exact = {name: t.double() for name, t in made.items()}
    leaves = [made[name].detach().requires_grad_() for name in ("b_theta", "b_g", "b_o")]
    with_leaves = made | dict(zip(("b_theta", "b_g", "b_o"), leaves, strict=True))
    y = self_attention_2d(**with_leaves, backend="triton")
    assert_close_to_truth("y", y, self_attention_2d(**exact, backend="eager"))
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all() for leaf in leaves)


@needs_interpreter
def test_triton_takes_any_strides_and_an_expanded_gradient(generator):
    made = arguments((2, 16, 8, 6, 2, 8), generator, dtype=torch.float64)
    wide = torch.zeros(2, 16, 8, 12, dtype=torch.float64)
    cut = wide[..., ::2].copy_(made["x"])
    grads = {}
    for backend, x in (("eager", made["x"]), ("triton", cut)):
        leaves = leaves_of({**made, "x": x})
        self_attention_2d(**leaves, backend=backend).sum().backward()
        grads[backend] = [t.grad for t in leaves.values()]
    torch.testing.assert_close(grads["triton"], grads["eager"])


@needs_interpreter
def test_triton_takes_float32_weights_beside_half_x(generator):
    made = arguments((2, 16, 8, 6, 2, 8), generator, dtype=torch.float32)
    leaves = leaves_of({name: t.half() if name == "x" else t for name, t in made.items()})
    out = self_attention_2d(**leaves, backend="triton")
    assert out.dtype == torch.float16
    assert_close_to_truth("y", out, by_hand(**{name: t.double() for name, t in leaves.items()}))
    out.float().square().sum().backward()
    assert all(t.grad.dtype == t.dtype for t in leaves.values())


@needs_interpreter
def test_triton_makes_only_the_gradients_asked_for(generator):
    made = arguments((1, 16, 4, 6, 2, 8), generator)
    full = leaves_of(made)
    self_attention_2d(**full, backend="triton").square().sum().backward()
    for wanted in ({"x"}, {"w_g", "b_o"}, {"gamma"}, {"w_o"}):
        some = {name: t.detach().requires_grad_(name in wanted) for name, t in made.items()}
        self_attention_2d(**some, backend="triton").square().sum().backward()
        assert {name for name, t in some.items() if t.grad is not None} == wanted
        for name in wanted:
            torch.testing.assert_close(some[name].grad, full[name].grad)


@needs_interpreter
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "unpooled"])
def test_triton_keeps_what_its_docstring_says(pool, generator):
    B, C, H, W, D_QK, D_V = shape = (2, 64, 16, 16, 8, 32)
    made = leaves_of(arguments(shape, generator, bias=False, dtype=torch.float16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        self_attention_2d(**made, pool=pool, backend="triton")
    N = H * W
    M = N // 4 if pool else N
    inputs = {t.untyped_storage().data_ptr() for t in made.values() if t is not None}
    own = sum(t.numel() * t.element_size() for t in kept if t.untyped_storage().data_ptr() not in inputs)
    pooled = M * (D_QK + D_V) if pool else 0
    assert own == B * (2 * ((N + M) * D_QK + M * D_V + 2 * N * D_V) + 4 * N + pooled)
    assert own <= (1.5 if pool else 3.0) * made["x"].numel() * 2


def test_triton_refuses_what_it_cannot_do_and_names_another(generator, monkeypatch):
    made = arguments((1, 260, 4, 4, 2, 260), generator, out_proj=False, bias=False, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"self_attention_2d: backend must .*'sdpa'.* D_V = 260"):
        self_attention_2d(**made, backend="triton")
    if "triton.runtime.interpreter" in sys.modules:
        monkeypatch.setattr("triton.runtime.interpreter.computes_bfloat16", False)
    made = arguments((1, 16, 4, 4, 2, 8), generator, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"self_attention_2d: .*'triton': .*"):
        self_attention_2d(**made, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_every_gradient_matches_float64(dtype, channels_last, generator):
    made = arguments((2, 128, 20, 18, 16, 64), generator, dtype=torch.float64)
    made = {name: t.to("cuda", dtype) * (0.3 if name.startswith("w") else 1.0) for name, t in made.items()}
    if channels_last:
        made["x"] = made["x"].to(memory_format=torch.channels_last)
    found = {}
    for backend, kind in (("triton", dtype), ("eager", dtype), ("eager", torch.float64)):
        leaves = leaves_of({name: t.to(kind) for name, t in made.items()})
        out = self_attention_2d(**leaves, backend=backend)
        out.backward(made["x"].to(kind))
        found[backend, kind] = [out.detach(), *(t.grad for t in leaves.values())]
    truths = dict(zip(("y", *NAMES), found["eager", torch.float64], strict=True))
    for (name, truth), ours, eager in zip(truths.items(), found["triton", dtype], found["eager", dtype], strict=True):
        error, limit = (ours.double() - truth).norm(), 2 * (eager.double() - truth).norm()
        size = truths["b_theta" if name == "b_phi" else name].norm()  # that of b_phi is truly 0
        assert error <= limit + RMS_TOLERANCE[DTYPE_NAMES[dtype]] * size, name


@on_a_real_gpu
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=[needs_interpreter, pytest.mark.slow]), DEVICES[1]])
@pytest.mark.parametrize("bias", [False, True])
def test_inductor_compiles_the_block_and_its_gradients(bias, device, generator):
    made = arguments((2, 32, 16, 16, 4, 16), generator, bias=bias, dtype=torch.float32)
    made = {name: t if t is None else t.to(device) for name, t in made.items()}
    made["x"] = made["x"].to(memory_format=torch.channels_last)

    def block(made):
        return self_attention_2d(**made, backend="triton").sigmoid() * 2  # for Inductor to fuse with

    found = []
    for function in (torch.compile(block, fullgraph=True), block):
        leaves = leaves_of(made)
        y = function(leaves)
        y.square().sum().backward()
        found.append([y.detach(), *(t.grad for t in leaves.values() if t is not None)])
    for name, ours, plain in zip(("y", *leaves), *found, strict=False):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@on_a_real_gpu
@pytest.mark.gpu
def test_on_a_gpu_a_cuda_graph_replays_the_block(generator):
    made = arguments((2, 64, 16, 16, 8, 32), generator, dtype=torch.float64)
    made = {name: t.to("cuda", torch.bfloat16) for name, t in made.items()}
    self_attention_2d(**made, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = self_attention_2d(**made, backend="triton")
    made["x"].normal_()
    graph.replay()
    assert torch.equal(out, self_attention_2d(**made, backend="triton"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 16, 8)}, r"x must have 4 axes \(B, C, H, W\), got shape \(2, 16, 8\)"),
        ({"w_phi": (3, 16, 1, 1)}, r"w_phi must have shape \(D_QK, C, 1, 1\) = \(2, 16, 1, 1\), got \(3, 16, 1, 1\)"),
        ({"w_g": (8, 15, 1, 1)}, r"w_g must have shape \(D_V, C, 1, 1\) = \(8, 16, 1, 1\), got \(8, 15, 1, 1\)"),
        ({"w_o": (16, 9, 1, 1)}, r"w_o must have shape \(C, D_V, 1, 1\) = \(16, 8, 1, 1\), got \(16, 9, 1, 1\)"),
        ({"w_o": None, "b_o": None}, r"w_g must have as many rows as x has channels, 16, where w_o is None, got 8"),
        ({"b_g": (7,)}, r"b_g must have shape \(D_V,\) = \(8,\), got \(7,\)"),
        ({"gamma": (2,)}, r"gamma must be a scalar of shape \(\) or \(1,\), got \(2,\)"),
        ({"x": (2, 16, 1, 8)}, r"x must be at least 2 x 2 to be pooled, got \(1, 8\)"),
    ],
)
def test_errors_name_the_argument(change, message, generator):
    made = arguments((2, 16, 8, 8, 2, 8), generator)
    for name, shape in change.items():
        made[name] = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match="self_attention_2d: " + message):
        self_attention_2d(**made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_is_that_of_the_scores(backend, generator):
    made = arguments((1, 12, 6, 5, 3, 5), generator)
    truth = by_hand(**made | {name: made[name] * 0.4 for name in ("w_theta", "b_theta")})
    torch.testing.assert_close(self_attention_2d(**made, scale=0.4, backend=backend), truth)
