"""What the parts of SAGAN's networks are called in each code base, and how each keeps them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sagan_fast.choices import CodeBase, check_choice
from sagan_fast.errors import InputError

State = Mapping[str, Tensor]
Places = tuple[list[str], dict[int, str]]
"""The name of every block, and of the attention after a block, by the block's index."""


@dataclass(frozen=True)
class Layout:
    """The names of one code base: of layers in a block, of the attention's, and of the layers before and after.

    `blocks` finds the blocks and attentions in a state dict. `gain_offset` is added to the conditional batch norms'
    tables of gains. The rest is what the shapes do not say.
    """

    name: CodeBase
    generator: Mapping[str, str]
    discriminator: Mapping[str, str]
    blocks: Callable[[State, bool], Places]
    signature: str
    gain_offset: float = 1.0
    sn_eps: float = 1e-12
    bn_eps: float = 1e-5
    rectified: bool = False
    separator: str = "."


def _exists(state: State, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)


def _nested(state: State, generator: bool) -> Places:
    """BigGAN-PyTorch: blocks.INDEX.0, and the attention after it blocks.INDEX.1."""
    count = 0
    while _exists(state, f"blocks.{count}.0."):
        count += 1
    return [f"blocks.{i}.0" for i in range(count)], {
        i: f"blocks.{i}.1" for i in range(count) if _exists(state, f"blocks.{i}.1.")
    }


def _in_a_row(first: list[str], pattern: str, theta: str) -> Callable[[State, bool], Places]:
    """Blocks and attentions share one count: those with `theta` are attentions."""

    def find(state: State, generator: bool) -> Places:
        blocks, attentions, i = [] if generator else list(first), {}, 0
        while _exists(state, (name := pattern.format(i)) + "."):
            if _exists(state, f"{name}.{theta}."):
                if len(blocks) - 1 in attentions or not blocks:
                    raise InputError(f"import: {name} must follow a block, got an attention before it")
                attentions[len(blocks) - 1] = name
            else:
                blocks.append(name)
            i += 1
        return blocks, attentions

    return find


def _numbered(g: str, first: str, d: str, start: int, attention: Mapping[bool, str], theta: str) -> Any:
    """Blocks with numbers in their names and one attention, whose place its number of channels tells."""

    def find(state: State, generator: bool) -> Places:
        pattern, separator = g if generator else d, "/" if "/" in theta else "."
        blocks, i = [] if generator else [first], 1 if generator else start
        while _exists(state, pattern.format(i) + separator):
            blocks.append(pattern.format(i))
            i += 1
        where = attention[generator]
        weight = next((state[key] for key in (f"{where}{theta}_orig", f"{where}{theta}") if key in state), None)
        if weight is None:
            return blocks, {}
        C = weight.shape[2] if separator == "/" else weight.shape[1]
        for i, block in enumerate(blocks):
            names = (f"{block}.snconv2d2.bias", f"{block}/snconv2/biases", f"{block}/sn_conv2/biases")
            width = next((state[key].shape[0] for key in names if key in state), None)
            if width == C:
                return blocks, {i: where}
        raise InputError(f"import: {where} must have the channels of a block, got {C}")

    return find


def _block(first: str, second: str, shortcut: str, *norms: str) -> dict[str, str]:
    return {"conv1": first, "conv2": second, "shortcut": shortcut, **dict(zip(("norm1", "norm2"), norms, strict=False))}


def _attention(*names: str, gamma: str) -> dict[str, str]:
    return {**dict(zip(("theta", "phi", "g", "o"), names, strict=True)), "gamma": gamma}


_THETA = _attention("theta", "phi", "g", "o", gamma="gamma")
_OFFICIAL = _attention("sn_conv_theta", "sn_conv_phi", "sn_conv_g", "sn_conv_attn", gamma="sigma_ratio")
_VOLETIV = _attention(*(f"snconv1x1_{n}" for n in ("theta", "phi", "g", "attn")), gamma="sigma")
_STUDIO = _attention(*(f"conv1x1_{n}" for n in ("theta", "phi", "g", "attn")), gamma="sigma")
_MMGEN = _attention("theta.conv", "phi.conv", "g.conv", "o.conv", gamma="gamma")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "official-tf",
            {**_block("snconv1", "snconv2", "snconv3", "cbn_0", "cbn_1"), **_OFFICIAL,
             "linear": "g_snh0", "tail": "g_bn", "last": "g_snconv_last"},
            {**_block("sn_conv1", "sn_conv2", "sn_conv3"), **_OFFICIAL,
             "linear": "d_sn_linear", "embedding": "d_embedding"},
            _numbered("g_block{}", "d_optimized_block1", "d_block{}", 2,
                      {True: "g_non_local", False: "d_non_local"}, "/sn_conv_theta/w"),
            r"^[gd]_\w+/", gain_offset=0.0, separator="/",
        ),
        Layout(
            "biggan-pytorch",
            {**_block("conv1", "conv2", "conv_sc", "bn1", "bn2"), **_THETA,
             "linear": "linear", "tail": "output_layer.0", "last": "output_layer.2"},
            {**_block("conv1", "conv2", "conv_sc"), **_THETA, "linear": "linear", "embedding": "embed"},
            _nested, r"^blocks\.0\.0\.conv1\.u0$",
        ),
        Layout(
            "studiogan",
            {**_block("conv2d1", "conv2d2", "conv2d0", "bn1", "bn2"), **_STUDIO,
             "linear": "linear0", "tail": "bn4", "last": "conv2d5"},
            {**_block("conv2d1", "conv2d2", "conv2d0"), **_STUDIO, "linear": "linear1", "embedding": "embedding"},
            _in_a_row([], "blocks.{}.0", "conv1x1_theta"), r"^blocks\.0\.0\.conv2d1\.",
            sn_eps=1e-6, bn_eps=1e-4, rectified=True,
        ),
        Layout(
            "voletiv",
            {**_block("snconv2d1", "snconv2d2", "snconv2d0", "cond_bn1", "cond_bn2"), **_VOLETIV,
             "linear": "snlinear0", "tail": "bn", "last": "snconv2d1"},
            {**_block("snconv2d1", "snconv2d2", "snconv2d0"), **_VOLETIV,
             "linear": "snlinear1", "embedding": "sn_embedding1"},
            _numbered("block{}", "opt_block1", "block{}", 1,
                      {True: "self_attn", False: "self_attn"}, ".snconv1x1_theta.weight"),
            r"^(block1|opt_block1)\.snconv2d1\.", gain_offset=0.0, rectified=True,
        ),
        Layout(
            "mmgeneration",
            {**_block("conv_1.conv", "conv_2.conv", "shortcut.conv", "norm_1", "norm_2"), **_MMGEN,
             "linear": "noise2feat", "tail": "to_rgb.bn", "last": "to_rgb.conv"},
            {**_block("conv_1.conv", "conv_2.conv", "shortcut.conv"), **_MMGEN,
             "linear": "decision", "embedding": "proj_y"},
            _in_a_row(["from_rgb"], "conv_blocks.{}", "theta"), r"^conv_blocks\.0\.", bn_eps=1e-4,
        ),
    )
}  # fmt: skip

REFUSED = {
    r"^shared\.weight$": "BigGAN with shared class embeddings is another network (only its SAGAN script fits)",
    r"^l1\.0\.module\.weight_bar$": "heykeetae's network is a DCGAN, not SAGAN's residual network",
    r"^block\d\.(c1|b1\.gain)": "mimicry's networks up-sample bilinearly and have a thin discriminator",
    r"^blocks\.\d+\.conv1\.parametrizations": "it is a state dict of sagan_fast: load_state_dict takes it",
}
"""What is known and cannot be imported, by a key of its state dict."""


def layout_of(state: State, name: str | None) -> Layout:
    """Return the layout `name`, or the one whose keys `state` has; InputError if there is none."""
    if name is not None:
        check_choice("layout", name, CodeBase)
        return LAYOUTS[name]
    for key in state:
        for pattern, why in REFUSED.items():
            if re.search(pattern, key):
                raise InputError(f"import: {why}")
    for layout in LAYOUTS.values():
        if any(re.search(layout.signature, key) for key in state):
            return layout
    some = ", ".join(list(state)[:3])
    raise InputError(f"import: the keys ({some}, ...) are of none of the layouts {', '.join(LAYOUTS)}")
