"""Put the kernels through tools that need no GPU, and add what they said to benchmarks/results/executed.jsonl.

python tests/evidence.py prove      sentryward proves synchronisation and race freedom of the machine code for sm_80
python tests/evidence.py compile    Triton compiles all standard launches for every chip

`make sanitize` installs both tools in build/sanitize. It adds the kernels that the tests executed itself.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "build" / "sanitize"


def record(kernel: str, evidence: str, tool: str, **found: Any) -> None:
    """Add a line: which kernel, what kind of evidence, from which tool, and what was found."""
    from benchmarks.records import EXECUTED, RESULTS, environment

    where = {name: environment("cpu")[name] for name in ("triton", "commit", "date")}
    line = {"kernel": kernel, "evidence": evidence, "tool": f"{tool} {metadata.version(tool)}", **found, **where}
    print(line, flush=True)
    with (RESULTS / f"{EXECUTED}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def launches(dtype: str, arch: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the plan of each kernel on a small image, and the numbers of its launch."""
    from benchmarks.shapes import BlockShape
    from benchmarks.shipped import block_plans, functional_launches, norms_plans, spectral_norm_plans
    from sagan_fast.kernels import launch

    numbers: list[dict[str, Any]] = []
    plan_of = launch._plan

    def noted(name: str, kernel: Any, tensors: Any, what: Any, recorded: Any) -> Any:
        numbers.append(dict(what.numbers))
        return plan_of(name, kernel, tensors, what, recorded)

    launch._plan = noted
    small = BlockShape("small", 2, 32, 16, 16, 16, 64, True, True)
    plans = block_plans(2, 32, 16, 16, 16, 64, dtype=dtype, arch=arch)
    plans += [found.plan for found in functional_launches(small, dtype, arch)]
    if dtype == "fp32":
        plans += spectral_norm_plans([(64, 576)], arch=arch) + norms_plans([(64, 576)], arch=arch)
    seen = set()
    for plan, given in zip(plans, numbers, strict=False):
        if plan.name not in seen:
            seen.add(plan.name)
            yield plan, given


def prove(dtypes: list[str]) -> None:
    """Prove each kernel's code for compute capability 8.0."""
    from sentryward import verify

    from benchmarks.compile import compile_kernel

    for dtype in dtypes:
        for plan, numbers in launches(dtype, 80):
            compiled = compile_kernel(plan, 80)
            names = [name for name in plan.kernel.arg_names if name in plan.signature]
            entry = compiled.metadata.name
            arguments = [
                {"type": {"i32": "u32", "i64": "u64", "fp32": "f32"}[plan.signature[name]], "value": numbers[name],
                 "parameter": f"{entry}_param_{i}"}
                for i, name in enumerate(names) if not plan.signature[name].startswith("*")
            ]  # fmt: skip
            given = {
                "schema": "spverify.kernel-input/v1",
                "entry": entry,
                "launch": {
                    "grid_dim": [*plan.grid, 1, 1][:3], "block_dim": [32 * plan.num_warps, 1, 1],
                    "cluster_dim": [1, 1, 1], "dynamic_shared_bytes": compiled.metadata.shared,
                },
                "arguments": arguments,
            }  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                code, said = Path(folder, "kernel.ptx"), Path(folder, "input.json")
                code.write_text(compiled.asm["ptx"])
                said.write_text(json.dumps(given))
                try:
                    result = verify(code, input=said, timeout_seconds=300)
                except Exception as error:
                    result = {"result": f"{type(error).__name__}: {error}"[:200], "diagnostics": []}
            why = [str(one.get("message", one))[:300] for one in result.get("diagnostics", ())][:2]
            record(plan.name, "proved", "sentryward", dtype=dtype, result=result["result"], why=why)


def compile(dtypes: list[str]) -> None:
    """Compile each kernel at each width, on ragged maps, for each chip: what spills or does not fit is listed."""
    from benchmarks.compile import compile_plan, resources
    from benchmarks.machine import LDS_BYTES, MACHINES
    from benchmarks.shipped import block_plans, spectral_norm_plans
    from sagan_fast.kernels.configs import AMD, SERVED_BY, WIDTHS

    for arch, dtype in ((arch, dtype) for arch in (*SERVED_BY, *AMD) for dtype in dtypes):
        found: dict[str, list[str]] = {}
        plans = spectral_norm_plans([(64, 576), (70, 1201)], arch=arch) if dtype == dtypes[0] else []
        for D_QK, D_V in WIDTHS:
            plans += block_plans(2, max(32, 2 * D_V), 63, 64, D_QK, D_V, dtype=dtype, arch=arch)
        for plan in plans:
            faults = found.setdefault(plan.name, [])
            what = f"{plan.constexprs.get('D_QK', '')}x{plan.constexprs.get('D_V', '')} {plan.config}"
            try:
                uses = resources(compile_plan(plan, arch))
            except Exception as error:
                faults.append(f"{what}: {type(error).__name__}")
                continue
            limits = (
                LDS_BYTES if isinstance(arch, str) else {chip: machine.smem_block for chip, machine in MACHINES.items()}
            )
            most = limits.get(arch, limits.get(SERVED_BY.get(arch)))
            if uses["stack"] or uses["smem"] > most:
                faults.append(f"{what}: {uses['stack']} bytes of stack, {uses['smem']} of shared memory")
        for name, faults in found.items():
            record(name, "compiled", "triton", arch=arch, dtype=dtype, faults=faults)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(TOOLS)]
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("prove", "compile"))
    parser.add_argument("--dtype", action="append", choices=("bf16", "fp16", "tf32", "fp32"))
    options = parser.parse_args()
    {"prove": prove, "compile": compile}[options.what](options.dtype or ["bf16", "fp16", "tf32", "fp32"])
