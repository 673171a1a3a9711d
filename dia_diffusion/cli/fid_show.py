"""`dia-diffusion fid --show`: a page of samples beside their nearest reference images, and the best and worst."""

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from dia_diffusion.distributed import on_rank_zero
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.neighbors import NEIGHBORS, Neighbors, find_neighbors
from dia_diffusion.evaluation.reference import reference_features
from dia_diffusion.evaluation.sources import ImageSource
from dia_diffusion.io import write_text
from dia_diffusion.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dia_diffusion.data import ImageSet
    from dia_diffusion.evaluation.features import FeatureExtractor

STYLE = """
body { font-family: system-ui, sans-serif; margin: 2em; max-width: 75em }
figure { display: inline-block; margin: 0 1em 1em 0 }
figcaption { font-size: small }
img { width: 96px; margin-right: 2px; image-rendering: pixelated }
"""


def show_samples(
    source: ImageSource,
    count: int,
    reference: "ImageSet",
    extractor: "FeatureExtractor",
    accelerator: "Accelerator",
    progress: Progress,
    folder: Path,
) -> Path:
    """Writes the page of the first `count` images of a source into a folder, and returns the file; on all ranks."""
    if len(reference) < NEIGHBORS:
        raise InputError(f"{reference.name} must have {NEIGHBORS} images or more for --show, got {len(reference)}")
    count = min(count, source.count)
    real_features = reference_features(reference, extractor, accelerator, progress)
    page = folder / f"show-{source.name}-{extractor.name.replace(':', '-')}.html"

    def write() -> None:
        assert real_features is not None
        batches = list(source.images(range(count), lambda amount: None))
        features = torch.cat([extractor.layers(batch)["features"] for batch in batches])
        found = find_neighbors(features, real_features, extractor.device)
        images = torch.cat([batch.cpu() for batch in batches]).numpy()
        write_text(page, _page(source, extractor.name, images, found, reference))

    on_rank_zero(accelerator, write)
    return page


def _page(source: ImageSource, features: str, images: np.ndarray, found: Neighbors, reference: "ImageSet") -> str:
    """HTML that loads nothing."""
    part, kind = max(1, min(16, len(images) // 2)), "image" if source.folder is None else "seed"
    densest_first = np.argsort(found.sparsity)
    sections = {
        f"Nearest of the {len(reference):,} images of {reference.name}, smallest distances first": (
            "Each sample is beside its nearest real image. The percentage is how many real images are nearer to their "
            "own nearest real image: 0 % is a copy or closer than any two real images.",
            np.argsort(found.distances),
        ),
        "Best samples": (f"Smallest distance to the {NEIGHBORS}th nearest real image.", densest_first[:part]),
        "Worst samples": (f"Largest distance to the {NEIGHBORS}th nearest real image.", densest_first[::-1][:part]),
    }
    title = f"{len(images)} samples of {source.name} in features {features}"
    body = ""
    for heading, (text, order) in sections.items():
        body += f"<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n"
        pairs = not heading.endswith("samples")
        for index in order:
            shown = [images[index], *(reference.read([found.nearest[index]]) if pairs else ())]
            caption = f"{kind} {index}: {found.sparsity[index]:.4f}"
            if pairs:
                caption = f"{kind} {index}: {found.distances[index]:.4f}, {found.percentiles[index]:.0f} %"
            body += f"<figure>{''.join(map(_image, shown))}<figcaption>{caption}</figcaption></figure>\n"
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
