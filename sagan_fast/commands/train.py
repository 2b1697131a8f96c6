"""`sagan-fast train` starts a run from a preset and options, or resumes one."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagan_fast.choices import check_least
from sagan_fast.commands.options import as_options, said_once
from sagan_fast.commands.train_options import Action, known_keys, train_parser
from sagan_fast.errors import InputError
from sagan_fast.models.config import preset_names
from sagan_fast.training.config import TrainConfig, merged, preset_recipe, read_yaml
from sagan_fast.words import nearest


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast train`."""
    with said_once():
        config, action = _parse(args)
    if action.print_config:
        import yaml

        print(yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None), end="")
    elif action.dry_run:
        from sagan_fast.training.rehearsal import rehearse

        rehearse(config, resume=action.resume)
    else:
        from sagan_fast.training.loop import train

        train(
            config,
            resume=action.resume,
            resume_from=action.resume_from,
            init_from=action.init_from,
            profile=action.profile,
        )


def _parse(args: list[str]) -> tuple[TrainConfig, Action]:
    """Return the configuration and what is to be done with it; --help prints and exits."""
    chosen = _chosen(args)
    if asked := {"-h", "--help", "--help_all"} & set(args):
        recipe = preset_recipe(chosen.preset) if chosen.preset else {}
        train_parser("--help_all" in asked, recipe).print_help()
        raise SystemExit(0)
    print_config = "--print_config" in args
    for name in ("config", "preset", "out", "resume_from", "init_from"):
        if getattr(chosen, name) is None:
            raise InputError(f"--{name.replace('_', '-')} must be followed by a value")
    args = [arg for arg in args if arg != "--print_config"]  # jsonargparse reads more into this name
    parser = train_parser(False, {})
    parser.check_known(args)  # or a missing --preset would hide a mistyped one
    recipe = _recipe(chosen, print_config)
    if chosen.config:
        parser.file = chosen.config
        parser.parse_args(as_options(recipe))  # or a sentence that names the file
        parser.file = ""
    options = parser.parse_args([*as_options(recipe), *args]).as_dict()
    action = Action(**{field.name: options.pop(field.name) for field in dataclasses.fields(Action)})
    action.print_config = print_config
    check_least(0, action, "profile")
    if action.global_batch is not None:
        options["batch_size"] = action.global_batch
    if any(arg.partition("=")[0] == "--num_classes" for arg in args):
        options["classes_from_data"] = False
    return TrainConfig.from_dict(options), action


def _chosen(args: list[str]) -> argparse.Namespace:
    """Return the options that say where the others come from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "out", "resume_from", "init_from"):
        parser.add_argument(f"--{name}", default="", nargs="?")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_known_args(args)[0]


def _recipe(chosen: argparse.Namespace, print_config: bool) -> dict[str, Any]:
    """Return the options that the command line changes: a preset's, a file's, or those of the run that is meant."""
    if chosen.config and chosen.preset:
        raise InputError("--config and --preset are both whole recipes: give one")
    if chosen.config:
        values = read_yaml(Path(chosen.config))
        _check_keys(values, chosen.config)
        return merged(preset_recipe(str(values["preset"])), values) if values.get("preset") else values
    recipe: dict[str, Any] = {}
    if chosen.preset:
        recipe = preset_recipe(chosen.preset)
    elif (chosen.resume or chosen.resume_from) and chosen.out:
        recipe = _of_run(Path(chosen.out), chosen.resume_from)
    elif chosen.resume or chosen.resume_from:
        raise InputError("--out RUN must be given: the folder of the run that is to go on")
    elif chosen.init_from:
        recipe = _of_checkpoint(Path(chosen.init_from))
        for name in ("data", "out", "classes"):  # a run's own
            recipe.pop(name, None)
        recipe["classes_from_data"] = recipe["num_classes"] > 0
    elif not print_config:
        raise InputError(
            f"--preset NAME or --config FILE must be given; presets are {', '.join(preset_names())}, and "
            "`sagan-fast train --help` shows an example"
        )
    return {"data": "SPEC", "out": "RUN", **recipe} if print_config else recipe


def _of_run(run: Path, resume_from: str) -> dict[str, Any]:
    """Return the options of the run in the folder `run`; InputError if there is none."""
    stored = run / "config.yaml"
    if stored.exists():
        return read_yaml(stored)
    from sagan_fast.models.checkpoint import holds_checkpoints
    from sagan_fast.training.folder import Checkpoints

    if not resume_from and not holds_checkpoints(run):
        beside = run.absolute().parent
        runs = [p.name for p in beside.iterdir() if (p / "checkpoints").is_dir()] if beside.is_dir() else []
        hint = nearest(run.name, runs)
        raise InputError(f"there is no run in {run} to resume{hint}; to start one, add --preset NAME and --data SPEC")
    path = Checkpoints(run / "checkpoints", 1).chosen(resume_from or "newest")
    if not int(os.environ.get("RANK", "0")):
        print(f"{stored} is missing: the options are those of {path}", flush=True)
    return _of_checkpoint(path)


def _of_checkpoint(path: Path) -> dict[str, Any]:
    """Return the options in a checkpoint, or in that of a run folder."""
    from sagan_fast.models.checkpoint import find_checkpoint, load_checkpoint

    return dict(load_checkpoint(find_checkpoint(path))["config"])


def _check_keys(values: Mapping[str, Any], file: str, prefix: str = "") -> None:
    """Raise InputError for a key of the YAML file that there is not; it names the file and the nearest key."""
    known = known_keys()
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and f"{name}." in {k[: len(name) + 1] for k in known}:
            _check_keys(value, file, f"{name}.")
        elif name not in known:
            raise InputError(f"{file}: unknown key {name!r}{nearest(name, known)}")
