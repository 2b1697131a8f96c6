"""`sagan-fast info` describes a run, or shows versions, the device and the backends."""

import json
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagan_fast.commands.options import read_options
from sagan_fast.errors import InputError
from sagan_fast.version import __version__
from sagan_fast.words import counted


@dataclass
class Options:
    """Describe a run: preset, step, classes with their numbers, best FID, pictures and size.

    Without a run: show versions, the device, and the backend of attention with its reason.
    """

    run: str | None = None
    """run folder, checkpoint file or exported folder"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast info`."""
    options = read_options("info", Options, args, positional=("run",))
    lines = _machine() if options.run is None else described(Path(options.run).expanduser())
    print("\n".join(lines))


def described(path: Path) -> list[str]:
    """Return the lines about the run folder, checkpoint file or exported folder `path`; InputError for another."""
    if path.is_dir() and (path / "config.yaml").exists():
        return _run(path)
    if path.is_dir() and (path / "config.json").exists():
        return _exported(path)
    from sagan_fast.models.checkpoint import find_checkpoint, load_checkpoint

    found = find_checkpoint(path)
    content = load_checkpoint(found)
    config = content["config"]
    return [
        f"checkpoint  {found}",
        *_of_config(config),
        f"step        {content['step']} of {config['steps']}",
        f"size        {_size(found.stat().st_size)}",
        *_classes(content.get("class_names", ())),
    ]


def _in_features(config: dict[str, Any]) -> str:
    """Return which features a score is of, where they are not those of papers."""
    features = config.get("eval_features", "inception")
    return "" if features == "inception" else f" in the features of {features}"


def _run(path: Path) -> list[str]:
    from sagan_fast.training.config import read_yaml

    config = read_yaml(path / "config.yaml")
    folder = path / "checkpoints"
    steps = sorted(int(p.stem[5:]) for p in folder.glob("step-*.pt") if p.stem[5:].isdecimal())
    step = f"{steps[-1]} of {config.get('steps')}" if steps else f"no checkpoint yet, of {config.get('steps')}"
    lines = [f"run         {path}", *_of_config(config), f"step        {step}"]
    if steps:
        kept = [*(p.name for p in (folder / "last.pt", folder / "best.pt") if p.exists()), *map(str, steps)]
        lines.append(f"checkpoints {', '.join(kept)}")
    best = _read_json(folder / "best.json")
    lines.append(
        f"best {best['metric'].upper():7}{best['score']:.4g}{_in_features(config)} at step {best['step']}, "
        "checkpoints/best.pt"
        if best
        else "best FID    not evaluated; --eval-every N scores during training, `sagan-fast evaluate` afterwards"
    )
    pictures = sorted((path / "samples").glob("*.png"))
    newest = f", the newest {pictures[-1]}" if pictures else ""
    lines.append(f"pictures    {len(pictures)} in samples/{newest}")
    inodes = {(s.st_dev, s.st_ino): s.st_size for p in path.rglob("*") if p.is_file() for s in [p.stat()]}
    lines.append(f"size        {_size(sum(inodes.values()))}")
    names = list(_read_json(path / "data.json").get("classes", {}))
    if not names and steps:
        from sagan_fast.models.checkpoint import find_checkpoint, load_checkpoint

        names = load_checkpoint(find_checkpoint(path)).get("class_names", [])
    return [*lines, *_classes(names)]


def _exported(path: Path) -> list[str]:
    about = _read_json(path / "config.json")
    if "generator" not in about:
        raise InputError(f"{path} is neither a run folder nor an exported generator")
    generator = about["generator"]
    return [
        f"generator   {path}, exported",
        f"images      {generator.get('resolution')}x{generator.get('resolution')}",
        f"step        {about.get('step', 'unknown')}, {about.get('weights', 'averaged')} weights",
        f"data        {about.get('data', about.get('origin', 'unknown'))}",
        f"size        {_size(sum(p.stat().st_size for p in path.iterdir() if p.is_file()))}",
        *_classes(about.get("class_names", ())),
    ]


def _of_config(config: dict[str, Any]) -> list[str]:
    networks = (("G", config.get("generator", {})), ("D", config.get("discriminator", {})))
    where = [f"{letter} {found['attention_resolutions']}" for letter, found in networks if found]
    return [
        f"preset      {config.get('preset') or 'not recorded'}",
        f"data        {config.get('data')}",
        f"images      {config.get('resolution')}x{config.get('resolution')}, attention at {', '.join(where)}",
    ]


def _classes(names: Sequence[str]) -> list[str]:
    """Return the classes with their numbers, in lines."""
    if not names:
        return ["classes     none, or not named"]
    listed = ", ".join(f"{number}\u00a0{name}".replace(" ", "\u00a0") for number, name in enumerate(names))
    text = textwrap.fill(listed, 100, initial_indent=f"classes     {len(names)}: ", subsequent_indent=" " * 12,
                         break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return text.replace("\u00a0", " ").splitlines()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _machine() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from sagan_fast.layers.explain import explain
    from sagan_fast.layers.self_attention import SelfAttention2d

    lines = [f"sagan_fast  {__version__}"]
    lines.append(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "torchvision", "numpy"):
        try:
            lines.append(f"{package:11} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:11} not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        capability = ".".join(str(n) for n in torch.cuda.get_device_capability())
        lines.append(f"device      {torch.cuda.get_device_name()}, compute capability {capability}")
    else:
        threads = f"{counted(torch.get_num_threads(), 'thread')} of {os.cpu_count()}"
        lines.append(f"device      cpu, {threads}; PyTorch finds no CUDA device")
    for size, channels, pool in ((32, 256, True), (64, 128, True), (64, 64, False)):
        block = SelfAttention2d(channels, pool=pool).to(device)
        x = torch.empty(1, channels, size, size, device=device)
        what = f"{size}x{size}, {channels} channels, {'pooled' if pool else 'unpooled'}"
        line = explain(x, block.theta.weight, block.phi.weight, block.g.weight, None, block.gamma, pool=pool)
        lines.append(f"attention   {what}: {line.split(': ', 1)[1]}")
    return lines
