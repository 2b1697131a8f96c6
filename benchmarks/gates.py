"""The launches that the gates compile, the hash of their code, and which records are about today's code.

    python -m benchmarks.gates bf16/90 fp32/gfx942        the hashes of today's kernels, as JSON

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
from dataclasses import asdict, dataclass
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


_planned: dict[tuple[Any, ...], list[Any]] = {}
"""The launches by precision and `choices`: planning one takes a third of a second, and many chips have the same."""


def shipped_plans(dtype: str, arch: Any) -> list[Any]:
    """Return the launches at all widths on `arch`, for "fp32" after those of spectral norm. Each piece of code once.

    On compute capabilities that the other kernels refuse, only spectral norm is left.
    """
    key = dtype, *choices(dtype, arch)
    if key not in _planned:
        _planned[key] = plan_all(dtype, arch)
    return _planned[key]


def choices(dtype: str, arch: Any) -> tuple[Any, ...]:
    """Return all that launchers ask about `arch`. Where two have equal answers, they have the same launches."""
    from sagan_fast.kernels.configs import MIN_ARCH, SMALL, _configs, lookup, row_precision

    if not (is_amd := isinstance(arch, str)) and arch < MIN_ARCH:
        return ()
    rows = sorted({(row[0], *row[3:]) for row in _configs() if row[2] == row_precision(dtype)})
    positions = {"any": None, "small": SMALL, "large": SMALL + 1}
    return is_amd, *(
        lookup(name, arch, dtype, *map(int, width.split("x")), positions[size]) for name, width, size in rows
    )


def plan_all(dtype: str, arch: Any) -> list[Any]:
    """Return the same as `shipped_plans`, planned anew."""
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


@dataclass(frozen=True)
class Today:
    """The hashes of today's kernels, by name.

    `sources` are of the code alone, `codes` of the code with its configs, by precision and chip ("bf16/90").
    """

    sources: dict[str, str]
    codes: dict[str, dict[str, str]]

    def said(self, record: dict[str, Any]) -> bool:
        """Return whether the kernel that the record is about has the same code today. Without a hash it has not."""
        codes = self.codes[case_of(record)] if record["evidence"] == "compiled" else self.sources
        return "code" in record and record["code"] == codes.get(record["kernel"])


def case_of(record: dict[str, Any]) -> str:
    """Return precision and chip of a record of a compiled kernel ("bf16/90")."""
    return f"{record['dtype']}/{record['arch']}"


def hash_today(cases: Iterable[str]) -> Today:
    """Return the hashes of today's kernels for these precisions and chips. Interpreted kernels have none."""
    codes = {}
    for case in cases:
        dtype, _, chip = case.partition("/")
        launches = launches_by_name(dtype, int(chip) if chip.isdigit() else chip)
        codes[case] = {name: code for name, (code, _) in launches.items()}
    plans = [plan for dtype in ("bf16", "fp32") for plan in shipped_plans(dtype, 90)]
    return Today({plan.name: source_of(plan.kernel) for plan in plans}, codes)


@functools.cache
def today(cases: frozenset[str]) -> Today:
    """Return what `hash_today` does. A process of its own asks, because here kernels may be interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gates", *sorted(cases)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    return Today(**json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(asdict(hash_today(sys.argv[1:]))))
