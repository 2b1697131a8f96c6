"""SAGAN's generator (the released generator.py): linear seed map, residual up-blocks, attention, tanh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from sagan_fast.errors import InputError
from sagan_fast.files import explained
from sagan_fast.layers.activation_checkpoint import checkpointed
from sagan_fast.layers.batch_norm import batch_norm_relu
from sagan_fast.layers.folded_weight import is_foldable
from sagan_fast.layers.initialization import xavier
from sagan_fast.layers.residual_blocks import GeneratorBlock, sn_conv
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.layers.spectral_norm import spectral_norm
from sagan_fast.models.config import GeneratorConfig, NetworkConfig, from_mapping, load_preset, network_config
from sagan_fast.ops.convolution import conv2d
from sagan_fast.ops.remade import remade

ARCHITECTURE, FORMAT = "sagan_fast.Generator", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of an exported generator; the first says ARCHITECTURE and FORMAT."""


def attention_block(channels: int, config: NetworkConfig) -> SelfAttention2d:
    """Return the attention block of `config` for `channels`, all its convolutions spectral-normed."""
    block = SelfAttention2d(
        channels,
        pool=config.attention_pool,
        out_proj=config.attention_out_proj,
        bias=config.attention_bias,
        backend=config.backend,
    )
    for conv in (block.theta, block.phi, block.g, block.o):
        if conv is not None:
            spectral_norm(conv, eps=config.sn_eps)
    return block


def run_block(again: bool, block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Return the block's output; it is computed `again` in the backward pass instead of kept."""
    return checkpointed(block, *inputs) if again else block(*inputs)


class Generator(nn.Module):
    """G(z, y) returns images (B, 3, R, R) in [-1, 1] of normal `z` (B, z_dim) and classes `y` (B,) int64 or None.

    A floating `y` (B, num_classes) mixes the classes with its weights. `class_names` is empty unless the generator was
    read from a file that names its classes. With `checkpoint_activations` each block is computed again in the backward
    pass, for less memory.

    Source: Zhang et al. 2019 and the released generator.py; spectral norm on every layer but the batch norms' tables.
    Raises ValueError for z of another width, and where a conditional generator is given no y or the reverse.
    """

    remakes = True
    """Whether the last norm `remakes` its result, as those of the blocks do."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.class_names: tuple[str, ...] = ()
        self.checkpoint_activations = False
        widths, eps = config.widths, config.sn_eps
        self.linear = spectral_norm(xavier(nn.Linear(config.z_dim, widths[0] * config.seed_size**2)), eps=eps)
        self.blocks = nn.ModuleList()
        self.attentions = nn.ModuleDict()
        for i, size in enumerate(config.sizes):
            momentum, bn_eps = config.batch_norm_momentum, config.batch_norm_eps
            self.blocks.append(GeneratorBlock(widths[i], widths[i + 1], config.num_classes, eps, momentum, bn_eps))
            if size in config.attention_resolutions:
                self.attentions[str(size)] = attention_block(widths[i + 1], config)
        self.norm = nn.BatchNorm2d(widths[-1], config.batch_norm_eps, config.tail_batch_norm_momentum)
        self.conv = sn_conv(widths[-1], 3, 3, eps)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Generator:
        """Return the generator of the preset `name`; `overrides` are fields of `GeneratorConfig`.

        Raises InputError (a ValueError) for unknown names and fields.
        """
        return cls(network_config(GeneratorConfig, load_preset(name), "generator", **overrides))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu") -> Generator:
        """Return the generator that `sagan-fast export` wrote to `folder`: in eval mode, frozen, channels_last.

        It is on `device`; its weights are W/sigma, without spectral norm. Nothing in the folder is run and no random
        numbers are drawn. Raises InputError if files are missing or damaged, or belong to another architecture or a
        newer format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no exported generator: there is no {name} in it")
        with explained(f"{folder} cannot be read", kinds=(OSError, ValueError, SafetensorError)):
            config = json.loads((folder / CONFIG).read_text())
            weights = load_file(folder / WEIGHTS, device=device)
        if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
            raise InputError(f"{folder / CONFIG} does not describe a {ARCHITECTURE}")
        if config.get("format") != FORMAT:
            raise InputError(f"{folder} has export format {config.get('format')}, this version reads {FORMAT}")
        generator = cls.folded(from_mapping(GeneratorConfig, config.get("generator", {}), "generator."))
        try:
            generator.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise InputError(f"{folder}: the weights do not fit the configuration ({error})") from error
        generator.class_names = tuple(config.get("class_names", ()))
        generator.to(memory_format=memory_format_on(device))  # type: ignore[call-overload]
        return generator.requires_grad_(False)

    @classmethod
    def folded(cls, config: GeneratorConfig) -> Generator:
        """Return a generator without spectral norm, in eval mode, whose tensors have shapes but no memory.

        Not made by folding a deep copy of another: `remove_parametrizations` deletes the property from the class, which
        copies share with their original, and the original would have no weights any more.
        """
        with torch.device("meta"), _Undrawn():  # no random numbers for weights that are about to be replaced
            generator = cls(config).eval()
        for module in generator.modules():
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        return generator

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return images (B, 3, R, R) in [-1, 1] for `z` (B, z_dim) and classes `y` (B,), or weights of them."""
        if z.ndim != 2 or z.shape[1] != self.config.z_dim:
            raise ValueError(f"Generator: z must have shape (B, {self.config.z_dim}), got {tuple(z.shape)}")
        check_classes("Generator", y, self.config.num_classes, z)
        size = self.config.seed_size
        x = self.linear(z).unflatten(1, (-1, size, size))
        for block, size in zip(self.blocks, self.config.sizes, strict=True):
            x = run_block(self.checkpoint_activations, block, x, y)
            if str(size) in self.attentions:
                x = run_block(self.checkpoint_activations, self.attentions[str(size)], x)
        unwatched = is_foldable(self.conv)
        x = batch_norm_relu(self.norm, x, remakes=self.remakes and unwatched)
        x = conv2d(x, self.conv.weight, self.conv.bias, 1, remade=remade(x)) if unwatched else self.conv(x)
        return torch.tanh(x)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as `torch.nn.init.normal_` and the like find them.

    On the meta device they would draw nothing, but import all of Dynamo, over a second (PyTorch 2.14.1).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Put `network` in eval mode, and each of its modules back in its own mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def memory_format_on(device: torch.device | str) -> torch.memory_format:
    """Return the memory format of networks on `device`: channels_last, as it is faster, but not on mps.

    There the gradients of batch norm and average pooling are wrong in channels_last, without a word
    (https://github.com/pytorch/pytorch/issues/175189).
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def is_exported(folder: Path) -> bool:
    """Return whether `folder` holds what `Generator.from_pretrained` reads."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def check_classes(model: str, y: Tensor | None, num_classes: int, batch: Tensor) -> None:
    """Raise an error unless `y` has a class, or weights of the classes, for each in `batch`; None without classes.

    TypeError for what is no tensor of whole numbers or weights, else ValueError. That a class exists is checked on the
    CPU alone: elsewhere the device would have to be waited for.
    """
    if (y is None) != (num_classes == 0):
        expected = "None (unconditional)" if num_classes == 0 else f"(B,) classes 0..{num_classes - 1}"
        raise ValueError(f"{model}: y must be {expected}, got {'None' if y is None else _shown(y)}")
    if y is None:
        return
    if not isinstance(y, Tensor) or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"{model}: y must be a tensor of classes, such as torch.tensor([0, 1]), got {_shown(y)}")
    if y.ndim == 0 or y.shape[0] != batch.shape[0]:
        got = y.shape[0] if y.ndim else "a single number"
        raise ValueError(f"{model}: y must have one class for each of {batch.shape[0]} inputs, got {got}")
    if y.is_floating_point() and y.shape[1:] != (num_classes,):
        raise ValueError(f"{model}: weights y must have shape (B, {num_classes}), got {tuple(y.shape)}")
    if not y.is_floating_point() and y.ndim > 1:
        raise ValueError(f"{model}: classes y must have shape (B,), got {tuple(y.shape)}")
    if not y.is_floating_point() and not _all_within(y, num_classes):
        raise ValueError(f"{model}: y must be classes 0 to {num_classes - 1}, got {_outside(y, num_classes)}")


def _all_within(y: Tensor, num_classes: int) -> bool:
    if y.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return True
    try:
        low, high = y.aminmax() if y.numel() else (0, 0)
        return int(low) >= 0 and int(high) < num_classes
    except RuntimeError:  # under torch.func.vmap values cannot be looked at
        return True


def _outside(y: Tensor, num_classes: int) -> int:
    return int(y[(y < 0) | (y >= num_classes)][0])


def _shown(y: object) -> str:
    return str(tuple(y.shape)) if isinstance(y, Tensor) else f"{type(y).__name__} {y!r:.40}"
