#!/usr/bin/env bash
# Triton 3.6.0 (2026): its wheel compiles for no card of compute capability 11.0 (Jetson Thor), though Triton accepts it.
#
# Triton makes PTX for the target and calls the assembler for Blackwell in its wheel. That of 3.6.0 is from CUDA 12.9,
# which called this chip sm_101a. CUDA 13 renamed it to sm_110a. So the kernel's compilation ends in PTXASError. The
# wheel of 3.7.0 has an assembler of CUDA 13. Compute capabilities 10.3 and 12.1 compile with both.
#
# Seen, Linux, Python 3.11, no GPU:
#   triton 3.6.0: 103 compiles, 110 PTXASError, 121 compiles
#   triton 3.7.0: 103 compiles, 110 compiles, 121 compiles
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/thor.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(x_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=offsets < size), mask=offsets < size)


seen = []
for arch in (103, 110, 121):
    source = ASTSource(double, {"x_ptr": "*fp32", "size": "i32", "BLOCK": "constexpr"}, {(2,): 256})
    try:
        triton.compile(source, target=GPUTarget("cuda", arch, 32))
        seen.append(f"{arch} compiles")
    except Exception as error:
        seen.append(f"{arch} {type(error).__name__}")
print(f"triton {triton.__version__}:", ", ".join(seen))
sys.exit(", ".join(seen) != sys.argv[1])
PYTHON
for version in 3.6.0 3.7.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet "triton==$version" "numpy<2.4" setuptools
done
export TRITON_CACHE_DIR="$folder/cache"
"$folder/3.6.0/bin/python" "$folder/thor.py" "103 compiles, 110 PTXASError, 121 compiles" 2>/dev/null | tail -n 1
"$folder/3.7.0/bin/python" "$folder/thor.py" "103 compiles, 110 compiles, 121 compiles" 2>/dev/null | tail -n 1
