"""Random arguments of the self-attention block, and the block written out without the code under test."""

import torch
from torch.nn.functional import conv2d, max_pool2d

from shared_by_tests import attention_terms, largest_is_clear, randn


def arguments(shape, generator, bias=True, out_proj=True, dtype=torch.float64):
    B, C, H, W, D_QK, D_V = shape
    D_V = D_V if out_proj else C
    sizes = {
        "x": (B, C, H, W), "w_theta": (D_QK, C, 1, 1), "w_phi": (D_QK, C, 1, 1), "w_g": (D_V, C, 1, 1),
        "w_o": (C, D_V, 1, 1), "gamma": (), "b_theta": (D_QK,), "b_phi": (D_QK,), "b_g": (D_V,), "b_o": (C,),
    }  # fmt: skip
    while True:
        made = {name: randn(*size, generator=generator, scale=C**-0.25).to(dtype) for name, size in sizes.items()}
        maps = (conv2d(*(made[n].double() for n in ("x", f"w_{key}", f"b_{key}"))) for key in ("phi", "g"))
        if dtype.itemsize < 4 or all(map(largest_is_clear, maps)):
            break
    made["gamma"] = made["gamma"] * 0 + 0.7
    if not out_proj:
        made["w_o"] = made["b_o"] = None
    if not bias:
        made |= dict.fromkeys(("b_theta", "b_phi", "b_g", "b_o"))
    return made


def by_hand(x, w_theta, w_phi, w_g, w_o, gamma, b_theta=None, b_phi=None, b_g=None, b_o=None, pool=True):
    """The block written out position by position, sharing nothing with the code under test."""
    B, C, H, W = x.shape

    def conv(w, b):
        out = torch.einsum("bchw,dc->bdhw", x, w[:, :, 0, 0])
        return out if b is None else out + b[:, None, None]

    def keys(maps):
        if not pool:
            return maps.flatten(2)
        h, w = H // 2, W // 2
        cut = maps[:, :, : 2 * h, : 2 * w].reshape(B, -1, h, 2, w, 2)
        return cut.amax(dim=(3, 5)).flatten(2)

    q, k, v = conv(w_theta, b_theta).flatten(2), keys(conv(w_phi, b_phi)), keys(conv(w_g, b_g))
    scores = torch.einsum("bdn,bdm->bnm", q, k)
    beta = (scores - scores.amax(2, keepdim=True)).exp()
    out = torch.einsum("bnm,bem->ben", beta / beta.sum(2, keepdim=True), v)
    if w_o is not None:
        out = torch.einsum("ben,ce->bcn", out, w_o[:, :, 0, 0])
    if b_o is not None:
        out = out + b_o[:, None]
    return x + gamma * out.reshape(B, C, H, W)


def leaves_of(made):
    return {name: t if t is None else t.detach().requires_grad_() for name, t in made.items()}


def gradient_terms(x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o, pool, d_out):
    """The `terms` of `assert_close_to_truth` for the gradients of x, the three projections and all biases, by name."""
    pools = {"theta": False, "phi": pool, "g": pool}
    weights = dict(zip(pools, (w_theta, w_phi, w_g), strict=True))
    maps = [
        conv2d(x, w, b).detach().requires_grad_() for w, b in zip(weights.values(), (b_theta, b_phi, b_g), strict=True)
    ]
    rows = [(max_pool2d(m, 2) if p else m).flatten(2).mT for m, p in zip(maps, pools.values(), strict=True)]
    square = (gamma * d_out).square()
    d_o = square if w_o is None else conv2d(square, w_o.square().transpose(0, 1))
    _, *added = attention_terms(*rows, d_o.flatten(2).mT.sqrt())
    found = {"x": d_out.square(), "b_o": square.sum((0, 2, 3))}
    for (name, weight), d_map in zip(weights.items(), torch.autograd.grad(rows, maps, added), strict=True):
        d_map = d_map.square()
        found[f"w_{name}"] = torch.einsum("bdhw,bchw->dc", d_map, x.square())[..., None, None]
        found[f"b_{name}"] = d_map.sum((0, 2, 3))
        found["x"] = found["x"] + conv2d(d_map, weight.square().transpose(0, 1))
    return {name: terms.detach().sqrt() for name, terms in found.items()}
