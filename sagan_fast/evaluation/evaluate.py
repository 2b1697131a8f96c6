"""Scores generated images against real ones and states the protocol with the scores."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sagan_fast.data import ImageDataset
from sagan_fast.data.classes import differences
from sagan_fast.data.listing import said_passed_over
from sagan_fast.distributed import current_world
from sagan_fast.errors import InputError
from sagan_fast.evaluation.features import Extractor
from sagan_fast.evaluation.metrics import (
    Gaussian,
    InceptionScore,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from sagan_fast.evaluation.protocol import METRICS, Protocol, check_metrics, versions
from sagan_fast.evaluation.statistics import Reference, SetStatistics, collect
from sagan_fast.evaluation.statistics_file import StatisticsFile, save_statistics
from sagan_fast.evaluation.streams import Images, StoredImages
from sagan_fast.files import file_sha256
from sagan_fast.models.checkpoint import find_checkpoint, load_checkpoint, load_generator
from sagan_fast.models.generator import CONFIG, WEIGHTS, Generator, is_exported
from sagan_fast.words import counted

EXTREMES = 5
"""Classes listed as worst and as best."""

Progress = Callable[[str, int], Callable[[int], None]]
"""Called with what is gone through and its number of images; returns what is told of each batch."""


def evaluate(
    generated: Images,
    dataset: ImageDataset,
    extractor: Extractor,
    protocol: Protocol,
    *,
    source: Mapping[str, Any] | None = None,
    metrics: Iterable[str] = METRICS,
    num_workers: int = 0,
    progress: Progress | None = None,
    save_to: Path | None = None,
) -> dict[str, Any] | None:
    """Return the scores of `generated` against `dataset`, plain data fit for JSON; None except on the first process.

    The keys are fid, is, is_std, kid, kid_std, precision, recall, density, coverage, intra_fid (the mean over classes),
    intra_fid_per_class, intra_fid_worst, intra_fid_best, each where `metrics` asks for it and it can be had; `notes`,
    sentences that whoever reads the numbers must know; and `protocol`. Under torch.distributed all processes call it.

    Args:
        source: what `generated` is, for the protocol: see `generator_source` and `dataset_source`.
        num_workers: processes that read real images.
        save_to: .npz file for mean and covariance of the real images' features.

    Raises InputError for unknown metrics, and for images that cannot be read or made.
    """
    metrics = check_metrics(metrics)
    notes: list[str] = []
    fixed = dataset.gaussian if isinstance(dataset, StatisticsFile) else None
    if fixed is not None:
        metrics = _of_statistics(dataset.name, fixed, metrics, extractor)
    pairs = shared_classes(generated, dataset)
    per_class = "intra_fid" in metrics and bool(pairs)
    with_score = "is" in metrics and extractor.num_logits > 0
    if with_score:
        protocol.check_splits()

    world = current_world(extractor.device)
    what = world.from_main(lambda: dataset_source(dataset))
    real_count = len(dataset) if protocol.reference_count is None else min(protocol.reference_count, len(dataset))
    if fixed is None and protocol.reference_count is not None and real_count < protocol.reference_count:
        notes.append(f"the protocol wants {protocol.reference_count} real images, and there are {real_count}")
    identity = {
        "data": what["fingerprint"],
        "resolution": dataset.resolution,
        "preprocessing": what["preprocessing"],
        "count": real_count,
        "seed": protocol.seed if real_count < len(dataset) else 0,
        "extractor": dataclasses.asdict(extractor.identity),
        "device": extractor.device.type,
        "torch": str(torch.__version__),
    }

    begin = progress or (lambda label, count: lambda done: None)
    batches = {"batch_size": protocol.batch_size, "num_workers": num_workers}
    reference = None
    if fixed is None:
        reference = Reference(
            identity,
            lambda: StoredImages(dataset, real_count, seed=protocol.seed, **batches),
            extractor,
            keep=protocol.keep,
            per_class=per_class,
            progress=begin("real images", real_count),
        )
    intra: dict[int, tuple[float, int]] = {}

    def compare_class(label: int, count: int, gaussian: Gaussian) -> None:
        if reference and label in pairs and (found := reference.of_class(pairs[label])) is not None:
            intra[pairs[label]] = (frechet_distance(gaussian, found[1]), count)

    score = None
    if with_score and world.is_main:
        score = InceptionScore(generated.count, extractor.num_logits, protocol.splits, extractor.device)
    fake = collect(
        generated,
        extractor,
        keep=protocol.keep,
        on_class=compare_class if per_class else None,
        inception=score,
        progress=begin("generated images", generated.count),
    )
    real = reference.statistics if reference else None
    if fixed is not None and world.is_main:
        nothing = torch.zeros(0, extractor.num_features, device=extractor.device)
        real = SetStatistics(0, fixed.to(extractor.device), nothing)
    broken = world.gather((dataset.num_broken, generated.num_broken))
    if fake is None or real is None:
        return None
    for number, which in zip(map(sum, zip(*broken, strict=True)), ("real", "generated"), strict=True):
        if number:
            notes.append(f"{number} of the {which} images could not be read: others of their classes stand in for them")
    if said := said_passed_over(dataset.passed_over):
        notes.append(f"passed over beside the real images: {said}")
    if save_to is not None:
        save_statistics(real.gaussian, save_to)
    result = _scores(fake, real, protocol, metrics, notes)
    if score is not None:
        result["is"], result["is_std"] = score.result()
    elif "is" in metrics:
        notes.append("no inception score: the features come without logits")
    if intra:
        result |= _intra(intra, dataset.class_names)
        if len(pairs) < max(dataset.num_classes, generated.num_classes):
            notes.append(
                f"intra-FID of the {len(pairs)} classes that both have: "
                f"{differences(generated.class_names, dataset.class_names)}"
            )
        if len(intra) < len(pairs):
            notes.append(f"intra-FID over {len(intra)} of {len(pairs)} classes: the others lack two images")
        fewest = min(count for _, count in intra.values())
        if fewest <= extractor.num_features:
            notes.append(
                f"intra-FID from only {counted(fewest, 'image')} a class is biased upwards: compare equal counts only"
            )
    elif "intra_fid" in metrics and max(dataset.num_classes, generated.num_classes):
        notes.append("no intra-FID: the generated images do not have the classes of the real ones")
    fewest_images = fake.count if fixed is not None else min(fake.count, real_count)
    if "fid" in metrics and fewest_images <= extractor.num_features:
        notes.append(
            f"{counted(fewest_images, 'image')} are too few for {extractor.num_features} features: "
            "FID is biased upwards; compare equal counts only"
        )
    result["notes"] = notes
    result["protocol"] = {
        **dataclasses.asdict(protocol),
        "count": generated.count,
        "reference_count": real_count,
        "kid_subset_size": min(protocol.kid_subset_size, len(fake.kept), len(real.kept)),
        "labels": "an even share of each class" if generated.num_classes else None,
        "features": {
            **dataclasses.asdict(extractor.identity),
            "num_features": extractor.num_features,
            "num_logits": extractor.num_logits,
        },
        "generated": dict(source or {"generator": "in memory"}),
        "real": {
            **what,
            "resolution": dataset.resolution,
            "images": len(dataset),
            "passed_over": dict(dataset.passed_over),
        },
        "device": str(extractor.device),
        "processes": world.size,
        "versions": versions(),
    }
    if not generated.drawn:
        result["protocol"] |= dict.fromkeys(("labels", "batch_norm", "standing_batches", "truncation", "weights"))
    return result


def _of_statistics(name: str, gaussian: Gaussian, metrics: tuple[str, ...], extractor: Extractor) -> tuple[str, ...]:
    """Return those of `metrics` that need no real images; InputError if there are none, or other features were used."""
    if len(gaussian.mean) != extractor.num_features:
        raise InputError(
            f"{name} are of {len(gaussian.mean)} features, and {extractor.identity.name} has {extractor.num_features}: "
            "choose the features that they were made with"
        )
    kept = tuple(metric for metric in metrics if metric in ("fid", "is"))
    if not kept:
        raise InputError(f"{name} give FID only, and {', '.join(metrics)} need the real images")
    return kept


def generator_source(run_or_checkpoint: Path, weights: str, device: str) -> tuple[Generator, dict[str, Any]]:
    """Return a run's, checkpoint's or exported generator, and its entry in the protocol: file, SHA-256, step, weights.

    An imported generator has no step.
    """
    exported = is_exported(run_or_checkpoint)
    path = run_or_checkpoint / WEIGHTS if exported else find_checkpoint(run_or_checkpoint)
    generator = load_generator(run_or_checkpoint if exported else path, average=weights == "average", device=device)
    if exported:
        about = json.loads((run_or_checkpoint / CONFIG).read_text())
        known = {"step": about["step"]} if "step" in about else {"data": about.get("origin", str(path))}
    else:
        known = {"step": int(load_checkpoint(path)["step"])}
    described = {
        "checkpoint": str(path),
        "sha256": file_sha256(path),
        **known,
        "weights": weights,
        "resolution": generator.config.resolution,
        "backend": generator.config.backend,
    }
    return generator, described


def dataset_source(dataset: ImageDataset) -> dict[str, Any]:
    """Return the protocol's entry of a set of images: its spec, its preprocessing, its fingerprint."""
    return {"data": dataset.name, "preprocessing": dataset.preprocessing, "fingerprint": dataset.fingerprint()}


def with_scores(
    result: dict[str, Any], what: Mapping[str, Any], scores: Mapping[str, Any], **measured: Any
) -> dict[str, Any]:
    """Return `result` of `evaluate` with more `scores`; the protocol's entries `measured` say how they were measured.

    `what` holds the arguments of `evaluate`: an empty `result` gets a protocol of its own from them.
    """
    generated, dataset, protocol = what["generated"], what["dataset"], what["protocol"]
    known = result.get("protocol") or {
        "name": protocol.name, "seed": protocol.seed, "count": generated.count, "quantise": protocol.quantise,
        "generated": dict(what["source"]), "real": {"data": dataset.name}, "versions": versions(),
    }  # fmt: skip
    return {**result, **scores, "notes": result.get("notes", []), "protocol": {**known, **measured}}


def shared_classes(generated: Images, dataset: ImageDataset) -> dict[int, int]:
    """Return the labels of `generated`, each with the label of the same class in `dataset`."""
    if generated.class_names:
        places = {name: label for label, name in enumerate(dataset.class_names)}
        return {label: places[name] for label, name in enumerate(generated.class_names) if name in places}
    # a generator in memory does not name its classes
    same = generated.num_classes == dataset.num_classes
    return {label: label for label in range(dataset.num_classes)} if same else {}


def _scores(
    fake: SetStatistics, real: SetStatistics, protocol: Protocol, metrics: tuple[str, ...], notes: list[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    fewest = min(len(fake.kept), len(real.kept))
    if "fid" in metrics:
        result["fid"] = frechet_distance(fake.gaussian, real.gaussian)
    if "kid" in metrics:
        size = min(protocol.kid_subset_size, fewest)
        result["kid"], result["kid_std"] = kernel_distance(fake.kept, real.kept, protocol.kid_subsets, size)
        if size < protocol.kid_subset_size:
            notes.append(f"KID from subsets of {size} images instead of {protocol.kid_subset_size}: there are no more")
    if "prdc" in metrics:
        if fewest > protocol.neighbours:
            values = precision_recall_density_coverage(fake.kept, real.kept, protocol.neighbours)
            result |= zip(("precision", "recall", "density", "coverage"), values, strict=True)
        else:
            notes.append(f"no precision, recall, density, coverage: each set needs over {protocol.neighbours} images")
    return result


def _intra(intra: Mapping[int, tuple[float, int]], class_names: list[str]) -> dict[str, Any]:
    ordered = sorted(((value, class_names[label]) for label, (value, _) in intra.items()), reverse=True)
    return {
        "intra_fid": statistics.fmean(value for value, _ in ordered),
        "intra_fid_worst": [name for _, name in ordered[:EXTREMES]],
        "intra_fid_best": [name for _, name in ordered[::-1][:EXTREMES]],
        "intra_fid_per_class": {class_names[label]: value for label, (value, _) in sorted(intra.items())},
    }
