"""Writes docs/furniture.md, the model's card, from the other commands' results.

python -m benchmarks.furniture.page
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.markdown import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "furniture.json"
SAMPLING = RESULTS.with_name("furniture-sampling.json")
TRAINING = RESULTS.with_name("furniture-training.json")
FINETUNING = RESULTS.with_name("furniture-finetuning.json")
PAGE = ROOT / "docs" / "furniture.md"
SETS = {
    "unseen-views": "unseen views of training shapes",
    "validation-shapes": "unseen shapes (validation)",
    "test-shapes": "unseen shapes (test)",
}


def cell(row: dict) -> str:
    return f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def redundancy_lines(found: dict | None) -> list[str]:
    if not found:
        return []
    share = len(found["least vital"]["blocks"])
    lines = [
        f"A quarter of the blocks ({share}) left out, without fine-tuning or quantization;",
        "random draws take the same number of each kind:",
        "",
        *table(
            "| left out | IoU to the original |",
            [
                f"| {title}: {', '.join(row['blocks'])} | {cell(row['iou_to_original'])} |"
                for title, row in found.items()
            ],
        ),
    ]
    return [*lines, ""]


def sampling_lines() -> list[str]:
    """The table of `benchmarks.furniture.sampling`, which chose guidance and step count."""
    if not SAMPLING.exists():
        return []
    data = json.loads(SAMPLING.read_text())
    lines = [
        "## Guidance, samplers, steps",
        "",
        f"Chosen on {data['images']} other unseen views, by `python -m",
        "benchmarks.furniture.sampling`. V-IoU to the true shape; IoU of the shapes of two seeds;",
        f"IoU to the same seed's shape after {data['reference_steps']} Euler steps.",
        "",
    ]
    rows = []
    for row in data["rows"]:
        kept = cell(row["to_reference"]) if "to_reference" in row else ""
        rows.append(
            f"| {row['guidance']:g} | {row['sampler']} | {row['steps']} | {cell(row['v_iou'])} | "
            f"{cell(row['two_seeds'])} | {kept} |"
        )
    head = "| guidance | sampler | steps | V-IoU to truth | IoU of two seeds | IoU to many steps |"
    return [*lines, *table(head, rows), ""]


def compression_lines(data: dict) -> list[str]:
    """Quality after compression, the vitality of each block, and the stability of their order."""
    found, vitality = data["compression"], data["compression"]["vitality"]
    lines = [
        "## Quality after compression",
        "",
        *redundancy_lines(found.get("redundancy")),
        "IoU to the original's output from the same noise, on unseen views that the vitality",
        f"analysis ({vitality['images']} other images) did not use.",
        "",
        *table(
            "| plan | blocks | network bytes | share of fp16 | IoU to original | V-IoU to truth |",
            [
                f"| {title} | {row['blocks']} | {row['dit_bytes']:,} | "
                f"{row['share_of_fp16']:.1%} | {cell(row['iou_to_original'])} | "
                f"{cell(row['v_iou_to_truth'])} |"
                for title, row in found["plans"].items()
            ],
        ),
    ]
    times = [row["seconds"] for row in found["plans"].values() if "seconds" in row]
    if times:
        lines += [
            "",
            f"Packed, an image takes {min(times):.1f} to {max(times):.1f} s on one core.",
        ]
    lines += ["", "The automatic plan:", "", "```", found["auto"], "```", ""]
    lines += ["## Vitality", "", "EMD to the original's output with the block left out.", ""]
    lines += table(
        "| block | vitality | floor | debiased | IoU to original |",
        [
            f"| {block['kind']} {block['index']} | {cell(block)} | {block['floor']:.4f} | "
            f"{block['debiased']:.4f} | {block['iou']:.3f} |"
            for block in sorted(vitality["blocks"], key=lambda b: -b["mean"])
        ],
    )
    rows = []
    for name, value in vitality["stability"].items():
        rows.append((vitality["images"], name, value))
    for name, value in data.get("stability", {}).get("orders", {}).items():
        rows.append((data["stability"]["images"], name, value))
    lines += [
        "",
        "Agreement of the blocks' order between two disjoint halves of the images (Spearman",
    ]
    lines += ["correlation, with the 2.5 to 97.5 % range of 500 random splits):", ""]
    lines += table(
        "| images | blocks | Spearman |",
        [f"| {images} | {name} | {cell(value)} |" for images, name, value in rows],
    )
    return [*lines, ""]


def page(data: dict, training: dict) -> str:
    """docs/furniture.md from the figures."""
    lines = [
        "# The furniture model",
        "",
        "A small image-to-shape Diffusion Transformer, bundled with vitapack so that compression",
        "can be judged on a trained model. A double/single-block DiT with the block structure of",
        "Hunyuan3D-2mini (8 double + 16 single blocks, hidden size 128), trained on",
        f"{data['model']['shapes']} human-made shapes of Debian's `sweethome3d-furniture`;",
        "every shape's author and licence is in `runtime/bundled/furniture/ATTRIBUTION.tsv`.",
        "It is made for tests, demos and benchmarks of compression, not to reconstruct your chair:",
        "it knows the shapes that it was trained on, from views that it has not seen.",
        "",
        "Unless another command is named, figures are from `python -m benchmarks.furniture.card",
        "--stability`; those of the test shapes from `... --sets test-shapes --no-compression`.",
        "",
        "## Networks",
        "",
        *table(
            "| network | parameters | fp16 bytes |",
            [
                f"| {name} | {count:,} | {2 * count:,} |"
                for name, count in data["model"]["parameters"].items()
            ],
        ),
        "",
        "## Quality to the true shape",
        "",
        "Mean and 95 % bootstrap interval over the images of a set; 64^3 cells of [-1, 1]^3.",
        "The ceiling is the autoencoder's reconstruction of the true shape. The nearest training",
        "shape is the one with the highest IoU to the true shape.",
        "",
    ]
    rows = []
    for name, words in SETS.items():
        if name in data["quality"]:
            s = data["quality"][name]["summary"]
            columns = ("v_iou", "v_iou_tolerant", "f_score", "autoencoder_iou",
                       "nearest_training_iou", "two_seeds")  # fmt: skip
            cells = " | ".join(cell(s[key]) for key in columns)
            rows.append(f"| {words} | {s['v_iou']['n']} | {cells} |")
    lines += table(
        "| set | n | V-IoU | V-IoU, 1 voxel | F-score 0.05 | ceiling | nearest training shape | "
        "IoU of two seeds |",
        rows,
    )
    unseen = data["quality"].get("validation-shapes", {}).get("summary")
    if unseen and unseen["v_iou"]["mean"] < unseen["nearest_training_iou"]["mean"]:
        lines += [
            "",
            "On unseen shapes it is worse than the nearest training shape: it does not generalise.",
        ]
    lines += [
        "",
        "Image, generated shape, true shape; the number is the V-IoU:",
        "",
        "![unseen views](pictures/furniture-unseen-views.png)",
        "",
        *sampling_lines(),
    ]
    if "compression" in data:
        lines += compression_lines(data)
    lines += finetuning_lines()
    lines += [
        "## Training",
        "",
        "![curves](pictures/furniture-training.svg)",
        "",
        "Logs of the three trainings: `benchmarks/results/furniture-training.json`. The DiT's,",
        "with its averaged weights and 12 Euler steps; mean V-IoU of 24 shapes per column:",
        "",
        *training_lines(training["DiT"]),
        f"Measured with {data['versions']}.",
    ]
    return "\n".join(lines) + "\n"


def finetuning_lines() -> list[str]:
    """The table of `benchmarks.furniture.finetune`."""
    if not FINETUNING.exists():
        return []
    data = json.loads(FINETUNING.read_text())
    training, judged = data["training"], data["before"]["iou_to_original"]["n"]
    rows = [f"| none | | {cells(data['before'])} | | |"]
    for name, row in data["after"].items():
        loss = f"{row['loss_before']:.3f} to {row['loss_after']:.3f}"
        rows.append(
            f"| {name} | {len(row['blocks'])} | {cells(row)} | {cell(row['gain'])} | {loss} |"
        )
    return [
        "## Fine-tuning",
        "",
        f"A plan of {data['blocks']} blocks in {data['share_of_fp16']:.1%} of the network's fp16",
        "bytes, before and after `vitapack finetune` with the settings",
        ", ".join(f"{key} {value:g}" for key, value in training.items()) + ".",
        "Each image is a rendered view of a different training shape. Judged on",
        f"{judged} of the bundled unseen views, which are other views; the gain is the mean",
        "difference per image. The loss is the paper's, on held-out sampling trajectories of the",
        "original. By `python -m benchmarks.furniture.finetune`. The paper trains for 20,000 to",
        "30,000 iterations.",
        "",
        *table(
            "| trained | blocks | IoU to original | V-IoU to truth | gain | loss |",
            rows,
        ),
        "",
    ]


def cells(row: dict) -> str:
    return f"{cell(row['iou_to_original'])} | {cell(row['v_iou_to_truth'])}"


def training_lines(rows: list[dict]) -> list[str]:
    """The DiT's scores by hours and samples, as a table."""
    keys = ("loss", "train_iou", "unseen_view_iou", "two_seeds", "unseen_shape_iou")
    lines = []
    for row in rows:
        scores = " | ".join(f"{row[key]:.3f}" if key in row else "" for key in keys)
        lines.append(f"| {row['hours']:.2f} | {row['samples']:,} | {scores} |")
    head = "| hours | samples | loss | train views | unseen views | two seeds | unseen shapes |"
    return [*table(head, lines), ""]


def curves(logs: dict[str, list[dict]]) -> str:
    """An SVG with one panel per training: held-out scores by hours."""
    width, height, gap = 300, 180, 40
    parts = []
    for number, (name, rows) in enumerate(logs.items()):
        left = number * (width + gap) + gap
        hours = max(row["hours"] for row in rows)
        parts.append(
            f'<text x="{left}" y="14">{name}: IoU by hours (0 to {hours:.2f})</text>'
            f'<rect x="{left}" y="20" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        )
        keys = [k for k in rows[-1] if k in SCORES and any(k in row for row in rows)]
        for key, colour in zip(keys, ("#1769aa", "#b3541e", "#2e7d32", "#6a1b9a"), strict=False):
            points = " ".join(
                f"{left + width * row['hours'] / hours:.1f},{20 + height * (1 - row[key]):.1f}"
                for row in rows
                if key in row
            )
            y = 20 + height + 16 + 14 * keys.index(key)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                f'<text x="{left}" y="{y}" fill="{colour}">{key} {rows[-1][key]:.3f}</text>'
            )
    total = len(logs) * (width + gap) + gap
    style = 'font-family="sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height + 100}" {style}>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


SCORES = (
    "train", "unseen", "retrieval", "train_iou", "unseen_view_iou", "unseen_shape_iou",
    "two_seeds",
)  # fmt: skip


def write_page() -> None:
    PAGE.with_name("pictures").mkdir(parents=True, exist_ok=True)
    training = json.loads(TRAINING.read_text())
    (PAGE.with_name("pictures") / "furniture-training.svg").write_text(curves(training))
    PAGE.write_text(page(json.loads(RESULTS.read_text()), training))


if __name__ == "__main__":
    write_page()
