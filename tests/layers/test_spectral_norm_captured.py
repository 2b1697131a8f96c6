"""The group under torch.compile and in CUDA graphs: as without."""

import copy

import pytest
import torch
from normed_net import gradients, images, is_same, net, state_of

from benchmarks.accuracy import rel_rms
from sagan_fast.layers.spectral_norm import fuse_spectral_norm
from shared_by_tests import on_a_real_gpu

GPU = [pytest.mark.gpu, on_a_real_gpu]


@pytest.mark.parametrize("update", ["step", "forward"])
@pytest.mark.parametrize(
    ("device", "options"),
    [
        pytest.param("cpu", {"backend": "aot_eager"}, id="traced"),
        pytest.param("cuda", {"mode": "default"}, id="inductor", marks=GPU),
        pytest.param("cuda", {"mode": "reduce-overhead"}, id="reduce-overhead", marks=GPU),
    ],
)
def test_compiles_without_graph_breaks_under_the_same_policy(generator, device, options, update):
    """With reduce-overhead the third step is the first that CUDA graphs replay."""
    torch.compiler.reset()  # Dynamo keeps eight versions of a function: seeds beyond would fail
    model = net().to(device)
    plain = copy.deepcopy(model)
    groups = [fuse_spectral_norm(m, update=update) for m in (model, plain)]
    compiled = torch.compile(model, fullgraph=True, **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain)]
    for _ in range(3 if device == "cpu" else 6):
        x = images(generator).to(device)
        for run, optimizer, group in zip((compiled, plain), optimizers, groups, strict=True):
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
            if update == "step":
                group.step()
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert rel_rms(a, b) < 1e-4
    before = state_of(model)
    model.eval(), plain.eval()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert is_same(before, model)


def test_a_step_whose_weight_has_to_be_copied_can_be_captured(generator, monkeypatch):
    """A transposed convolution's rows are its second axis: each step makes a copy, at another address."""
    from sagan_fast.kernels.spectral_norm import addresses, tables

    model = net()
    group = fuse_spectral_norm(model, backend="triton")
    model(images(generator))
    group.step()
    for module in (addresses, tables):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    before = state_of(model)
    group.step()
    assert not is_same(before, model)


@on_a_real_gpu
@pytest.mark.gpu
def test_a_captured_step_reads_a_transposed_convolution_anew_at_each_replay(generator):
    """Its weight is copied to lie row after row; the graph holds the copy and the table of its address."""
    model = net().cuda()
    group = fuse_spectral_norm(model, backend="triton")
    twin = copy.deepcopy(model)
    twin_group = fuse_spectral_norm(twin, backend="triton")
    for each, m in ((group, model), (twin_group, twin)):
        m(images(generator).cuda())
        each.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group.step()
    for _ in range(3):
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            changed = torch.randn(a.shape, generator=generator).cuda()
            with torch.no_grad():
                a.copy_(changed), b.copy_(changed)
        graph.replay()
        twin_group.step()
        assert torch.empty(1 << 20, device="cuda").isnan().all()  # memory of a copy outside the graph would be taken
        x = images(generator).cuda()
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert rel_rms(a, b) < 1e-5


@on_a_real_gpu
@pytest.mark.gpu
def test_step_and_accesses_in_a_cuda_graph(generator):
    model = net().cuda()
    group = fuse_spectral_norm(model)
    twin = copy.deepcopy(model)
    twin_group = fuse_spectral_norm(twin)
    x = images(generator).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step(model, group):
        loss = model(x).square().sum()
        grads = gradients(loss, model)
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), grads, alpha=-0.01)
        group.step()

    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, group)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, group)
    for _ in range(3):
        step(twin, twin_group)
    for _ in range(5):
        graph.replay()
        step(twin, twin_group)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert rel_rms(a, b) < 1e-4
