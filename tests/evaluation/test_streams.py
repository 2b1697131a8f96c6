"""Images to be scored: which ones, in what order, with which batch norms, and how processes share them."""

import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.features import open_extractor
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.sampling import classes, latents, sample
from sagan_fast.evaluation.streams import GeneratedImages, StoredImages, features_in_order
from sagan_fast.models.generator import Generator
from sagan_fast.visualize.grids import to_uint8
from shared_by_tests import tiny_extractor_file


def small_generator(**overrides):
    torch.manual_seed(3)
    generator = Generator.from_preset("shapes-32", base_channels=4, **overrides).eval().requires_grad_(False)
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return generator


def generated(generator, count, **protocol):
    return GeneratedImages(generator, Protocol(count=count, splits=1, **protocol))


def everything(images):
    return torch.cat(list(images.units(range(images.num_units))))


@pytest.mark.parametrize("batch_size", [4, 9, 50])
def test_generated_images_are_those_of_sample_whatever_the_batch(batch_size):
    generator = small_generator()
    images = generated(generator, 23, seed=5, truncation=0.7, batch_size=batch_size)
    expected = sample(generator, latents(23, generator.config.z_dim, 5, 0.7), classes(23, 10))
    assert (everything(images).int() - to_uint8(torch.cat(list(expected))).int()).abs().max() <= 1
    assert images.labels.tolist() == classes(23, 10).tolist()
    floats = everything(generated(generator, 3, seed=5, quantise="none"))
    assert floats.dtype == torch.float32 and floats.max() <= 255 and (floats != floats.round()).any()


def test_unconditional_images_have_no_classes():
    images = generated(small_generator(num_classes=0), 7)
    assert images.num_classes == 0 and len(everything(images)) == images.count == 7


@pytest.mark.parametrize("batch_norm", ["batch", "standing"])
def test_other_batch_statistics_leave_the_generator_alone(batch_norm):
    generator = small_generator()
    before = copy.deepcopy(generator.state_dict())
    rng = torch.get_rng_state()
    images = generated(generator, 21, batch_size=8, batch_norm=batch_norm, standing_batches=3)
    pixels = everything(images)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())
    assert not generator.training
    running = everything(generated(generator, 21, batch_size=8))
    assert pixels.shape == running.shape and not torch.equal(pixels, running)
    again = everything(generated(generator, 21, batch_size=8, batch_norm=batch_norm, standing_batches=3))
    assert torch.equal(pixels, again)
    # Spectral norm's u and v are at rest.
    for key, value in images.generator.state_dict().items():
        if "running_" not in key and "num_batches" not in key:
            assert torch.equal(value, before[key]), key


def test_every_batch_is_whole_where_its_statistics_count():
    """The 21st image shares its batch with 7 that are drawn and left out, not with 4."""
    generator = small_generator()
    of_21 = everything(generated(generator, 21, batch_size=8, batch_norm="batch"))
    of_24 = everything(generated(generator, 24, batch_size=8, batch_norm="batch"))
    assert len(of_21) == 21 and torch.equal(of_21, of_24[:21])
    labels = generated(generator, 24, batch_size=8, batch_norm="batch").labels
    assert labels[:8].unique().numel() > 3  # classes are mixed


def test_standing_statistics_are_means_over_batches():
    generator = small_generator(num_classes=0)
    images = generated(generator, 4, batch_size=8, batch_norm="standing", standing_batches=2)
    seen = []
    probe = copy.deepcopy(generator)
    first = probe.blocks[0]
    norm = next(module for module in first.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((0, 2, 3))))
    for batch in range(2):
        probe(latents(8, generator.config.z_dim, (batch + 1) * 1_000_003))
    moved = next(m for m in images.generator.blocks[0].modules() if isinstance(m, torch.nn.BatchNorm2d))
    torch.testing.assert_close(moved.running_mean, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)
    assert moved.momentum == norm.momentum


def test_a_broken_generator_is_named():
    generator = small_generator()
    generator.conv.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="images that are not finite"):
        everything(generated(generator, 3))


def test_stored_images_come_in_order_of_class_and_a_choice_is_fixed():
    dataset = open_dataset("shapes", resolution=16)
    images = StoredImages(dataset, 50, seed=1, batch_size=8)
    assert images.labels.tolist() == sorted(images.labels.tolist()) and len(set(images.indices)) == 50
    expected = torch.stack([dataset[i][0] for i in images.indices])
    assert torch.equal(everything(images), expected)
    assert images.indices.tolist() == StoredImages(dataset, 50, seed=1).indices.tolist()
    assert images.indices.tolist() != StoredImages(dataset, 50, seed=2).indices.tolist()
    assert sorted(StoredImages(dataset).indices) == list(range(5000))
    with pytest.raises(InputError, match="shapes has 5000 images, and 5001 are asked for"):
        StoredImages(dataset, 5001)


def _share(rank, world_size, port, extractor_file, folder, count, bad):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    generator = small_generator()
    if bad and rank == 1:
        generator.conv.bias.data[0] = float("nan")
    images = generated(generator, count, batch_size=4)
    try:
        parts = list(features_in_order(images, open_extractor(extractor_file)))
        torch.save(parts, f"{folder}/{rank}.pt")
    except InputError as error:
        torch.save(str(error), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _run_processes(world_size, tmp_path, count, bad=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(tiny_extractor_file(tmp_path / "f.pt"))
    # Forked: a spawned process could not import this file, which belongs to no package.
    mp.start_processes(_share, (world_size, port, path, str(tmp_path), count, bad), world_size, start_method="fork")
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)], path


@pytest.mark.parametrize(("world_size", "count"), [(2, 27), (3, 9)])
def test_processes_share_without_repeating_or_leaving_out(world_size, count, tmp_path):
    """Not divisible by processes or batches; every process sees all, in order."""
    found, path = _run_processes(world_size, tmp_path, count)
    alone = list(features_in_order(generated(small_generator(), count, batch_size=4), open_extractor(path)))
    for parts in found:
        assert [start for start, _, _ in parts] == [start for start, _, _ in alone] == list(range(0, count, 4))
        for part, expected in zip(parts, alone, strict=True):
            torch.testing.assert_close(part[1], expected[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(part[2], expected[2], rtol=1e-5, atol=1e-5)


def test_a_failure_of_one_process_reaches_all(tmp_path):
    found, _ = _run_processes(2, tmp_path, 30, bad=True)
    assert all("not finite" in sentence for sentence in found)
