"""SAGAN generators and discriminators from checkpoints of other code bases, their architecture read off the shapes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.interop.layouts import Layout, layout_of
from sagan_fast.interop.sources import Network, Source, read_source
from sagan_fast.layers.foreign_spectral_norm import saved_spectral_norm
from sagan_fast.models.config import DiscriminatorConfig, GeneratorConfig
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import Generator

_NOT_STATE = ("num_batches_tracked", "sv0", "sn_sigma", "accumulation_counter")


def import_generator(source: Source, *, layout: str | None = None, ema: bool = True) -> Generator:
    """Return the SAGAN generator in `source`, in eval mode on the CPU, with spectral norm, to be used or trained on.

    `source` is a file (.pth, .pt, .safetensors, or .npz with TensorFlow's variable names), a state dict or a module.
    `layout` is one of official-tf, biggan-pytorch, studiogan, voletiv and mmgeneration, and is recognised if not given.
    With `ema` the averaged generator is taken where the source has one. Widths, resolution, classes and the attention's
    place come from the shapes. Nothing in a file is run. Raises InputError for keys that do not map, and for networks
    that are not SAGAN's.
    """
    reader = _Reader(source, "generator", layout, ema)
    names, blocks = reader.layout.generator, reader.blocks
    widths = [reader.width(f"{blocks[0]}.conv1", 1), *(reader.width(f"{block}.conv1", 0) for block in blocks)]
    rows, z_dim = reader.matrix_shape(names["linear"])
    seed = math.isqrt(rows // widths[0])
    sizes = [seed << (i + 1) for i in range(len(blocks))]
    loaded: dict[str, Tensor] = {}
    reader.layer(loaded, "linear", names["linear"], seed=seed)
    num_classes = 0
    for i, block in enumerate(blocks):
        for part in ("norm1", "norm2"):
            num_classes = reader.norm(loaded, f"blocks.{i}.{part}", f"{block}.{names[part]}")
        for part in ("conv1", "conv2", "shortcut"):
            reader.layer(loaded, f"blocks.{i}.{part}", f"{block}.{names[part]}")
    biased = reader.attentions(loaded, sizes)
    reader.plain_norm(loaded, "norm", names["tail"])
    reader.layer(loaded, "conv", names["last"])
    config = GeneratorConfig(
        resolution=sizes[-1], z_dim=z_dim, batch_norm_eps=reader.layout.bn_eps,
        **reader.shared(widths, num_classes, [sizes[i] for i in reader.places], biased),
    )  # fmt: skip
    return reader.finish(Generator(config), loaded)  # type: ignore[no-any-return]


def import_discriminator(
    source: Source, *, layout: str | None = None, ema: bool = True, resolution: int | None = None
) -> Discriminator:
    """Return the SAGAN discriminator in `source`, as `import_generator` does its generator.

    The shapes do not say the resolution: if not given, the last map is taken as 4x4, or 8x8 after two halvings.
    """
    reader = _Reader(source, "discriminator", layout, ema)
    names, blocks = reader.layout.discriminator, reader.blocks
    widths = [reader.width(f"{block}.conv1", 0) for block in blocks]
    has_shortcut = [reader.has(f"{block}.{names['shortcut']}") for block in blocks]
    if reader.layout.name == "voletiv" and len(blocks) > 1:  # its last block has a shortcut that it never uses
        has_shortcut[-1] = False
        reader.forget(f"{blocks[-1]}.{names['shortcut']}")
    halvings = sum(has_shortcut)
    if not all(has_shortcut[:halvings]):
        raise InputError("import: the blocks of a discriminator must halve the map first and keep it then")
    final = (8 if halvings == 2 else 4) if resolution is None else resolution >> halvings
    sizes = [final << max(0, halvings - i - 1) for i in range(len(blocks))]
    loaded: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        for part in ("conv1", "conv2", *(["shortcut"] if has_shortcut[i] else [])):
            reader.layer(loaded, f"blocks.{i}.{part}", f"{block}.{names[part]}")
    if any(i >= halvings for i in reader.places):
        raise InputError("import: attention must follow a block that halves the map, got it after one that keeps it")
    biased = reader.attentions(loaded, sizes)
    reader.layer(loaded, "linear", names["linear"])
    num_classes = 0
    if reader.has(names["embedding"]):
        num_classes = reader.layer(loaded, "embedding", names["embedding"], bias=False)
    config = DiscriminatorConfig(
        resolution=final << halvings, final_size=final, rectified_shortcut=reader.layout.rectified,
        **reader.shared(widths, num_classes, [sizes[i] for i in reader.places], biased),
    )  # fmt: skip
    return reader.finish(Discriminator(config), loaded)  # type: ignore[no-any-return]


class _Reader:
    """The tensors of one network, and which of them were used. Names are joined with "." here, whatever the layout."""

    def __init__(self, source: Source, network: Network, layout: str | None, ema: bool) -> None:
        state = read_source(source, network, ema)
        self.layout: Layout = layout_of(state, layout)
        blocks, places = self.layout.blocks(state, network == "generator")
        self.generator = network == "generator"
        self.names = self.layout.generator if self.generator else self.layout.discriminator
        last = self.names["last"] if self.generator else self.names["linear"]
        self.state = {key.replace(self.layout.separator, "."): value for key, value in state.items()}
        if not blocks or not self.has(last):
            what, key = f"a {network} of {self.layout.name}", next(iter(state))
            raise InputError(f"import: the source must hold {what}, got other keys ({key}, ...)")
        self.blocks, self.places, self.used = blocks, places, set[str]()

    def has(self, name: str) -> bool:
        return any(key.startswith(name + ".") for key in self.state)

    def forget(self, name: str) -> None:
        self.used |= {key for key in self.state if key.startswith(name + ".")}

    def take(self, *names: str) -> Tensor:
        """Return the first of `names` that there is; InputError if there is none."""
        for name in names:
            if name in self.state:
                self.used.add(name)
                return self.state[name]
        raise InputError(f"import: the source must have {names[0]!r} as {self.layout.name} has, got no such key")

    def raw(self, name: str) -> Tensor:
        """Return the weight of a layer, not normalised, rows first."""
        if self.layout.separator == "/":
            if f"{name}.embedding_map" in self.state:
                return self.take(f"{name}.embedding_map")
            weight = self.take(f"{name}.w", f"{name}.Matrix")
            return weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight.t()
        return self.take(f"{name}.weight_orig", f"{name}.weight")

    def matrix_shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.raw(name).flatten(1).shape
        return rows, columns

    def width(self, name: str, axis: int) -> int:
        block, _, part = name.rpartition(".")
        return int(self.raw(f"{block}.{self.names[part]}").shape[axis])

    def normed(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return W, u and v of a layer, or None if it has no spectral norm."""
        weight = self.raw(name)
        if self.layout.separator == "/":
            found = saved_spectral_norm({"x.weight": weight, "x.u0": self.take(f"{name}.u")}, "x")
        else:
            found = saved_spectral_norm(self.state, name)
        self.used |= {f"{name}.{end}" for end in ("weight_u", "weight_v", "u0", "sn_u", "weight")}
        return found

    def effective(self, name: str) -> Tensor:
        """Return the weight that a layer uses, spectral-normed or not."""
        found = self.normed(name)
        if found is None:
            return self.raw(name)
        weight, u, v = found
        return weight / torch.dot(u, weight.flatten(1) @ v)

    def layer(self, loaded: dict[str, Tensor], ours: str, theirs: str, seed: int = 0, bias: bool = True) -> int:
        """Put the layer `theirs` into `loaded` as `ours`; return its number of rows.

        TensorFlow's seed layer of maps (`seed` high and wide) has the channels last.
        """
        found = self.normed(theirs)
        if found is None:
            raise InputError(f"import: {theirs} must be spectral-normed, got a plain weight")
        weight, u, v = found
        vectors = [u] if not bias else [u, self.take(f"{theirs}.bias", f"{theirs}.biases")]
        if seed and self.layout.separator == "/":
            rows = torch.arange(weight.shape[0]).view(seed, seed, -1).permute(2, 0, 1).flatten()
            weight, vectors = weight[rows], [vector[rows] for vector in vectors]
        chain = f"{ours}.parametrizations.weight."
        loaded |= {chain + "original": weight, chain + "0._u": vectors[0], chain + "0._v": v}
        if bias:
            loaded[f"{ours}.bias"] = vectors[1]
        return int(weight.shape[0])

    def norm(self, loaded: dict[str, Tensor], ours: str, theirs: str) -> int:
        """Put a conditional batch norm into `loaded`; return its number of classes, 0 for a plain batch norm."""
        offset = self.layout.gain_offset
        if f"{theirs}.embed.weight" in self.state:
            gain, bias = self.take(f"{theirs}.embed.weight").chunk(2, 1)
        else:
            pairs = {"gamma": "beta", "gain": "bias", "embed0": "embed1", "weight_embedding": "bias_embedding"}
            parts = {key[len(theirs) + 1 :].partition(".")[0] for key in self.state if key.startswith(theirs + ".")}
            known = [(gain, bias) for gain, bias in pairs.items() if gain in parts]
            if not known:
                inner = theirs if f"{theirs}.weight" in self.state else f"{theirs}.norm"
                self.plain_norm(loaded, f"{ours}.norm", inner)
                return 0
            pair = known[0]
            if f"{theirs}.{pair[0]}" in self.state:
                gain, bias = (self.take(f"{theirs}.{each}") for each in pair)
            else:
                gain, bias = (self.effective(f"{theirs}.{each}") for each in pair)
            C = self.take(*self._statistics(theirs, "mean")).shape[0]
            if gain.shape[1] != C or (self.layout.name == "studiogan" and pair[0] == "gain"):
                gain, bias = gain.t(), bias.t()  # a linear layer of one-hot classes
            if pair[0] == "weight_embedding" and float(gain.mean()) > 0.5:
                offset = 0.0  # started at 1: mmgeneration adds 1 only to gains that started at 0
        loaded |= {f"{ours}.gain.weight": gain + offset, f"{ours}.bias.weight": bias}
        for part in ("mean", "var"):
            loaded[f"{ours}.norm.running_{part}"] = self.take(*self._statistics(theirs, part))
        loaded[f"{ours}.norm.num_batches_tracked"] = torch.tensor(0)
        return int(gain.shape[0])

    @staticmethod
    def _statistics(name: str, part: str) -> list[str]:
        full = {"mean": "moving_mean", "var": "moving_variance"}[part]
        inner = (f"bn.running_{part}", f"norm.running_{part}", f"running_{part}", f"bn.stored_{part}")
        return [f"{name}.{each}" for each in (part, f"stored_{part}", *inner, full)]

    def plain_norm(self, loaded: dict[str, Tensor], ours: str, theirs: str) -> None:
        loaded[f"{ours}.weight"] = self.take(*(f"{theirs}.{each}" for each in ("weight", "gain", "gamma")))
        loaded[f"{ours}.bias"] = self.take(*(f"{theirs}.{each}" for each in ("bias", "beta")))
        for part in ("mean", "var"):
            loaded[f"{ours}.running_{part}"] = self.take(*self._statistics(theirs, part))
        loaded[f"{ours}.num_batches_tracked"] = torch.tensor(0)

    def attentions(self, loaded: dict[str, Tensor], sizes: list[int]) -> bool:
        """Put every attention block into `loaded`; return whether their convolutions have biases."""
        biased = False
        for i, theirs in self.places.items():
            ours = f"attentions.{sizes[i]}"
            for part in ("theta", "phi", "g", "o"):
                name = f"{theirs}.{self.names[part]}"
                biased = f"{name}.bias" in self.state
                self.layer(loaded, f"{ours}.{part}", name, bias=biased)
            loaded[f"{ours}.gamma"] = self.take(f"{theirs}.{self.names['gamma']}").reshape(())
        return biased

    def shared(self, widths: list[int], classes: int, attentions: list[int], biased: bool) -> dict[str, Any]:
        base = math.gcd(*widths)
        return {
            "num_classes": classes, "base_channels": base,
            "channel_multipliers": tuple(width // base for width in widths),
            "attention_resolutions": tuple(attentions), "attention_bias": biased, "sn_eps": self.layout.sn_eps,
        }  # fmt: skip

    def finish(self, network: Any, loaded: dict[str, Tensor]) -> Any:
        """Return `network` with what was loaded; InputError for keys that were not used and shapes that do not fit."""
        rest = [key for key in self.state if key not in self.used and key.rpartition(".")[2] not in _NOT_STATE]
        if rest:
            some = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
            raise InputError(f"import: every key must map to SAGAN's network, got {some}")
        try:
            network.load_state_dict(loaded)
        except RuntimeError as error:
            raise InputError(f"import: the shapes do not fit SAGAN's network ({error})") from error
        return network.eval()
