"""Exports a trained generator: safetensors with its configuration, ONNX, TorchScript.

Spectral norm is folded in: the weights written are W/sigma, with the u and v of the checkpoint. Nothing here needs the
trainer. `Generator.from_pretrained` reads the safetensors back.
"""

import contextlib
import dataclasses
import io
import json
import operator
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagan_fast.choices import Backend
from sagan_fast.errors import InputError
from sagan_fast.files import written
from sagan_fast.models.generator import ARCHITECTURE, CONFIG, FORMAT, WEIGHTS, Generator, in_eval_mode
from sagan_fast.version import __version__

ONNX, TORCHSCRIPT = "model.onnx", "model.torchscript.pt"
ONNX_OPSET = 18


def folded(generator: Generator, backend: Backend = "auto") -> Generator:
    """Return a copy of `generator` on the CPU for deployment: in eval mode and frozen, its attention on `backend`.

    Its weights are W/sigma, u and v as they are, under the keys of plain layers. `generator` is left as it was.
    """
    out = Generator.folded(dataclasses.replace(generator.config, backend=backend))
    contiguous = torch.contiguous_format  # whatever those of `generator` are
    with in_eval_mode(generator), torch.no_grad():  # reading a weight in training mode would move u and v
        tensors = {name: operator.attrgetter(name)(generator).detach().cpu() for name in out.state_dict()}
    out.load_state_dict({name: t.clone(memory_format=contiguous) for name, t in tensors.items()}, assign=True)
    out.class_names = generator.class_names
    return out.requires_grad_(False)


def save_folder(generator: Generator, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write `generator` to `folder` as model.safetensors and config.json, which `Generator.from_pretrained` reads.

    `about` is put into config.json beside what sizes the network: plain values such as the step. Raises InputError if
    the folder cannot be written.
    """
    from safetensors.torch import save

    weights = folded(generator).state_dict()
    config = {
        "architecture": ARCHITECTURE,
        "format": FORMAT,
        "generator": dataclasses.asdict(dataclasses.replace(generator.config, backend="auto")),
        "class_names": list(generator.class_names),
        **(about or {}),
        "versions": {"sagan_fast": __version__, "torch": str(torch.__version__)},
    }
    with written(folder / WEIGHTS) as file:
        file.write(save(weights, metadata={"format": "pt"}))
    with written(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")


def save_torchscript(generator: Generator, path: Path) -> None:
    """Write `generator` as TorchScript: `torch.jit.load(path)(z, y)`, any batch size, without sagan_fast.

    It is traced with PyTorch's fused attention, which does not store the map. Its inputs are z (B, z_dim) float32 and,
    if it has classes, y (B,) int64; its output is images (B, 3, R, R) in [-1, 1].
    """
    traced = io.BytesIO()
    with quiet(), torch.no_grad():
        script = torch.jit.trace(folded(generator, "sdpa"), example(generator), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(script, traced)  # type: ignore[no-untyped-call]
    with written(path) as file, zipfile.ZipFile(traced) as whole, zipfile.ZipFile(file, "w") as kept:
        for entry in whole.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # source lines, with the paths of this machine
                kept.writestr(entry, whole.read(entry))


def save_onnx(generator: Generator, path: Path) -> None:
    """Write `generator` as ONNX, opset 18, with inputs "z" and, if it has classes, "y", and the output "images".

    The batch size is free. One file, weights included. Raises InputError where onnx and onnxscript are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"the format onnx needs the package {error.name}: pip install 'sagan_fast[export]'") from error
    inputs = example(generator)
    batch = torch.export.Dim("batch")
    names = ["z", "y"][: len(inputs)]
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            folded(generator, "eager"),
            inputs,
            input_names=names,
            output_names=["images"],
            dynamic_shapes={name: {0: batch} for name in names},
            opset_version=ONNX_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for part_of_graph in (*model.graph.node, *model.graph.value_info, model.graph, model):
        del part_of_graph.metadata_props[:]  # stack traces, with the paths of this machine
    with written(path) as file:
        onnx.save(model, file)


def example(generator: Generator, count: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Return z (count, z_dim) and, if there are classes, y (count,), on the CPU; a seed gives the same ones."""
    config, rng = generator.config, torch.Generator().manual_seed(seed)
    z = torch.randn(count, config.z_dim, generator=rng)
    return (z, torch.randint(config.num_classes, (count,), generator=rng)) if config.num_classes else (z,)


def read(path: Path) -> Callable[..., Tensor] | None:
    """Return the exported file `path` as a function of z and y; None for ONNX where onnxruntime is not installed."""
    if path.suffix == ".safetensors":
        return Generator.from_pretrained(path.parent)
    if path.suffix != ".onnx":
        with quiet():
            return torch.jit.load(str(path))  # type: ignore[no-any-return,no-untyped-call]
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide PyTorch's warnings about tracing: shapes checked in Python, TorchScript's deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
