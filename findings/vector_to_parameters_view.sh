#!/usr/bin/env bash
# torch 2.14.1 (2026): vector_to_parameters copies nothing; two networks filled from one vector train each other.
#
# Its documentation says that it copies slices of the vector. It makes every parameter a view of the vector instead. A
# vector of weights that fills a generator and its average, or both members of a pair, ties them. A step of one network
# then moves the other and the vector itself. A parameter also loses its channels_last layout.
#
# Seen, Linux, Python 3.11, one step of SGD on the first of two networks:
#   torch 2.14.1+cu130: the second network moved True, the vector moved True, channels_last kept False
#   filled by copy_ instead: the second network moved False, the vector moved False, channels_last kept True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/views.py" <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def by_copy(vector, parameters):
    parameters = list(parameters)
    with torch.no_grad():
        for part, parameter in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True):
            parameter.copy_(part.view_as(parameter))


def after_a_step(fill):
    torch.manual_seed(0)
    first, second = (nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    vector = parameters_to_vector(nn.Conv2d(4, 4, 3).parameters()).detach().clone()
    fill(vector, first.parameters())
    fill(vector, second.parameters())
    before, weight = vector.clone(), second.weight.detach().clone()
    optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
    first(torch.randn(1, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    kept = first.weight.is_contiguous(memory_format=torch.channels_last)
    moved = not torch.equal(second.weight, weight), not torch.equal(vector, before)
    return f"the second network moved {moved[0]}, the vector moved {moved[1]}, channels_last kept {kept}"


print(f"torch {torch.__version__}: {after_a_step(vector_to_parameters)}")
print(f"filled by copy_ instead: {after_a_step(by_copy)}")
PYTHON
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/torch" torch==2.14.1 numpy
said=$(PYTHONPATH="$folder/torch" python3 "$folder/views.py" 2> "$folder/errors" || cat "$folder/errors")
printf '%s\n' "$said"
expected="torch 2.14.1+cu130: the second network moved True, the vector moved True, channels_last kept False
filled by copy_ instead: the second network moved False, the vector moved False, channels_last kept True"
[ "$said" = "$expected" ] || { echo "torch behaves otherwise now" >&2; exit 1; }
