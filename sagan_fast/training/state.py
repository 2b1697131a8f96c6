"""The state of a run from step to step, which is saved to and loaded from plain data."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.layers.spectral_norm import SpectralNormGroup, fuse_spectral_norm
from sagan_fast.layers.synced_batch_norm import sync_batch_norms
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import Generator, memory_format_on
from sagan_fast.ops.backends import choose
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.losses import LeCam
from sagan_fast.training.parallel import Replica
from sagan_fast.training.precision import Precision, Scaler


@dataclass
class TrainState:
    """Both networks, the averaged generator, their optimizers, spectral-norm groups and scalers, LeCam's averages.

    The replicas are the networks as steps train them, in this process alone until `connect`. `rollbacks` counts how
    often the run went back before a divergence; each time the noise is another.
    """

    generator: Generator
    discriminator: Discriminator
    ema: Generator
    g_optimizer: torch.optim.Optimizer
    d_optimizer: torch.optim.Optimizer
    g_spectral: SpectralNormGroup
    d_spectral: SpectralNormGroup
    precision: Precision
    g_scaler: Scaler
    d_scaler: Scaler
    lecam: LeCam
    world: World
    g_replica: Replica
    d_replica: Replica
    step: int = 0
    rollbacks: int = 0

    # In this order: the groups' sigmas belong to weights, u and v that are there already.
    PARTS = (
        "generator", "discriminator", "ema", "g_spectral", "d_spectral", "g_optimizer", "d_optimizer", "g_scaler",
        "d_scaler", "lecam",
    )  # fmt: skip

    def connect(self, world: World, config: TrainConfig) -> None:
        """Let the steps from now on be those of all processes of `world`, which hold the same state; all must call it.

        The state changes no more than by the memory that it takes.
        """
        self.world = world
        y = torch.zeros(2, dtype=torch.long, device=world.device) if config.num_classes else None
        like = next(self.generator.parameters())
        z, images = (
            like.new_zeros(2, config.generator.z_dim),
            like.new_zeros(2, 3, config.resolution, config.resolution),
        )
        for replica, group, x in ((self.g_replica, self.g_spectral, z), (self.d_replica, self.d_spectral, images)):
            group.bucket_cap_mb = config.bucket_cap_mb
            with self.precision.products():  # and autocast: no kernels are built that the steps do not need
                autocast = self.precision.autocast()
                replica.connect(world, config.bucket_cap_mb, config.gradient_compression, autocast, x, y)

    def traffic(self) -> str:
        """Return a sentence about the buckets that gradients travel in; empty in a process alone."""
        if self.world.size == 1:
            return ""
        found = [self.g_replica.buckets, self.d_replica.buckets]
        (g, d), size = map(len, found), sum(map(sum, found)) / 1e6
        return f"gradients of {size:.0f} MB travel in {g} buckets of the generator and {d} of the discriminator"

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors, numbers, strings, lists and dictionaries."""
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return {"step": self.step, "rollbacks": self.rollbacks, **parts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; weights, u and v, statistics, optimizers and the step count.

        What was there before keeps its address.
        """
        for name in self.PARTS:
            part = getattr(self, name)
            if isinstance(part, torch.optim.Optimizer):
                _load(part, saved[name])
            elif name != "lecam" or name in saved:  # older checkpoints have none
                part.load_state_dict(saved[name])
        self.step, self.rollbacks = int(saved["step"]), int(saved.get("rollbacks", 0))


def _load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load `saved` into the moments that are there, else into moments with the strides of their parameters.

    Fused Adam goes through the memory of both without comparing.
    """
    before = {parameter: dict(moments) for parameter, moments in optimizer.state.items()}
    optimizer.load_state_dict(saved)
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            place = before.get(parameter, {}).get(name)
            if place is None and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                place = torch.empty_like(parameter, dtype=moment.dtype)
            if place is not None:
                moments[name] = place.copy_(moment)


def check_backend(state: TrainState) -> None:
    """Raise InputError if the attention of a network cannot run on the backend that was asked for."""
    for network in (state.generator, state.discriminator):
        like = torch.empty(0, device=state.precision.device, dtype=state.precision.product_dtype)
        for layer in network.modules():
            if isinstance(layer, SelfAttention2d):
                try:
                    choose("attention", layer.backend, like, 1, 1, 1, layer.theta.out_channels, layer.g.out_channels)
                except (RuntimeError, ValueError) as error:
                    why = str(error).rpartition(f"got '{layer.backend}': ")[2]
                    raise InputError(
                        f"--backend {layer.backend} cannot run here: {why}; --backend auto takes one that can"
                    ) from error


def new_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Return the state before the first step, its weights drawn from `config.seed`, on `device`."""
    rng = torch.get_rng_state()
    torch.manual_seed(config.seed)
    generator, discriminator = Generator(config.generator), Discriminator(config.discriminator)
    torch.set_rng_state(rng)
    for model in (generator, discriminator):
        model.checkpoint_activations = config.checkpoint_activations
        model.to(device, memory_format=memory_format_on(device))  # type: ignore[call-overload]
    ema = copy.deepcopy(generator).requires_grad_(False).eval()
    if config.sync_batch_norm:
        sync_batch_norms(generator)

    def adam(model: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=lr, betas=(config.beta1, config.beta2), fused=True)

    precision = Precision(config.precision, device)
    g_spectral, d_spectral = (fuse_spectral_norm(model, update="step") for model in (generator, discriminator))
    g_spectral.started = d_spectral.started = True  # by the iterations of their construction: only steps move u and v
    return TrainState(
        generator, discriminator, ema,
        adam(generator, config.g_lr), adam(discriminator, config.d_lr), g_spectral, d_spectral,
        precision, precision.scaler(), precision.scaler(), LeCam(config.lecam_decay).to(device),
        World(device), Replica(generator), Replica(discriminator),
    )  # fmt: skip
