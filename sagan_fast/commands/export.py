"""`sagan-fast export` writes the generator as files that work without the trainer."""

from dataclasses import dataclass
from pathlib import Path

from sagan_fast.commands.options import check_is_folder, read_options
from sagan_fast.errors import InputError
from sagan_fast.words import counted

FORMATS = ("safetensors", "onnx", "torchscript", "biggan-pytorch", "studiogan")
ENDINGS = (".safetensors", ".onnx", ".pt", ".pth", ".bin", ".ckpt")
"""Of files with weights: no folder is named so."""
TOLERANCE = 1e-4
"""Largest difference to the checkpoint's samples, in units of [-1, 1], that an export may have: under a 78th of a gray
level of 256."""


@dataclass
class Options:
    """Write the EMA generator (averaged weights) of a run to files that work without the trainer.

    Spectral norm is folded into the weights. The samples of every file are compared with those of the checkpoint. A
    model card, README.md, says what the generator is and how to use it, with scores and a picture of samples.
    """

    checkpoint: str
    """run folder or checkpoint file"""
    out: str
    """folder for the files"""
    format: str = "safetensors"
    """formats to write: one or more of safetensors,onnx,torchscript,biggan-pytorch,studiogan"""
    last: bool = False
    """use the weights of the last step instead of the EMA weights"""
    license: str = "unknown"
    """licence of the weights for the model card, as Hugging Face names it: apache-2.0, cc-by-4.0, ..."""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast export`."""
    options = read_options("export", Options, args, positional=("checkpoint",))
    asked = [name.strip() for name in options.format.split(",")]
    if unknown := [name for name in asked if name not in FORMATS]:
        raise InputError(f"format must be one or more of {','.join(FORMATS)}, got {unknown[0]!r}")
    formats = [name for name in FORMATS if name in asked]
    folder = Path(options.out)
    check_is_folder(options.out, ENDINGS)
    import torch

    from sagan_fast.files import written
    from sagan_fast.interop import import_generator
    from sagan_fast.interop.foreign_states import foreign_state
    from sagan_fast.models import export
    from sagan_fast.models.checkpoint import find_checkpoint, load_checkpoint, load_generator
    from sagan_fast.models.generator import WEIGHTS, is_exported
    from sagan_fast.view.card import README, SAMPLES, save_card, scores_of, shortened
    from sagan_fast.view.history import History, run_of

    if is_exported(Path(options.checkpoint)):
        raise InputError(f"{options.checkpoint} is an exported generator: give the run or checkpoint it came from")
    generator = load_generator(options.checkpoint, average=not options.last)
    content = load_checkpoint(find_checkpoint(Path(options.checkpoint)))
    about = {
        "step": content["step"],
        "weights": "last" if options.last else "averaged",
        "data": shortened(content["config"]["data"]),
    }
    paths = {"safetensors": WEIGHTS, "onnx": export.ONNX, "torchscript": export.TORCHSCRIPT}
    paths |= {name: f"{name}.pth" for name in FORMATS if name not in paths}
    inputs = export.example(generator, count=5, seed=1)
    expected = generator(*inputs)
    for name in formats:
        path = folder / paths[name]
        if name == "safetensors":
            export.save_folder(generator, folder, about)
        elif path.suffix == ".pth":
            with written(path) as file:
                torch.save(foreign_state(generator, name), file)
        else:
            {"onnx": export.save_onnx, "torchscript": export.save_torchscript}[name](generator, path)
        exported = import_generator(path, layout=name) if path.suffix == ".pth" else export.read(path)
        if exported is None:
            print(f"{path}: not compared with the checkpoint's samples, onnxruntime is not installed")
            continue
        difference = (exported(*inputs) - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{path} differs from the checkpoint's samples by {difference:.2g}")
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, differs from the checkpoint's samples by {difference:.1g}")
    results = scores_of(History(run_of(Path(options.checkpoint))).scores(), about)
    save_card(generator, folder, about, [paths[name] for name in formats], results, options.license)
    print(f"{folder / README}: model card, with {counted(len(results), 'evaluation')} and {SAMPLES}")
