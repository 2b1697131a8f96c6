"""Compiles a kernel for a GPU that need not be there, and reads what its machine code uses.

Needs torch, triton and numpy: the assembler and disassembler come with Triton. What was read is kept in Triton's own
cache, so a second report disassembles nothing.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagan_fast.kernels.configs import Arch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what the launchers ask for; Triton 3.9 warns when unset

_RESOURCE = re.compile(r"(REG|STACK|LOCAL):(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@(!?U?PT?\d*)\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
_LABEL_OR_CODE = re.compile(r"^\s*(?:\.(L\w+):|/\*[0-9a-f]{4,}\*/\s+(.*);)", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*`?\(\.(L\w+)\)")


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code. `stack`, `local` and `shared` are bytes, `tmem` is columns of tensor memory.

    `opcodes` counts the instructions by opcode with modifiers ("LDG.E.128").
    """

    arch: Arch
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    tmem: int
    opcodes: dict[str, int]

    @property
    def spills(self) -> int:
        """Loads and stores of local memory, plus bytes of local memory; anything but 0 is a fault."""
        return self.count("LDL", "STL") + self.local

    def count(self, *prefixes: str) -> int:
        """Return how many instructions have an opcode that starts with one of `prefixes`."""
        return sum(count for op, count in self.opcodes.items() if op.startswith(prefixes))


def opcodes(sass: str) -> Counter[str]:
    """Return the number of instructions by opcode in `sass`, the output of nvdisasm.

    Instructions that never run (predicate !PT) are left out. Raises ValueError if there is no instruction.
    """
    found = Counter(op for predicate, op in _INSTRUCTION.findall(sass) if predicate != "!PT")
    if not found:
        raise ValueError("opcodes: sass must hold at least one instruction, got none")
    return found


def spills_in_loops(sass: str) -> int:
    """Return how many instructions inside the innermost loops of `sass`, nvdisasm's output, use local memory.

    A loop goes from a label to the last branch back to it. Raises ValueError for a branch to a label that is not there.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    for label, instruction in _LABEL_OR_CODE.findall(sass):
        if label:
            labels[label] = len(code)
        else:
            code.append(instruction)
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code):
        if "BRA" not in instruction:
            continue
        to = _BRANCH.search(instruction)
        if to is None or to[1] not in labels:
            raise ValueError(f"spills_in_loops: the branch {instruction!r} must name a label of the code")
        if labels[to[1]] < i:
            ends[labels[to[1]]] = i
    inner = [(a, b) for a, b in ends.items() if not any(a < other <= b for other in ends)]
    return sum(bool(re.search(r"\b(?:LDL|STL)\b", code[i])) for a, b in inner for i in range(a, b + 1))


def compile_key(plan: Any, arch: Arch) -> tuple[Any, ...]:
    """Return a key that is equal for two plans with the same machine code on `arch`, whatever their grids."""
    function = getattr(plan.kernel, "fn", plan.kernel)
    return (
        f"{function.__module__}.{function.__qualname__}",
        tuple(sorted(plan.signature.items())),
        tuple(sorted((name, repr(value)) for name, value in plan.constexprs.items())),
        tuple(sorted(plan.divisible_by_16)),
        plan.num_warps,
        plan.num_stages,
        tuple(sorted((name, repr(value)) for name, value in plan.options.items())),
        arch,
    )


def compile_kernel(plan: Any, arch: Arch) -> Any:
    """Compile `plan` for `arch` without a GPU and return Triton's compiled kernel, with its code of all stages.

    Raises RuntimeError if kernels were imported for the interpreter (TRITON_INTERPRET=1), or if `plan` misses an
    argument of its kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = plan.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"compile_kernel: kernel must be a JITFunction, got {type(kernel).__name__}; "
            "unset TRITON_INTERPRET before sagan_fast is imported"
        )
    signature, constexprs = {}, dict(plan.constexprs)
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in plan.signature:
            signature[name] = plan.signature[name]
        else:
            raise RuntimeError(f"compile_kernel: plan {plan.name} must give argument {name} of its kernel")
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in plan.divisible_by_16}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = dict(num_warps=plan.num_warps, num_stages=plan.num_stages, **plan.options)
    if isinstance(arch, str):  # threads of CDNA's waves: 64, of RDNA's: 32
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=options)


def compile_plan(plan: Any, arch: Arch) -> Compiled:
    """Compile `plan` for `arch` (90 for compute capability 9.0, "gfx942" for AMD) and read what it uses.

    Raises RuntimeError as `compile_kernel` does.
    """
    import triton

    compiled = compile_kernel(plan, arch)
    metadata = compiled.metadata
    if isinstance(arch, str):
        found = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        found = _cached(compiled.asm["cubin"], triton.__version__)
    return Compiled(
        arch=arch,
        warps=metadata.num_warps,
        shared=metadata.shared,
        tmem=getattr(metadata, "tmem_size", 0) or 0,
        **found,
    )


def footprint(plan: Any, arch: Arch) -> tuple[int, int]:
    """Compile `plan` as `compile_plan` does; return bytes of stack and of shared memory alone, a third sooner."""
    compiled = compile_kernel(plan, arch)
    found = _read_amdgcn(compiled.asm["amdgcn"]) if isinstance(arch, str) else _usage(compiled.asm["cubin"])[0]
    return found["stack"], compiled.metadata.shared


def looped_spills(plan: Any, arch: int) -> int:
    """Return `spills_in_loops` of the launch's code for one of NVIDIA's chips."""
    return spills_in_loops(_usage(compile_kernel(plan, arch).asm["cubin"], code=True)[1])


def _read_amdgcn(text: str) -> dict[str, Any]:
    """Return the same of AMD's assembly: spilled registers count as stack, four bytes each."""
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+_count|\w+_fixed_size):\s+(\d+)", text)}
    found = Counter(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
    stack = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]) + numbers["private_segment_fixed_size"]
    return {"registers": numbers["vgpr_count"], "stack": stack, "local": 0, "opcodes": dict(found)}


def _cached(cubin: bytes, version: str) -> dict[str, Any]:
    """Registers, stack, local memory and opcodes of `cubin`, from Triton's cache folder if it has them."""
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(f"opcodes of {version}".encode() + cubin).hexdigest())
    path = cache.get_file("opcodes.json")
    if path is None:
        path = cache.put(json.dumps(_disassemble(cubin)), "opcodes.json")
    return dict(json.loads(Path(path).read_text()))


def _disassemble(cubin: bytes) -> dict[str, Any]:
    usage, text = _usage(cubin, code=True)
    return {**usage, "opcodes": opcodes(text)}


def _usage(cubin: bytes, code: bool = False) -> tuple[dict[str, Any], str]:
    """Return registers, stack and local memory of `cubin`, and its machine code where that is asked for."""
    import triton

    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        text = _run(tools.nvdisasm.path, "-c", file.name) if code else ""
    numbers = {name: int(value) for name, value in _RESOURCE.findall(usage)}
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "local": numbers["LOCAL"]}, text


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


def resources(compiled: Compiled) -> dict[str, int]:
    """Return what a row of the report says about the machine code: registers, bytes and instruction counts."""
    return {
        "registers": compiled.registers,
        "stack": compiled.stack,
        "spills": compiled.spills,
        "smem": compiled.shared,
        "tmem": compiled.tmem,
        "hgmma": compiled.count("HGMMA"),
        "hmma": compiled.count("HMMA"),
        "utchmma": compiled.count("UTCHMMA"),
        "mufu": compiled.count("MUFU"),
        "ldg128": sum(count for op, count in compiled.opcodes.items() if op.startswith("LDG.") and ".128" in op),
        "instructions": sum(compiled.opcodes.values()),
    }
