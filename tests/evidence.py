"""Put the kernels through tools that need no GPU, and add what they said to benchmarks/results/executed.jsonl.

python tests/evidence.py prove      sentryward proves synchronisation and race freedom of the machine code for sm_80
python tests/evidence.py compile    Triton compiles the launches at all widths for every chip

`make sanitize` installs both tools in build/sanitize. It adds the kernels that the tests executed itself. `make gates`
compiles with each version of Triton that the gates hold for.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "build" / "sanitize"
DTYPES = ("bf16", "fp16", "tf32", "fp32")
STACK_BYTES = 32
"""Let pass a thread, where no innermost loop touches it: up to eight registers, kept around such a loop."""

BATCH_NORMS = (
    ((64, 1024, 4, 4), 1000, True, True),
    ((64, 64, 128, 128), 1000, True, True),
    ((64, 64, 128, 128), 1000, False, True),
    ((64, 96, 32, 32), 0, True, False),
    ((64, 256, 32, 32), None, False, False),
    ((3, 70, 63, 65), 1000, False, True),
    ((3, 70, 63, 65), None, True, True),
    ((3, 70, 63, 65), 0, True, False),
)
"""Maps of batch norm, how their gains come (`batch_norm_plans`), whether they are channels_last, and training."""


def record(kernel: str, evidence: str, tool: str, **found: Any) -> None:
    """Add a line: which kernel, what kind of evidence, from which tool, and what was found."""
    from benchmarks.records import EXECUTED, RESULTS, append_line, environment

    where = {name: environment("cpu")[name] for name in ("triton", "commit", "date")}
    line = {"kernel": kernel, "evidence": evidence, "tool": f"{tool} {metadata.version(tool)}", **found, **where}
    print(line, flush=True)
    append_line(RESULTS / f"{EXECUTED}.jsonl", line)


def launches(dtype: str, arch: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the plan of each kernel on a small image, and the numbers of its launch."""
    from benchmarks.shapes import BlockShape
    from benchmarks.shipped import (
        batch_norm_plans,
        block_plans,
        functional_launches,
        norms_plans,
        spectral_norm_plans,
    )
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
    plans += batch_norm_plans((2, 32, 16, 16), 10, dtype, arch)
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


def shipped_plans(dtype: str, arch: Any) -> list[Any]:
    """Return the launches at all widths on `arch`, for "fp32" after those of spectral norm. Each piece of code once.

    On compute capabilities that the other kernels refuse, only spectral norm is left.
    """
    from benchmarks.compile import compile_key
    from benchmarks.shapes import BlockShape
    from benchmarks.shipped import (
        batch_norm_plans,
        functional_launches,
        norms_plans,
        second_plans,
        spectral_norm_plans,
        width_plans,
    )
    from sagan_fast.kernels.configs import MIN_ARCH, WIDTHS

    matrices = [(64, 576), (70, 1201)]
    plans = spectral_norm_plans(matrices, arch=arch) + norms_plans(matrices, arch=arch) if dtype == "fp32" else []
    supported = isinstance(arch, str) or arch >= MIN_ARCH
    for width in WIDTHS if supported else ():
        plans += (large := width_plans(*width, 64, dtype, arch))
        others = {(plan.name, plan.config) for plan in large}
        plans += [plan for plan in width_plans(*width, 16, dtype, arch) if (plan.name, plan.config) not in others]
        plans += [one.plan for one in functional_launches(BlockShape("", 2, 32, 63, 64, *width), dtype, arch)]
        plans += second_plans(2, 63 * 64, 31 * 32, *width, dtype, arch)
    for form in BATCH_NORMS if supported and dtype != "tf32" else ():  # no products: TF32 is float32
        plans += batch_norm_plans(*form[:2], dtype, arch, *form[2:])
    return list({compile_key(plan, arch): plan for plan in reversed(plans)}.values())[::-1]


def fault(plan: Any, arch: Any) -> str:
    """Return in which way the launch does not fit the chip, "" if it fits."""
    from benchmarks.compile import footprint, looped_spills
    from benchmarks.machine import SHARED_BYTES

    what = f"{plan.constexprs.get('D_QK', '')}x{plan.constexprs.get('D_V', '')} {plan.config}"
    try:
        stack, shared = footprint(plan, arch)
    except Exception as error:
        return f"{what}: {type(error).__name__}"
    looped = looped_spills(plan, arch) if stack and isinstance(arch, int) else None
    if stack > (STACK_BYTES if looped == 0 else 0) or shared > SHARED_BYTES[arch]:
        used = f" used {looped} times in loops" if looped is not None else ""
        return f"{what}: {stack} bytes of stack{used}, {shared} of shared memory"
    return ""


def compile(dtypes: list[str], arches: list[str], kernel: str = "") -> int:
    """Compile each kernel at each width for each chip, on even and ragged maps; list what spills or does not fit.

    What was recorded for the same code without a fault is not done again, and chips that this Triton is too old for
    are left out, as backend="auto" does. Return 1 if one of NVIDIA's chips has a fault, or AMD's compiler refuses a
    kernel.
    """
    from benchmarks.compile import compile_key
    from benchmarks.machine import SHARED_BYTES
    from benchmarks.records import EXECUTED, RESULTS
    from sagan_fast.kernels.configs import AMD
    from sagan_fast.ops.backends import older_triton

    lines = (RESULTS / f"{EXECUTED}.jsonl").read_text().splitlines()
    names = ("kernel", "arch", "dtype", "triton", "code")
    recorded = [line for line in map(json.loads, lines) if "faults" in line]
    done = {tuple(line.get(name) for name in names) for line in recorded if not line["faults"] or line["arch"] in AMD}
    status = 0
    chips = [arch for arch in SHARED_BYTES if (not arches or str(arch) in arches) and not older_triton(arch)]
    for arch, dtype in product(chips, dtypes):
        plans: dict[str, list[Any]] = {}
        for plan in shipped_plans(dtype, arch):
            if plan.name.startswith(kernel):
                plans.setdefault(plan.name, []).append(plan)
        for name, same in plans.items():
            text = "".join(f"{compile_key(plan, arch)}{plan.kernel.cache_key}" for plan in same)
            code = hashlib.sha256(text.encode()).hexdigest()[:12]
            if (name, arch, dtype, metadata.version("triton"), code) in done:
                continue
            faults = [found for plan in same if (found := fault(plan, arch))]
            found = dict(arch=arch, dtype=dtype, launches=len(same), code=code, faults=faults)
            record(name, "compiled", "triton", **found)
            bad = [one for one in faults if isinstance(arch, int) or "bytes of stack" not in one]
            status = 1 if bad else status
            print(*(f"{name} on {arch}, {dtype}: {one}" for one in bad), sep="\n", end="\n" * bool(bad), flush=True)
    return status


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(TOOLS)]
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("prove", "compile"))
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this precision; may be repeated")
    parser.add_argument("--arch", action="append", help="only this chip, as 86 or gfx942; may be repeated")
    parser.add_argument("--kernel", default="", help="only kernels whose name begins so, as spectral_norm")
    options = parser.parse_args()
    wanted = options.dtype or [*DTYPES]
    sys.exit(prove(wanted) if options.what == "prove" else compile(wanted, options.arch or [], options.kernel))
