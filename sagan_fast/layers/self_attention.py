"""The self-attention block as a module."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.kernels.attention.reference import attention_map
from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.layers.effective_weight import bias_of, is_direct, weight_now
from sagan_fast.layers.foreign_spectral_norm import saved_spectral_norm
from sagan_fast.layers.initialization import xavier
from sagan_fast.ops.attention import attention
from sagan_fast.ops.backends import BACKENDS, Choice, check_backend, choose
from sagan_fast.ops.self_attention import block_on, check_block, choose_block


class SelfAttention2d(nn.Module):
    """The self-attention block: x (B, C, H, W) becomes x + gamma * o(softmax(theta(x) phi(x)ᵀ) g(x)).

    Source: Zhang et al. 2019, §3. The defaults are the released code's: `qk_channels` C/8, `v_channels` C/2, keys and
    values max-pooled 2x2, an output projection, no biases, no 1/sqrt(d). The best-known PyTorch port corresponds to
    `pool=False, out_proj=False, bias=True`, where v has C channels. `gamma` starts at 0: the block is the identity and
    only gamma learns at first.

    The parameters are `theta.weight`, `phi.weight` (qk_channels, C, 1, 1), `g.weight` (v_channels, C, 1, 1),
    `o.weight` (C, v_channels, 1, 1), their biases, and `gamma`, a scalar. Weights start Xavier-uniform, biases at zero.
    The names are BigGAN-PyTorch's too, and `load_state_dict` takes its states. Spectral norm works on the four
    convolutions as on any other. Hooks of the convolutions run, and so does a convolution with its own forward in
    their place: then the block calls them, and only softmax(q kᵀ) v is fused.

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
        if not (is_direct(theta) and is_direct(phi) and is_direct(g) and (o is None or is_direct(o))):
            return self._with_calls(x)
        w_theta, w_phi, w_g = weight_now(theta), weight_now(phi), weight_now(g)
        w_o, b_o = (None, None) if o is None else (weight_now(o), bias_of(o))
        inputs = BlockInputs(x, w_theta, w_phi, w_g, w_o, self.gamma, bias_of(theta), bias_of(phi), bias_of(g), b_o)
        check_block(inputs, self.pool)
        choice = choose_block(inputs, self.pool, self.backend)
        if not torch.compiler.is_compiling():
            self.last_choice = choice
        return block_on(choice.backend, inputs, self.pool)

    def _with_calls(self, x: Tensor) -> Tensor:
        """Return the block's output from calls of its convolutions: they have hooks, or a forward of their own."""
        maps = (self.theta(x), self.phi(x), self.g(x))
        q, k, v = (F.max_pool2d(m, 2) if self.pool and i else m for i, m in enumerate(maps))
        q, k, v = (m.flatten(2).transpose(1, 2) for m in (q, k, v))
        (B, N, D_QK), (M, D_V) = q.shape, v.shape[1:]
        choice = choose("SelfAttention2d", self.backend, q, B, N, M, D_QK, D_V)
        out = attention(q, k, v, backend=self.backend).transpose(1, 2).reshape(B, D_V, *x.shape[2:])
        if not x.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous()
        if not torch.compiler.is_compiling():
            self.last_choice = Choice(choice.backend, f"{choice.reason}; the convolutions are called: one has hooks or "
                                      "its own forward")  # fmt: skip
        return (x + self.gamma * (out if self.o is None else self.o(out))).to(x.dtype)

    @torch.no_grad()
    def attention_map(self, x: Tensor, queries: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return the attention weights of each query, (B, N or len(queries), M); every row sums to 1.

        `queries` are flat positions row * W + column, in 0..H*W-1; only their rows are computed. Column m is key
        position m of the pooled map (W//2 a row) or, without pooling, of the map itself. No gradient is kept.

        Raises ValueError for positions outside the map.
        """
        self._check(x)
        q, k = self.theta(x), self.phi(x)
        q, k = (m.flatten(2).transpose(1, 2) for m in (q, F.max_pool2d(k, 2) if self.pool else k))
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also take a state whose convolutions have the spectral norm of another code base, and gamma of shape (1,).

        A plain convolution gets W/sigma, one with our or torch's parametrization W, u and v. Gamma takes the shape
        that it has in the state, so that a state saved later fits where this one came from.
        """
        for name in ("theta", "phi", "g", "o"):
            conv, saved = getattr(self, name), saved_spectral_norm(state_dict, prefix + name)
            own = conv.state_dict() if conv is not None else {}
            theirs = [key for key in state_dict if key.startswith(f"{prefix}{name}.") and not key.endswith(".bias")]
            if saved is None or conv is None or all(key.removeprefix(f"{prefix}{name}.") in own for key in theirs):
                continue
            weight, u, v = saved
            for key in theirs:
                del state_dict[key]
            if "weight" in own:
                state_dict[f"{prefix}{name}.weight"] = weight / torch.dot(u, weight.flatten(1) @ v)
            else:
                chain = f"{prefix}{name}.parametrizations.weight."
                state_dict |= {chain + "original": weight, chain + "0._u": u, chain + "0._v": v}
        gamma = state_dict.get(prefix + "gamma")
        if gamma is not None and gamma.numel() == 1 and gamma.ndim < 2:
            self.gamma.data = self.gamma.data.reshape(gamma.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]
