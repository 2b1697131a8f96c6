"""State dicts that BigGAN-PyTorch and StudioGAN load, from our generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.interop.layouts import LAYOUTS
from sagan_fast.models.generator import Generator

FORMATS = ("biggan-pytorch", "studiogan")


def foreign_state(generator: Generator, layout: str) -> dict[str, Tensor]:
    """Return the state dict, on the CPU, with which the generator of `layout` gives the samples of `generator`.

    `layout` is biggan-pytorch, its generator without shared embeddings, or studiogan, its "resnet" with spectral norm.
    Both keep W and u. BigGAN-PyTorch iterates once more before it uses u, so its u0 is chosen to end at our sigma.
    Raises InputError for a generator that the layout cannot hold.
    """
    if layout not in FORMATS:
        raise InputError(f"layout must be one of {', '.join(FORMATS)}, got {layout!r}")
    config, names, studio = generator.config, LAYOUTS[layout].generator, layout == "studiogan"
    if not config.attention_pool or not config.attention_out_proj or config.attention_bias:
        raise InputError(f"{layout} holds pooled attention with an output projection and no biases alone")
    if not config.num_classes and not studio:
        raise InputError(f"{layout} holds generators with classes alone")
    ours = {key: value.detach().cpu().float() for key, value in generator.state_dict().items()}
    shift = config.batch_norm_eps - LAYOUTS[layout].bn_eps
    out: dict[str, Tensor] = {}

    def layer(mine: str, theirs: str) -> None:
        weight, u, v = (ours[f"{mine}.parametrizations.weight.{part}"] for part in ("original", "0._u", "0._v"))
        if studio:
            out.update({f"{theirs}.weight_orig": weight, f"{theirs}.weight_u": u, f"{theirs}.weight_v": v})
        else:
            u0, sigma = _start(weight.flatten(1).double(), u.double(), v.double())
            out.update(
                {f"{theirs}.weight": weight, f"{theirs}.u0": u0[None].float(), f"{theirs}.sv0": sigma[None].float()}
            )
        if f"{mine}.bias" in ours:
            out[f"{theirs}.bias"] = ours[f"{mine}.bias"]

    def statistics(mine: str, theirs: str) -> None:
        variance = ours[f"{mine}.running_var"] + shift
        if bool((variance < 0).any()):
            raise InputError(
                f"{layout} adds {LAYOUTS[layout].bn_eps:g} to variances, and those of {mine} are too small"
            )
        kind = "running" if studio else "stored"
        out.update({f"{theirs}{kind}_mean": ours[f"{mine}.running_mean"], f"{theirs}{kind}_var": variance})
        if studio:
            out[f"{theirs}num_batches_tracked"] = torch.tensor(0)

    def norm(mine: str, theirs: str) -> None:
        if not config.num_classes:
            plain_norm(f"{mine}.norm", theirs)
            return
        gain, bias = ours[f"{mine}.gain.weight"] - 1, ours[f"{mine}.bias.weight"]
        statistics(f"{mine}.norm", f"{theirs}.bn." if studio else f"{theirs}.")
        for name, table in (("gain", gain), ("bias", bias)):
            if studio:
                out.update({f"{theirs}.{name}.{key}": value for key, value in _with_sigma_one(table.t()).items()})
            else:
                out[f"{theirs}.{name}.weight"] = table

    def plain_norm(mine: str, theirs: str) -> None:
        out.update({f"{theirs}.{'weight' if studio else 'gain'}": ours[f"{mine}.weight"]})
        out[f"{theirs}.bias"] = ours[f"{mine}.bias"]
        statistics(mine, f"{theirs}.")

    layer("linear", names["linear"])
    place = 0
    for i, size in enumerate(config.sizes):
        block = f"blocks.{place}.0"
        for part in ("conv1", "conv2", "shortcut"):
            layer(f"blocks.{i}.{part}", f"{block}.{names[part]}")
        for part in ("norm1", "norm2"):
            norm(f"blocks.{i}.{part}", f"{block}.{names[part]}")
        if size in config.attention_resolutions:
            place += studio
            attention, mine = f"blocks.{place}.{0 if studio else 1}", f"attentions.{size}"
            for part in ("theta", "phi", "g", "o"):
                layer(f"{mine}.{part}", f"{attention}.{names[part]}")
            out[f"{attention}.{names['gamma']}"] = ours[f"{mine}.gamma"].reshape(1) if studio else ours[f"{mine}.gamma"]
        place += 1
    plain_norm("norm", names["tail"])
    layer("conv", names["last"])
    return {key: value.contiguous() for key, value in out.items()}


def _start(matrix: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a unit u0 with |W v0| = uᵀWv = sigma for v0 = Wᵀu0/|Wᵀu0|, and sigma.

    |W v0| is at least sigma for u0 = u. Away from u it falls, and halving finds where it is sigma.
    """
    sigma = torch.dot(u, matrix @ v)

    def reached(u0: Tensor) -> float:
        return float((matrix @ F.normalize(matrix.t() @ u0, dim=0)).norm())

    draw = torch.Generator().manual_seed(0)
    other = torch.randn(u.shape, dtype=u.dtype, generator=draw)
    other = F.normalize(other - torch.dot(other, u) * u, dim=0)
    if reached(other) >= float(sigma):
        other = torch.linalg.svd(matrix, full_matrices=False).U[:, -1]
    if reached(u) <= float(sigma) or reached(other) >= float(sigma):
        return u, sigma
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if reached(math.cos(angle) * u + math.sin(angle) * other) > float(sigma):
            low = angle
        else:
            high = angle
    return F.normalize(math.cos(low) * u + math.sin(low) * other, dim=0), sigma


def _with_sigma_one(weight: Tensor) -> dict[str, Tensor]:
    """Return a weight with torch's older spectral norm, u and v such that it is divided by 1 in evaluation."""
    weight = weight.contiguous().clone()
    if not bool(weight.any()):
        weight[0, 0] = 1e-12  # nothing is divided by 0
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return {"weight_orig": weight, "weight_u": U[:, 0].float(), "weight_v": (Vh[0] / S[0]).float()}
