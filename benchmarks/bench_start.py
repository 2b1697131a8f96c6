"""Measures how long the command line and the package take to answer, in processes of their own.

    python -m benchmarks.run --only start

Each case has a base: what Python or PyTorch takes alone. The files are in the page cache, since every provider runs
once before it is timed.
"""

import functools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Case, Provider, Run, Target

PYTHON = "pass"
TORCH = "import torch"
GENERATOR = "import torch, sagan_fast; sagan_fast.Generator"
PRESETS = ("shapes-32", "tiny-imagenet-64", "official-128-feat64")
"""Whose generators are loaded."""


def cases(target: Target) -> Iterator[Case]:
    """Yield a case for each answer of the command line, for the import, and for `from_pretrained` of a few sizes."""
    for what, args in (("--help", ["--help"]), ("--version", ["--version"]), ("a mistyped command", ["tran"])):
        program = f"import sys; from sagan_fast.cli import main; sys.argv[1:] = {args!r}; main()"
        yield case(what, {"python": PYTHON, "ours": program})
    yield case("import sagan_fast", {"import-torch": TORCH, "ours": GENERATOR})
    with tempfile.TemporaryDirectory() as folder:
        for preset in PRESETS[: 1 if target.dry_run else None]:
            path = exported(Path(folder), preset)
            program = f"{GENERATOR}.from_pretrained({str(path)!r})"
            yield case(f"from_pretrained, {preset}", {"import-sagan_fast": GENERATOR, "ours": program})


def case(what: str, programs: dict[str, str]) -> Case:
    """Return the case of `programs` by provider; they have no result to compare but that they end well."""
    providers = [
        Provider(name, functools.partial(started, program), timer=functools.partial(microseconds, program))
        for name, program in programs.items()
    ]
    return Case(
        "start", what, "fp32", "process", providers, lambda: [torch.ones(1)], tolerance=0.0,
        most_rounds=9, config={"programs": {name: re.sub(r"'/.*/", "'", text) for name, text in programs.items()}},
    )  # fmt: skip


def started(program: str) -> Run:
    """Return a run of `program` whose result is 1 when it ends well."""

    def run(_: int) -> Sequence[Tensor]:
        microseconds(program)
        return [torch.ones(1)]

    return run


def microseconds(program: str) -> float:
    """Return how long a new Python takes for `program`, from its start to its end. Raises RuntimeError if it fails."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return took * 1e6


def exported(folder: Path, preset: str) -> Path:
    """Return a folder in `folder` with the exported generator of `preset`, its weights as they were drawn."""
    from sagan_fast.models.export import save_folder
    from sagan_fast.models.generator import Generator

    path = folder / preset
    if not path.exists():
        save_folder(Generator.from_preset(preset), path)
    return path


if __name__ == "__main__":
    command = [sys.executable, "-m", "benchmarks.run", "--only", "start", *sys.argv[1:]]
    sys.exit(subprocess.run(command).returncode)
