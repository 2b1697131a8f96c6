"""What is imported gives the original's samples and logits; what does not map is an error."""

import copy

import numpy as np
import pytest
import torch
from foreign_layers import BigGANLinear
from foreign_networks import CLASSES, Discriminator, Generator, Z, official, trained
from torch import nn

from sagan_fast.errors import InputError
from sagan_fast.interop import import_discriminator, import_generator
from shared_by_tests import randn

KINDS = ["biggan-pytorch", "studiogan", "studiogan-embeddings", "voletiv", "mmgeneration"]


def compare(ours, theirs, x, y):
    """1e-6 in exact arithmetic; in float32 as near to that as the original is, which rounds too."""
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(x.double(), y)
        exact, a, b = copy.deepcopy(ours).double()(x.double(), y), ours(x, y), theirs(x, y)
    scale = max(1.0, float(truth.abs().max()))
    errors = [float((found.double() - truth).abs().max()) / scale for found in (exact, a, b)]
    assert errors[0] < 1e-6 and errors[1] <= 2 * errors[2] + 1e-6, errors


def iterate(network):
    """Move u and v once: TensorFlow does so at every use, torch's hook uses them in evaluation as they are."""
    for module in network.modules():
        for hook in module._forward_pre_hooks.values():
            hook.compute_weight(module, True)


@pytest.mark.parametrize("kind", KINDS)
def test_generators_of_every_layout(kind, generator):
    theirs = trained(Generator(kind))
    ours = import_generator(theirs.state_dict())
    z, y = randn(4, Z, generator=generator, dtype=torch.float32), torch.arange(4) % CLASSES
    compare(ours, theirs, z, y)
    config = ours.config
    assert (config.resolution, config.num_classes, config.z_dim) == (32, CLASSES, Z)
    assert config.widths == (24, 16, 8, 8) and config.attention_resolutions == (8,)
    assert config.attention_bias == (kind == "voletiv") and not ours.training
    ours.train()(z, y).sum().backward()  # it can be trained on


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "embeddings" not in kind])
def test_discriminators_of_every_layout(kind, generator):
    theirs = trained(Discriminator(kind))
    ours = import_discriminator(theirs.state_dict(), layout=kind)
    x, y = randn(3, 3, 32, 32, generator=generator, dtype=torch.float32), torch.arange(3)
    compare(ours, theirs, x.clone(), y)
    assert ours.config.rectified_shortcut == (kind in ("studiogan", "voletiv")) and ours.config.widths == (8, 16, 16)
    assert ours.config.resolution == 32 and ours.config.attention_resolutions == (8,)
    assert import_discriminator(theirs.state_dict(), resolution=64).config.final_size == 16


@pytest.mark.parametrize("which", ["generator", "discriminator"])
def test_official_variables(which, generator, tmp_path):
    theirs = trained((Generator if which == "generator" else Discriminator)("voletiv"))
    if which == "discriminator":  # TensorFlow's ReLU does not work in place
        for module in theirs.modules():
            module.in_place = False
    noise = {"global_step": np.array(7), "model/g_bn/gamma/Adam": np.ones(3), "model/d_sn_linear/u/Adam_1": np.ones(2)}
    variables = {key: value.copy() for key, value in official(theirs).items()} | noise
    iterate(theirs)
    np.savez(tmp_path / "variables.npz", **{f"{name}:0": value for name, value in variables.items()})
    y = torch.arange(3)
    if which == "generator":
        x = randn(3, Z, generator=generator, dtype=torch.float32)
        ours = import_generator(tmp_path / "variables.npz")
        with pytest.raises(InputError, match="holds no tensors of a discriminator"):
            import_discriminator(tmp_path / "variables.npz")
    else:
        x, ours = randn(3, 3, 32, 32, generator=generator, dtype=torch.float32), import_discriminator(variables)
    compare(ours, theirs, x, y)


def test_containers_prefixes_and_averages(tmp_path, generator):
    average, last, d = trained(Generator("voletiv")), trained(Generator("voletiv")), trained(Discriminator("voletiv"))
    z, y = randn(2, Z, generator=generator, dtype=torch.float32), torch.arange(2)
    states = {"G_state_dict": last.state_dict(), "D_state_dict": d.state_dict(), "step": 3, "G_optimizer": {"a": 1}}
    torch.save({**states, "G_ema": {f"module.{k}": v for k, v in average.state_dict().items()}}, tmp_path / "a.pth")
    compare(import_generator(tmp_path / "a.pth"), average, z, y)
    compare(import_generator(str(tmp_path / "a.pth"), ema=False), last, z, y)
    assert import_discriminator(tmp_path / "a.pth").config.num_classes == CLASSES
    flat = {
        f"{prefix}.{key}": value
        for prefix, net in (("generator_ema", average), ("generator", last), ("discriminator", d))
        for key, value in net.state_dict().items()
    }
    compare(import_generator({"state_dict": flat, "meta": {}}), average, z, y)
    compare(import_generator(last), last, z, y)


def test_keys_that_do_not_map_and_other_networks_are_refused(tmp_path):
    state = Generator("biggan-pytorch").state_dict()
    with pytest.raises(InputError, match=r"every key must map to SAGAN's network, got extra\.weight"):
        import_generator({**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"must have 'blocks\.1\.0\.conv2\.weight_orig' as biggan-pytorch has"):
        import_generator({k: v for k, v in state.items() if not k.startswith("blocks.1.0.conv2")})
    with pytest.raises(InputError, match="shared class embeddings"):
        import_generator({**state, "shared.weight": torch.zeros(3, 4)})
    with pytest.raises(InputError, match="must hold a generator of biggan-pytorch"):
        import_generator(Discriminator("biggan-pytorch").state_dict())
    with pytest.raises(InputError, match="are of none of the layouts official-tf, "):
        import_generator(nn.Linear(2, 2))
    with pytest.raises(InputError, match="layout must be one of official-tf, .*, got 'keras'"):
        import_generator(state, layout="keras")
    with pytest.raises(InputError, match="must be spectral-normed"):
        import_generator({k: v for k, v in state.items() if k != "output_layer.2.u0"})
    twice = Discriminator("biggan-pytorch")
    twice.blocks[2].append(twice.blocks[1][1])
    with pytest.raises(InputError, match="attention must follow a block that halves the map"):
        import_discriminator(twice)
    wrong = {**state, "output_layer.0.gain": torch.zeros(3)}
    with pytest.raises(InputError, match="the shapes do not fit"):
        import_generator(wrong)


def test_files_that_would_run_code_or_are_broken_are_refused(tmp_path):
    torch.save({"G": BigGANLinear(2, 2)}, tmp_path / "model.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:200])
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    for name in ("model.pth", "cut.pth", "objects.npz", "none.pth"):
        with pytest.raises(InputError, match=name):
            import_generator(tmp_path / name)
    with pytest.raises(InputError, match="would run code"):
        import_generator(tmp_path / "model.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="must hold a state dict, got list"):
        import_generator(tmp_path / "list.pth")
