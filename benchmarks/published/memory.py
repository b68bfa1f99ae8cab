"""Predicted memory by phase of every published model, with the measured peak if there is one.

    python -m benchmarks.published memory --work /tmp/published    # a minute, no weights

Calls `Pipeline.predicted_bytes`, which `vitapack generate` prints before it runs, in a fresh
process, with a packed file and an original that have real headers and sparse, empty data. Nothing
is loaded, so GPU predictions need no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.published import hollow
from vitapack.runtime.families.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
# In the order of the page; SLAT models generate no mesh.
MODELS = (
    "hunyuan3d-2.0", "hunyuan3d-2.0-fast", "hunyuan3d-2.0-turbo", "hunyuan3d-2mini",
    "hunyuan3d-2mini-fast", "hunyuan3d-2mini-turbo", "hunyuan3d-2mv", "step1x-3d",
    "step1x-3d-label", "trellis-ss",
)  # fmt: skip
VIEWS = {"hunyuan3d-2mv": 4}
# Column -> device, compute, memory mode.
COLUMNS = {
    f"{device} {compute} {memory}": (device, compute, memory)
    for device, memory in (("cpu", "lean"), ("cuda", "lean"), ("cuda", "resident"))
    for compute in ("a8", "a16")
}


def predicted(original: Checkpoint, name: str, out: Path) -> dict[str, Any]:
    """{"cpu a8 lean": {"condition": bytes, ...}, ...}; writes and removes the file `out`."""
    hollow.packed(original, out)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.published.memory", name,
         str(original.path.resolve()), str(out.resolve())],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    out.unlink()
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def predict(name: str, folder: str, file: str) -> dict[str, Any]:
    """The predictions; in a fresh process, since a CPU's include the process's own memory."""
    from vitapack.runtime.pipeline.pipeline import Pipeline

    found: dict[str, Any] = {}
    for column, (device, compute, memory) in COLUMNS.items():
        pipeline = Pipeline.from_packed(
            file, device, compute, parts=folder, memory=memory, absent=True
        )
        found[column] = pipeline.predicted_bytes(views=VIEWS.get(name, 1))
        found["resolution"] = pipeline.decoder.resolution or 64
    return found


def lines(found: Mapping[str, Any], ran: Mapping[str, Any]) -> list[str]:
    """The section of docs/published.md; `ran`: the measured generations."""
    names = [name for name in MODELS if name in found]
    return [
        "## Predicted memory by phase",
        "",
        "What `generate` prints before it runs, for the paper's layer map: packed at the family's",
        "default steps, encoder in 8 bits, guidance in two passes, the family's default grid (384;",
        "TRELLIS 64), 2mv with four views. GB. On the CPU of the whole process, lean: predicted /",
        "the largest peak of that phase in the generations below.",
        "",
        *table(
            "| CPU, lean | condition | denoise, a8 | denoise, a16 | decode |",
            [_cpu_row(name, found[name], ran) for name in names],
        ),
        "",
        "On a GPU: of torch's allocations. **Never run on a GPU.**",
        "",
        *table(
            "| GPU | memory | condition | denoise, a8 | denoise, a16 | decode |",
            [
                f"| {name} | {memory} | {' | '.join(_cells(found[name], 'cuda', memory))} |"
                for name in names
                for memory in ("lean", "resident")
            ],
        ),
        "",
    ]


def _cells(found: Mapping[str, Any], device: str, memory: str) -> list[str]:
    a8, a16 = (found[f"{device} {compute} {memory}"] for compute in ("a8", "a16"))
    counts = (a8["condition"], a8["denoise"], a16["denoise"], a8["decode"])
    return [f"{count / 1e9:.2f}" for count in counts]


def _cpu_row(name: str, found: Mapping[str, Any], ran: Mapping[str, Any]) -> str:
    peaks: dict[tuple[str, str], int] = {}  # the largest of all generations
    for row in (row for row in ran.values() if row["model"] == name):
        for phase, held in row["bytes"].items():
            key = phase, row["compute"] if phase == "denoise" else ""
            if phase != "decode" or row["resolution"] == found["resolution"]:
                peaks[key] = max(held["peak"], peaks.get(key, 0))
    cells = [
        f"{cell} / {peaks[key] / 1e9:.2f}" if key in peaks else cell
        for cell, key in zip(
            _cells(found, "cpu", "lean"),
            (("condition", ""), ("denoise", "a8"), ("denoise", "a16"), ("decode", "")),
            strict=True,
        )
    ]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(json.dumps(predict(*sys.argv[1:])))
