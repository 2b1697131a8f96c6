"""What is exported gives the samples of the model it came from, and is read without the trainer."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sagan_fast import Generator
from sagan_fast.errors import InputError
from sagan_fast.models import export


def trained(num_classes=10, **overrides):
    """A generator in which everything matters: gamma, the tables and the statistics are away from where they start."""
    torch.manual_seed(3)
    model = Generator.from_preset("shapes-32", base_channels=4, num_classes=num_classes, **overrides)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("gamma"):
                tensor.fill_(0.7)
            elif "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif "gain" in name or "bias" in name or "running_mean" in name:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    model.class_names = tuple(f"class no. {i}" for i in range(num_classes))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def unconditional():
    return trained(0, attention_resolutions=(8, 16))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported")
    export.save_folder(model, path, {"step": 5})
    return path


def largest_difference(a, b):
    return (a - b).abs().max().item()


def test_folding_keeps_the_function_and_leaves_the_original(model):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inputs = export.example(model, 6)
    expected = model(*inputs)
    for _ in range(2):  # a copy folded by remove_parametrizations would take the original's weights away
        out = export.folded(model.train())
        assert model.training and not out.training and not any("parametrizations" in key for key in out.state_dict())
        assert largest_difference(out(*inputs), expected) < 1e-6
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert largest_difference(model.eval()(*inputs), expected) == 0
    sigma = torch.linalg.matrix_norm(out.conv.weight.flatten(1), 2)
    assert abs(sigma - 1) < 0.1 and largest_difference(out.conv.weight, model.conv.weight) == 0


def test_folded_weights_are_contiguous_whatever_the_originals_are(tmp_path):
    model = trained().to(memory_format=torch.channels_last)
    assert not model.blocks[0].conv1.parametrizations.weight.original.is_contiguous()
    out, inputs = export.folded(model), export.example(model, 6)
    assert all(tensor.is_contiguous() for tensor in out.state_dict().values())
    assert largest_difference(out(*inputs), model(*inputs)) < 1e-6
    export.save_folder(model, tmp_path)
    assert not Generator.from_pretrained(tmp_path).blocks[0].conv1.weight.is_contiguous()  # faster on all devices


def test_a_folder_gives_the_generator_back(model, folder):
    out = Generator.from_pretrained(folder)
    assert not out.training and out.class_names == model.class_names and out.config == model.config
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in out.parameters())
    inputs = export.example(model, 6)
    assert largest_difference(out(*inputs), model(*inputs)) < 1e-6
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["step"] == 5


def test_three_lines_and_no_trainer(model, folder, tmp_path):
    torch.save((export.example(model), model(*export.example(model))), tmp_path / "expected.pt")
    code = f"""
import sys, torch
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
rng = torch.get_rng_state()
import sagan_fast
generator = sagan_fast.Generator.from_pretrained({str(folder)!r})
assert torch.equal(torch.get_rng_state(), rng)  # nothing was drawn for weights that were loaded
images = generator(*inputs)
assert (images - expected).abs().max() < 1e-6
parts = ("training", "data", "evaluation", "commands", "cli", "visualize")
found = [name for name in sys.modules if name.startswith(tuple(f"sagan_fast.{{part}}" for part in parts))]
assert not found, found
assert not {{"yaml", "jsonargparse", "tensorboard", "torchvision", "PIL"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_torchscript_needs_nothing_of_ours(model, unconditional, tmp_path):
    for i, generator in enumerate((model, unconditional)):
        path = tmp_path / f"{i}.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the user hears nothing of tracing
            export.save_torchscript(generator, path)
        script = export.read(path)
        for count in (1, 2, 7):
            inputs = export.example(generator, count, seed=count)
            assert largest_difference(script(*inputs), generator(*inputs)) < 1e-5
        assert str(Path(export.__file__).parents[2]).encode() not in path.read_bytes()
        assert "sagan_fast::" not in str(script.inlined_graph)  # none of our ops
        assert "scaled_dot_product_attention" in str(script.inlined_graph)
    code = (
        f"import sys, torch; torch.jit.load({str(path)!r})(torch.zeros(3, 128)); assert 'sagan_fast' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("which", ["model", pytest.param("unconditional", marks=pytest.mark.slow)])
def test_onnx_gives_the_samples_at_any_batch_size(which, request, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    generator = request.getfixturevalue(which)
    path = tmp_path / "model.onnx"
    export.save_onnx(generator, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert str(Path(export.__file__).parents[2]).encode() not in path.read_bytes()
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    assert [given.name for given in graph.input] == ["z", "y"][: len(export.example(generator))]
    assert [given.name for given in graph.output] == ["images"]
    assert not any(node.domain not in ("", "ai.onnx") for node in graph.node)
    run = export.read(path)
    for count in (1, 2, 7):
        inputs = export.example(generator, count, seed=count)
        out = run(*inputs)
        assert out.shape == (count, 3, 32, 32) and largest_difference(out, generator(*inputs)) < 1e-5


def test_without_onnx_there_is_a_sentence(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        InputError, match=r"the format onnx needs the package onnxscript: pip install 'sagan_fast\[export\]'"
    ):
        export.save_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def damaged(folder, tmp_path, change=None, weights=None):
    config = json.loads((folder / "config.json").read_text())
    if change:
        change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(weights or (folder / "model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(architecture="other"), "does not describe a sagan_fast.Generator"),
        (lambda c: c.update(format=9), "has export format 9, this version reads 1"),
        (lambda c: c["generator"].update(widht=3), "unknown key 'generator.widht'"),
        (lambda c: c["generator"].update(base_channels=8), "the weights do not fit the configuration"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change, message, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        Generator.from_pretrained(damaged(folder, tmp_path, change))


def test_damaged_files_are_refused_by_name(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for weights in (whole[:100], whole[:-10], b"x"):
        with pytest.raises(InputError, match=f"{tmp_path.name} cannot be read"):
            Generator.from_pretrained(damaged(folder, tmp_path, weights=weights))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="holds no exported generator: there is no config.json in it"):
        Generator.from_pretrained(tmp_path)


def test_a_place_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write .*model.safetensors"):
        export.save_folder(model, tmp_path / "file" / "x")


@pytest.mark.gpu
def test_everything_runs_on_the_gpu(model, folder, tmp_path):
    expected = model(*export.example(model, 6))
    inputs = [x.cuda() for x in export.example(model, 6)]
    for generator in (Generator.from_pretrained(folder, device="cuda"), _script(model, tmp_path / "m.pt")):
        assert largest_difference(generator(*inputs).cpu(), expected) < 2e-2  # tf32 products


def _script(model, path):
    export.save_torchscript(model, path)
    return torch.jit.load(str(path), map_location="cuda")
