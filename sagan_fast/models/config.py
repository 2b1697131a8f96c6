"""The configurations of both networks, and the presets in sagan_fast/presets/*.yaml."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, TypeVar, get_type_hints

from sagan_fast.choices import Backend, check_choices, check_kind, check_least
from sagan_fast.errors import InputError, nearest

Config = TypeVar("Config")
Network = TypeVar("Network", bound="NetworkConfig")


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Options that generator and discriminator share."""

    resolution: int = 128
    """width and height of the images, a power of two"""
    num_classes: int = 1000
    """number of classes; 0: unconditional"""
    base_channels: int = 64
    """unit of channel_multipliers, in channels"""
    channel_multipliers: tuple[int, ...] = ()
    """numbers of channels, in units of base_channels"""
    attention_resolutions: tuple[int, ...] = (32,)
    """map sizes with an attention block, after the first residual block of that size"""
    attention_pool: bool = True
    """max-pool the keys and values 2x2"""
    attention_out_proj: bool = True
    """true: values have C/2 channels, and a 1x1 output convolution restores C; false: values have C channels"""
    attention_bias: bool = False
    """use biases in the convolutions of the attention block"""
    sn_eps: float = 1e-12
    """epsilon of spectral norm: the smallest value that it divides by"""
    backend: Backend = "auto"
    """implementation of the attention blocks"""

    def __post_init__(self) -> None:
        for name in ("channel_multipliers", "attention_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise InputError(f"resolution must be a power of two from 8 on, got {self.resolution}")
        if self.num_classes < 0:
            raise InputError(f"num_classes must be 0 (unconditional) or the number of classes, got {self.num_classes}")
        check_least(1, self, "base_channels")
        if any(factor < 1 for factor in self.channel_multipliers):
            raise InputError(f"channel_multipliers must be positive, got {self.channel_multipliers}")
        check_choices(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels, one for each of `channel_multipliers`."""
        return tuple(self.base_channels * factor for factor in self.channel_multipliers)

    def _check_attention(self, sizes: Iterable[int]) -> None:
        for size in self.attention_resolutions:
            if size not in sizes:
                known = ", ".join(str(s) for s in sorted(set(sizes)))
                raise InputError(f"attention_resolutions must be map sizes of the network ({known}), got {size}")


@dataclasses.dataclass(frozen=True)
class GeneratorConfig(NetworkConfig):
    """Options of the generator."""

    channel_multipliers: tuple[int, ...] = (16, 16, 8, 4, 2, 1)
    """channels of the first map and after each block, in units of base_channels. Each block doubles the map size"""
    z_dim: int = 128
    """dimension of the normally distributed z"""
    batch_norm_momentum: float = 0.001
    """momentum of the conditional batch norms: weight of the new batch in the running averages"""
    tail_batch_norm_momentum: float = 0.0001
    """momentum of the last batch norm, which is not conditional"""
    batch_norm_eps: float = 1e-5
    """epsilon of all batch norms: what is added to the variance"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(1, self, "z_dim")
        if len(self.channel_multipliers) < 2 or self.seed_size < 2:
            raise InputError(
                f"generator.channel_multipliers must have 2 to {int(math.log2(self.resolution))} entries at resolution "
                f"{self.resolution}, the first map's and one for each doubling, got {len(self.channel_multipliers)}"
            )
        self._check_attention(self.sizes)

    @property
    def seed_size(self) -> int:
        """Height and width of the map that z is projected to."""
        return self.resolution >> (len(self.channel_multipliers) - 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Map size after each block."""
        return tuple(self.seed_size << (i + 1) for i in range(len(self.channel_multipliers) - 1))


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(NetworkConfig):
    """Options of the discriminator."""

    channel_multipliers: tuple[int, ...] = (1, 2, 4, 8, 16, 16)
    """channels after each block, in units of base_channels"""
    final_size: int = 4
    """final map size: blocks halve the map until it has this size, then keep it"""
    rectified_shortcut: bool = False
    """apply the first ReLU of a block to its shortcut too, as the in-place ReLU of voletiv's code and StudioGAN does"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.resolution / self.final_size if self.final_size > 0 else 0
        if ratio < 2 or ratio != 2 ** int(math.log2(ratio)):
            raise InputError(f"final_size must be {self.resolution} / 2, / 4, ..., got {self.final_size}")
        if len(self.channel_multipliers) < int(math.log2(ratio)):
            raise InputError(
                f"discriminator.channel_multipliers must have at least {int(math.log2(ratio))} entries to go from "
                f"{self.resolution} to {self.final_size}, got {len(self.channel_multipliers)}"
            )
        self._check_attention(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Map size after each block."""
        return tuple(max(self.final_size, self.resolution >> (i + 1)) for i in range(len(self.channel_multipliers)))


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Return the dataclass `cls` filled from `values`; InputError names an unknown key and the nearest known one."""
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            hint = nearest(str(key), known) or f": known are {', '.join(known)}"
            raise InputError(f"unknown key {where + str(key)!r}{hint}")
    kinds = get_type_hints(cls)
    for key, value in values.items():
        check_kind(where + key, value, kinds[key])
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{where or cls.__name__}: a value of the wrong type ({error})") from error


def preset_names() -> list[str]:
    """Return the names `from_preset` takes."""
    return sorted(item.name[: -len(".yaml")] for item in files("sagan_fast.presets").iterdir() if ".yaml" in item.name)


SHARED = ("resolution", "num_classes", "backend")
"""Fields of both networks that a recipe states once, at its top."""


def network_config(cls: type[Network], recipe: Mapping[str, Any], section: str, **overrides: Any) -> Network:
    """Return the `section` ("generator" or "discriminator") of `recipe` as `cls`, with what both networks share."""
    shared = {key: recipe[key] for key in SHARED if key in recipe}
    return from_mapping(cls, {**shared, **recipe.get(section, {}), **overrides}, where=f"{section}.")


def load_preset(name: str) -> dict[str, Any]:
    """Return the preset `name` as nested dictionaries; InputError names the nearest known one if there is none."""
    if name not in preset_names():
        known = preset_names()
        raise InputError(f"unknown preset {name!r}{nearest(name, known)} (there are {', '.join(known)})")
    import yaml

    preset: dict[str, Any] = yaml.safe_load((files("sagan_fast.presets") / f"{name}.yaml").read_text())
    return preset
