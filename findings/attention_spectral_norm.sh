#!/usr/bin/env bash
# torch 2.14.1 (2026): spectral norm of MultiheadAttention's output projection freezes the projection, without a word.
#
# torch.nn.utils.spectral_norm computes the weight in a hook of the layer's forward. MultiheadAttention reads
# `out_proj.weight` and never calls `out_proj`, so the hook never runs. A loop that normalizes every nn.Linear of a
# discriminator finds `out_proj`, too. From then on the projection is not normalized, no gradient reaches `weight_orig`,
# and an optimizer leaves it at its first value. torch.nn.utils.parametrizations.spectral_norm works.
#
# Seen, Linux, Python 3.11, weights times 3, ten steps of Adam:
#   torch 2.14.1+cu130, hook: gradient of the projection False, its norm 1 False, its weight trained False
#   parametrization: gradient of the projection True, its norm 1 True, its weight trained True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/projection.py" <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm


def network(normalize):
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        attention.out_proj.weight.mul_(3)
    for name, layer in list(attention.named_modules()):
        if isinstance(layer, nn.Linear):
            setattr(attention, name, normalize(layer, n_power_iterations=20))
    return attention


def said(normalize, original):
    torch.manual_seed(0)
    attention, x = network(normalize), torch.randn(2, 8, 16)
    weight = attention.get_parameter(original)
    before = weight.detach().clone()
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        (attention(x, x, x)[0] - x).square().sum().backward()
        optimizer.step()
    attention(x, x, x)
    norm = float(torch.linalg.matrix_norm(attention.out_proj.weight.detach(), 2))
    line = f"gradient of the projection {weight.grad is not None}, its norm 1 {abs(norm - 1) < 0.01}"
    return f"{line}, its weight trained {not torch.equal(weight, before)}"


print(f"torch {torch.__version__}, hook: {said(spectral_norm, 'out_proj.weight_orig')}")
print(f"parametrization: {said(parametrizations.spectral_norm, 'out_proj.parametrizations.weight.original')}")
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/torch" torch==2.14.1 numpy
said=$(PYTHONPATH="$folder/torch" python3 "$folder/projection.py" 2> "$folder/errors" || cat "$folder/errors")
printf '%s\n' "$said"
expected="torch 2.14.1+cu130, hook: gradient of the projection False, its norm 1 False, its weight trained False
parametrization: gradient of the projection True, its norm 1 True, its weight trained True"
[ "$said" = "$expected" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
