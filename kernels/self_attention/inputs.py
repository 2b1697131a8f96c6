"""The tensors of the self-attention block, as they travel from the module to the kernels."""

from typing import NamedTuple

from torch import Tensor


class BlockInputs(NamedTuple):
    """Everything the block is computed from.

    `x` (B, C, H, W); weights of 1x1 convolutions `w_theta`, `w_phi` (D_QK, C), `w_g` (D_V, C) and `w_o` (C, D_V), with
    two more axes of length 1 where they come from a module; `gamma`, one element; biases `b_theta`, `b_phi` (D_QK,),
    `b_g` (D_V,), `b_o` (C,). Without an output projection `w_o` and `b_o` are None, and D_V is C.
    """

    x: Tensor
    w_theta: Tensor
    w_phi: Tensor
    w_g: Tensor
    w_o: Tensor | None
    gamma: Tensor
    b_theta: Tensor | None = None
    b_phi: Tensor | None = None
    b_g: Tensor | None = None
    b_o: Tensor | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """D_QK and D_V."""
        return self.w_theta.shape[0], self.w_g.shape[0]

    def sizes(self, pool: bool) -> tuple[int, int, int]:
        """Return B, the number of queries N = H*W, and the number of keys M: N or, pooled, (H//2)*(W//2)."""
        B, _, H, W = self.x.shape
        return B, H * W, (H // 2) * (W // 2) if pool else H * W


class Saved(NamedTuple):
    """What the forward pass keeps for backward: O(N) elements, never the N x M map.

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V), `o` (B, N, D_V), the attention's output; `lse` (B, N), the
    base-2 log-sum-exp of its scores; `lost`, what o lost by rounding to 16 bits, like o, None for wider dtypes;
    `argmax` (B, M, D_QK + D_V) uint8, the winners of the max-pool, None without it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    lost: Tensor | None
    argmax: Tensor | None


class BlockGradients(NamedTuple):
    """The gradients of the block; None where one was not asked for.

    `x` like x; `w_qkv` (2 * D_QK + D_V, C) and `b_qkv` (2 * D_QK + D_V,): those of theta, phi and g, one below the
    other; `w_o` (C, D_V); `b_o` (C,); `gamma`, a scalar.
    """

    x: Tensor | None
    w_qkv: Tensor | None
    b_qkv: Tensor | None
    w_o: Tensor | None
    b_o: Tensor | None
    gamma: Tensor
