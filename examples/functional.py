"""The operations as functions of tensors, for a model with its own modules."""

import torch

import sagan_fast.functional as sf

torch.manual_seed(0)

# softmax(q kᵀ) v, without the map in memory; scale=D ** -0.5 gives the attention of transformers
q, k, v = torch.randn(2, 1024, 16), torch.randn(2, 256, 16), torch.randn(2, 256, 64)
out = sf.attention(q, k, v)
print(f"attention: {tuple(out.shape)}")

# the whole block: x + gamma * o(softmax(theta(x) phi(x)ᵀ) g(x)), keys and values max-pooled
C = 64
x = torch.randn(2, C, 32, 32, requires_grad=True)
theta, phi, g = (torch.randn(n, C, 1, 1) / C**0.5 for n in (C // 8, C // 8, C // 2))
o, gamma = torch.randn(C, C // 2, 1, 1) / C**0.5, torch.tensor(0.5, requires_grad=True)
y = sf.self_attention_2d(x, theta, phi, g, o, gamma)
y.square().mean().backward()
print(f"block: {tuple(y.shape)}, gradient of gamma {gamma.grad.item():.4f}")

# spectral norm of several weights in one pass; u and v are updated in place
weights = [torch.randn(64, 8, 3, 3, requires_grad=True), torch.randn(10, 64, requires_grad=True)]
us = [torch.nn.functional.normalize(torch.randn(w.shape[0]), dim=0) for w in weights]
vs = [torch.nn.functional.normalize(torch.randn(w[0].numel()), dim=0) for w in weights]
for _ in range(200):
    normed = sf.spectral_norm_group(weights, us, vs)
largest = [torch.linalg.matrix_norm(w.detach().flatten(1), 2).item() for w in normed]
print(f"largest singular values: {largest[0]:.2f} and {largest[1]:.2f}")
