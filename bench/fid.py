"""How long a folder's Frechet distance takes: ours, torch-fidelity's, and what the feature extractor alone allows."""

import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from timing import Contender, Found, interleave, memory_now, memory_peak, rows_of, seconds_of
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric

from dia_diffusion.cli.main import main as command
from dia_diffusion.data import open_images
from dia_diffusion.evaluation.feature_store import BATCH
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.frechet import FeatureStatistics, GivenMoments, frechet_distance
from dia_diffusion.evaluation.metrics import METRICS, MetricInputs
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.precision import exact_float32

IMAGE_SIZE = 32
SMALL_NETWORK = 25
"""The small network gets this many times as many images as Inception."""
DIMENSIONS, SAMPLES = 2048, 5000
CHECKED = 64
"""Images per folder in the check that all contenders find the same distance."""
AGREEMENT = 1e-4
"""Largest relative difference allowed between the contenders' distances in exact float32."""

Run = Callable[[], float]
"""Does the work once and returns the distance; NaN if it computes none."""


def measure(images: int, rounds: int, device: torch.device) -> list[Found]:
    """Times an evaluation with Inception's features and with a small network's, and the distance alone.

    images: number of images in each of the two folders that are compared; features are computed for both.

    Raises AssertionError if contenders disagree about a distance.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        weights = work / "inception.pth"
        save_inception(weights)
        many = SMALL_NETWORK * images
        tables = []
        for title, features, given, count in (
            ("Inception's features (seeded weights)", "inception", weights, images),
            ("the features `cifar10`", "cifar10", None, many),
        ):
            check_agreement(of_folders(*make_folders(work, CHECKED), features, given, work))
            runs = of_folders(*make_folders(work, count), features, given, work)
            tables.append(
                side_by_side(f"Distance of {count} PNGs to {count}, {title}", runs, 2 * count, rounds, device)
            )
        check_agreement(of_statistics())
        tables.append(side_by_side(f"Frechet distance in {DIMENSIONS} dimensions", of_statistics(), 1, rounds, device))
        rows = [precision_recall(many)]
        return [*tables, Found(f"Precision and recall of {many} images to {many}, in 256 features", rows)]


def check_agreement(runs: dict[str, Run]) -> None:
    """Runs each contender once, which also warms it up. Raises AssertionError if their distances differ."""
    with exact_float32():  # by default torch-fidelity allows TF32 on a GPU, and is timed that way
        distances = {name: run() for name, run in runs.items()}
    found = [distance for distance in distances.values() if not np.isnan(distance)]
    assert max(found) - min(found) <= AGREEMENT * max(found), f"they disagree: {distances}"


def side_by_side(title: str, runs: dict[str, Run], images: int, rounds: int, device: torch.device) -> Found:
    """The interleaved timings of the contenders, and their ratios to ours."""
    contenders = [Contender(name, run, images) for name, run in runs.items()]
    timings = interleave(contenders, rounds, device, warm_up=False)  # check_agreement did
    return Found(title, rows_of(timings, timings[0]), timings)


def of_folders(folder: Path, reference: Path, features: str, weights: Path | None, work: Path) -> dict[str, Run]:
    """Contenders for the distance of two folders of images."""
    extractor = build_features(features, "cuda" if torch.cuda.is_available() else "cpu", weights)
    decoded = [torch.from_numpy(open_images(place).images) for place in (folder, reference)]
    number = count()

    def ours() -> float:
        fresh = Path(tempfile.mkdtemp(dir=work, prefix=f"{features}-{next(number)}-"))  # nothing from an earlier turn
        os.environ["DIA_DIFFUSION_CACHE"] = str(fresh / "cache")
        arguments = ["fid", str(folder), "--reference", str(reference), "--features", features]
        arguments += ["--record", str(fresh / "records.jsonl")]
        arguments += [] if weights is None else ["--inception-weights", str(weights)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            assert command(arguments) == 0
        return read_records(fresh / "records.jsonl")[-1].distance

    def theirs() -> float:
        found = torch_fidelity.calculate_metrics(
            input1=str(folder),
            input2=str(reference),
            fid=True,
            feature_extractor="inception-v3-compat" if weights else features,
            feature_extractor_weights_path=str(weights) if weights else None,
            cuda=torch.cuda.is_available(),
            cache=False,
            verbose=False,
        )
        return found["frechet_inception_distance"]

    def extractor_alone() -> float:
        for images in decoded:
            for batch in images.split(BATCH):
                extractor(batch).cpu()
        return float("nan")

    return {"dia-diffusion": ours, "torch-fidelity": theirs, "extractor alone": extractor_alone}


def of_statistics() -> dict[str, Run]:
    """Contenders for the distance of two sets of moments, each from more samples than dimensions."""
    mixing = np.random.default_rng(0).normal(size=(DIMENSIONS, DIMENSIONS)) / np.sqrt(DIMENSIONS)
    spread = np.exp(-4 * np.arange(DIMENSIONS) / DIMENSIONS)
    pair = []
    for seed in (1, 2):
        samples = np.random.default_rng(seed).normal(size=(SAMPLES, DIMENSIONS)) + 0.3
        samples = np.maximum(samples @ mixing * spread + 0.02 * seed, 0)  # skewed and correlated, as a network's
        pair.append(GivenMoments(samples.mean(0), np.cov(samples, rowvar=False)))
    named = [{"mu": each.mean, "sigma": each.covariance} for each in pair]
    return {
        "dia-diffusion": lambda: frechet_distance(*pair),
        "torch-fidelity": lambda: fid_statistics_to_metric(*named, verbose=False)["frechet_inception_distance"],
    }


def precision_recall(count: int) -> dict[str, Any]:
    """Seconds, and memory beyond that of the features, measured in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, taken = pool.apply(_precision_recall, (count,))
    return {"what": "dia-diffusion", "seconds": seconds, "MiB": round(taken / 2**20)}


def _precision_recall(count: int) -> tuple[float, int]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, reference = torch.randn(2, count, 256, generator=torch.Generator().manual_seed(0))
    nothing = FeatureStatistics(0)
    inputs = MetricInputs(nothing, nothing, device, features, reference_features=reference)
    before = memory_now(device)
    seconds = seconds_of(lambda: METRICS["prc"].compute(inputs, METRICS["prc"].settings), device)
    return seconds, memory_peak(device) - before


def make_folders(work: Path, images: int) -> tuple[Path, Path]:
    """Two folders of PNGs: noise around a color that differs from image to image."""
    folders = work / f"{images}-a", work / f"{images}-b"
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        for index in range(images):
            noise = generator.normal(generator.uniform(0, 255, 3), 40 + 20 * seed, (IMAGE_SIZE, IMAGE_SIZE, 3))
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06}.png")
    return folders


def save_inception(path: Path) -> None:
    """Writes seeded random weights for torch-fidelity's Inception that give different features for different images."""

    class Unfilled(FeatureExtractorInceptionV3):
        def __init__(self) -> None:
            nothing = io.BytesIO()
            torch.save({}, nothing)
            nothing.seek(0)
            super().__init__("unfilled", ["2048"], nothing)

        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    torch.manual_seed(0)
    network = Unfilled()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
