"""Figures from one device's records: bars against peers, roofline, time and memory over N, images/s over the batch.

A figure without records is not drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shapes import BlockShape

Records = Sequence[dict[str, Any]]
OURS = {"auto", "triton", "ours", "group"}
COLOURS = {
    "eager": "#9aa0a6", "eager-compiled": "#c08a3e", "sdpa": "#7b93c4", "sdpa-compiled": "#4f6fae", "flex": "#7da87b",
    "auto": "#c2302e", "triton": "#c2302e", "ours": "#c2302e", "group": "#c2302e",
}  # fmt: skip
OTHERS = ("#8f7bb5", "#5f9ea0", "#b57b93", "#6b705c", "#a5a58d", "#463f3a")


FIGURES = ("peers", "roofline", "size", "batch")


def chosen(records: Records, prefix: str) -> Records:
    """Return the records that the figures of `prefix`, "cpu" or a GPU's name, are drawn from."""
    dtype, method = ("fp32", "wall") if prefix == "cpu" else ("bf16", "graph")
    return [
        r
        for r in records
        if r["benchmark"] == "attention" and r["p50_us"] and r["dtype"] == dtype and r["method"] == method
    ]


def available(records: Records, prefix: str) -> list[str]:
    """Return the names of the figures that `records` are enough for."""
    found = chosen(records, prefix)
    ours = [r for r in found if r["provider"] in OURS]
    enough = {
        "peers": any("sweep" not in r["shape"] for r in ours),
        "roofline": any(r.get("bound_us") for r in ours),
        "size": bool(_sweep(found, "N")),
        "batch": bool(_sweep(found, "B")),
    }
    return [name for name in FIGURES if enough[name]]


def draw(records: Records, folder: Path, prefix: str, device: str) -> list[Path]:
    """Write one device's figures as `folder`/`prefix`-*.png, remove those without records, and return the paths."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found, names = chosen(records, prefix), available(records, prefix)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    plots: dict[str, tuple[Callable[..., None], tuple[float, float], str]] = {
        "peers": (_peers, (9, 8), "self-attention block, time over ours (longer is slower)"),
        "roofline": (
            functools.partial(_roofline, rates=_rates(records, prefix)),
            (9, 4.5),
            "self-attention block, rate of its needed work",
        ),
        "size": (_size, (9, 4), "self-attention block, forward+backward over the number of queries N"),
        "batch": (_batch, (6, 4), "self-attention block, forward+backward over the batch"),
    }
    for name, (plot, size, title) in plots.items():
        path = folder / f"{prefix}-{name}.png"
        if name not in names:
            path.unlink(missing_ok=True)
            continue
        figure = plt.figure(figsize=size, dpi=110, layout="constrained")
        plot(figure, found)
        figure.suptitle(f"{title}\n{device}, {'fp32' if prefix == 'cpu' else 'bf16'}", fontsize=11)
        figure.savefig(path, metadata={"Software": None})  # the same bytes for the same records
        plt.close(figure)
        made.append(path)
    return made


def _colour(provider: str) -> str:
    return COLOURS.get(provider, OTHERS[sum(map(ord, provider)) % len(OTHERS)])


def _by(records: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def _peers(figure: Any, records: Records) -> None:
    """Bars: each provider's time over ours, shape by shape."""
    records = [r for r in records if "sweep" not in r["shape"]]
    panels = figure.subplots(1, 2, sharey=True)
    shapes = list(_by(records, "shape"))[::-1]
    for axes, mode in zip(panels, ("forward", "forward+backward"), strict=True):
        place = 0.0
        ticks = []
        for shape in shapes:
            row = [r for r in records if r["shape"] == shape and r["mode"] == mode]
            ours = next((r["p50_us"] for r in row if r["provider"] in OURS), None)
            start = place
            for r in sorted(row, key=lambda r: r["provider"] in OURS, reverse=True) if ours else ():
                ratio = r["p50_us"] / ours
                axes.barh(place, ratio, color=_colour(r["provider"]), height=0.9)
                axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=7)
                place += 1
            place = max(place, start + 1)
            ticks.append((start + place - 1) / 2)
            place += 0.8
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks(ticks, shapes, fontsize=8)
        axes.set_title(mode, fontsize=9)
        axes.margins(x=0.15)
        axes.set_xlabel("time / ours")
    _legend(figure, records)


def _roofline(figure: Any, records: Records, rates: dict[str, float]) -> None:
    """Dots: rate of needed work over needed FLOP a byte, each with its limit; the roof of the measured rates."""
    points = [(r, BlockShape(**{k: r["config"][k] for k in BlockShape.__dataclass_fields__}))
              for r in records if r["provider"] in OURS and r.get("bound_us")]  # fmt: skip
    axes = figure.add_subplot()
    unit, name = (1e12, "TFLOP/s") if max(s.flops() / r["p50_us"] for r, s in points) > 1e6 else (1e9, "GFLOP/s")
    marks = {"forward": "o", "forward+backward": "s"}
    numbers: dict[str, int] = {}
    intensities = []
    for r, shape in points:
        flops = shape.flops(r["mode"] != "forward")
        x, y = flops / shape.bytes(r["dtype"], r["mode"] != "forward"), flops / r["p50_us"] * 1e6 / unit
        intensities.append(x)
        swept = "sweep" in shape.name
        axes.scatter(x, y, marker=marks[r["mode"]], color=_colour(r["provider"]), s=12 if swept else 40, zorder=3)
        axes.scatter(x, flops / r["bound_us"] * 1e6 / unit, marker="_", color="black", s=90, zorder=2)
        if not swept:
            number = numbers.setdefault(shape.name, len(numbers) + 1)
            axes.annotate(str(number), (x, y), fontsize=8, xytext=(0, 6), ha="center", textcoords="offset points")
    if {"copy", "product"} <= set(rates):
        ridge = rates["product"] / rates["copy"]
        xs = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
        axes.plot(xs, [min(x * rates["copy"], rates["product"]) / unit for x in xs], color="black", lw=1, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="needed FLOP / needed byte", ylabel=f"needed {name}")
    axes.plot([], [], "ko", label="forward")
    axes.plot([], [], "ks", label="forward+backward")
    axes.plot([], [], "ko", ms=3, label="small: the sweeps over N and B")
    axes.plot([], [], "k_", ms=9, label="its limit: FLOP, exponentials or bytes")
    axes.plot([], [], "k-", lw=1, label="roof: copy and products as measured")
    for shape_name, number in numbers.items():
        axes.plot([], [], " ", label=f"{number}  {shape_name}")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    axes.grid(alpha=0.3)


def _rates(records: Records, prefix: str) -> dict[str, float]:
    """Return the measured bytes a second of a copy and FLOP a second of a product in the figures' precision."""
    found = {}
    for r in records:
        if r["benchmark"] == "ceilings":
            what, size = r["shape"].split()[:2]
            if what == "copy":
                found["copy"] = 2 * int(size) * 2**20 / r["p50_us"] * 1e6
            elif what == "product" and r["dtype"] == ("fp32" if prefix == "cpu" else "bf16"):
                found["product"] = 2 * int(size) ** 3 / r["p50_us"] * 1e6
    return found


def _sweep(records: Records, kind: str) -> list[tuple[float, dict[str, Any]]]:
    """The forward+backward records of the sweep `kind` ("N" or "B") with their place on the axis."""
    found = []
    for r in records:
        head, _, tail = r["shape"].rpartition(f"sweep-{kind}")
        if tail.isdigit() and head in ("", "cpu-") and r["mode"] == "forward+backward":
            found.append((float(tail), r))
    return sorted(found, key=lambda pair: pair[0])


def _lines(axes: Any, points: list[tuple[float, dict[str, Any]]], value: Callable[[dict[str, Any]], float]) -> None:
    for provider in dict.fromkeys(r["provider"] for _, r in points):
        mine = [(x, value(r)) for x, r in points if r["provider"] == provider]
        axes.plot(*zip(*mine, strict=True), marker="o", ms=4, color=_colour(provider), label=provider,
                  lw=2.2 if provider in OURS else 1.2)  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sorted({x for x, _ in points}), [f"{x:.0f}" for x in sorted({x for x, _ in points})], fontsize=8)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < 20 * low:  # a decade has few ticks of its own
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _size(figure: Any, records: Records) -> None:
    """Two panels over N: time an image, and what is kept for backward an image."""
    points = _sweep(records, "N")
    left, right = figure.subplots(1, 2)
    _lines(left, points, lambda r: r["p50_us"] / 1e3 / r["config"]["B"])
    left.set(xlabel="N", ylabel="ms an image")
    _lines(right, points, lambda r: max(r["saved_bytes"], 1) / 2**20 / r["config"]["B"])
    right.set(xlabel="N", ylabel="MiB an image kept for backward")
    left.legend(fontsize=8)


def _batch(figure: Any, records: Records) -> None:
    points = _sweep(records, "B")
    axes = figure.add_subplot()
    _lines(axes, points, lambda r: r["config"]["B"] / r["p50_us"] * 1e6)
    axes.set(xlabel="images in the batch", ylabel="images/s")
    axes.legend(fontsize=8)


def _legend(figure: Any, records: Records) -> None:
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(r["provider"] for r in records))
    figure.legend(handles=[Patch(color=_colour(n), label=n) for n in names], loc="outside lower center", ncol=6,
                  fontsize=8)  # fmt: skip
