#!/usr/bin/env bash
# torch 2.14.1 (2026), CPU: a convolution whose bias alone is trained computes the gradient of its weights, and drops it.
#
# Who freezes weights and trains biases, as BitFit does, pays for the weights' gradient too. oneDNN prints which of its
# primitives run: the gradient of the bias comes out of `backward_weights`, which does the weights' products as well.
# The sum of the gradient over images and pixels is the same. The gradient of the input alone does not run it.
#
# Seen, Linux x86-64, Python 3.11; the trained tensors, the primitives that ran in backward, and what came out:
#   weight,bias: 1 backward_weights, torch 2.14.1+cu130, gradients of weight and bias
#   bias: 1 backward_weights, torch 2.14.1+cu130, gradients of bias
#   input: 0 backward_weights, torch 2.14.1+cu130, gradients of input
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/bias.py" <<'PYTHON'
import sys

import torch

trained = sys.argv[1].split(",")
torch.manual_seed(0)
conv = torch.nn.Conv2d(16, 16, 3, padding=1)
x = torch.randn(2, 16, 8, 8)
places = {"weight": conv.weight, "bias": conv.bias, "input": x}
for name, tensor in places.items():
    tensor.requires_grad_(name in trained)
out = conv(x)
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
    out.square().sum().backward()
got = [name for name, tensor in places.items() if tensor.grad is not None]
if "bias" in trained:
    torch.testing.assert_close(conv.bias.grad, (2 * out).detach().sum((0, 2, 3)))
print(f"torch {torch.__version__}, gradients of {' and '.join(got)}")
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/torch" torch==2.14.1 numpy
said=$(for trained in weight,bias bias input; do
    PYTHONPATH="$folder/torch" python3 "$folder/bias.py" "$trained" > "$folder/said" 2> "$folder/errors" || cat "$folder/errors"
    echo "$trained: $(grep -c ',exec,.*,backward_weights,' "$folder/said" || true) backward_weights, $(tail -1 "$folder/said")"
done)
printf '%s\n' "$said"
expected="weight,bias: 1 backward_weights, torch 2.14.1+cu130, gradients of weight and bias
bias: 1 backward_weights, torch 2.14.1+cu130, gradients of bias
input: 0 backward_weights, torch 2.14.1+cu130, gradients of input"
[ "$said" = "$expected" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
