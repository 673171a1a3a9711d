"""`python tools/metric_orders.py RUN --reference DATA`: how metrics rank checkpoints at several numbers of samples.

Each pipeline draws its images once; each metric is computed on every consecutive block of N of them. Kendall's tau
compares the order of the pipelines with the metric's own order at the largest N, and with that of the Frechet distance
there: with the same seeds for all pipelines, and, averaged over 1,000 draws, with different seeds for each.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import kendalltau

from dia_diffusion.cli.console import console
from dia_diffusion.data import open_images
from dia_diffusion.environment import environment
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.feature_store import filled_store
from dia_diffusion.evaluation.features import FeatureExtractor, build_features
from dia_diffusion.evaluation.frechet import SUM_BLOCK, sums
from dia_diffusion.evaluation.metrics import METRICS, MetricInputs
from dia_diffusion.evaluation.reference import Reference, reference_features, reference_statistics
from dia_diffusion.evaluation.sources import pipeline_source
from dia_diffusion.io import step_folders, write_json
from dia_diffusion.pipelines.folder import weights_hash
from dia_diffusion.progress import Progress
from dia_diffusion.sampling.generate import adapt_pipeline
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sampling.samplers import SamplingSettings
from dia_diffusion.tables import Table
from dia_diffusion.training.run_folder import RunFolder

matplotlib.use("agg")
import matplotlib.pyplot as plt

Values = dict[str, dict[int, list[list[float]]]]
"""Metric -> number of samples N -> for each pipeline, in order of step, one number per block of N samples."""
DRAWS = 1000
"""Number of random choices of seeds for each pipeline."""


def main() -> int:
    """Measures, prints a table, writes OUT.json and OUT.png. Exit codes: 0, or 2 if it can't be measured."""
    options = _parser().parse_args()
    try:
        steps, values = _measure(options)
    except InputError as error:
        print(f"metric_orders: error: {error}", file=sys.stderr)
        return 2
    rows = orders(values)
    console.print(Table(COLUMNS, rows, left=("metric",)).to_rich())
    write_json(options.out.with_suffix(".json"), {"steps": steps, "values": values, "environment": environment()})
    _draw(steps, values, options.out.with_suffix(".png"))
    console.print(f"{options.out.with_suffix('.json')}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tools/metric_orders.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run with at least three pipelines")
    parser.add_argument("--reference", required=True, help="images that it was trained on")
    parser.add_argument("--features", default="cifar10")
    parser.add_argument("--metrics", default="fid,kid,mind", help="separated by commas, the first number of each")
    parser.add_argument("--counts", default="500,1000,2000,5000", help="numbers of samples")
    parser.add_argument("--sampler", default="dpmsolver++")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/results/orders"), help="without an ending")
    return parser


def _measure(options: argparse.Namespace) -> tuple[list[int], Values]:
    accelerator = Accelerator()
    folders = step_folders(RunFolder(options.run).pipelines)
    if len(folders) < 3:
        raise InputError(f"RUN must have 3 pipelines or more, got {len(folders)} in {options.run}")
    extractor = build_features(options.features, accelerator.device)
    counts = sorted(map(int, options.counts.split(",")))
    values: Values = {METRICS.choose(name, "metrics").names[0]: {} for name in options.metrics.split(",")}
    reference = None
    for folder in folders.values():
        loaded = load_pipeline(folder, accelerator.device, torch.float32)
        pipeline = adapt_pipeline(loaded, SamplingSettings(options.sampler, options.steps))
        if reference is None:
            images = open_images(options.reference, size=pipeline.image_shape[1], channels=pipeline.image_shape[0])
            reference = reference_statistics(images, extractor)
            real = reference_features(images, extractor, accelerator)
        assert real is not None
        source = pipeline_source(pipeline, folder, counts[-1], options.batch_size)
        work = options.out.parent / f"{options.out.name}.features" / weights_hash(folder)[:16]
        store = filled_store(
            source.images, source.count, extractor, accelerator, folder.name, folder=work, progress=Progress()
        )
        with store as kept:
            assert kept is not None  # one process
            features = kept.read("features")
        compute = partial(_numbers, options.metrics.split(","), counts[0], reference, real, extractor)
        for count in counts:
            blocks = [compute(block) for block in features.split(count) if len(block) == count]
            for name, of_metric in values.items():
                of_metric.setdefault(count, []).append([numbers[name] for numbers in blocks])
        last = {name: of_metric[counts[-1]][-1][0] for name, of_metric in values.items()}
        console.print(f"{folder.name}: " + ", ".join(f"{name} {number:.4f}" for name, number in last.items()))
    return list(folders), values


def _numbers(
    metrics: Sequence[str],
    kid_subset_size: int,
    reference: Reference,
    real: torch.Tensor,
    extractor: FeatureExtractor,
    features: torch.Tensor,
) -> dict[str, float]:
    statistics = sums(features.split(SUM_BLOCK), extractor.num_features)
    inputs = MetricInputs(statistics, reference.statistics, extractor.device, features, reference_features=real)
    numbers = {}
    for name in metrics:
        row = METRICS[name]
        settings = {**row.settings, **({"kid_subset_size": kid_subset_size} if name == "kid" else {})}
        row.check_count(name, len(features), settings, num_features=extractor.num_features)
        numbers[row.names[0]] = row.compute(inputs, settings)[row.names[0]]
    return numbers


COLUMNS = ("metric", "samples", "seeds", "tau with its own order", "tau with FD's")


def orders(values: Values) -> list[list[Any]]:
    """Rows of COLUMNS; the orders at the largest number of samples use its first block."""
    most = max(next(iter(values.values())))
    final = {name: [blocks[0] for blocks in by_count[most]] for name, by_count in values.items()}
    with_fd = final.get("FD")
    rows = []
    for name, by_count in values.items():
        for count, numbers in by_count.items():
            blocks = np.array(numbers)  # (pipelines, blocks)
            chosen = np.random.default_rng(0).integers(blocks.shape[1], size=(DRAWS, len(blocks)))
            draws = np.take_along_axis(blocks[None], chosen[:, :, None], axis=2)[:, :, 0]  # (DRAWS, pipelines)
            kinds = {"the same": blocks[:, :1].T} | ({"other": draws} if blocks.shape[1] > 1 else {})
            for kind, sets in kinds.items():
                taus = (_mean_tau(sets, final[name]), "" if with_fd is None else _mean_tau(sets, with_fd))
                rows.append([name, f"{count:,}", kind, *taus])
    return rows


def _mean_tau(sets: np.ndarray, order: Sequence[float]) -> str:
    return f"{np.mean([kendalltau(numbers, order).statistic for numbers in sets]):.3f}"


def _draw(steps: Sequence[int], values: Values, path: Path) -> None:
    """Plots one panel per metric: for each number of samples, the mean over the blocks and their range."""
    figure, panels = plt.subplots(1, len(values), figsize=(4 * len(values), 3.2), layout="constrained", squeeze=False)
    for panel, (name, by_count) in zip(panels[0], values.items(), strict=True):
        for count, numbers in by_count.items():
            blocks = np.array(numbers)
            panel.plot(steps, blocks.mean(1), marker="o", markersize=3, label=f"{count:,} samples")
            panel.fill_between(steps, blocks.min(1), blocks.max(1), alpha=0.2)
        scale = "log" if min(np.min(numbers) for numbers in by_count.values()) > 0 else "linear"
        panel.set(title=name, xlabel="training steps", yscale=scale)
    panels[0][0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
