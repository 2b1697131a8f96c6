"""The launches that the gates compile, the hash of their code, and which records are about today's code.

    python -m benchmarks.gates < RECORDS        those lines of executed.jsonl that are about today's code

Needs torch and triton, but no GPU. Kernels are imported by the functions alone: pytest imports this file before it
chooses whether the interpreter runs them.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.records import ROOT

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


def source_key(kernel: Any) -> str:
    """Return Triton's hash of the kernel's text and of what it calls. It changes with the line where it begins too.

    What it calls is hashed before it: Triton 3.6 forgets the constants of a function that has no hash yet.
    """
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if hasattr(called, "cache_key"):
            source_key(called)
    return str(kernel.cache_key)


def source_of(kernel: Any) -> str:
    """Return the hash that records of executed and proved kernels carry."""
    return source_key(kernel)[:12]


def launches_by_name(dtype: str, arch: Any) -> dict[str, tuple[str, list[Any]]]:
    """Return the hash of each kernel's code and configs, with its launches at all widths."""
    from benchmarks.compile import compile_key

    plans: dict[str, list[Any]] = {}
    for plan in shipped_plans(dtype, arch):
        plans.setdefault(plan.name, []).append(plan)
    texts = {
        name: "".join(f"{compile_key(plan, arch)}{source_key(plan.kernel)}" for plan in same)
        for name, same in plans.items()
    }
    return {name: (hashlib.sha256(texts[name].encode()).hexdigest()[:12], same) for name, same in plans.items()}


@functools.cache
def _codes(dtype: str, arch: Any) -> dict[str, str]:
    return {name: code for name, (code, _) in launches_by_name(dtype, arch).items()}


@functools.cache
def _sources() -> dict[str, str]:
    return {plan.name: source_of(plan.kernel) for dtype in ("bf16", "fp32") for plan in shipped_plans(dtype, 90)}


def is_today(record: dict[str, Any]) -> bool:
    """Return whether the kernel that the record is about has the same code today. Without a hash it has not."""
    codes = _codes(record["dtype"], record["arch"]) if record["evidence"] == "compiled" else _sources()
    return "code" in record and record["code"] == codes.get(record["kernel"])


def of_today(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records about today's code. A process of its own asks: interpreted kernels have no hash."""
    lines = "\n".join(json.dumps(record) for record in records if "code" in record)
    if not lines:
        return []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gates"],
        input=lines, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    for line in sys.stdin:
        if is_today(json.loads(line)):
            print(line, end="" if line.endswith("\n") else "\n")
