"""Tables of records: ours beside its peers, and what each kernel went through."""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.bench_loader import IMAGES
from benchmarks.gates import Today, case_of, today
from benchmarks.records import EXECUTED, MODES, OURS
from benchmarks.shipped import BLOCK_DTYPES as DTYPES
from benchmarks.text import table

Found = dict[str, Any]
"""A record as `records.read` returns it."""
MISSING = "not measured"


def block_table(records: Sequence[Found], shapes: Iterable[str], dtype: str, method: str) -> str:
    """Return the attention block against its peers: times of eager, the best peer and ours, and their ratios."""
    cases = cases_of(records, "attention", method)
    rows = []
    for shape, mode in product(shapes, MODES):
        found = dict(cases.get((shape, mode, dtype), {}))
        ours = _pop_ours(found)
        best = min(found.values(), key=lambda r: r["p50_us"], default=None)
        eager, named = found.get("eager"), MISSING if best is None else f"{_us(best)} ({best['provider']})"
        kept = MISSING if ours is None or ours["saved_bytes"] is None else f"{ours['saved_bytes'] / 2**20:.1f}"
        ratios = [_ratio(eager, ours), _ratio(best, ours), _share(ours), kept]
        rows.append([shape, mode, _us(eager), named, _us(ours), *ratios])
    return markdown(
        "shape | mode | eager us | best peer us | ours us | eager / ours | best / ours | of limit | kept MiB", rows
    )


def peers_table(records: Sequence[Found], benchmark: str, method: str, images: bool = False) -> str:
    """Return ours against each peer in every case of `benchmark`, as microseconds or as images a second."""

    def value(r: Found | None) -> str:
        return f"{r['config']['batch_size'] / r['p50_us'] * 1e6:.1f}" if images and r else _us(r)

    rows = []
    for (shape, mode, _), found in cases_of(records, benchmark, method).items():
        ours = _pop_ours(found)
        for name, peer in found.items():
            rows.append([shape, mode, name, value(peer), value(ours), _ratio(peer, ours), _share(ours)])
    unit = "images/s" if images else "us"
    return markdown(f"what | mode | peer | peer {unit} | ours {unit} | peer time / ours | of limit", rows)


def training_table(records: Sequence[Found]) -> str:
    """Return the runs of benchmarks.gpu_train: throughput, agreement of the backends, distances of the samples."""
    rows = []
    for r in records:
        if r["benchmark"] == "train":
            c = r["config"]
            losses = [f"{c[key]:.3f}" for key in ("between_backends", "between_seeds")]
            scores = " ".join(f"{score:.1f}" for score in c.get("frechet", [])) or MISSING
            rows.append([r["shape"], r["provider"], c["steps"], f"{c['images_per_s']:.0f}", *losses, scores])
    return markdown(
        "preset | backend | steps | images/s | losses between backends | between seeds | Frechet, by seed", rows
    )


def loader_table(records: Sequence[Found]) -> str:
    """Return images/s of the packed set and of JPEG folders by workers."""
    rows = []
    for r in records:
        if r["benchmark"] == "loader" and r["p50_us"]:
            c = r["config"]
            rows.append([r["provider"], c["workers"], f"{IMAGES / r['p50_us'] * 1e6:.0f}", c["processors"]])
    return markdown("from | workers | images/s | cores", rows)


def ddp_table(records: Sequence[Found]) -> str:
    """Return steps of several processes over limited links: one all-reduce at the end against buckets.

    Times are 20th percentiles: other work on the machine slows the slowest of the processes, and never speeds it up.
    """
    groups: dict[str, dict[str, Found]] = {}
    for r in records:
        if r["p50_us"]:
            groups.setdefault(r["shape"], {})[r["provider"]] = r
    rows = []
    for found in sorted(groups.values(), key=lambda found: next(iter(found.values()))["config"]["processes"]):
        c = next(iter(found.values()))["config"]
        names = ("compute", "one-all-reduce", "ours", "ours-bf16")
        compute, one, ours, half = (found[name]["p20_us"] / 1e3 if name in found else math.nan for name in names)
        what = [c["processes"], c["processors"], f"{c['mbit']:.0f}", f"{c['megabytes']:.0f}"]
        times = [f"{time:.0f}" for time in (compute, one, ours, half)]
        hidden = f"{(one - ours) / (one - compute):.0%}"
        rows.append([*what, " and ".join(map(str, c["buckets"])), *times, f"{one / ours:.2f}", hidden])
    return markdown(
        "processes | cores | Mbit/s a link | MB of gradients | buckets | compute ms | one all-reduce ms | buckets ms | "
        "bf16 buckets ms | one / buckets | hidden",
        rows,
    )


def start_part(records: Sequence[Found]) -> list[str]:
    """Return how long the command line and the package take to answer (benchmarks.bench_start), and their bases."""
    rows = []
    for (shape, _, _), found in cases_of(records, "start", "wall").items():
        ours = _pop_ours(found)
        for name, base in found.items():
            times = [r["p50_us"] / 1e6 if r else None for r in (base, ours)]
            beyond = times[1] - times[0] if None not in times else None
            rows.append([shape, name, *(MISSING if t is None else f"{t:.2f}" for t in (*times, beyond))])
    found = [r for r in records if r["benchmark"] == "start"]
    return [where(found), markdown("what | base | base s | with sagan_fast s | beyond s", rows)]


def derivatives_table(records: Sequence[Found]) -> str:
    """Return ours against each peer of benchmarks.bench_derivatives: time, memory, and what the peer notes."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for record in records:
        groups.setdefault((record["shape"], record["mode"]), []).append(record)
    rows = []
    for (shape, mode), found in groups.items():
        ours = next((r for r in found if r["provider"] in OURS), None)
        for peer in (r for r in found if r is not ours):
            sizes = [peer["peak_bytes"], ours and ours["peak_bytes"]]
            less = f"{sizes[0] / sizes[1]:.1f}" if all(sizes) else MISSING
            memory = [f"{size / 2**20:.0f}" if size else MISSING for size in sizes]
            row = [shape, mode, peer["provider"], _us(peer), _us(ours), _ratio(peer, ours), *memory, less, peer["note"]]
            rows.append(row)
    titles = "shape | mode | peer | peer us | ours us | peer / ours | peer MiB | ours MiB | peer / ours | note"
    return markdown(titles, rows)


def evidence_table(folder: Path) -> str:
    """Return what each kernel went through without a GPU, and what each Triton compiled (tests/evidence.py).

    The last record of each kind counts, of those about today's code. Of a Triton only the chips are named for which it
    compiled all kernels of the family.
    """
    path = folder / f"{EXECUTED}.jsonl"
    found = [json.loads(line) for line in (path.read_text().splitlines() if path.exists() else ())]
    found = [r for r in found if r["evidence"] != "gradients" and "code" in r]
    if not found:
        return MISSING
    now = today(frozenset(case_of(r) for r in found if r["evidence"] == "compiled"))
    latest: dict[tuple[str, ...], Found] = {}
    for record in filter(now.said, found):
        names = ("kernel", "evidence", "triton") if "arch" in record else ("kernel", "evidence")
        latest[tuple(str(record.get(name)) for name in (*names, "arch", "dtype", "dtypes"))] = record

    of = {kind: [r for r in latest.values() if r["evidence"] == kind] for kind in ("executed", "proved", "compiled")}
    rows = []
    for kernel in dict.fromkeys(r["kernel"] for r in latest.values()):
        executed, proved, compiled = ([r for r in kind if r["kernel"] == kernel] for kind in of.values())
        ran = _names(dtype for r in executed for dtype in r["dtypes"])
        free = _names(r["dtype"] for r in proved if r["result"] == "race_free")
        rows.append([f"`{kernel}`", ran or "no", free or "no", _chips(compiled)])
    cells: dict[tuple[str, str], dict[str, list[Found]]] = {}
    for r in sorted(of["compiled"], key=lambda r: str(r["triton"])):
        cells.setdefault((r["triton"], _family(r["kernel"])), {}).setdefault(r["dtype"], []).append(r)
    tritons = [
        [*which, *(_chips_of_all(cell.get(dtype, []), which[1], now) for dtype in DTYPES)]
        for which, cell in sorted(cells.items())
    ]
    kernels = markdown("kernel | executed as compiled IR | race-free by proof on sm_80 | compiled for", rows)
    return kernels + "\n\n" + markdown(f"Triton | kernels | {' | '.join(DTYPES)}", tritons)


def _family(kernel: str) -> str:
    return next((name for name in ("spectral_norm", "batch_norm") if kernel.startswith(name)), "attention")


def _chips_of_all(records: Sequence[Found], family: str, now: Today) -> str:
    """Return the chips for which each of today's kernels of the family is among the records."""
    kernels: dict[str, set[str]] = {}
    for r in records:
        kernels.setdefault(case_of(r), set()).add(r["kernel"])
    needed = {case: {name for name in now.codes[case] if _family(name) == family} for case in kernels}
    whole = [r for r in records if needed[case_of(r)] <= kernels[case_of(r)]]
    return _chips(whole) if whole or not records else "not all kernels"


def _chips(records: Sequence[Found]) -> str:
    names = {r["arch"]: f"{r['arch'] / 10}" if isinstance(r["arch"], int) else r["arch"] for r in records}
    spilling = {r["arch"] for r in records if r["faults"]}
    order = sorted(names, key=lambda arch: (isinstance(arch, str), arch))
    return ", ".join(names[arch] + "\\*" * (arch in spilling) for arch in order) or "no record"


def accuracy_table(folder: Path) -> str:
    """Return the errors of each gradient of the block beside eager's (tests/gradient_accuracy.py)."""
    path = folder / f"{EXECUTED}.jsonl"
    found = [json.loads(line) for line in (path.read_text().splitlines() if path.exists() else ())]
    latest = {(r["dtype"], r["width"]): r for r in found if r["evidence"] == "gradients"}
    names = list(next(iter(latest.values()))["errors"]) if latest else []
    rows = []
    for name in names:
        pairs = [r["errors"][name] for r in latest.values()]
        rows.append(
            [f"`{name}`", *(f"{e['ours_median']:.1e} ({e['ours_median'] / e['eager_median']:.2f})" for e in pairs)]
        )
    return markdown(" | ".join(["gradient of", *(f"{dtype}, {pool}" for dtype, pool in latest)]), rows)


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def shapes_of(records: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(r["shape"] for r in records if r["benchmark"] == "attention"))


def cases_of(records: Iterable[Found], benchmark: str, method: str) -> dict[tuple[str, str, str], dict[str, Found]]:
    """Return the timed records of a benchmark by (shape, mode, dtype), then by provider."""
    cases: dict[tuple[str, str, str], dict[str, Found]] = {}
    for r in records:
        if (r["benchmark"], r["method"]) == (benchmark, method) and r["p50_us"] is not None:
            cases.setdefault((r["shape"], r["mode"], r["dtype"]), {})[r["provider"]] = r
    return cases


def _pop_ours(found: dict[str, Found]) -> Found | None:
    return next((found.pop(name) for name in OURS if name in found), None)


def markdown(columns: str, rows: Sequence[Sequence[Any]]) -> str:
    return table(columns, rows, markdown=True) if rows else MISSING


def where(records: Sequence[Found]) -> str:
    if not records:
        return "Not measured yet: there is no record."
    commits: dict[str, set[str]] = {}
    for r in records:
        stamp = f"{r['device']}, torch {r['torch']}, triton {r['triton']}, {r['date']}"
        commits.setdefault(stamp, set()).add(r["commit"])
    said = (f"{stamp}, commit {', '.join(sorted(names))}" for stamp, names in sorted(commits.items()))
    return "Measured on " + "; ".join(said) + "."


def _us(record: Found | None) -> str:
    return MISSING if record is None else f"{record['p50_us']:.1f}"


def _ratio(peer: Found | None, ours: Found | None) -> str:
    return MISSING if peer is None or ours is None else f"{peer['p50_us'] / ours['p50_us']:.2f}"


def _share(record: Found | None) -> str:
    if record is None or not record["bound_us"]:
        return MISSING
    return f"{record['bound_us'] / record['p50_us']:.0%} ({record['bound_by']})"
