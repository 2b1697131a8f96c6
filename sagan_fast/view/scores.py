"""The evaluations of a run as HTML tables, one for each protocol: only scores of one protocol can be compared."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sagan_fast.view.curves import number
from sagan_fast.view.history import step_of

COLUMNS = {
    "fid": "FID", "intra_fid": "Intra-FID", "kid": "KID", "is": "IS", "precision": "Precision", "recall": "Recall",
    "density": "Density", "coverage": "Coverage",
}  # fmt: skip
LOWER_IS_BETTER = ("fid", "intra_fid", "kid")
NONE = (
    '<p class="none">This run has no evaluations. <code>sagan-fast evaluate</code> and <code>train --eval-every</code> '
    "make them.</p>"
)


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return `results` of evaluations as HTML: scores by step, the protocol and the notes below each table."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(json.dumps(_comparable(result["protocol"]), sort_keys=True, default=str), []).append(result)
    many = '<p class="note">Scores of different tables cannot be compared: their protocols differ.</p>'
    return (many if len(groups) > 1 else "") + "".join(_table(group) for group in groups.values()) or NONE


def _comparable(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return `protocol` without what tells one checkpoint from another."""
    return {key: value for key, value in protocol.items() if key not in ("generated", "device", "processes")}


def _table(results: Sequence[dict[str, Any]]) -> str:
    shown = [key for key in COLUMNS if any(key in result for result in results)]
    best = {
        key: (min if key in LOWER_IS_BETTER else max)(values)
        for key in shown
        if len(values := [r[key] for r in results if isinstance(r.get(key), int | float)]) > 1
    }
    head = "".join(f'<th scope="col">{COLUMNS[key]}</th>' for key in shown)
    rows = []
    for result in results:
        step = step_of(result)
        cells = "".join(_cell(result, key, best.get(key)) for key in shown)
        rows.append(f'<tr><th scope="row">{"-" if step is None else f"{step:,}"}</th>{cells}</tr>')
    notes = dict.fromkeys(note for result in results for note in result.get("notes", []))
    listed = "".join(f"<li>{escape(str(note))}</li>" for note in notes)
    return (
        f'<p class="note">{escape(summary(results[-1]["protocol"]))}.</p><div class="scroll"><table>'
        f'<thead><tr><th scope="col">Step</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        + (f'<ul class="note">{listed}</ul>' if notes else "")
        + f"<details><summary>The whole protocol</summary><dl>{entries(results[-1]['protocol'])}</dl></details>"
    )


def _cell(result: Mapping[str, Any], key: str, best: float | None) -> str:
    value = result.get(key)
    if not isinstance(value, int | float):
        return "<td>-</td>"
    spread = result.get(f"{key}_std")
    text = number(value) + (f" ± {number(spread)}" if isinstance(spread, int | float) else "")
    return f'<td class="best">{text}</td>' if value == best else f"<td>{text}</td>"


def summary(protocol: Mapping[str, Any]) -> str:
    """Return in one line what matters most when two scores are compared."""
    features, real = _part(protocol, "features"), _part(protocol, "real")
    parts = [
        f"protocol {protocol.get('name', 'unknown')}",
        f"{protocol.get('count', '?')} generated images against {protocol.get('reference_count', '?')} of "
        f"{real.get('data', 'unknown data')}",
        f"features {features.get('name', 'unknown')}",
        "no truncation" if protocol.get("truncation") is None else f"truncation {protocol['truncation']}",
    ]
    return "; ".join(parts)


def _part(protocol: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = protocol.get(name)
    return found if isinstance(found, Mapping) else {}


def entries(values: Mapping[str, Any], prefix: str = "") -> str:
    """Return nested `values` as the entries of an HTML list of names and values."""
    out = ""
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += entries(value, f"{prefix}{key}.")
        else:
            out += f"<dt>{escape(prefix + str(key))}</dt><dd>{escape(str(value))}</dd>"
    return out
