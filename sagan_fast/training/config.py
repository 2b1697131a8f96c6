"""The options of a run, from a preset, a YAML file and overrides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagan_fast.choices import (
    Backend,
    CudaGraph,
    Device,
    DiffAugment,
    EvalMode,
    Float64Device,
    GradientCompression,
    Loss,
    MicroBatchSize,
    OnBroken,
    OnDivergence,
    Precision,
    check_choices,
    check_least,
    several,
)
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
    preset_names,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options of the run."""

    data: str
    """real images: shapes, or folder, packed, cifar10, cifar100 or npz with :PATH; docs/data.md describes them"""
    out: str
    """folder of the run, for config.yaml, log.jsonl, data.png, samples/, checkpoints/ and tensorboard/"""
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    classes: str = ""
    """text file with one class name per line, in the order of the labels; default: by name, or by number"""
    unlabelled: bool = False
    """read the images without labels, whatever looks like a label beside them; for num_classes 0"""
    resolution: int = 128
    """width and height of the images, a power of two"""
    num_classes: int = 1000
    """number of classes; 0 trains without labels. With a preset: as many as the data has, if not given"""
    classes_from_data: bool = False
    """take the number of classes from the data, and not from num_classes"""
    backend: Backend = "auto"
    """implementation of the attention blocks"""
    steps: int = 1_000_000
    """total number of steps, including those before --resume"""
    batch_size: int = 256
    """number of images per step, over all processes"""
    micro_batch_size: MicroBatchSize = 0
    """number of images a process computes at a time; 0: its whole share of batch_size; auto: the largest number that
    fits a CUDA device's memory, on the CPU the whole share"""
    checkpoint_activations: bool = False
    """keep less for the backward pass and compute the blocks of both networks again there: less memory, the same result
    in more time"""
    cuda_graph: CudaGraph = "auto"
    """replay each step as a CUDA graph, captured after three steps: no launches to wait for, more memory. The run says
    why where it cannot be done. auto: no, as long as no GPU has been measured"""
    sync_batch_norm: bool = False
    """compute batch norm over the images of all processes"""
    bucket_cap_mb: float = 25.0
    """size in MiB of the buckets in which gradients go to the other processes while the backward pass goes on"""
    gradient_compression: GradientCompression = "none"
    """none, or bf16: round gradients to bfloat16 on their way between processes, for half the traffic"""
    seed: int = 0
    """random seed of the weights, the image order, the noise and the labels"""
    device: Device = "auto"
    """where to train; auto takes cuda if available, else cpu. mps (Apple GPUs) is untested"""
    precision: Precision = "auto"
    """precision of matrix products and convolutions; auto takes bf16 on CUDA devices that support it, else fp32"""
    loss: Loss = "hinge"
    """adversarial loss: hinge, non_saturating, wasserstein, or relativistic, which compares each real image with a fake
    one of its class (R3GAN)"""
    r1_gamma: float = 0.0
    """weight of R1: gamma/2 times the mean squared norm of the discriminator's gradient at real images; 0: off"""
    r2_gamma: float = 0.0
    """weight of R2, the same at generated images; 0: off"""
    gp_weight: float = 0.0
    """weight of WGAN-GP's gradient penalty, at random points between real and generated images; 0: off"""
    penalty_every: int = 1
    """number of steps between R1, R2 and gradient penalty (lazy regularisation); their weights are multiplied by it"""
    lecam_weight: float = 0.0
    """weight of LeCam regularisation, which draws scores to moving averages of scores; 0: off"""
    lecam_decay: float = 0.99
    """decay per step of LeCam's moving averages"""
    diffaugment: str = ""
    """changes of the images that the discriminator sees, real and generated: any of color,translation,cutout. For few
    images (DiffAugment)"""
    g_lr: float = 1e-4
    """Adam's learning rate for the generator"""
    d_lr: float = 4e-4
    """Adam's learning rate for the discriminator"""
    beta1: float = 0.0
    """Adam's beta1 for both networks"""
    beta2: float = 0.9
    """Adam's beta2 for both networks"""
    ema_decay: float = 0.9999
    """decay of the EMA generator (averaged weights) per step; smaller in the first steps"""
    flip: bool = False
    """mirror images left to right at random"""
    on_broken: OnBroken = "fail"
    """what to do with an image that cannot be read: fail, or skip and count it"""
    num_workers: int = 0
    """number of processes that read images"""
    log_every: int = 100
    """number of steps between log lines"""
    wandb: str = ""
    """project of Weights & Biases to log to, beside TensorBoard; needs the package wandb"""
    sample_every: int = 1000
    """number of steps between sample grids"""
    checkpoint_every: int = 1000
    """number of steps between checkpoints"""
    keep: int = 3
    """number of newest checkpoints to keep; best.pt is always kept"""
    collapse_patience: int = 20
    """number of log lines in a row after which a collapsed discriminator counts as divergence. Collapsed: its loss is
    near 0, or it gives all images the same score"""
    sigma_growth: float = 10.0
    """growth factor of a network's largest sigma (spectral norm) that counts as divergence, within collapse_patience
    log lines"""
    on_divergence: OnDivergence = "stop"
    """after divergence: stop, or roll back to an earlier checkpoint and continue with other noise"""
    max_rollbacks: int = 3
    """maximum number of rollbacks; after them a diverged run stops"""
    preset: str = ""
    """recipe to start from; config.yaml keeps the name for the record"""
    timeout: int = 1800
    """seconds that a process waits for the others before the run fails"""
    eval_every: int = 0
    """number of steps between evaluations; 0: never. The checkpoint with the lowest FID is kept as best.pt"""
    eval_count: int = 10_000
    """number of generated images per evaluation"""
    eval_data: str = ""
    """real images for evaluations; default: those of --data"""
    eval_reference_count: int = 0
    """number of real images per evaluation, chosen at random once; 0: all"""
    eval_features: str = "inception"
    """network that computes the features: inception, dinov2, efficientnet-lite0 or a TorchScript file"""
    eval_metrics: str = "fid,is,kid"
    """scores to compute: fid, and any of is,kid,prdc,intra_fid"""
    eval_mode: EvalMode = "inline"
    """inline: evaluate between two steps; background: evaluate in a second process"""
    eval_device: Float64Device = "auto"
    """device of background evaluations; auto takes the device of the run, or cpu for mps"""

    def __post_init__(self) -> None:
        check_least(1, self, "steps", "batch_size", "log_every", "sample_every", "checkpoint_every")
        check_least(1, self, "collapse_patience", "keep", "timeout")
        check_least(1, self, "penalty_every")
        check_least(0, self, "r1_gamma", "r2_gamma", "gp_weight", "lecam_weight")
        check_least(0, self, "num_workers", "max_rollbacks", "eval_every", "eval_reference_count")
        if self.micro_batch_size != "auto":
            if not isinstance(self.micro_batch_size, int):
                raise InputError(f"micro_batch_size must be auto or a whole number, got {self.micro_batch_size!r}")
            check_least(0, self, "micro_batch_size")
        if self.cuda_graph not in (True, False, "auto"):
            raise InputError(f"cuda_graph must be true, false or auto, got {self.cuda_graph!r}")
        metrics = self.eval_metrics.split(",")
        if "fid" not in metrics or set(metrics) - set(METRICS):
            raise InputError(f"eval_metrics must be fid and any of {','.join(METRICS)}, got {self.eval_metrics!r}")
        several("diffaugment", self.diffaugment, DiffAugment)  # or a sentence
        if not self.bucket_cap_mb > 0:
            raise InputError(f"bucket_cap_mb must be positive, got {self.bucket_cap_mb}")
        if not self.sigma_growth > 1:
            raise InputError(f"sigma_growth must be more than 1, got {self.sigma_growth}")
        for name in ("g_lr", "d_lr"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema_decay", "lecam_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        check_choices(self)

    def micro_batches(self, processes: int) -> int:
        """Return the number of micro-batches per step and process; InputError if the batch cannot be shared evenly."""
        micro = self.micro_batch_size
        if isinstance(micro, str):
            raise ValueError(f"micro_batch_size must be found first, got {micro!r}")
        if self.batch_size % (processes * max(micro, 1)):
            by = f"processes x micro_batch_size = {processes} x {micro}" if micro else f"processes = {processes}"
            raise InputError(f"batch_size must be divisible by the number of {by}, got {self.batch_size}")
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
                means = "the images, such as folder:PATH" if key == "data" else "the folder of the run"
                raise InputError(f"{key} must be given: {means}")
        for key, network in (("generator", GeneratorConfig), ("discriminator", DiscriminatorConfig)):
            section = values.get(key) or {}
            for shared in SHARED:
                if shared in section:
                    raise InputError(f"unknown key '{key}.{shared}': {shared} is stated once, at the top")
            values[key] = network_config(network, values, key)
        return from_mapping(cls, values)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> TrainConfig:
        """Return the preset `name` with `overrides`; nested ones as dictionaries, `generator={"base_channels": 8}`.

        Unless `num_classes` is given or the preset is without classes, a run takes as many as its data has.
        """
        return cls.from_dict(merged(preset_recipe(name), overrides))

    def with_classes(self, num_classes: int, hint: str = "") -> TrainConfig:
        """Return the configuration for data of so many classes, where `classes_from_data` asks for it.

        `hint` is what may be wrong with data without classes.

        Raises InputError for data without classes, which needs another preset.
        """
        if not self.classes_from_data:
            return self
        if not num_classes and not self.unlabelled:
            flat = [name for name in preset_names() if not load_preset(name)["num_classes"]]
            hint = hint or "for classes, put the images of each into a sub-folder of its own"
            raise InputError(
                f"{self.data} has no classes: for images without classes there are the presets {', '.join(flat)}, or "
                f"add --num-classes 0; {hint}"
            )
        networks = {
            key: dataclasses.replace(getattr(self, key), num_classes=num_classes)
            for key in ("generator", "discriminator")
        }
        return dataclasses.replace(self, num_classes=num_classes, classes_from_data=False, **networks)

    def to_dict(self) -> dict[str, Any]:
        """Return the YAML form: plain values, with the values that both networks share given once."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for key in ("generator", "discriminator"):
            own = {name: value for name, value in dataclasses.asdict(plain[key]).items() if name not in SHARED}
            plain[key] = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return plain


def preset_recipe(name: str) -> dict[str, Any]:
    """Return the preset `name` as a recipe: with its name, and whether its classes are those of the data."""
    recipe = load_preset(name)
    return {**recipe, "preset": name, "classes_from_data": recipe["num_classes"] > 0}


def merged(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `recipe` with `overrides`, networks key by key; a number of classes that is given is taken."""
    sections = {key: {**recipe.get(key, {}), **overrides.get(key, {})} for key in ("generator", "discriminator")}
    given = {"classes_from_data": False} if "num_classes" in overrides else {}
    return {**recipe, **given, **overrides, **sections}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`; a value means what it means on the command line.

    Numbers in YAML's other notations, such as 010 and 12:30, stay text for the parser of options. Raises InputError if
    the file cannot be read, is no mapping, or gives a key twice or without a value.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if repeated := [key for key in keys if keys.count(key) > 1]:
                raise InputError(f"{path} gives {repeated[0]} twice: remove one of the lines")
            values = super().construct_mapping(node, deep)
            if empty := [key for key, value in values.items() if value is None]:
                raise InputError(f"{path} gives {empty[0]} no value: write one, or remove the line for the default")
            return values

    resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:int"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_implicit_resolvers = resolvers
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
    try:
        with explained(f"cannot read {path}"):
            values = yaml.load(path.read_text(), Loader)  # noqa: S506, a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values
