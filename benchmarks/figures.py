"""Figures from one device's records: bars against peers, roofline, time and memory over N, images/s over the batch.

A figure without records is not drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.records import MODES, OURS
from benchmarks.shapes import BlockShape

Records = list[dict[str, Any]]
COLOURS = {
    "eager": "#9aa0a6", "eager-compiled": "#c08a3e", "sdpa": "#7b93c4", "sdpa-compiled": "#4f6fae", "flex": "#7da87b",
    **dict.fromkeys(OURS, "#c2302e"),
}  # fmt: skip
OTHERS = ("#8f7bb5", "#5f9ea0", "#b57b93", "#6b705c", "#a5a58d", "#463f3a")


@dataclass(frozen=True)
class Figure:
    """One figure: `select` picks its records, `plot` draws them; `size` is inches."""

    title: str
    size: tuple[float, float]
    select: Callable[[Records], Records]
    plot: Callable[..., None]


def available(records: Sequence[dict[str, Any]], prefix: str) -> dict[str, Records]:
    """Return the records of each figure of `prefix`, "cpu" or a GPU's name, that `records` are enough for."""
    case = ("attention", *(("fp32", "wall") if prefix == "cpu" else ("bf16", "graph")))
    found = [r for r in records if (r["benchmark"], r["dtype"], r["method"]) == case and r["p50_us"]]
    selected = {name: figure.select(found) for name, figure in FIGURES.items()}
    return {name: points for name, points in selected.items() if points}


def draw(records: Sequence[dict[str, Any]], folder: Path, prefix: str, device: str) -> list[Path]:
    """Write one device's figures as `folder`/`prefix`-*.png, remove those without records, and return the paths."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    dtype = "fp32" if prefix == "cpu" else "bf16"
    folder.mkdir(parents=True, exist_ok=True)
    points, made = available(records, prefix), []
    for name, figure in FIGURES.items():
        path = folder / f"{prefix}-{name}.png"
        if name not in points:
            path.unlink(missing_ok=True)
            continue
        page = plt.figure(figsize=figure.size, dpi=110, layout="constrained")
        figure.plot(page, points[name], _rates(records, dtype))
        page.suptitle(f"self-attention block, {figure.title}\n{device}, {dtype}", fontsize=11)
        page.savefig(path, metadata={"Software": None})  # the same bytes for the same records
        plt.close(page)
        made.append(path)
    return made


def _colour(provider: str) -> str:
    return COLOURS.get(provider, OTHERS[sum(map(ord, provider)) % len(OTHERS)])


def _against_ours(records: Records) -> Records:
    shapes = {r["shape"] for r in records if r["provider"] in OURS and "sweep" not in r["shape"]}
    return [r for r in records if r["shape"] in shapes]


def _peers(page: Any, records: Records, _: object) -> None:
    """Bars: each provider's time over ours, shape by shape."""
    from matplotlib.patches import Patch

    shapes = list(dict.fromkeys(r["shape"] for r in records))[::-1]
    for axes, mode in zip(page.subplots(1, 2, sharey=True), MODES, strict=True):
        place, ticks = 0.0, []
        for shape in shapes:
            times = {r["provider"]: r["p50_us"] for r in records if (r["shape"], r["mode"]) == (shape, mode)}
            names = sorted(times, key=lambda name: name in OURS, reverse=True)
            ours = times[names[0]] if names and names[0] in OURS else float("nan")
            places = [place + i for i in range(len(names))]
            bars = axes.barh(places, [times[n] / ours for n in names], height=0.9, color=[*map(_colour, names)])
            axes.bar_label(bars, fmt=" %.2f", fontsize=7)
            ticks.append(place + (len(names) - 1) / 2)
            place += max(len(names), 1) + 0.8
        axes.axvline(1, color="black", lw=0.8)
        axes.set_yticks(ticks, shapes, fontsize=8)
        axes.set_title(mode, fontsize=9)
        axes.margins(x=0.15)
        axes.set_xlabel("time / ours")
    patches = [Patch(color=_colour(name), label=name) for name in dict.fromkeys(r["provider"] for r in records)]
    page.legend(handles=patches, loc="outside lower center", ncol=6, fontsize=8)


def _roofline(page: Any, records: Records, rates: dict[str, float]) -> None:
    """Dots: rate of needed work over needed FLOP a byte, each with its limit; the roof of the measured rates."""
    axes = page.add_subplot()
    shapes = [BlockShape(**{key: r["config"][key] for key in BlockShape.__dataclass_fields__}) for r in records]
    fast = max(s.flops() / r["p50_us"] for s, r in zip(shapes, records, strict=True)) > 1e6
    unit, name = (1e12, "TFLOP/s") if fast else (1e9, "GFLOP/s")
    named = list(dict.fromkeys(s.name for s in shapes if "sweep" not in s.name))
    xs = []
    for shape, r in zip(shapes, records, strict=True):
        backward = r["mode"] != "forward"
        flops = shape.flops(backward)
        x, y = flops / shape.bytes(r["dtype"], backward), flops / r["p50_us"] * 1e6 / unit
        xs.append(x)
        size = 40 if shape.name in named else 12
        axes.scatter(x, y, marker="s" if backward else "o", color=_colour(r["provider"]), s=size, zorder=3)
        axes.scatter(x, flops / r["bound_us"] * 1e6 / unit, marker="_", color="black", s=90, zorder=2)
        if shape.name in named:
            number = str(1 + named.index(shape.name))
            axes.annotate(number, (x, y), fontsize=8, xytext=(0, 6), ha="center", textcoords="offset points")
    if {"copy", "product"} <= set(rates):
        ridge = rates["product"] / rates["copy"]
        roof = [min(*xs, ridge) / 2, ridge, max(*xs, ridge) * 2]
        axes.plot(roof, [min(x * rates["copy"], rates["product"]) / unit for x in roof], color="black", lw=1, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="needed FLOP / needed byte", ylabel=f"needed {name}")
    signs = {"ko": "forward", "ks": "forward+backward", "k.": "small: the sweeps over N and B"}
    signs |= {"k_": "its limit: FLOP, exponentials or bytes", "k-": "roof: copy and products as measured"}
    for style, text in signs.items():
        axes.plot([], [], style, label=text)
    for number, text in enumerate(named, 1):
        axes.plot([], [], " ", label=f"{number}  {text}")
    page.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    axes.grid(alpha=0.3)


def _rates(records: Sequence[dict[str, Any]], dtype: str) -> dict[str, float]:
    """Return the measured bytes a second of a copy and FLOP a second of a product in the figures' precision."""
    found = {}
    for r in records:
        what, size, *_ = f"{r['shape']} -".split()
        if (r["benchmark"], what) == ("ceilings", "copy"):
            found[what] = 2 * int(size) * 2**20 / r["p50_us"] * 1e6
        elif (r["benchmark"], what, r["dtype"]) == ("ceilings", "product", dtype):
            found[what] = 2 * int(size) ** 3 / r["p50_us"] * 1e6
    return found


def _swept(kind: str) -> Callable[[Records], Records]:
    """Return what picks the forward+backward records of the sweep over the batch ("B") or over the queries ("N")."""
    return lambda records: [r for r in records if f"sweep-{kind}" in r["shape"] and r["mode"] == "forward+backward"]


PANELS: dict[str, dict[str, Callable[[dict[str, Any]], float]]] = {
    "N": {
        "ms an image": lambda r: r["p50_us"] / 1e3 / r["config"]["B"],
        "MiB an image kept for backward": lambda r: max(r["saved_bytes"], 1) / 2**20 / r["config"]["B"],
    },
    "B": {"images/s": lambda r: r["config"]["B"] / r["p50_us"] * 1e6},
}


def _lines(page: Any, records: Records, _: object, kind: str) -> None:
    """Lines: each panel's value over the number in the shape's name, one a provider."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    placed = sorted(((int(r["shape"].rpartition(f"sweep-{kind}")[2]), r) for r in records), key=lambda pair: pair[0])
    ticks = sorted({x for x, _ in placed})
    for axes, (label, value) in zip(
        page.subplots(1, len(PANELS[kind]), squeeze=False)[0], PANELS[kind].items(), strict=True
    ):
        for provider in dict.fromkeys(r["provider"] for r in records):
            points = [(x, value(r)) for x, r in placed if r["provider"] == provider]
            width = 2.2 if provider in OURS else 1.2
            axes.plot(*zip(*points, strict=True), "o-", ms=4, color=_colour(provider), label=provider, lw=width)
        axes.set(xscale="log", yscale="log", ylabel=label, xlabel="N" if kind == "N" else "images in the batch")
        axes.set_xticks(ticks, map(str, ticks), fontsize=8)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        if high < 20 * low:  # a decade has few ticks of its own
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    page.axes[0].legend(fontsize=8)


FIGURES = {
    "peers": Figure("time over ours (longer is slower)", (9, 8), _against_ours, _peers),
    "roofline": Figure(
        "rate of its needed work",
        (9, 4.5),
        lambda records: [r for r in records if r["provider"] in OURS and r["bound_us"]],
        _roofline,
    ),
    "size": Figure("forward+backward over the number of queries N", (9, 4), _swept("N"), partial(_lines, kind="N")),
    "batch": Figure("forward+backward over the batch", (6, 4), _swept("B"), partial(_lines, kind="B")),
}
