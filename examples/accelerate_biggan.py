"""A generator in BigGAN-PyTorch's style: its layers normalise their own weights, its optimizer exists already.

`sagan_fast.accelerate` changes what computes the attention block and the spectral norm. The module objects, the
parameters, the optimizer and the keys of the state dict stay.
"""

import torch
import torch.nn.functional as F
from torch import nn

import sagan_fast


class SNConv2d(nn.Conv2d):
    """A convolution that divides its weight by its largest singular value, found by one power iteration a forward."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("u0", torch.randn(1, self.out_channels))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self):  # noqa: N802
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u0 @ matrix)
            u = F.normalize(v @ matrix.t())
            if self.training:
                self.u0.copy_(u)
        sigma = (v @ matrix.t() @ u.t()).squeeze()
        if self.training:
            self.sv0.copy_(sigma.detach())
        return self.weight / sigma

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class Attention(nn.Module):
    """The block of the released SAGAN: pooled keys and values, an output convolution, one scalar."""

    def __init__(self, channels):
        super().__init__()
        self.theta = SNConv2d(channels, channels // 8, 1, bias=False)
        self.phi = SNConv2d(channels, channels // 8, 1, bias=False)
        self.g = SNConv2d(channels, channels // 2, 1, bias=False)
        self.o = SNConv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.1))

    def forward(self, x, y=None):
        q = self.theta(x).flatten(2)
        k, v = (F.max_pool2d(conv(x), 2).flatten(2) for conv in (self.phi, self.g))
        beta = torch.softmax(q.transpose(1, 2) @ k, dim=-1)
        out = (v @ beta.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.o(out)


torch.manual_seed(0)
model = nn.Sequential(SNConv2d(3, 32, 3, padding=1), nn.ReLU(), Attention(32), SNConv2d(32, 3, 3, padding=1), nn.Tanh())
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.999))

report = sagan_fast.accelerate(model)
print(report)

for _ in range(3):
    optimizer.zero_grad()
    loss = model(torch.randn(4, 3, 32, 32)).square().mean()
    loss.backward()
    optimizer.step()
print(f"loss after 3 steps: {loss.item():.4f}")

report.undo()  # the classes that computed it before
print(f"undone: {type(model[2]) is Attention}")
