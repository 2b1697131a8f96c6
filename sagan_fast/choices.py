"""Defines the allowed values of each option as a Literal, for the command line, the configurations and Python callers.

Only the standard library is imported here.
"""

from typing import Any, Literal, get_args, get_origin, get_type_hints

from sagan_fast.errors import InputError

Device = Literal["auto", "cpu", "cuda", "mps"]
"""auto is cuda where there is one, else cpu. mps, Apple's GPUs, is taken only where it is asked for: nobody has run
sagan_fast there yet."""
Float64Device = Literal["auto", "cpu", "cuda"]
"""Where float64 is needed too, which mps does not have: for sums of features, and for the detector of faces."""
Backend = Literal["auto", "eager", "sdpa", "triton"]
"""What runs the attention blocks."""
Resizing = Literal["auto", "folded", "plain"]
"""Up-sampling and pooling inside the convolution beside them, or before and after it; auto is the faster."""
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
"""How products are computed; auto is bf16 on CUDA devices that have it, else fp32."""
GradientCompression = Literal["none", "bf16"]
"""What gradients are rounded to on their way between processes."""
Loss = Literal["hinge", "non_saturating", "wasserstein", "relativistic"]
"""The adversarial loss (training/losses.py)."""
DiffAugment = Literal["color", "translation", "cutout"]
"""How the discriminator's images are changed (training/augment.py)."""
MicroBatchSize = int | Literal["auto"]
"""Images that a process computes at a time; auto is the most that fit (training/micro_batch.py)."""
CudaGraph = bool | Literal["auto"]
"""Whether each step is the replay of a CUDA graph (training/cuda_graph.py); auto is false so far."""
OnBroken = Literal["fail", "skip"]
"""What happens at an image that cannot be read."""
OnDivergence = Literal["stop", "rollback"]
EvalMode = Literal["inline", "background"]
"""Evaluate between two steps, or in a process beside the run."""
SourceKind = Literal["folder", "tar", "zip", "tfrecord", "hdf5"]
"""What `sagan-fast prepare` reads."""
CodeBase = Literal["official-tf", "biggan-pytorch", "studiogan", "voletiv", "mmgeneration"]
"""Whose checkpoints `sagan-fast import` reads."""
FacePrecision = Literal["fp32", "bf16"]
"""Of the face detector's network."""
ProtocolName = Literal["clean", "official"]
Metric = Literal["fid", "is", "kid", "prdc", "intra_fid"]
Resize = Literal["tf1-bilinear", "antialias-bicubic"]
"""TensorFlow 1's bilinear, which aliases, as in the scores of the papers; antialiased bicubic, as in clean-fid
(Parmar et al. 2022, https://arxiv.org/abs/2104.11222)."""
Quantisation = Literal["uint8", "none"]
"""Images as a PNG holds them, or floats."""
BatchNorm = Literal["running", "batch", "standing"]
"""Statistics of the generator's batch norms: averages of training, of each batch, or averaged anew before sampling."""
Weights = Literal["average", "last"]
"""The generator's averaged weights, or those of the last step."""


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise InputError unless `value` is one of the Literal `choices`."""
    if value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def several(name: str, text: str, choices: Any) -> tuple[str, ...]:
    """Return the values that `text` names, as "a,b", in the order of the Literal `choices`; InputError for another."""
    given = [value.strip() for value in text.split(",")] if text else []
    if unknown := [value for value in given if value not in get_args(choices)]:
        raise InputError(f"{name} must be any of {','.join(get_args(choices))}, got {unknown[0]!r}")
    return tuple(value for value in get_args(choices) if value in given)


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
"""What a plain type is called in sentences."""


def check_kind(name: str, value: object, kind: Any) -> None:
    """Raise InputError unless `value` is of the plain type `kind`; other types are not checked."""
    wanted = (int, float) if kind is float else kind
    if kind in KINDS and (not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool)):
        raise InputError(f"{name} must be {KINDS[kind]}, got {value!r}")


def check_least(low: int, options: object, *names: str) -> None:
    """Raise InputError for a field in `names` of the dataclass `options` that is less than `low`; None is allowed."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < low:
            raise InputError(f"{name} must be at least {low}, got {value}")


def check_choices(config: object) -> None:
    """Raise InputError for a field of the dataclass `config` that has a Literal type and another value."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            check_choice(name, getattr(config, name), kind)
