#!/usr/bin/env bash
# accelerate 1.15.0 (2026): with gradient accumulation over two batches, a GAN's discriminator never takes a step.
#
# Every `with accelerator.accumulate(network)` counts a batch, whichever network it is given. A GAN enters it twice per
# batch, for the discriminator and the generator. With two accumulation steps the first is then always the odd one: its
# optimizer skips `step` and `zero_grad` for ever, while the generator steps at every batch. Any even number freezes the
# discriminator. Nothing warns.
#
# Seen, Linux, Python 3.11, torch 2.14.1, steps that each optimizer took in 12 batches:
#   accelerate 1.15.0: 1 accumulated: discriminator 12, generator 12
#   2 accumulated: discriminator 0, generator 12
#   3 accumulated: discriminator 4, generator 4
#   4 accumulated: discriminator 0, generator 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/steps.py" <<'PYTHON'
import sys

import accelerate
import torch
from torch import nn

count = int(sys.argv[1])
accelerator = accelerate.Accelerator(gradient_accumulation_steps=count, cpu=True)
D, G = nn.Linear(2, 1), nn.Linear(2, 2)
D, G, *optimizers = accelerator.prepare(D, G, *(torch.optim.SGD(n.parameters(), lr=0.1) for n in (D, G)))
taken = [0, 0]


def train(turn, network, loss):
    before = network.weight.detach().clone()
    with accelerator.accumulate(network):
        accelerator.backward(loss())
        optimizers[turn].step()
        optimizers[turn].zero_grad()
    taken[turn] += not torch.equal(network.weight, before)


torch.manual_seed(0)
for _ in range(12):
    train(0, D, lambda: D(torch.randn(4, 2)).mean() - D(G(torch.randn(4, 2)).detach()).square().mean())
    train(1, G, lambda: D(G(torch.randn(4, 2))).square().mean())
version = f"accelerate {accelerate.__version__}: " if count == 1 else ""
print(f"{version}{count} accumulated: discriminator {taken[0]}, generator {taken[1]}")
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/packages" \
    torch==2.14.1 numpy accelerate==1.15.0
said=$(for count in 1 2 3 4; do
    PYTHONPATH="$folder/packages" python3 "$folder/steps.py" "$count" 2> "$folder/errors" || cat "$folder/errors"
done)
printf '%s\n' "$said"
expected="accelerate 1.15.0: 1 accumulated: discriminator 12, generator 12
2 accumulated: discriminator 0, generator 12
3 accumulated: discriminator 4, generator 4
4 accumulated: discriminator 0, generator 6"
[ "$said" = "$expected" ] || { echo "accelerate behaves otherwise now" >&2; exit 1; }
