"""Batch norm over the images of all processes together, plain PyTorch: any device, any torch.distributed backend."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.ops.batch_norm import together


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the batches (B, C, H, W) of all processes.

    torch's SyncBatchNorm computes the same on CUDA only. Every process must call it equally often; batches
    may have any size. In evaluation, and where torch.distributed is not set up, it is `nn.BatchNorm2d`. The keys of the
    state dict are the same. Differentiable once.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised `input` (B, C, H, W), in its dtype; the running averages move as nn.BatchNorm2d's."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        if input.ndim != 4:
            raise ValueError(f"SyncedBatchNorm2d: input must have 4 dimensions (B, C, H, W), got {tuple(input.shape)}")
        if self.momentum is None:
            raise ValueError("SyncedBatchNorm2d: momentum must be a number, got None")
        out, mean, var, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and bool(count > 0):
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp_min(1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)  # type: ignore[union-attr]
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)  # type: ignore[union-attr]
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        result: Tensor = out
        return result


def of_all(mine: Tensor) -> Tensor:
    """Return `mine` of all processes, stacked by rank."""
    gathered = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered)


def sync_batch_norms(model: nn.Module) -> int:
    """Make every nn.BatchNorm2d in `model` a SyncedBatchNorm2d, in place; return how many there were."""
    norms = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for norm in norms:
        norm.__class__ = SyncedBatchNorm2d  # which differs in `forward` only
    return len(norms)


class _Normalise(torch.autograd.Function):
    """(x - mean)/sqrt(var + eps) * weight + bias, with mean and biased variance over all processes' x, in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, C, H, W = x.shape
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if x.numel():
            var, mean = torch.var_mean(x.to(wide), dim=(0, 2, 3), correction=0)
        else:
            var = mean = x.new_zeros(C, dtype=wide)
        mine = torch.cat([mean, var, x.new_full((1,), B * H * W, dtype=wide)])
        mean, var, count = together(of_all(mine), C)
        out = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, mean, torch.rsqrt(var + eps), count, weight)
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, count, weight = ctx.saved_tensors
        wide = mean.dtype
        normalised = (x.to(wide) - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        d_wide = d_out.to(wide)
        d_bias, d_weight = d_wide.sum((0, 2, 3)), (d_wide * normalised).sum((0, 2, 3))
        totals = torch.stack([d_bias, d_weight])[..., None, None]
        dist.all_reduce(totals)
        gain = scale if weight is None else scale * weight.to(wide)
        d_x = (d_wide - (totals[0] + normalised * totals[1]) / count.clamp_min(1)) * gain.view(-1, 1, 1)
        if weight is None:
            return d_x.to(x.dtype), None, None, None
        return d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None
