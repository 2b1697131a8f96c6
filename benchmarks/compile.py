"""Compile a plan for a GPU that need not be there, and read what the machine code uses.

Works where only torch, triton and numpy are: the assembler and disassembler come with Triton. What was read is kept
beside Triton's own cache, so that a second report costs no disassembly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the launchers ask for; Triton 3.9 warns when unset

from benchmarks.sass import Code, parse

_RESOURCE = re.compile(r"(REG|STACK|LOCAL):(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What a compilation produced. `shared` and `stack` are bytes, `tmem` columns; `sass` is nvdisasm's text."""

    arch: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    tmem: int
    sass: str
    ttir: str

    @property
    def spills(self) -> int:
        """Loads and stores of local memory in the code, and bytes of local memory: 0 is the only good answer."""
        return self.code().count("LDL", "STL") + self.local

    def code(self) -> Code:
        """The machine code, parsed."""
        return _parsed(self.sass)


_PARSED: dict[str, Code] = {}


def _parsed(text: str) -> Code:
    if text not in _PARSED:
        _PARSED[text] = parse(text)
    return _PARSED[text]


def compile_key(plan: Any, arch: int) -> tuple[Any, ...]:
    """Equal for two plans that compile to the same code for `arch`, whatever their grids and trip counts."""
    return (
        _kernel_name(plan.kernel),
        tuple(sorted(plan.signature.items())),
        tuple(sorted((name, repr(value)) for name, value in plan.constexprs.items())),
        tuple(sorted(plan.divisible_by_16)),
        plan.num_warps,
        plan.num_stages,
        tuple(sorted((name, repr(value)) for name, value in plan.options.items())),
        arch,
    )


def _kernel_name(kernel: Any) -> str:
    function = getattr(kernel, "fn", kernel)
    return f"{function.__module__}.{function.__qualname__}"


def compile_plan(plan: Any, arch: int) -> Compiled:
    """Compile `plan` for compute capability `arch` (80, 90, 100) and read the result; no GPU is needed.

    Raises RuntimeError if kernels were imported for the interpreter (TRITON_INTERPRET=1).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = plan.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"compile_plan: kernel must be compiled code = JITFunction, got {type(kernel).__name__}; "
            "unset TRITON_INTERPRET before sagan_fast is imported"
        )
    signature, constexprs = {}, dict(plan.constexprs)
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in plan.signature:
            signature[name] = plan.signature[name]
        else:
            raise RuntimeError(f"compile_plan: plan {plan.name} must give argument {name} of its kernel")
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in plan.divisible_by_16}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = dict(num_warps=plan.num_warps, num_stages=plan.num_stages, **plan.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = compiled.asm["cubin"]
    record = _cached(cubin, triton.__version__)
    metadata = compiled.metadata
    return Compiled(
        arch=arch,
        warps=metadata.num_warps,
        shared=metadata.shared,
        tmem=getattr(metadata, "tmem_size", 0) or 0,
        ttir=str(compiled.asm["ttir"]),
        **record,
    )


def _cached(cubin: bytes, version: str) -> dict[str, Any]:
    """Registers, stack, local memory and disassembly of `cubin`, from the cache folder if it has them."""
    name = hashlib.sha256(version.encode() + cubin).hexdigest()[:32]
    path = cache_folder() / "disassembled" / f"{name}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    record = _disassemble(cubin)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(record, file)
    os.replace(file.name, path)  # two processes may write the same file
    return record


def cache_folder() -> Path:
    """TRITON_CACHE_DIR, or Triton's default."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def _disassemble(cubin: bytes) -> dict[str, Any]:
    import triton

    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        text = _run(tools.nvdisasm.path, "-g", "-c", file.name)
    numbers = {name: int(value) for name, value in _RESOURCE.findall(usage)}
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "local": numbers["LOCAL"], "sass": text}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


def resources(compiled: Compiled) -> dict[str, int]:
    """What a row of the report says about the code itself: registers, stack, spills, smem, and instruction counts."""
    code = compiled.code()
    return {
        "registers": compiled.registers,
        "stack": compiled.stack,
        "spills": compiled.spills,
        "smem": compiled.shared,
        "tmem": compiled.tmem,
        "hgmma": code.count("HGMMA"),
        "hmma": code.count("HMMA"),
        "utchmma": code.count("UTCHMMA"),
        "mufu": code.count("MUFU"),
        "ldg128": sum(i.base == "LDG" and ".128" in i.op for i in code.instructions),
        "instructions": len(code.instructions),
    }
