"""The model card of an exported generator: README.md with a YAML header in Hugging Face's form, and a grid of samples.

The header's keys: https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sagan_fast.evaluation.sampling import latents, rows_by_class, sample
from sagan_fast.files import written
from sagan_fast.models.export import ONNX, TORCHSCRIPT
from sagan_fast.models.generator import WEIGHTS, Generator
from sagan_fast.view.curves import number
from sagan_fast.view.history import step_of
from sagan_fast.view.scores import COLUMNS, summary
from sagan_fast.visualize.grids import grid, labelled_grid, save_png
from sagan_fast.words import counted

README, SAMPLES = "README.md", "samples.png"
TASK = "unconditional-image-generation"
"""Hugging Face's task of generators without a text, also those with classes."""
HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
"""Where Hugging Face has the data sets that a spec names for certain."""
SIDE = 1100
"""Pixels a side that the grid of samples has at most."""
BODY = """
# SAGAN generator, {size}x{size}, {classes}

{origin}; {parameters:,} parameters, spectral norm folded in.
Inputs: `z` (batch, {z_dim}), normal{and_y}. Output: images (batch, 3, {size}, {size}) in [-1, 1].

![{alt}]({samples})

{alt}.
{scores}
## Use
{usage}"""
USAGE = {
    WEIGHTS: """
```python
import sagan_fast, torch
generator = sagan_fast.Generator.from_pretrained("{folder}")
images = generator(torch.randn(8, {z_dim}){y})
```
""",
    ONNX: """
```python
import numpy, onnxruntime
session = onnxruntime.InferenceSession("{folder}/model.onnx")
z = numpy.random.randn(8, {z_dim}).astype("float32")
(images,) = session.run(None, {{"z": z{onnx_y}}})
```
{onnx_note}""",
    TORCHSCRIPT: """
```python
import torch
generator = torch.jit.load("{folder}/model.torchscript.pt")
images = generator(torch.randn(8, {z_dim}){y})
```
""",
    "biggan-pytorch.pth": """
In BigGAN-PyTorch, with `G_shared=False` and the sizes of config.json; in evaluation it gives the same images:
`G.load_state_dict(torch.load("{folder}/biggan-pytorch.pth"))`
""",
    "studiogan.pth": """
In StudioGAN, backbone "resnet" with spectral norm and the sizes of config.json; in evaluation it gives the same images:
`Gen.load_state_dict(torch.load("{folder}/studiogan.pth"))`
""",
}


def save_card(
    generator: Generator,
    folder: Path,
    about: Mapping[str, Any],
    files: Sequence[str],
    results: Sequence[Mapping[str, Any]] = (),
    license: str = "unknown",
) -> None:
    """Write README.md and samples.png to `folder`: what `generator` is, its scores, and how each of `files` is used.

    `about` says where it comes from: "origin", or "step", "data" and "weights". `results` are those of evaluations of
    these weights, `license` is an identifier of Hugging Face. Raises InputError if a file cannot be written.
    """
    n, config = generator.config.num_classes, generator.config
    picture, shown = samples_of(generator)
    save_png(picture, folder / SAMPLES)
    values = {
        "origin": about.get("origin")
        or f"{str(about['weights']).capitalize()} weights after {counted(about['step'], 'step')} on `{about['data']}`",
        "folder": folder.name,
        "size": config.resolution,
        "z_dim": config.z_dim,
        "classes": counted(n, "class"),
        "and_y": f", and `y` (batch,) int64, classes 0 to {n - 1}" if n else "",
        "y": f", torch.randint({n}, (8,))" if n else "",
        "onnx_y": f', "y": numpy.random.randint({n}, size=8)' if n else "",
        "onnx_note": "ONNX Runtime counts negative classes from the end.\n" if n else "",
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
        "samples": SAMPLES,
        "alt": f"Samples, not selected{shown}",
        "scores": _scores(results),
    }
    text = BODY.format(usage="".join(USAGE[file].format(**values) for file in files), **values)
    if generator.class_names:
        text += "\n## Classes\n\n" + ", ".join(f"{i} {name}" for i, name in enumerate(generator.class_names)) + "\n"
    head = header(folder.name, about, files, results, license)
    with written(folder / README) as file:
        file.write(f"---\n{head}---\n{text}".encode())


def header(
    name: str, about: Mapping[str, Any], files: Sequence[str], results: Sequence[Mapping[str, Any]], license: str
) -> str:
    """Return the YAML of the header: licence, library, task, tags, data set if known, and scores if there are."""
    import yaml

    tags = ["sagan", "gan", "self-attention", "image-generation", "pytorch", *(["onnx"] if ONNX in files else [])]
    values: dict[str, Any] = {"license": license, "library_name": "sagan_fast", "pipeline_tag": TASK, "tags": tags}
    if known := HUB_DATASETS.get(str(about.get("data", "")).partition(":")[0]):
        values["datasets"] = [known]
    if results:
        values["model-index"] = [{"name": name, "results": [_result(result) for result in results]}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def scores_of(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return those of a run's evaluation `results` that are of the exported weights: same step, averaged or last."""
    weights = "average" if about["weights"] == "averaged" else "last"
    same = (result for result in results if step_of(dict(result)) == about["step"])
    return [result for result in same if result["protocol"]["generated"].get("weights") == weights]


@torch.no_grad()
def samples_of(generator: Generator) -> tuple[torch.Tensor, str]:
    """Return a grid (3, h, w) uint8 of samples of seed 0, and its rows in words.

    There is a labelled row for each class; of more than ten, ten are chosen evenly, and fewer of large images.
    """
    config, most = generator.config, max(3, min(10, SIDE // max(64, generator.config.resolution)))
    columns = min(8, most)
    if not config.num_classes:
        z = latents(columns * columns, config.z_dim, 0)
        return grid(torch.cat(list(sample(generator, z, None))), columns), ""
    rows = min(most, config.num_classes)
    chosen = [i * config.num_classes // rows for i in range(rows)]
    z, y, labels = rows_by_class(generator, chosen, columns, 0, None)
    which = "each class" if rows == config.num_classes else f"each of {rows} classes"
    return labelled_grid(
        torch.cat(list(sample(generator, z, y))), labels
    ), f"; a row for {which}, the same z in a column"


def _named(key: str, result: Mapping[str, Any]) -> str:
    """Return the name of the score `key`: FID is of Inception's features alone."""
    features = result["protocol"].get("features", {}).get("name", "unknown features")
    name = COLUMNS[key] if features == "inception" else COLUMNS[key].replace("FID", "FD")
    return f"{name} ({features})"


def _measured(result: Mapping[str, Any]) -> list[str]:
    return [key for key in COLUMNS if isinstance(result.get(key), int | float)]


def _result(result: Mapping[str, Any]) -> dict[str, Any]:
    data = str(result["protocol"].get("real", {}).get("data", "unknown"))
    is_inception = result["protocol"].get("features", {}).get("name") == "inception"
    kinds = {"is": "inception_score"} if is_inception else {"fid": "fd", "intra_fid": "intra_fd"}
    return {
        "task": {"type": TASK},
        "dataset": {"name": shortened(data), "type": data.partition(":")[0]},
        "metrics": [
            {"type": kinds.get(key, key), "name": _named(key, result), "value": float(f"{result[key]:.5g}"),
             "args": _protocol(result)}
            for key in _measured(result)
        ],
    }  # fmt: skip


def _protocol(result: Mapping[str, Any]) -> str:
    data = str(result["protocol"].get("real", {}).get("data", ""))
    text = summary(result["protocol"])
    text = text.replace(data, shortened(data)) if data else text
    return text[:1].upper() + text[1:]


def _scores(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of scores; a table for each evaluation, with its protocol."""
    text = "\n## Scores\n" if results else ""
    for result in results:
        rows = "".join(f"| {_named(key, result)} | {number(result[key])} |\n" for key in _measured(result))
        notes = "".join(f"- {note}\n" for note in result.get("notes", []))
        text += f"\n{_protocol(result)}.\n\n| score | value |\n|---|---|\n{rows}"
        text += f"\n{notes}" if notes else ""
    return text


def shortened(spec: str) -> str:
    """Return the data set's spec with only the last two folders of its path, as the rest differs between machines."""
    kind, colon, path = spec.partition(":")
    return kind + colon + "/".join(Path(path).parts[-2:]).replace("//", "/")
