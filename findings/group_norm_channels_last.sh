#!/usr/bin/env bash
# torch 2.14.1 (2026): group_norm of a channels_last tensor on the CPU loses what the same tensor in NCHW keeps.
#
# The variance of a channels_last tensor is taken as E[x^2] - E[x]^2 in float32, which cancels when the mean is large
# beside the spread. So the memory format, which is no part of the values, decides the result. The NCHW path of
# group_norm, instance_norm, and batch_norm in both formats have no such loss. Nothing warns.
#
# Seen, Linux x86-64, Python 3.11, normal numbers plus a mean, largest error against float64 (outputs reach about 4):
#   torch 2.14.1+cu130
#   mean 100: NCHW below 0.001 True, channels_last below 0.001 False
#   mean 1000: NCHW below 0.001 True, channels_last below 0.1 False, batch_norm below 0.01 True
#   mean 10000: NCHW below 0.01 True, channels_last below 100 False, batch_norm below 0.1 True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/norm.py" <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
print(f"torch {torch.__version__}")


def group(x):
    return F.group_norm(x, 8)


def batch(x):
    return F.batch_norm(x, None, None, training=True)


def error(norm, x):
    return float((norm(x) - norm(x.double().contiguous())).abs().max())


for mean, good, bad, batch_good in ((100, 1e-3, 1e-3, None), (1000, 1e-3, 0.1, 0.01), (10000, 0.01, 100, 0.1)):
    x = torch.randn(2, 32, 16, 16) + mean
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(x, last)
    line = f"mean {mean}: NCHW below {good} {error(group, x) < good}, "
    line += f"channels_last below {bad} {error(group, last) < bad}"
    if batch_good:
        line += f", batch_norm below {batch_good} {max(error(batch, x), error(batch, last)) < batch_good}"
    print(line)
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/torch" torch==2.14.1 numpy
said=$(PYTHONPATH="$folder/torch" python3 "$folder/norm.py" 2> "$folder/errors" || cat "$folder/errors")
printf '%s\n' "$said"
expected="torch 2.14.1+cu130
mean 100: NCHW below 0.001 True, channels_last below 0.001 False
mean 1000: NCHW below 0.001 True, channels_last below 0.1 False, batch_norm below 0.01 True
mean 10000: NCHW below 0.01 True, channels_last below 100 False, batch_norm below 0.1 True"
[ "$said" = "$expected" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
