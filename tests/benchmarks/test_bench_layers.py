import pytest
import torch

from benchmarks.bench_layers import case, cases, layers, networks
from benchmarks.harness import Effort, measure


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layer", layers(2, 8, 8) + networks("shapes-32", 2, base_channels=4)[:1], ids=lambda x: x.name)
def test_ours_and_the_plain_module_compute_the_same(layer, mode):
    records = measure(case(layer, mode, "cpu"), "cpu", Effort(rounds=1))
    assert [(r.provider, r.error) for r in records] == [("eager", ""), ("ours", "")]
    assert all(r.relative_rms < 1e-4 for r in records)


def test_a_module_that_computes_something_else_is_wrong():
    good = layers(2, 8, 8)[0]

    def make(backend):
        module = good.make(backend)
        if backend == "auto":
            module.register_forward_hook(lambda m, inputs, out: out * 1.01)
        return module

    records = measure(case(type(good)("x", make, good.size), "forward", "cpu"), "cpu", Effort(rounds=1))
    assert records[0].error == "" or records[1].error == ""
    assert any(r.provider == "ours" and r.error.startswith("wrong") for r in records)


def test_every_kind_of_layer_is_there():
    names = {c.shape for c in cases("cpu", tiny=True)}
    for kind in ("SelfAttention2d", "GeneratorBlock", "DiscriminatorBlock", "spectral-conv", "generator", "discrimin"):
        assert any(name.startswith(kind) for name in names)
    assert torch.is_grad_enabled()
