"""`sagan-fast report` writes what `view` shows as one HTML file."""

from dataclasses import dataclass, field
from pathlib import Path

from sagan_fast.choices import Device
from sagan_fast.commands.options import read_options
from sagan_fast.errors import InputError


@dataclass
class Options:
    """Write a report of a run or an exported generator: one HTML file, with all pictures inside and no scripts.

    It shows what the page of `sagan-fast view` shows: samples, attention maps, curves, scores.
    """

    checkpoint: str
    """run folder, checkpoint file or exported folder"""
    out: str = field(metadata={"metavar": "FILE"})
    """HTML file to write"""
    device: Device = "auto"
    """where to compute; auto takes cuda if available, else cpu. mps (Apple GPUs) is untested"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast report`."""
    options = read_options("report", Options, args, positional=("checkpoint",))
    out = Path(options.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out must name a .html file, got {out}")
    from sagan_fast.distributed import pick_device
    from sagan_fast.files import written
    from sagan_fast.view.report import report

    text = report(Path(options.checkpoint), pick_device(options.device))
    with written(out) as file:
        file.write(text.encode())
    print(f"report of {options.checkpoint} in {out}")
