#!/usr/bin/env bash
# torch 2.14.1 (2026), CPU: batch norm moves its running averages without their version, so autograd does not notice.
#
# A forward in eval mode keeps the running averages for its backward pass. If a forward in training mode comes between
# the two, it moves them in place. Autograd compares versions to refuse such a backward, but batch norm leaves the
# version as it was: the gradient is that of other statistics, without an error. A change by hand is refused. This
# concerns a penalty in eval mode whose backward runs after the next training forward. pytorch/pytorch#13402 is open
# since 2018.
#
# Seen, Linux x86-64, Python 3.11; who moved the averages between forward and backward, and what came of it:
#   nobody: version 0, gradient off by 0.00
#   a forward in training mode: version 0, gradient off by 0.25
#   mul_(2): version 1, RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/versions.py" <<'PYTHON'
import torch


def moved_by(move):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3).double().eval()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    (right,) = torch.autograd.grad(norm(x).square().sum(), x)
    out = norm(x)
    move(norm, x.detach())
    try:
        (found,) = torch.autograd.grad(out.square().sum(), x)
        said = f"gradient off by {((found - right).norm() / right.norm()).item():.2f}"
    except RuntimeError as error:
        said = f"RuntimeError: {str(error).split(':')[0]}"
    return f"version {norm.running_var._version}, {said}"


def forward_in_training(norm, x):
    norm.train()(3 * x + 1)
    norm.eval()


print("nobody:", moved_by(lambda norm, x: None))
print("a forward in training mode:", moved_by(forward_in_training))
print("mul_(2):", moved_by(lambda norm, x: norm.running_var.mul_(2)))
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/torch" torch==2.14.1 numpy
said=$(PYTHONPATH="$folder/torch" python3 "$folder/versions.py")
printf '%s\n' "$said"
expected="nobody: version 0, gradient off by 0.00
a forward in training mode: version 0, gradient off by 0.25
mul_(2): version 1, RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation"
[ "$said" = "$expected" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
