#!/usr/bin/env bash
# torch 2.14.1 (2026): the tangent of an operator registered with torch.library.custom_op is zero, without a word.
#
# The operator has a backward (register_autograd), so its gradient is right. torch.func.jvp and forward-mode AD have
# no formula for it. Built-in operators without one raise NotImplementedError, and so does an autograd.Function without
# `jvp`. A custom operator returns a tangent of zeros, or none, instead. Compiled, the Function has a right tangent,
# taken from its traced body, and the operator still zeros.
#
# Seen, Linux, Python 3.11, x = 3, x * x in all three:
#   torch 2.14.1+cu130: gradient 6.0, jvp of the operator 0.0, dual number's tangent None
#   the Function raises NotImplementedError, compiled 6.0, the operator compiled 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/tangent.py" <<'PYTHON'
import torch
from torch.autograd import forward_ad
from torch.func import jvp


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@square.register_fake
def _(x):
    return torch.empty_like(x)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, gradient):
    return 2 * ctx.saved_tensors[0] * gradient


square.register_autograd(backward, setup_context=keep)


class Square(torch.autograd.Function):
    forward = staticmethod(lambda x: x * x)
    setup_context = staticmethod(keep)
    backward = staticmethod(backward)


x, t = torch.tensor(3.0), torch.tensor(1.0)


def tangent(function):
    return lambda x: jvp(function, (x,), (t,))[1]


def said(function):
    try:
        return float(function(x))
    except Exception as error:
        return type(error).__name__


with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(square(forward_ad.make_dual(x, t))).tangent
leaf = x.clone().requires_grad_()
square(leaf).backward()
print(f"torch {torch.__version__}: gradient {float(leaf.grad)}, jvp of the operator {said(tangent(square))},", end=" ")
print(f"dual number's tangent {dual}")
compiled = [said(torch.compile(tangent(f), backend="aot_eager")) for f in (Square.apply, square)]
print(f"the Function raises {said(tangent(Square.apply))}, compiled {compiled[0]}, the operator compiled {compiled[1]}")
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/torch" torch==2.14.1 numpy
said=$(PYTHONPATH="$folder/torch" python3 "$folder/tangent.py" 2> "$folder/errors" || cat "$folder/errors")
printf '%s\n' "$said"
expected="torch 2.14.1+cu130: gradient 6.0, jvp of the operator 0.0, dual number's tangent None
the Function raises NotImplementedError, compiled 6.0, the operator compiled 0.0"
[ "$said" = "$expected" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
