"""`python bench/samplers.py RUN --reference DATA`: distance and images per second of each sampler.

Every sampler draws images from the same seeds with the same numbers of network calls, and all rates come from one run.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from timing import console

from dia_diffusion.data import open_images
from dia_diffusion.environment import environment
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.frechet import frechet_distance, measure
from dia_diffusion.evaluation.reference import Reference, floor_distance, reference_statistics
from dia_diffusion.io import write_json
from dia_diffusion.pipelines.folder import find_pipeline, weights_hash
from dia_diffusion.sampling.generate import adapt_pipeline, generate
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sampling.samplers import SAMPLERS, SamplingSettings

matplotlib.use("agg")
import matplotlib.pyplot as plt

CALLS_PER_STEP = {"heun": 2}
"""Network calls per step; 1 for samplers that aren't listed. Heun's last step takes one."""
PRECISIONS = ("float32", "bfloat16")


def main() -> int:
    """Measures, prints a table, writes OUT.json and OUT.png. Exit codes: 0, or 2 if it can't be measured."""
    options = _parser().parse_args()
    try:
        about, rows = _measure(options)
    except InputError as error:
        print(f"samplers: error: {error}", file=sys.stderr)
        return 2
    write_json(options.out.with_suffix(".json"), {**about, "rows": rows})
    _draw(rows, about, options.out.with_suffix(".png"))
    console.print(f"{options.out.with_suffix('.json')}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bench/samplers.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run or a pipeline folder")
    parser.add_argument("--reference", required=True, help="images that it was trained on")
    parser.add_argument("--features", default="cifar10")
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help="separated by commas; all if none")
    parser.add_argument("--calls", default="10,20,50", help="of the network an image")
    parser.add_argument("--num", type=int, default=2000, help="images a distance")
    parser.add_argument("--first-seed", type=int, default=0, help="of the images; the others follow it")
    parser.add_argument("--precisions", default="float32", help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed/samplers"), help="without an ending")
    return parser


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    device = Accelerator().device
    folder = find_pipeline(options.run)
    shape = adapt_pipeline(load_pipeline(folder, device, torch.float32), SamplingSettings()).image_shape
    extractor = build_features(options.features, device)
    images = open_images(options.reference, size=shape[1], channels=shape[0])
    reference = reference_statistics(images, extractor)
    floor = floor_distance(reference, images, extractor, count=options.num)
    about = {
        "pipeline": folder.name,
        "weights": weights_hash(folder),
        "reference": f"{reference.name}, {len(images)} images of {shape}",
        "features": extractor.name,
        "num": options.num,
        "first seed": options.first_seed,
        "distance of as many real images": floor,
        "environment": environment(),
    }
    rows = []
    for precision in options.precisions.split(","):
        pipeline = load_pipeline(folder, device, getattr(torch, precision))
        for calls in map(int, options.calls.split(",")):
            for name in options.samplers.split(","):
                try:
                    row = _row(pipeline, name, calls, options, extractor, reference)
                except InputError as error:  # this sampler can't do this; the others continue
                    console.print(f"{name}, {calls} calls: {error}")
                    continue
                rows.append({"precision": precision, **row})
                console.print(rows[-1])
    return about, rows


def _row(
    pipeline: DiffusionPipeline,
    name: str,
    calls: int,
    options: argparse.Namespace,
    extractor: Any,
    reference: Reference,
) -> dict[str, Any]:
    steps = -(-calls // CALLS_PER_STEP.get(name, 1))
    adapted = adapt_pipeline(pipeline, SamplingSettings(name, steps))
    seeds = range(options.first_seed, options.first_seed + options.num)
    seconds: list[float] = []

    def batches() -> Any:
        started = time.perf_counter()
        for _, images in generate(adapted, seeds, options.batch_size):
            seconds.append((time.perf_counter() - started) / len(images))
            yield images
            started = time.perf_counter()

    statistics = measure(batches(), extractor)
    distance = frechet_distance(statistics, reference.statistics)
    return {
        "calls": calls,
        "sampler": name,
        "steps": steps,
        f"FD({extractor.name})": round(distance, 4),
        "images_per_second": round(1 / median(seconds), 2),
    }


def _draw(rows: Sequence[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Plots distance against rate, one line per sampler."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    distance = f"FD({about['features']})"
    for precision in dict.fromkeys(row["precision"] for row in rows):
        for number, name in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
            mine = [row for row in rows if (row["sampler"], row["precision"]) == (name, precision)]
            style = "-" if precision == "float32" else "--"
            rates, distances = [row["images_per_second"] for row in mine], [row[distance] for row in mine]
            label = name if precision == "float32" else None
            axis.plot(rates, distances, f"o{style}", color=f"C{number}", label=label, markersize=4)
    axis.set(xlabel="images a second", ylabel=f"{distance} of {about['num']:,} images", xscale="log")
    real = about["distance of as many real images"]
    axis.set_title(f"as many real images: {real:.3f}; dashed: bfloat16", fontsize=9, loc="left")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
