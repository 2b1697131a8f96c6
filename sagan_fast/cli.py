"""The command line: `sagan-fast {train, sample, info}`. Parses, calls, and turns errors into a sentence."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import sagan_fast
from sagan_fast.errors import InputError
from sagan_fast.models.config import SHARED, DiscriminatorConfig, GeneratorConfig, load_preset, preset_names

DASHES = "Options may be written with dashes or underscores."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 bad input (one sentence on stderr), 1 anything else."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[list[str]], None], str]] = {
        "train": (train_command, "train a SAGAN on images, or go on with a run"),
        "sample": (sample_command, "draw images from a run or checkpoint; needs no data set"),
        "info": (info_command, "versions, device, and which backend would run and why"),
    }
    try:
        if not args or args[0] in ("-h", "--help"):
            print(f"usage: sagan-fast {{{','.join(commands)}}} ...\n\nSelf-attention GANs, trained and sampled.\n")
            for name, (_, what) in commands.items():
                print(f"  {name:8} {what}")
            print("\nsagan-fast COMMAND --help shows a command's options.")
            return 0 if args else 2
        if args[0] == "--version":
            print(f"sagan-fast {sagan_fast.__version__}")
            return 0
        if args[0] not in commands:
            raise InputError(f"unknown command {args[0]!r}{_nearest(args[0], list(commands))}")
        commands[args[0]][0](_underscored(args[1:]))
    except InputError as error:
        print(f"sagan-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sagan-fast: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that went away
        print(f"sagan-fast: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        from sagan_fast.training.health import Diverged

        if not isinstance(error, Diverged):
            raise
        print(f"sagan-fast: {error}", file=sys.stderr)
        return 1
    return 0


def train_command(args: list[str]) -> None:
    """Parse and run `sagan-fast train`."""
    import yaml

    from sagan_fast.training.config import TrainConfig, read_yaml

    parser = _parser("train", "Train a SAGAN; RUN gets config.yaml, log.jsonl, samples, checkpoints and curves.")
    parser.add_argument("--config", help="YAML file of options, for example a run's config.yaml")
    parser.add_argument("--preset", help=f"whole recipe to start from: {', '.join(preset_names())}")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--print_config", action="store_true", help="print the configuration that would run, and stop")
    parser.add_class_arguments(TrainConfig, skip={"generator", "discriminator"})
    for section, network in (("generator", GeneratorConfig), ("discriminator", DiscriminatorConfig)):
        parser.add_class_arguments(network, section, skip=set(SHARED))

    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--preset", "--out"):
        recipe.add_argument(name)
    recipe.add_argument("--resume", action="store_true")
    chosen = recipe.parse_known_args(args)[0]
    stored = Path(chosen.out or "", "config.yaml")
    if chosen.config and chosen.preset:
        raise InputError("--config and --preset are both whole recipes: give one")
    if chosen.config:
        base = read_yaml(Path(chosen.config))
    elif chosen.preset:
        base = load_preset(chosen.preset)
    elif chosen.resume and chosen.out and stored.exists():
        base = read_yaml(stored)
    elif not {"-h", "--help", "--print_config"} & set(args):
        raise InputError(f"--preset NAME or --config FILE must be given; presets are {', '.join(preset_names())}")
    else:
        base = {}
    print_config = "--print_config" in args
    args = [arg for arg in args if arg != "--print_config"]  # jsonargparse reads more into this name
    if print_config:
        base = {"data": "SPEC", "out": "RUN", **base}

    options = parser.parse_args([*_tokens(base), *args]).as_dict()
    for name in ("config", "preset", "print_config"):
        del options[name]
    resume = options.pop("resume")
    config = TrainConfig.from_dict(options)
    if print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None), end="")
        return
    from sagan_fast.training.loop import train

    train(config, resume=resume)


def sample_command(args: list[str]) -> None:
    """Parse and run `sagan-fast sample`."""
    parser = _parser("sample", "Draw images from the averaged generator of a run or checkpoint.")
    parser.add_argument("checkpoint", help="run folder or checkpoint file")
    parser.add_argument("--out", required=True, help="PNG file with --grid, else a folder that gets one PNG an image")
    parser.add_argument("--count", type=int, default=64, help="number of images")
    parser.add_argument("--class_id", type=int, help="one class only; without, an even share of each")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--truncation", type=float, help="draw z within [-T, T]: less varied, more typical")
    parser.add_argument("--grid", action="store_true", help="one PNG with all images, eight a row")
    parser.add_argument("--last", action="store_true", help="the last weights instead of the averaged ones")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time")
    options = parser.parse_args(args)
    from sagan_fast.evaluation.sampling import classes, latents, sample
    from sagan_fast.models.checkpoint import load_generator
    from sagan_fast.training.loop import pick_device
    from sagan_fast.visualize.grids import save_grid, save_png, to_uint8

    for name in ("count", "batch_size"):
        if options[name] < 1:
            raise InputError(f"{name} must be positive, got {options[name]}")
    out = Path(options.out)
    if options.grid and out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file with --grid, got {out}")
    if not options.grid and out.is_file():
        raise InputError(f"--out must name a folder without --grid, and {out} is a file")
    device = pick_device(options.device)
    generator = load_generator(options.checkpoint, average=not options.last, device=str(device))
    z = latents(options.count, generator.config.z_dim, options.seed, options.truncation)
    y = classes(options.count, generator.config.num_classes, options.class_id)
    images = sample(generator, z, y, options.batch_size)
    if options.grid:
        import torch

        save_grid(torch.cat(list(images)), out, min(8, options.count))
        print(f"{options.count} images in {out}")
        return
    number = 0
    for batch in images:
        for image in to_uint8(batch):
            label = "" if y is None else f"_class{int(y[number])}"
            save_png(image, out / f"{number:06d}{label}.png")
            number += 1
    print(f"{number} images in {out}")


def info_command(args: list[str]) -> None:
    """Parse and run `sagan-fast info`."""
    _parser("info", "Show versions, the device, and which backend would run and why.").parse_args(args)
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from sagan_fast.layers.self_attention import SelfAttention2d, explain

    print(f"sagan_fast  {sagan_fast.__version__}")
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "torchvision", "numpy"):
        try:
            print(f"{package:11} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:11} not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        capability = ".".join(str(n) for n in torch.cuda.get_device_capability())
        print(f"device      {torch.cuda.get_device_name()}, compute capability {capability}")
    else:
        print(f"device      cpu, {torch.get_num_threads()} threads of {os.cpu_count()}; PyTorch finds no CUDA device")
    for size, channels, pool in ((32, 256, True), (64, 128, True), (64, 64, False)):
        block = SelfAttention2d(channels, pool=pool).to(device)
        x = torch.empty(1, channels, size, size, device=device)
        what = f"{size}x{size}, {channels} channels, {'pooled' if pool else 'unpooled'}"
        line = explain(x, block.theta.weight, block.phi.weight, block.g.weight, None, block.gamma, pool=pool)
        print(f"attention   {what}: {line.split(': ', 1)[1]}")


def _parser(command: str, description: str) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class SentenceParser(ArgumentParser):  # type: ignore[misc]
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InputError(_sentence(message, list(self._option_string_actions))) from ex

    return SentenceParser(prog=f"sagan-fast {command}", description=description, epilog=DASHES)


def _tokens(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested `values` as command-line options, so that a file's keys are checked as options are."""
    tokens = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tokens += _tokens(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            tokens.append(f"--{prefix}{key}={text}")
    return tokens


def _underscored(args: list[str]) -> list[str]:
    """Return `args` with the dashes inside option names as underscores; values are left alone."""
    return [
        "--" + name.replace("-", "_") + equals + value if arg.startswith("--") and len(arg) > 2 else arg
        for arg in args
        for name, equals, value in [arg[2:].partition("=")]
    ]


def _sentence(message: str, known: list[str]) -> str:
    """Return a parser's message as one line; for an unknown option with the nearest known one."""
    line = " ".join(message.split()).replace("Parser key ", "option ")
    if line.startswith("unrecognized arguments: "):
        options = [word.split("=")[0] for word in line.split()[2:] if word.startswith("--")]
        if options:
            return f"unknown key {options[0].lstrip('-')!r}{_nearest(options[0], known)}"
    return line


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {near[0].lstrip('-')!r}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
