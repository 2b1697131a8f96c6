#!/usr/bin/env bash
# torch 2.14.1 (2026): two optimizers given one learning rate as a tensor decay it twice a step.
#
# A learning rate may be a tensor, so that torch.compile does not recompile when it changes. The optimizer keeps the
# caller's tensor, and a scheduler fills it in place. So the schedulers of a generator and a discriminator multiply one
# rate, and the caller's own variable changes. A schedule in closed form, such as LambdaLR, hides it if both are equal.
# If they differ, the last one to step sets the rate of both.
#
# Seen, Linux, Python 3.11, a rate of 1, after one step of both optimizers and schedulers:
#   torch 2.14.1+cu130, ExponentialLR(0.5): float [0.5, 0.5], tensor [0.25, 0.25], the caller's tensor 0.25
#   LambdaLR, 0.5 for one and 0.125 for the other: float [0.5, 0.125], tensor [0.125, 0.125], the caller's tensor 0.125
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/rates.py" <<'PYTHON'
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR


def rates(rate, schedules):
    optimizers = [torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), lr=rate) for _ in range(2)]
    schedulers = [schedule(o) for schedule, o in zip(schedules, optimizers, strict=True)]
    for each in optimizers + schedulers:
        each.step()
    return [float(o.param_groups[0]["lr"]) for o in optimizers]


def halve(optimizer):
    return ExponentialLR(optimizer, 0.5)


def falling(factor):
    return lambda optimizer: LambdaLR(optimizer, lambda step: factor**step)


for name, schedules in (
    (f"torch {torch.__version__}, ExponentialLR(0.5)", (halve, halve)),
    ("LambdaLR, 0.5 for one and 0.125 for the other", (falling(0.5), falling(0.125))),
):
    mine = torch.tensor(1.0)
    plain, tensor = rates(1.0, schedules), rates(mine, schedules)
    print(f"{name}: float {plain}, tensor {tensor}, the caller's tensor {float(mine)}")
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/torch" torch==2.14.1 numpy
said=$(PYTHONPATH="$folder/torch" python3 "$folder/rates.py" 2> "$folder/errors" || cat "$folder/errors")
printf '%s\n' "$said"
expected="torch 2.14.1+cu130, ExponentialLR(0.5): float [0.5, 0.5], tensor [0.25, 0.25], the caller's tensor 0.25
LambdaLR, 0.5 for one and 0.125 for the other: float [0.5, 0.125], tensor [0.125, 0.125], the caller's tensor 0.125"
[ "$said" = "$expected" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
