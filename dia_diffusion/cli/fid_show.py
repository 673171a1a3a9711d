"""`dia-diffusion fid --show`: a page of samples next to their nearest reference images, and the best and worst."""

import base64
import io
import re
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from dia_diffusion.distributed import on_rank_zero
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.evaluate import Evaluator, filled_by_all
from dia_diffusion.evaluation.neighbors import NEIGHBORS, Neighbors, find_neighbors
from dia_diffusion.evaluation.reference import reference_features
from dia_diffusion.evaluation.sources import MeasuredImages
from dia_diffusion.io import write_text
from dia_diffusion.progress import Progress

if TYPE_CHECKING:
    from dia_diffusion.data import ImageSet
    from dia_diffusion.evaluation.feature_store import FeatureStore

STYLE = """
body { font-family: system-ui, sans-serif; margin: 2em; max-width: 75em }
figure { display: inline-block; margin: 0 1em 1em 0 }
figcaption { font-size: small }
img { width: 96px; margin-right: 2px; image-rendering: pixelated }
"""


def show_samples(
    evaluators: Sequence[Evaluator],
    source: MeasuredImages,
    works: Sequence[Path],
    count: int,
    reference: "ImageSet",
    progress: Progress,
    folder: Path,
) -> list[Path]:
    """Writes a page into the folder for each evaluator, on all ranks, and returns the files.

    Args:
        works: work folders of the evaluators; their features stay there for the measurement.
        count: how many of the samples nearest to a real image are shown.
    """
    if len(reference) < NEIGHBORS:
        raise InputError(f"{reference.name} must have {NEIGHBORS} images or more for --show, got {len(reference)}")
    accelerator, pages = evaluators[0].accelerator, []

    def write(page: Path, features: str, store: "FeatureStore | None", real_features: torch.Tensor | None) -> None:
        assert store is not None and real_features is not None  # on rank 0
        found = find_neighbors(store.read("features"), real_features, accelerator.device)
        write_text(page, _page(source, features, found, count, reference))

    with filled_by_all(evaluators, source, works, progress) as stores:
        for evaluator, store, work in zip(evaluators, stores, works, strict=True):
            features = evaluator.extractor.name
            name = re.sub("[/:]", "-", f"{source.name}-{features}")
            page = folder / f"show-{name}-{work.name[:8]}.html"  # one per measurement
            real_features = reference_features(reference, evaluator.extractor, accelerator, progress)
            on_rank_zero(accelerator, partial(write, page, features, store, real_features))
            pages.append(page)
    return pages


def _page(source: MeasuredImages, features: str, found: Neighbors, count: int, reference: "ImageSet") -> str:
    """A page of HTML that loads no other files."""
    samples, kind = len(found.distances), "image" if source.folder is None else "seed"
    densest_first = np.argsort(found.sparsity)
    few = min(max(1, count // 4), samples)
    sections = {
        f"Nearest of the {len(reference):,} images of {reference.name}": (
            f"The {min(count, samples)} samples with the smallest distances, each beside its nearest real image. The "
            "percentage is how many real images are nearer to their own nearest real image: 0 % is a copy or closer "
            f"than any two real images. {(found.percentiles == 0).sum():,} of {samples:,} samples are at 0 %; the "
            f"median is {np.median(found.percentiles):.0f} %.",
            np.argsort(found.distances)[:count],
        ),
        "Best samples": (f"Smallest distance to the {NEIGHBORS}th nearest real image.", densest_first[:few]),
        "Worst samples": (f"Largest distance to the {NEIGHBORS}th nearest real image.", densest_first[::-1][:few]),
    }
    shown = np.unique(np.concatenate([order for _, order in sections.values()]))
    batches = source.images(shown.tolist(), lambda amount: None)
    images = dict(zip(shown, torch.cat([batch.cpu() for batch in batches]).numpy(), strict=True))
    title = f"{samples:,} samples of {source.name} in features {features}"
    body = ""
    for heading, (text, order) in sections.items():
        body += f"<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n"
        for index in order:
            pictures, caption = [images[index]], f"{kind} {index}: {found.sparsity[index]:.4f}"
            if not heading.endswith("samples"):
                pictures.append(reference.read([found.nearest[index]])[0])
                caption = f"{kind} {index}: {found.distances[index]:.4f}, {found.percentiles[index]:.0f} %"
            body += f"<figure>{''.join(map(_image, pictures))}<figcaption>{caption}</figcaption></figure>\n"
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n'
    )


def _image(pixels: np.ndarray) -> str:
    """A uint8 image (C, H, W) as a PNG in the page."""
    file = io.BytesIO()
    rows = np.moveaxis(pixels, 0, -1)
    Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows).save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
