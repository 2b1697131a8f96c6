"""The options of a run, from a preset, a YAML file and overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagan_fast.choices import Backend, Device, EvalMode, OnBroken, OnDivergence, Precision, check_choices, check_least
from sagan_fast.errors import InputError
from sagan_fast.evaluation.protocol import METRICS
from sagan_fast.files import explained
from sagan_fast.models.config import (
    SHARED,
    DiscriminatorConfig,
    GeneratorConfig,
    from_mapping,
    load_preset,
    network_config,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of the run."""

    data: str
    """real images: shapes, folder:PATH, packed:PATH or cifar10:PATH"""
    out: str
    """folder of the run: config.yaml, log.jsonl, samples/, checkpoints/, tensorboard/"""
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    resolution: int = 128
    """height and width of the images, a power of two"""
    num_classes: int = 1000
    """number of classes; 0 trains without labels"""
    backend: Backend = "auto"
    """what runs the attention blocks"""
    steps: int = 1_000_000
    """train until this many steps are done, resumed ones included"""
    batch_size: int = 256
    """number of images in a step, over all processes"""
    micro_batch_size: int = 0
    """number of images that a process takes at a time; 0 takes its share of batch_size at once"""
    sync_batch_norm: bool = False
    """take the statistics of batch norm over the images of all processes, not of each one"""
    seed: int = 0
    """chooses the weights, the order of the images, the noise and the labels"""
    device: Device = "auto"
    """where to train; auto is cuda where there is one"""
    precision: Precision = "auto"
    """how products are computed; auto is bf16 on CUDA devices that have it, else fp32"""
    g_lr: float = 1e-4
    """Adam's learning rate of the generator"""
    d_lr: float = 4e-4
    """Adam's learning rate of the discriminator"""
    beta1: float = 0.0
    """Adam's beta1 of both networks"""
    beta2: float = 0.9
    """Adam's beta2 of both networks"""
    ema_decay: float = 0.9999
    """share of itself that the averaged generator keeps in a step; less in the first steps"""
    flip: bool = False
    """mirror images left to right at random"""
    on_broken: OnBroken = "fail"
    """at an image that cannot be read: fail, or skip and count it"""
    num_workers: int = 0
    """processes that read images"""
    log_every: int = 100
    """number of steps between lines of the log"""
    sample_every: int = 1000
    """number of steps between sample grids"""
    checkpoint_every: int = 1000
    """number of steps between checkpoints"""
    keep: int = 3
    """number of the newest checkpoints that are kept; best.pt is kept, too"""
    collapse_patience: int = 20
    """number of log lines in a row, in which the discriminator has won outright or died, that mean divergence"""
    sigma_growth: float = 10.0
    """growth of a network's largest sigma within collapse_patience log lines that means divergence"""
    on_divergence: OnDivergence = "stop"
    """when the run diverges: stop, or roll back to a checkpoint before it and go on with other noise"""
    max_rollbacks: int = 3
    """number of times that a run is rolled back before it stops"""
    timeout: int = 1800
    """seconds to wait for another process before the run ends"""
    eval_every: int = 0
    """number of steps between evaluations, of which the lowest FID is kept as best.pt; 0 never evaluates"""
    eval_count: int = 10_000
    """number of generated images in an evaluation"""
    eval_data: str = ""
    """real images to evaluate against; those of data if not given"""
    eval_reference_count: int = 0
    """number of real images in an evaluation, a fixed random choice; 0 takes all"""
    eval_features: str = "inception"
    """features of evaluations: inception, efficientnet-lite0 or a TorchScript file"""
    eval_metrics: str = "fid,is,kid"
    """fid, and perhaps others of is,kid,prdc,intra_fid"""
    eval_mode: EvalMode = "inline"
    """evaluate between two steps, or in the background: in a process beside the run"""
    eval_device: Device = "auto"
    """device of evaluations in the background; auto is the one of the run"""

    def __post_init__(self) -> None:
        check_least(1, self, "steps", "batch_size", "log_every", "sample_every", "checkpoint_every")
        check_least(1, self, "collapse_patience", "keep", "timeout")
        check_least(0, self, "num_workers", "micro_batch_size", "max_rollbacks", "eval_every", "eval_reference_count")
        metrics = self.eval_metrics.split(",")
        if "fid" not in metrics or set(metrics) - set(METRICS):
            raise InputError(
                f"eval_metrics must be some of {','.join(METRICS)}, fid among them, got {self.eval_metrics!r}"
            )
        if not self.sigma_growth > 1:
            raise InputError(f"sigma_growth must be more than 1, got {self.sigma_growth}")
        for name in ("g_lr", "d_lr"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        check_choices(self)

    def micro_batches(self, processes: int) -> int:
        """Return how many times a step each of `processes` takes images; InputError if they do not share evenly."""
        micro = self.micro_batch_size
        if not micro and self.batch_size % processes:
            raise InputError(
                f"batch_size must be divisible by the number of processes = {processes}, got {self.batch_size}"
            )
        if micro and self.batch_size % (processes * micro):
            raise InputError(
                "batch_size must be divisible by the number of processes times micro_batch_size = "
                f"{processes} x {micro}, got {self.batch_size}"
            )
        return self.batch_size // (processes * micro) if micro else 1

    def norm_batch(self, processes: int) -> int:
        """Return the number of images over which batch norm takes its statistics with so many processes."""
        shares = self.micro_batches(processes) * (1 if self.sync_batch_norm else processes)
        return self.batch_size // shares

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration in `values` (YAML form); InputError names unknown keys and bad values."""
        values = dict(values)
        for key in ("data", "out"):
            if not values.get(key):
                raise InputError(f"{key} must be given: --{key} {'SPEC' if key == 'data' else 'FOLDER'}")
        for key, network in (("generator", GeneratorConfig), ("discriminator", DiscriminatorConfig)):
            section = values.get(key) or {}
            for shared in SHARED:
                if shared in section:
                    raise InputError(f"unknown key '{key}.{shared}': {shared} is stated once, at the top")
            values[key] = network_config(network, values, key)
        return from_mapping(cls, values)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> TrainConfig:
        """Return the preset `name` with `overrides`; nested ones as dictionaries, `generator={"base_channels": 8}`."""
        return cls.from_dict(merge(load_preset(name), overrides))

    def to_dict(self) -> dict[str, Any]:
        """Return the YAML form: plain values, what both networks share stated once."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for key in ("generator", "discriminator"):
            own = {name: value for name, value in dataclasses.asdict(plain[key]).items() if name not in SHARED}
            plain[key] = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return plain


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, nested dictionaries merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`; InputError if it cannot be read or is no mapping."""
    import yaml

    try:
        with explained(f"cannot read {path}"):
            values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values
