"""A hand-written SAGAN: a `Self_Attn` as in many repositories, torch's spectral norm, two networks in training."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import sagan_fast


class Self_Attn(nn.Module):  # noqa: N801
    """Attention without pooling; it returns its map too, which most callers throw away."""

    def __init__(self, in_dim):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = torch.softmax(torch.bmm(q.transpose(1, 2), k), dim=-1)
        out = torch.bmm(v, attention.transpose(1, 2)).view(x.shape)
        return self.gamma * out + x, attention


class Discriminator(nn.Module):
    def __init__(self, channels=32):
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(3, channels, 4, stride=2, padding=1))
        self.attention = Self_Attn(channels)
        self.conv2 = spectral_norm(nn.Conv2d(channels, 1, 4, stride=2, padding=1))

    def forward(self, x):
        x, attention = self.attention(torch.relu(self.conv1(x)))
        return self.conv2(x).mean(dim=(1, 2, 3)), attention


torch.manual_seed(0)
generator = nn.Sequential(nn.ConvTranspose2d(8, 32, 8), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 4), nn.Tanh())
discriminator = Discriminator()
g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.0, 0.9))

print(sagan_fast.accelerate(discriminator))

for _ in range(3):
    real, z = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 8, 1, 1)
    d_optimizer.zero_grad()
    loss = (
        torch.relu(1 - discriminator(real)[0]).mean() + torch.relu(1 + discriminator(generator(z).detach())[0]).mean()
    )
    loss.backward()
    d_optimizer.step()
    g_optimizer.zero_grad()
    scores, attention = discriminator(generator(z))
    (-scores.mean()).backward()
    g_optimizer.step()

print(f"map of {tuple(attention.shape)}, computed now: each row sums to {attention.sum(2).mean().item():.3f}")
