#!/usr/bin/env bash
# Triton 3.6.0 (2026): its wheel compiles for no card of compute capability 11.0 (Jetson Thor), though Triton accepts it.
#
# Triton makes PTX for the target and calls the assembler for Blackwell in its wheel. That of 3.6.0 is from CUDA 12.9,
# which called this chip sm_101a. CUDA 13 renamed it to sm_110a. So the kernel's compilation ends in PTXASError. The
# wheel of 3.7.0 has an assembler of CUDA 13. Compute capabilities 10.3 and 12.1 compile with both.
#
# 3.6.0 cannot list what it compiled for these two: its disassembler is from CUDA 12.8, which knows neither, so
# `kernel.asm["sass"]` raises. TRITON_NVDISASM_PATH can name a newer one.
#
# Seen, Linux, Python 3.11, no GPU:
#   triton 3.6.0: 103 compiles, no listing (CalledProcessError); 110 PTXASError; 121 compiles, no listing (CalledProcessError)
#   triton 3.7.0: 103 compiles, listing; 110 compiles, listing; 121 compiles, listing
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
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    except Exception as error:
        seen.append(f"{arch} {type(error).__name__}")
        continue
    try:
        listing = "listing" if "STG" in kernel.asm["sass"] else "empty listing"
    except Exception as error:
        listing = f"no listing ({type(error).__name__})"
    seen.append(f"{arch} compiles, {listing}")
print(f"triton {triton.__version__}:", "; ".join(seen))
sys.exit("; ".join(seen) != sys.argv[1])
PYTHON
for version in 3.6.0 3.7.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet "triton==$version" "numpy<2.4" setuptools
done
old="103 compiles, no listing (CalledProcessError); 110 PTXASError; 121 compiles, no listing (CalledProcessError)"
new="103 compiles, listing; 110 compiles, listing; 121 compiles, listing"
export TRITON_CACHE_DIR="$folder/cache"
"$folder/3.6.0/bin/python" "$folder/thor.py" "$old" 2>/dev/null | tail -n 1
"$folder/3.7.0/bin/python" "$folder/thor.py" "$new" 2>/dev/null | tail -n 1
