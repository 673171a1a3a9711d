"""How long a folder's Frechet distance takes: ours, torch-fidelity's, and what the feature extractor alone allows."""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric

from dia_diffusion.cli import fid
from dia_diffusion.data import open_images
from dia_diffusion.evaluation.feature_pass import BATCH
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.frechet import frechet_distance
from dia_diffusion.evaluation.record import read_records
from dia_diffusion.evaluation.statistics import GivenMoments

IMAGE_SIZE = 32
SMALL_NETWORK = 20
"""The small network is given so many times the images that Inception is."""
DIMENSIONS, SAMPLES = 2048, 5000
AGREEMENT = 1e-4
"""How far the distances of contenders may be apart, of themselves."""

Run = Callable[[], float]
"""Does the work once and returns the distance; NaN where it measures none."""
Seconds = dict[str, dict[str, list[float]]]


def measure(images: int, rounds: int, work: Path) -> Seconds:
    """Seconds of every round, by what is measured and contender.

    images: in the folder, and as many in the folder it is compared to; both are measured.
    rounds: after one that isn't counted; in each the contenders take turns.
    work: a folder for the images and weights that this makes.

    Raises AssertionError where contenders disagree about a distance.
    """
    weights = work / "inception.pth"
    if not weights.exists():
        save_inception(weights)
    few, many = (make_folders(work, number) for number in (images, SMALL_NETWORK * images))
    return {
        "inception": take_turns(of_folders(*few, "inception", weights, work), rounds),
        "cifar10": take_turns(of_folders(*many, "cifar10", None, work), rounds),
        "frechet 2048": take_turns(of_statistics(), rounds),
    }


def take_turns(contenders: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Runs A B C, A B C, ...: what else the machine does falls on all alike. The first round is for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        distances = []
        for name, run in contenders.items():
            start = time.perf_counter()
            distances.append(run())
            seconds[name].append(time.perf_counter() - start)
        found = [distance for distance in distances if not np.isnan(distance)]
        assert max(found) - min(found) <= AGREEMENT * max(found), f"{', '.join(contenders)} disagree: {distances}"
    return {name: each[1:] for name, each in seconds.items()}


def of_folders(folder: Path, reference: Path, features: str, weights: Path | None, work: Path) -> dict[str, Run]:
    """Contenders for the distance of two folders of images."""
    extractor = build_features(features, "cuda" if torch.cuda.is_available() else "cpu", weights)
    decoded = [torch.from_numpy(open_images(place).images) for place in (folder, reference)]
    number = count()

    def ours() -> float:
        fresh = Path(tempfile.mkdtemp(dir=work, prefix=f"{features}-{next(number)}-"))  # nothing from an earlier turn
        os.environ["DIA_DIFFUSION_CACHE"] = str(fresh / "cache")
        arguments = [str(folder), "--reference", str(reference), "--features", features]
        arguments += ["--record", str(fresh / "records.jsonl")]
        arguments += [] if weights is None else ["--inception-weights", str(weights)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            fid.run(arguments)
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
    """Contenders for the distance of two sets of moments, of more samples than dimensions."""
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


def make_folders(work: Path, images: int) -> tuple[Path, Path]:
    """Two folders of PNGs: noise about a colour that differs from image to image."""
    folders = work / f"{images}-a", work / f"{images}-b"
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        for index in range(images):
            noise = generator.normal(generator.uniform(0, 255, 3), 40 + 20 * seed, (IMAGE_SIZE, IMAGE_SIZE, 3))
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06}.png")
    return folders


def save_inception(path: Path) -> None:
    """A weights file for torch-fidelity's Inception, drawn by a seed, under which features differ between images."""

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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for measured, contenders in measure(int(sys.argv[1]), int(sys.argv[2]), Path(folder)).items():
            for name, seconds in contenders.items():
                print(f"{measured:12}  {name:15}  {median(seconds):8.3f} s")
