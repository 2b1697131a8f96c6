"""The options of `sagan-fast train`, in groups: what most runs need in --help, all of them in --help-all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sagan_fast.commands.options import add_options, command_parser
from sagan_fast.models.config import SHARED, DiscriminatorConfig, GeneratorConfig, preset_names
from sagan_fast.training.config import TrainConfig


@dataclasses.dataclass
class Action:
    """What to do."""

    config: str = ""
    """YAML file with options, such as the config.yaml of a run"""
    resume: bool = False
    """continue the run in --out. With a preset or --config: start it if there is none"""
    resume_from: str = ""
    """continue from this step, "best" or a checkpoint file. What is later is kept in replaced/"""
    init_from: str = ""
    """begin a new run with the weights of this run or checkpoint. Classes and sizes may differ"""
    dry_run: bool = False
    """check everything, measure three steps after a first one, estimate the end; write nothing"""
    print_config: bool = False
    """print the configuration as YAML and exit"""
    profile: int = 0
    """write a torch.profiler trace of this many steps"""
    global_batch: int | None = None
    """same as --batch-size"""
    help_all: bool = False
    """show all options and exit"""


COMMON = {
    "Start": {
        "preset": "recipe to start from",
        "config": "YAML file with options, as a run's config.yaml",
        "data": "images: folder:PATH, packed:PATH, or shapes",
        "out": "folder of the run",
        "resume": "go on with the run in --out",
        "resume_from": "go back to a step, best or a checkpoint file",
        "init_from": "begin with the weights of another run",
        "dry_run": "check, measure three steps, write nothing",
    },
    "Data": {
        "num_classes": "0: no labels; default: those of the data",
        "resolution": "width and height of the images",
        "flip": "mirror images at random",
        "diffaugment": "for few images: color,translation,cutout",
        "num_workers": "processes that read images",
    },
    "Training": {
        "steps": "in all, with those before --resume",
        "batch_size": "images a step, over all processes",
        "micro_batch_size": "images computed at a time; 0: all",
        "seed": "of weights, order, noise and labels",
        "loss": "adversarial loss",
        "r1_gamma": "weight of the R1 penalty; 0: off",
        "g_lr": "learning rate of the generator",
        "d_lr": "learning rate of the discriminator",
        "ema_decay": "of the averaged weights",
    },
    "Device": {
        "device": "cpu, cuda or mps",
        "precision": "fp32, tf32, bf16 or fp16",
        "backend": "of attention: triton, sdpa or eager",
    },
    "Log": {
        "log_every": "steps between lines of the log",
        "sample_every": "steps between sample grids",
        "checkpoint_every": "steps between checkpoints",
        "keep": "checkpoints kept, beside the best",
        "eval_every": "steps between evaluations; 0: never",
    },
    "Networks": {
        "generator.base_channels": "width; also --discriminator.base-channels",
    },
}
"""What most runs need, in the words of --help; --help-all shows the docstrings."""
OTHERS = {
    "Start": "print_config",
    "Data": "classes classes_from_data unlabelled on_broken",
    "Training": "beta1 beta2 sync_batch_norm global_batch r2_gamma gp_weight penalty_every lecam_weight lecam_decay",
    "Device": "cuda_graph timeout profile",
    "Log": "wandb on_divergence max_rollbacks collapse_patience sigma_growth "
    "eval_count eval_data eval_reference_count eval_features eval_metrics eval_mode eval_device",
}
NETWORKS = {"generator": GeneratorConfig, "discriminator": DiscriminatorConfig}
USAGE = "sagan-fast train --preset NAME --data SPEC --out RUN [options]"
EXAMPLE = """Example: sagan-fast train --preset faces-64 --data folder:photos --out runs/a\v
In brackets: the values without --preset, or with the one you name.\v
All options: sagan-fast train --help-all"""


def train_parser(everything: bool, defaults: Mapping[str, Any]) -> Any:
    """Return the parser of `sagan-fast train`; its help shows the common options, or all, with these `defaults`."""
    about = f"Train a SAGAN, or resume a run. Presets: {', '.join(preset_names())}."
    parser = command_parser("train", about, usage=USAGE, epilog=EXAMPLE, brief=not everything)
    homes: dict[str, tuple[type, str, str]] = {
        field.name: (kind, field.name, "")
        for kind in (TrainConfig, Action)
        for field in dataclasses.fields(kind)
        if field.name not in NETWORKS
    }
    for section, network in NETWORKS.items():
        for field in dataclasses.fields(network):
            if field.name not in SHARED:
                homes[f"{section}.{field.name}"] = network, field.name, f"{section}."
    for title, common in COMMON.items():
        group = parser.add_argument_group(title)
        names = [*common, *OTHERS.get(title, "").split()]
        if title == "Networks":  # all that are left
            names += [name for name in homes if "." in name and name not in names]
        for name in names:
            kind, field_name, prefix = homes.pop(name)
            helps = None if everything else {field_name: common[name]} if name in common else {}
            values = kind is not Action
            add_options(group, kind, only=(field_name,), helps=helps, values=values, prefix=prefix)
    add_options(parser, Action, only=("help_all",), helps=None if everything else {})
    del homes["help_all"]
    group = parser.add_argument_group("More")  # what nobody has put into a group
    for kind, field_name, prefix in homes.values():
        add_options(group, kind, only=(field_name,), helps=None if everything else {}, values=True, prefix=prefix)
    if defaults:
        parser.set_defaults(_flat(defaults))
    return parser


def known_keys() -> list[str]:
    """Return the keys that a YAML file may hold, those of the networks as "generator.z_dim"."""
    keys = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in NETWORKS]
    for section, network in NETWORKS.items():
        keys += [f"{section}.{field.name}" for field in dataclasses.fields(network) if field.name not in SHARED]
    return keys


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = tuple(value) if isinstance(value, list) else value
    return found
