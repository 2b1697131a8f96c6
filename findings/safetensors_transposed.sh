#!/usr/bin/env bash
# safetensors 0.8.0 (2026): safetensors.numpy writes a transposed array's values in the wrong order, without a word.
#
# It writes the array's memory from its first address on, as if it were in C order, under the array's shape. So a
# TensorFlow kernel transposed to PyTorch's order, an array in Fortran order and a strided view load with other values.
# `save` and `save_file` do the same. The docstring asks for contiguous arrays, but nothing checks. 0.7.0 is right, and
# safetensors.torch refuses such tensors. In the project's tracker since August 2026 as issue 825.
#
# Seen, Linux, Python 3.11, NumPy 2.3.5, arrays that load as they were:
#   safetensors 0.7.0: C order same, kernel transposed same, Fortran order same, every second column same
#   safetensors 0.8.0: C order same, the other three other values
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernel.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save, save_file

kernel = np.arange(3 * 3 * 2 * 4, dtype=np.float32).reshape(3, 3, 2, 4)
arrays = {
    "C order": kernel,
    "kernel transposed": kernel.transpose(3, 2, 0, 1),
    "Fortran order": np.asfortranarray(kernel),
    "every second column": kernel[..., ::2],
}
said = []
for name, array in arrays.items():
    path = f"{sys.argv[1]}/kernel.safetensors"
    save_file({"kernel": array}, path)
    found = [load_file(path)["kernel"], load(save({"kernel": array}))["kernel"]]
    assert all(f.shape == array.shape and f.dtype == array.dtype for f in found)
    same = {bool(np.array_equal(f, array)) for f in found}
    said.append(f"{name} {'same' if same == {True} else 'other values' if same == {False} else 'mixed'}")
print(f"safetensors {safetensors.__version__}: {', '.join(said)}")
PYTHON
said=""
for version in 0.7.0 0.8.0; do
    python3 -m pip install --quiet --disable-pip-version-check --target "$folder/$version" \
        "safetensors==$version" numpy==2.3.5
    said+=$(PYTHONPATH="$folder/$version" python3 "$folder/kernel.py" "$folder")$'\n'
done
printf '%s' "$said"
other="other values"
expected="safetensors 0.7.0: C order same, kernel transposed same, Fortran order same, every second column same
safetensors 0.8.0: C order same, kernel transposed $other, Fortran order $other, every second column $other
"
[ "$said" = "$expected" ] || { echo "safetensors behaves otherwise now" >&2; exit 1; }
