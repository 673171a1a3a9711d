"""How seconds per training step and peak memory grow with batch, width, depth and image size, one at a time."""

import multiprocessing
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from steps import OURS, Setting, experiment_of, made_up_images, own_step
from timing import STEPS, Found, block_size, exponent, memory_now, memory_peak, note, seconds_of

from dia_diffusion.training.recipe import override

# A U-ViT that a CPU trains in minutes; each axis varies one of these numbers.
BASE = {"batch": 32, "width": 192, "blocks": 5, "size": 16}
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "width": (96, 192, 384, 768),
    "blocks": (5, 9, 17, 33),
    "size": (8, 16, 32, 64),
}
PATCH, HEAD = 2, 32
ASKED_FOR = {"batch": 1.0, "width": 2.0, "blocks": 1.0, "size": 4.0}
"""Largest exponents of a step's operation count: by width from the matrix products, by size from attention."""


def measure(rounds: int, precision: str) -> list[Found]:
    """One table per axis; each setting runs in a separate process."""
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in AXES.items():
            rows: list[dict[str, Any]] = []
            for value in values:
                note(f"{axis} {value}")
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, taken = pool.apply(step_of, (BASE | {axis: value}, rounds, precision, Path(folder)))
                rows.append({"what": f"{axis} {value}", "seconds": seconds, "MiB": round(taken / 2**20)})
            for index in range(1, len(rows)):
                pair = rows[index - 1 : index + 1]
                for key in ("seconds", "MiB"):
                    rows[index][f"exponent of {key}"] = exponent(
                        values[index - 1 : index + 1], [row[key] for row in pair]
                    )
            rows[0] |= {"exponent of seconds": "", "exponent of MiB": ""}
            others = ", ".join(f"{name} {value}" for name, value in BASE.items() if name != axis)
            caption = f"the mathematics asks for at most {ASKED_FOR[axis]:g} in the long run"
            tables.append(
                Found(f"Training step of a U-ViT with DIA-LSTM, by {axis}; {others}, patch {PATCH}", rows, note=caption)
            )
    return tables


def step_of(shape: dict[str, int], rounds: int, precision: str, folder: Path) -> tuple[float, int]:
    """Median seconds of a step of this shape, and the peak bytes that it took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = experiment_of(f"{OURS}, DIA-LSTM", Setting(shape["batch"], precision, folder))
    keys = {
        "output": str(folder / "-".join(map(str, shape.values()))),
        "data.source": str(made_up_images(folder, shape["size"])),
        "model.sample_size": shape["size"],
        "model.patch_size": PATCH,
        "model.hidden_size": shape["width"],
        "model.num_layers": shape["blocks"],
        "model.num_attention_heads": shape["width"] // HEAD,
    }
    before = memory_now(device)
    step = own_step(override(recipe, keys))
    step()
    block = block_size(seconds_of(step, device), device, STEPS)
    return median(seconds_of(step, device, block) for _ in range(rounds)), memory_peak(device) - before
