"""The self-attention block as a module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sagan_fast.kernels.attention.reference import attention_map
from sagan_fast.kernels.projection.reference import project
from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.layers.initialization import xavier
from sagan_fast.ops.backends import BACKENDS, Choice, check_backend
from sagan_fast.ops.self_attention import block_on, check_block, choose_block


class SelfAttention2d(nn.Module):
    """The self-attention block: x (B, C, H, W) becomes x + gamma * o(softmax(theta(x) phi(x)ᵀ) g(x)).

    Source: Zhang et al. 2019, §3. The defaults are the released code's: `qk_channels` C/8, `v_channels` C/2, keys and
    values max-pooled 2x2, an output projection, no biases, no 1/sqrt(d). The best-known PyTorch port corresponds to
    `pool=False, out_proj=False, bias=True`, where v has C channels. `gamma` starts at 0: the block is the identity and
    only gamma learns at first.

    The parameters are `theta.weight`, `phi.weight` (qk_channels, C, 1, 1), `g.weight` (v_channels, C, 1, 1),
    `o.weight` (C, v_channels, 1, 1), their biases, and `gamma`, a scalar; the names are BigGAN-PyTorch's too. Weights
    start Xavier-uniform, biases at zero. Spectral norm works on the four convolutions as on any other.

    Input of any strides, float32, float16, bfloat16 or float64; output in the dtype of x. For `backend` see
    `functional.attention`. Raises ValueError for widths that do not fit each other, for x with another number of
    channels, and for a map too small to pool.
    """

    def __init__(
        self,
        channels: int,
        *,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        pool: bool = True,
        out_proj: bool = True,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if qk_channels is None:
            qk_channels = max(1, channels // 8)
        if v_channels is None:
            v_channels = max(1, channels // 2) if out_proj else channels
        for name, width in (("channels", channels), ("qk_channels", qk_channels), ("v_channels", v_channels)):
            if width < 1:
                raise ValueError(f"SelfAttention2d: {name} must be at least 1, got {width}")
        if not out_proj and v_channels != channels:
            raise ValueError(f"SelfAttention2d: v_channels must be {channels} if out_proj=False, got {v_channels}")
        check_backend("SelfAttention2d", backend, BACKENDS)
        self.channels = channels
        self.pool = pool
        self.backend = backend
        self.theta = xavier(nn.Conv2d(channels, qk_channels, 1, bias=bias))
        self.phi = xavier(nn.Conv2d(channels, qk_channels, 1, bias=bias))
        self.g = xavier(nn.Conv2d(channels, v_channels, 1, bias=bias))
        self.o = xavier(nn.Conv2d(v_channels, channels, 1, bias=bias)) if out_proj else None
        self.gamma = nn.Parameter(torch.zeros(()))
        self.last_choice: Choice | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, C, H, W), for `x` (B, C, H, W)."""
        self._check(x)
        theta, phi, g, o = self.theta, self.phi, self.g, self.o  # once: nn.Module finds them slowly
        w_theta, w_phi, w_g = _weight(theta, x), _weight(phi, x), _weight(g, x)
        w_o, b_o = (None, None) if o is None else (_weight(o, x), o.bias)
        inputs = BlockInputs(x, w_theta, w_phi, w_g, w_o, self.gamma, theta.bias, phi.bias, g.bias, b_o)
        check_block(inputs, self.pool)
        choice = choose_block(inputs, self.pool, self.backend)
        if not torch.compiler.is_compiling():
            self.last_choice = choice
        return block_on(choice.backend, inputs, self.pool)

    @torch.no_grad()
    def attention_map(self, x: Tensor, queries: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return the attention weights of each query, (B, N or len(queries), M); every row sums to 1.

        `queries` are flat positions row * W + column, in 0..H*W-1; only their rows are computed. Column m is key
        position m of the pooled map (W//2 a row) or, without pooling, of the map itself. No gradient is kept.

        Raises ValueError for positions outside the map.
        """
        self._check(x)
        q = project(x, _weight(self.theta, x), self.theta.bias)
        k = project(x, _weight(self.phi, x), self.phi.bias, self.pool)
        if queries is not None:
            positions = torch.as_tensor(queries, device=x.device, dtype=torch.long).reshape(-1)
            N = q.shape[1]
            low, high = (int(end) for end in positions.aminmax()) if positions.numel() else (0, 0)
            if low < 0 or high >= N:
                raise ValueError(f"attention_map: queries must be positions 0 to {N - 1}, got {low} to {high}")
            q = q[:, positions]
        return attention_map(q, k)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, pool={self.pool}, backend={self.backend!r}"

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"SelfAttention2d: x must have shape (B, {self.channels}, H, W), got {tuple(x.shape)}")


def _weight(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the weight the convolution would use now: hooks that set it (torch's old spectral norm) run first."""
    for hook in conv._forward_pre_hooks.values():
        hook(conv, (x,))
    return conv.weight
