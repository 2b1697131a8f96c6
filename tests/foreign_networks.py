"""SAGAN's networks as other code bases name and write them, few channels wide, written from their description."""

import torch
import torch.nn.functional as F
from foreign_attention import Block
from foreign_layers import BigGANConv, BigGANEmbedding, BigGANLinear
from torch import nn
from torch.nn.utils.spectral_norm import spectral_norm

WIDTHS_G, WIDTHS_D, CLASSES, Z = (24, 16, 8, 8), (8, 16, 16), 5, 6
"""Maps of 4, 8, 16 and 32; attention at 8 (16 channels). D halves 32 twice; attention at 8 (16 channels)."""


def conv3(make, inputs, outputs, kernel=3):
    return make(inputs, outputs, kernel, padding=kernel // 2)


def legacy(eps, bias=True):
    return lambda *sizes, **options: spectral_norm(nn.Conv2d(*sizes, **options), eps=eps)


class BigGANNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.gain, self.bias = nn.Embedding(CLASSES, C), nn.Embedding(CLASSES, C)
        self.register_buffer("stored_mean", torch.zeros(C))
        self.register_buffer("stored_var", torch.ones(C))

    def forward(self, x, y):
        out = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, 1e-5)
        return out * (1 + self.gain(y))[:, :, None, None] + self.bias(y)[:, :, None, None]


class VoletivNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.bn, self.embed = nn.BatchNorm2d(C, affine=False), nn.Embedding(CLASSES, 2 * C)

    def forward(self, x, y):
        gain, bias = self.embed(y)[:, :, None, None].chunk(2, 1)
        return gain * self.bn(x) + bias


class StudioNorm(nn.Module):
    def __init__(self, C, linear=True):
        super().__init__()
        self.bn = nn.BatchNorm2d(C, eps=1e-4, affine=False)
        names = ("gain", "bias") if linear else ("embed0", "embed1")
        for name in names:
            layer = nn.Linear(CLASSES, C, bias=False) if linear else nn.Embedding(CLASSES, C)
            setattr(self, name, spectral_norm(layer, eps=1e-6))
        self.names = names

    def forward(self, x, y):
        gain, bias = (getattr(self, name)(y)[:, :, None, None] for name in self.names)
        return self.bn(x) * (1 + gain) + bias


class MmgenNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm = nn.BatchNorm2d(C, eps=1e-4, affine=False)
        self.weight_embedding, self.bias_embedding = nn.Embedding(CLASSES, C), nn.Embedding(CLASSES, C)

    def forward(self, x, y):
        return (
            self.norm(x) * (1 + self.weight_embedding(y)[:, :, None, None]) + self.bias_embedding(y)[:, :, None, None]
        )


class Held(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


class BigGANTail(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("stored_mean", torch.zeros(C))
        self.register_buffer("stored_var", torch.ones(C))

    def forward(self, x):
        return F.batch_norm(x, self.stored_mean, self.stored_var, self.gain, self.bias, self.training, 0.1, 1e-5)


KINDS = {
    "biggan-pytorch": {
        "conv": BigGANConv, "block": ("conv1", "conv2", "conv_sc", "bn1", "bn2"), "norm": BigGANNorm,
        "attention": (("theta", "phi", "g", "o"), "gamma", False),
    },
    "studiogan": {
        "conv": legacy(1e-6), "block": ("conv2d1", "conv2d2", "conv2d0", "bn1", "bn2"), "norm": StudioNorm,
        "attention": (tuple(f"conv1x1_{n}" for n in ("theta", "phi", "g", "attn")), "sigma", False),
    },
    "voletiv": {
        "conv": legacy(1e-12), "block": ("snconv2d1", "snconv2d2", "snconv2d0", "cond_bn1", "cond_bn2"),
        "norm": VoletivNorm,
        "attention": (tuple(f"snconv1x1_{n}" for n in ("theta", "phi", "g", "attn")), "sigma", True),
    },
    "mmgeneration": {
        "conv": lambda *sizes, **options: Held(spectral_norm(nn.Conv2d(*sizes, **options))),
        "block": ("conv_1", "conv_2", "shortcut", "norm_1", "norm_2"), "norm": MmgenNorm,
        "attention": (("theta", "phi", "g", "o"), "gamma", False),
    },
}  # fmt: skip
KINDS["studiogan-embeddings"] = {**KINDS["studiogan"], "norm": lambda C: StudioNorm(C, linear=False)}


class GBlock(nn.Module):
    def __init__(self, kind, inputs, outputs):
        super().__init__()
        made, self.names, self.one_hot = KINDS[kind], KINDS[kind]["block"], kind == "studiogan"
        first, second, shortcut, norm1, norm2 = self.names
        setattr(self, first, conv3(made["conv"], inputs, outputs))
        setattr(self, second, conv3(made["conv"], outputs, outputs))
        setattr(self, shortcut, conv3(made["conv"], inputs, outputs, 1))
        setattr(self, norm1, made["norm"](inputs))
        setattr(self, norm2, made["norm"](outputs))

    def forward(self, x, y):
        first, second, shortcut, norm1, norm2 = (getattr(self, name) for name in self.names)
        y = F.one_hot(y, CLASSES).to(x.dtype) if self.one_hot else y
        h = first(F.interpolate(F.relu(norm1(x, y)), scale_factor=2))
        return second(F.relu(norm2(h, y))) + shortcut(F.interpolate(x, scale_factor=2))


class DBlock(nn.Module):
    def __init__(self, kind, inputs, outputs, first, down, in_place):
        super().__init__()
        made, self.names = KINDS[kind], KINDS[kind]["block"]
        self.first, self.down, self.in_place = first, down, in_place
        setattr(self, self.names[0], conv3(made["conv"], inputs, outputs))
        setattr(self, self.names[1], conv3(made["conv"], outputs, outputs))
        if down or kind == "voletiv":
            setattr(self, self.names[2], conv3(made["conv"], inputs, outputs, 1))

    def forward(self, x):
        x0 = x
        if not self.first:
            x = F.relu(x, inplace=self.in_place)
        h = getattr(self, self.names[1])(F.relu(getattr(self, self.names[0])(x)))
        if self.down:
            h, x0 = F.avg_pool2d(h, 2), F.avg_pool2d(getattr(self, self.names[2])(x0), 2)
        return h + x0


def attention(kind):
    names, scalar, bias = KINDS[kind]["attention"]
    return Block(
        lambda i, o: KINDS[kind]["conv"](i, o, 1, bias=bias), names, scalar, () if names[0] == "theta" else (1,)
    )


class Generator(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind.removesuffix("-embeddings")
        made, pairs = KINDS[kind]["conv"], zip(WIDTHS_G[:-1], WIDTHS_G[1:], strict=True)
        blocks = [GBlock(kind, *pair) for pair in pairs]
        linear = nn.Linear(Z, WIDTHS_G[0] * 16)
        last, C = conv3(made, WIDTHS_G[-1], 3), WIDTHS_G[-1]
        if self.kind == "biggan-pytorch":
            self.linear = BigGANLinear(Z, WIDTHS_G[0] * 16)
            self.blocks = nn.ModuleList(
                nn.ModuleList([b, attention(kind)] if i == 0 else [b]) for i, b in enumerate(blocks)
            )
            self.output_layer = nn.Sequential(BigGANTail(C), nn.ReLU(), last)
        elif self.kind == "studiogan":
            self.linear0 = spectral_norm(linear, eps=1e-6)
            self.blocks = nn.ModuleList(nn.ModuleList([b]) for b in (blocks[0], attention(kind), *blocks[1:]))
            self.bn4, self.conv2d5 = nn.BatchNorm2d(C, eps=1e-4), last
        elif self.kind == "voletiv":
            self.snlinear0 = spectral_norm(linear)
            self.block1, self.self_attn = blocks[0], attention(kind)
            self.block2, self.block3 = blocks[1:]
            self.bn, self.snconv2d1 = nn.BatchNorm2d(C), last
        else:
            self.noise2feat = spectral_norm(linear)
            self.conv_blocks = nn.ModuleList([blocks[0], attention(kind), *blocks[1:]])
            self.to_rgb = nn.ModuleDict({"bn": nn.BatchNorm2d(C, eps=1e-4), "conv": last.conv})

    def forward(self, z, y):
        linear = next(self.children())
        h = linear(z).view(len(z), WIDTHS_G[0], 4, 4)
        for module in self.modules():
            if isinstance(module, (GBlock, Block)):
                h = module(h, y) if isinstance(module, GBlock) else module(h)
        tail = {
            "biggan-pytorch": lambda: self.output_layer(h), "studiogan": lambda: self.conv2d5(F.relu(self.bn4(h))),
            "voletiv": lambda: self.snconv2d1(F.relu(self.bn(h))),
            "mmgeneration": lambda: self.to_rgb["conv"](F.relu(self.to_rgb["bn"](h))),
        }[self.kind]  # fmt: skip
        return torch.tanh(tail())


class Discriminator(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, in_place = kind, kind in ("studiogan", "voletiv")
        sizes = zip((3, *WIDTHS_D[:-1]), WIDTHS_D, strict=True)
        blocks = [DBlock(kind, i, o, n == 0, n < 2, in_place) for n, (i, o) in enumerate(sizes)]
        eps = 1e-6 if kind == "studiogan" else 1e-12
        linear = spectral_norm(nn.Linear(WIDTHS_D[-1], 1), eps=eps)
        embedding = spectral_norm(nn.Embedding(CLASSES, WIDTHS_D[-1]), eps=eps)
        rows = [blocks[0], blocks[1], attention(kind), blocks[2]]
        if kind == "biggan-pytorch":
            self.blocks = nn.ModuleList(nn.ModuleList(each) for each in ([rows[0]], rows[1:3], [rows[3]]))
            self.linear, self.embed = BigGANLinear(WIDTHS_D[-1], 1), BigGANEmbedding(CLASSES, WIDTHS_D[-1])
        elif kind == "studiogan":
            self.blocks = nn.ModuleList(nn.ModuleList([each]) for each in rows)
            self.linear1, self.embedding = linear, embedding
        elif kind == "voletiv":
            self.opt_block1, self.block1, self.self_attn, self.block2 = rows
            self.snlinear1, self.sn_embedding1 = linear, embedding
        else:
            self.from_rgb, self.conv_blocks = rows[0], nn.ModuleList(rows[1:])
            self.decision, self.proj_y = linear, embedding

    def forward(self, x, y):
        for module in list(self.modules()):
            if isinstance(module, (DBlock, Block)):
                x = module(x)
        h = F.relu(x).sum((2, 3))
        linear, embedding = list(self.children())[-2:]
        return linear(h).squeeze(1) + (embedding(y) * h).sum(1)


def trained(network):
    """Return `network` with statistics, tables and u as after some training, in eval mode."""
    for name, tensor in network.state_dict().items():
        if name.endswith(("mean", "bias")):
            tensor.normal_(0, 0.3)
        elif name.endswith("var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("gamma", "sigma")):
            tensor.fill_(0.7)
    network.train()
    inputs = (4, Z) if isinstance(network, Generator) else (4, 3, 32, 32)
    with torch.no_grad():  # torch's older hook leaves a weight that can be copied
        for _ in range(3):
            network(torch.randn(inputs), torch.arange(4))
    return network.eval().requires_grad_(False)


def official(network):
    """Return TensorFlow's variables by name for a generator or discriminator of the layout "voletiv"."""
    variables = {}

    def put(name, layer, rows=None):
        weight, u = layer.weight_orig.detach(), layer.weight_u
        if rows is not None:
            weight, u = weight[rows], u[rows]
        linear = isinstance(layer, nn.Linear)
        variables[f"{name}/{'Matrix' if linear else 'w'}"] = weight.t() if linear else weight.permute(2, 3, 1, 0)
        variables[f"{name}/u"] = u[None]
        if layer.bias is not None:
            bias = layer.bias if rows is None else layer.bias[rows]
            variables[f"{name}/{'bias' if linear else 'biases'}"] = bias

    g = isinstance(network, Generator)
    for name, module in network.named_modules():
        number = name[-1:]
        if isinstance(module, (GBlock, DBlock)):
            where = f"g_block{number}" if g else f"d_block{int(number) + 1}"
            where = "d_optimized_block1" if name == "opt_block1" else where
            for ours, theirs in (("snconv2d1", "conv1"), ("snconv2d2", "conv2"), ("snconv2d0", "conv3")):
                if hasattr(module, ours) and (g or ours != "snconv2d0" or module.down):
                    put(f"{where}/{'sn' if g else 'sn_'}{theirs}", getattr(module, ours))
            for i in range(2 if g else 0):
                norm = getattr(module, f"cond_bn{i + 1}")
                gain, bias = norm.embed.weight.chunk(2, 1)
                values = {"gamma": gain, "beta": bias, "mean": norm.bn.running_mean, "var": norm.bn.running_var}
                variables |= {f"{where}/cbn_{i}/{key}": value for key, value in values.items()}
        elif isinstance(module, Block):
            where = "g_non_local" if g else "d_non_local"
            for part in ("theta", "phi", "g", "attn"):
                put(f"{where}/sn_conv_{part}", getattr(module, f"snconv1x1_{part}"))
                variables.pop(f"{where}/sn_conv_{part}/biases")
                getattr(module, f"snconv1x1_{part}").bias.data.zero_()
            variables[f"{where}/sigma_ratio"] = module.sigma.reshape(())
    if g:
        put("g_snh0", network.snlinear0, torch.arange(WIDTHS_G[0] * 16).view(-1, 16).t().flatten())
        put("g_snconv_last", network.snconv2d1)
        values = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        variables |= {f"g_bn/{key}": getattr(network.bn, name) for key, name in values.items()}
    else:
        put("d_sn_linear", network.snlinear1)
        variables["d_embedding/embedding_map"] = network.sn_embedding1.weight_orig
        variables["d_embedding/u"] = network.sn_embedding1.weight_u[None]
    return {f"model/{key}": value.detach().numpy() for key, value in variables.items()}
