"""`sagan-fast import` writes the generator of another code base as an exported folder."""

from dataclasses import dataclass
from pathlib import Path

from sagan_fast.choices import CodeBase
from sagan_fast.commands.export import ENDINGS
from sagan_fast.commands.options import check_is_folder, read_options
from sagan_fast.words import counted


@dataclass
class Options:
    """Import the SAGAN generator of a checkpoint of another code base.

    The folder holds what `sagan-fast export` writes: `sample`, `evaluate`, `attention` and
    `sagan_fast.Generator.from_pretrained` read it. Nothing in the checkpoint is run, and a key that does not map is an
    error.
    """

    source: str
    """.pth or .pt file, .safetensors, or .npz with TensorFlow's variable names"""
    out: str
    """folder for the generator"""
    layout: CodeBase | None = None
    """code base that wrote the source; recognised by its keys if not given"""
    last: bool = False
    """use the weights of the last step where the source holds averaged ones too"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast import`."""
    options = read_options("import", Options, args, positional=("source",))
    folder = Path(options.out)
    check_is_folder(options.out, ENDINGS)
    from sagan_fast.interop import import_generator
    from sagan_fast.models import export
    from sagan_fast.models.generator import WEIGHTS, Generator
    from sagan_fast.view.card import save_card

    generator = import_generator(options.source, layout=options.layout, ema=not options.last)
    about = {
        "origin": f"Imported from `{Path(options.source).name}`",
        "weights": "last" if options.last else "averaged",
    }
    export.save_folder(generator, folder, about)
    save_card(generator, folder, about, [WEIGHTS])
    inputs = export.example(generator, count=3, seed=1)
    difference = (Generator.from_pretrained(folder)(*inputs) - generator(*inputs)).abs().max().item()
    config = generator.config
    classes = counted(config.num_classes, "class")
    where = ", ".join(f"{size}x{size}" for size in config.attention_resolutions) or "no map"
    print(
        f"{folder}: generator of {config.resolution}x{config.resolution}, {classes}, channels "
        f"{','.join(map(str, config.widths))}, attention at {where}; differs from the source's by {difference:.1g}"
    )
