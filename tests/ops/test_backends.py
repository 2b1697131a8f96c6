"""The choice of a backend: by size on the CPU, never replaced when asked for by name."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from sagan_fast.functional import attention
from sagan_fast.kernels.configs import MIN_ARCH, SERVED_BY
from sagan_fast.kernels.launch import device_arch
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.ops.backends import build_refusal, choose, choose_batch_norm, choose_spectral_norm, triton_refusal


def test_auto_on_the_cpu_goes_by_size():
    q = torch.zeros(1)
    assert choose("attention", "auto", q, 8, 256, 64, 8, 32).backend == "eager"
    assert choose("attention", "auto", q, 4, 4096, 4096, 8, 64).backend == "cpu"
    assert choose("attention", "auto", q.bfloat16(), 4, 4096, 4096, 8, 64).backend == "sdpa"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose("attention", "auto", q, 4, 4096, 4096, 8, 64).backend == "sdpa"
    assert choose("attention", "auto", q, 4, 4096, 4096, 8, 64).reason.startswith(
        "4 maps of 4096 x 4096: a chunk at a time"
    )
    assert choose("attention", "auto", q, 1, 256, 64, 8, 32).reason.startswith("1 map of 256 x 64: small ones")


def test_auto_on_an_apple_gpu_is_eager():
    like = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32, is_cuda=False, is_cpu=False)
    for N in (16, 4096):
        assert choose("attention", "auto", like, 4, N, N, 8, 64).backend == "eager"


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_named_backend_is_taken(backend):
    choice = choose("attention", backend, torch.zeros(1), 4, 4096, 4096, 8, 64)
    assert choice.backend == backend and "asked for" in str(choice)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"attention: backend must be one of auto, eager, sdpa, triton, got 'flash'"):
        choose("attention", "flash", torch.zeros(1), 1, 1, 1, 1, 1)


def test_the_choice_is_logged_at_debug_level(caplog):
    with caplog.at_level(logging.DEBUG, logger="sagan_fast"):
        choose("attention", "auto", torch.zeros(1), 8, 256, 64, 8, 32)
    assert "attention: eager" in caplog.text


def test_shapes_alone_can_be_computed():
    """On the device meta, which has no autocast."""
    q, v = torch.empty(4, 4096, 8, device="meta"), torch.empty(4, 4096, 64, device="meta")
    assert choose("attention", "auto", q, 4, 4096, 4096, 8, 64).backend == "sdpa"
    assert attention(q, q, v).shape == v.shape


def test_spectral_norm_is_eager_on_the_cpu_and_says_why_triton_cannot_run(monkeypatch):
    if "triton.runtime.interpreter" in sys.modules:
        monkeypatch.setattr("triton.runtime.interpreter.computes_bfloat16", False)
    assert choose_spectral_norm("op", "auto", [torch.ones(4, 6)]).backend == "eager"
    for weight, reason in [
        (torch.ones(4, 6, dtype=torch.float64), "float64"),
        (torch.ones(4, 6, dtype=torch.bfloat16), "bfloat16 rightly"),
        (torch.ones(1, 16385), "16384 columns"),
    ]:
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match=reason):
                choose_spectral_norm("op", "triton", [weight])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        choose_spectral_norm("op", "triton", [torch.ones(4, 6)])


def test_batch_norm_has_a_form_of_its_own_on_the_cpu_and_is_what_is_asked_for_elsewhere(monkeypatch):
    x = torch.ones(2, 3, 4, 4)
    assert choose_batch_norm("op", "auto", x).backend == choose_batch_norm("op", "cpu", x.double()).backend == "cpu"
    assert choose_batch_norm("op", "auto", x.bfloat16()).backend == "eager"
    assert choose_batch_norm("op", "eager", x).backend == "eager"
    assert choose_batch_norm("op", "triton", x).backend == "triton"
    with pytest.raises(RuntimeError, match="op: backend 'cpu' must get a float32 or float64 map on the CPU, got"):
        choose_batch_norm("op", "cpu", x.bfloat16())
    with pytest.raises(ValueError, match="backend must be one of auto, eager, cpu, triton, got 'sdpa'"):
        choose_batch_norm("op", "sdpa", x)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        choose_batch_norm("op", "triton", x)


@pytest.fixture
def card(monkeypatch):
    """Make every CUDA device one of compute capability 9.0, or of what the test calls this with."""

    def of(major=9, minor=0, amd=None):
        properties = SimpleNamespace(name="a card", major=major, minor=minor, gcnArchName=f"{amd}:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
        device_arch.cache_clear()

    build_refusal.cache_clear()
    of()
    yield of
    build_refusal.cache_clear()
    device_arch.cache_clear()


def test_a_card_that_is_too_old_or_a_dtype_is_named(card):
    device = torch.device("cuda")
    assert triton_refusal(device, torch.bfloat16, MIN_ARCH) is None
    assert "torch.float64" in triton_refusal(device, torch.float64)
    card(7, 5)
    assert triton_refusal(device, torch.float16, MIN_ARCH) == "a card has compute capability 7.5, below 8.0"


@pytest.mark.parametrize("version, can", [("3.6.0", False), ("3.7.0", True), ("3.10.1", True)])
def test_a_card_that_triton_is_too_old_for_is_named(card, monkeypatch, version, can):
    monkeypatch.setattr("triton.__version__", version)
    card(11, 0)
    refusal = "a card has compute capability 11.0, which Triton 3.6.0 cannot compile for"
    assert triton_refusal(torch.device("cuda"), torch.bfloat16, MIN_ARCH) == (None if can else refusal)
    card(10, 3)
    assert triton_refusal(torch.device("cuda"), torch.bfloat16, MIN_ARCH) is None


class Like:
    """As much of a tensor on a card as a choice asks for."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda:0")

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize("arch", [75, *SERVED_BY])
def test_attention_runs_from_compute_capability_8_0_on_and_spectral_norm_before(arch, card):
    card(arch // 10, arch % 10)
    device = torch.device("cuda:0")
    weight = SimpleNamespace(device=device, dtype=torch.float32, shape=(64, 576), numel=lambda: 64 * 576)
    assert choose_spectral_norm("op", "auto", [weight]).backend == "triton"
    choice = choose("op", "auto", Like(torch.bfloat16), 1, 512, 512, 32, 64)
    assert choose_batch_norm("op", "auto", Like(torch.float16)).backend == ("triton" if arch >= 80 else "eager")
    if arch >= 80:
        assert choice.backend == "triton"
        return
    assert choice.backend == "sdpa" and "capability 7.5, below 8.0" in choice.reason
    with pytest.raises(RuntimeError, match="got 'triton': a card has compute capability 7.5, below 8.0"):
        choose("op", "triton", Like(torch.float16), 1, 512, 512, 32, 64)


def test_amd_is_left_alone_unless_asked_for(card):
    like = Like(torch.bfloat16)
    assert choose("op", "auto", like, 1, 512, 512, 32, 64).backend == "triton"
    card(amd="gfx942")
    assert triton_refusal(like.device, torch.bfloat16, MIN_ARCH) is None
    assert choose("op", "auto", like, 1, 512, 512, 32, 64).backend == "sdpa"
    assert "never run there" in choose("op", "auto", like, 1, 512, 512, 32, 64).reason
    assert choose_batch_norm("op", "auto", like).backend == "eager"
    assert choose("op", "triton", like, 1, 512, 512, 32, 64).backend == "triton"
    card(amd="gfx906")
    with pytest.raises(RuntimeError, match="a card is gfx906, and the kernels are compiled for gfx90a, gfx942"):
        choose("op", "triton", like, 1, 512, 512, 32, 64)


@pytest.mark.parametrize("fast", [False, True])
def test_float32_without_tensor_cores_goes_to_sdpa(card, monkeypatch, fast):
    monkeypatch.setattr("sagan_fast.ops.backends.has_fast_float32", lambda *_: fast)
    like = Like(torch.float32)
    choice = choose("op", "auto", like, 1, 512, 512, 32, 64)
    assert choice.backend == ("triton" if fast else "sdpa")
    assert fast or "would not run on the tensor cores" in choice.reason
    monkeypatch.setattr("sagan_fast.ops.backends.precision_of", lambda dtype: "tf32")
    assert choose("op", "auto", like, 1, 512, 512, 32, 64).backend == "triton"


@pytest.mark.parametrize("dtype, backend", [(torch.float32, "sdpa"), (torch.bfloat16, "triton")])
def test_the_choice_on_a_card_is_compiled_without_a_graph_break(card, dtype, backend):
    like = Like(dtype)

    def add(x):
        return x + (1 if choose("op", "auto", like, 1, 512, 512, 32, 64).backend == backend else 0)

    torch.compiler.reset()
    assert torch.compile(add, fullgraph=True, backend="eager")(torch.zeros(())) == 1


def test_without_a_compiler_or_headers_triton_is_not_taken(card, monkeypatch, tmp_path):
    device = torch.device("cuda")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert "no " + str(tmp_path / "Python.h") in triton_refusal(device, torch.float32)
    build_refusal.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no gcc or clang (install one, or set CC)" in triton_refusal(device, torch.float32)
    build_refusal.cache_clear()
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert "no /no/such/compiler" in triton_refusal(device, torch.float32)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_an_exported_block_keeps_its_gradients(backend):
    block = SelfAttention2d(16, backend=backend)
    torch.nn.init.constant_(block.gamma, 0.5)
    x = torch.randn(2, 16, 4, 4)
    exported = torch.export.export(block, (x,)).module()
    gradients = []
    for module in (block, exported):
        z = x.clone().requires_grad_(True)
        module(z).square().sum().backward()
        gradients.append([z.grad, *(parameter.grad for _, parameter in sorted(module.named_parameters()))])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=1e-5)
