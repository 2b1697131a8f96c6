"""Attention blocks as other code bases have them, and a network around each, written from their description."""

import torch
import torch.nn.functional as F
from foreign_layers import BigGANConv, MimicryConv, MmgenConv, Wrapped, hooked
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import spectral_norm as legacy


class Block(nn.Module):
    """Names of the convolutions and of the scalar, with what differs between the code bases as options."""

    def __init__(self, conv, names, scalar="gamma", shape=(1,), C=16, D_QK=2, D_V=8, pool=True):
        super().__init__()
        self.names, self.scalar, self.pool = names, scalar, pool
        sizes = [(C, D_QK), (C, D_QK), (C, D_V), (D_V, C)]
        for name, (inputs, outputs) in zip(names, sizes, strict=False):
            setattr(self, name, conv(inputs, outputs))
        setattr(self, scalar, nn.Parameter(torch.full(shape, 0.3)))

    def parts(self, x):
        q, k, v = (getattr(self, name)(x) for name in self.names[:3])
        if self.pool:
            k, v = F.max_pool2d(k, 2), F.max_pool2d(v, 2)
        return q.flatten(2), k.flatten(2), v.flatten(2)

    def output(self, out, x):
        out = out.view(x.shape[0], -1, *x.shape[2:])
        if len(self.names) == 4:
            out = getattr(self, self.names[3])(out)
        return x + getattr(self, self.scalar) * out

    def forward(self, x):
        q, k, v = self.parts(x)
        beta = F.softmax(torch.bmm(q.transpose(1, 2), k), -1)
        return self.output(torch.bmm(v, beta.transpose(1, 2)), x)


class WithClasses(Block):
    def forward(self, x, y=None):
        return super().forward(x)


class WithMap(Block):
    def forward(self, x):
        q, k, v = self.parts(x)
        beta = F.softmax(torch.bmm(q.transpose(1, 2), k), -1)
        return self.output(torch.bmm(v, beta.transpose(1, 2)), x), beta


class Exchanged(Block):
    """Over one axis of positions, the softmax over the first of the map's: exact with query and key exchanged."""

    def forward(self, x):
        flat = x.flatten(2)
        q, k, v = (getattr(self, name)(flat) for name in self.names)
        beta = F.softmax(torch.bmm(q.transpose(1, 2), k), 1)
        return getattr(self, self.scalar) * torch.bmm(v, beta).view(x.shape) + x


class Container(nn.Module):
    """A module that holds one convolution, as mmcv's."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.activate = conv, None

    def forward(self, x):
        x = self.conv(x)
        return x if self.activate is None else self.activate(x)


def conv(inputs, outputs, bias=False):
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


THETA = ("theta", "phi", "g", "o")
QUERY = ("query_conv", "key_conv", "value_conv")
BLOCKS = {
    "biggan": lambda: WithClasses(lambda i, o: BigGANConv(i, o, 1, bias=False), THETA, shape=()),
    "mimicry": lambda: Block(lambda i, o: MimicryConv(i, o, 1, bias=False), THETA),
    "mmgeneration": lambda: Block(lambda i, o: Container(MmgenConv(i, o, 1, bias=False)), THETA),
    "mmgeneration-torch": lambda: Block(lambda i, o: Container(legacy(conv(i, o))), THETA, shape=()),
    "studiogan": lambda: Block(
        lambda i, o: legacy(conv(i, o), eps=1e-6), [f"conv1x1_{n}" for n in ("theta", "phi", "g", "attn")], "sigma"
    ),
    "voletiv": lambda: Block(
        lambda i, o: legacy(conv(i, o, True)), [f"snconv1x1_{n}" for n in ("theta", "phi", "g", "attn")], "sigma"
    ),
    "huggingface": lambda: Block(
        lambda i, o: legacy(conv(i, o), eps=1e-4), [f"snconv1x1_{n}" for n in ("theta", "phi", "g", "o_conv")]
    ),
    "heykeetae": lambda: WithMap(lambda i, o: conv(i, o, True), QUERY, D_V=16, pool=False),
    "wrapper": lambda: WithMap(lambda i, o: Wrapped(conv(i, o, True)), QUERY, D_QK=4, D_V=16, pool=False),
    "rosinality": lambda: Exchanged(lambda i, o: hooked(nn.Conv1d(i, o, 1)), ("query", "key", "value"), D_V=16),
    "fastai": lambda: Exchanged(
        lambda i, o: parametrizations.spectral_norm(nn.Conv1d(i, o, 1, bias=False)), ("query", "key", "value"), D_V=16
    ),
    "pooled fastai": lambda: Block(lambda i, o: legacy(conv(i, o)), THETA, pool=True),
}
NORMS = {
    "biggan": lambda *sizes: BigGANConv(*sizes),
    "mimicry": lambda *sizes: MimicryConv(*sizes),
    "mmgeneration": lambda *sizes: MmgenConv(*sizes),
    "heykeetae": lambda *sizes: Wrapped(nn.Conv2d(*sizes)),
    "wrapper": lambda *sizes: Wrapped(nn.Conv2d(*sizes)),
    "rosinality": lambda *sizes: hooked(nn.Conv2d(*sizes)),
    "fastai": lambda *sizes: parametrizations.spectral_norm(nn.Conv2d(*sizes)),
}


class Net(nn.Module):
    """Convolution, attention, batch norm, convolution; the caller of "biggan" gives classes, maps are returned."""

    def __init__(self, kind, norm=True):
        super().__init__()
        make = NORMS.get(kind, lambda *sizes: legacy(nn.Conv2d(*sizes), eps=1e-6))
        self.kind = kind
        self.conv1, self.attention = make(3, 16, 3), BLOCKS[kind]()
        self.bn = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.conv2 = make(16, 4, 3)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        assert isinstance(self.attention, Block)
        out = self.attention(x, "classes") if self.kind == "biggan" else self.attention(x)
        out, *maps = out if isinstance(out, tuple) else (out,)
        out = self.conv2(self.bn(out)).mean((2, 3))
        return (out, *maps) if maps else out
