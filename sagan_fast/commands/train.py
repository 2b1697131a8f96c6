"""`sagan-fast train` starts a run from a preset and options, or resumes one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sagan_fast.commands.options import as_options, command_parser, said_once
from sagan_fast.errors import InputError
from sagan_fast.models.config import SHARED, DiscriminatorConfig, GeneratorConfig, load_preset, preset_names

if TYPE_CHECKING:
    from sagan_fast.training.config import TrainConfig


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast train`."""
    with said_once():
        config, resume, profile = _parse(args)
    if config is None:
        return
    from sagan_fast.training.loop import train

    train(config, resume=resume, profile=profile)


def _parse(args: list[str]) -> tuple[TrainConfig | None, bool, int]:
    """Return the configuration, whether to resume, and the number of steps to trace.

    The configuration is None if it was only to be printed.
    """
    import yaml

    from sagan_fast.training.config import TrainConfig, read_yaml

    parser = command_parser("train", "Train a SAGAN from a preset or a configuration file, or resume a run.")
    parser.add_argument("--config", help="YAML file with options, such as the config.yaml of a run")
    parser.add_argument("--preset", help=f"preset to start from: {', '.join(preset_names())}")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out; start a new run if there is none"
    )
    parser.add_argument("--print_config", action="store_true", help="print the configuration and exit")
    parser.add_argument("--profile", type=int, default=0, help="write a torch.profiler trace of this many steps")
    parser.add_argument("--global_batch", type=int, help="same as --batch_size")
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

    options = parser.parse_args([*as_options(base), *args]).as_dict()
    for name in ("config", "preset", "print_config"):
        del options[name]
    resume, profile, global_batch = (options.pop(name) for name in ("resume", "profile", "global_batch"))
    if global_batch is not None:
        options["batch_size"] = global_batch
    if profile < 0:
        raise InputError(f"profile must be at least 0, got {profile}")
    config = TrainConfig.from_dict(options)
    if print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None), end="")
        return None, resume, profile
    return config, resume, profile
