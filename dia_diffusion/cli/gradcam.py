"""`dia-diffusion gradcam`: where trained classifiers look in the same images, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dia_diffusion.cli.console import console
from dia_diffusion.cli.options import Metavar, Positional
from dia_diffusion.cli.shared_options import Split
from dia_diffusion.errors import InputError
from dia_diffusion.io import refuse_existing
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    from dia_diffusion.data import ImageSet
    from dia_diffusion.models.classifiers import SavedClassifier


class Options(Strict):
    """Draws Grad-CAM heat maps of trained classifiers over images."""

    classifiers: Annotated[tuple[str, ...], Positional("CLASSIFIER")]
    """Runs or folders that classify has written."""
    images: Annotated[str, Metavar("SOURCE")]
    """Any image source, as for training."""
    split: Split = "train"
    """Split of the images, if they have splits."""
    count: int = Field(6, ge=1)
    """Number of images, drawn at random."""
    seed: int = Field(0, ge=0)
    """Seed of the drawn images."""
    number: int | None = Field(None, alias="class")
    """The class to explain; if not given, the image's own or, without labels, what the first classifier predicts."""
    out: Path = Path("gradcam.png")
    """The figure."""


def run(options: Options) -> None:
    """Draws the heat maps side by side."""
    import numpy as np
    import torch

    from dia_diffusion.analysis.gradcam import draw_heat_maps, heat_maps
    from dia_diffusion.data import open_images
    from dia_diffusion.models.classifiers import load_classifier
    from dia_diffusion.plotting import check_format

    refuse_existing(options.out)
    check_format(options.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = {Path(place).resolve().name: load_classifier(place, device) for place in options.classifiers}
    if len(loaded) < len(options.classifiers):
        raise InputError(f"classifiers must have folders of different names, got {min(loaded)} twice")
    first, *others = loaded.values()
    for other in others:
        if (other.config.sample_size, other.config.num_classes) != (first.config.sample_size, first.config.num_classes):
            raise InputError("the classifiers must have the same model.sample_size and num_classes")

        if None not in (first.class_names, other.class_names) and other.class_names != first.class_names:
            raise InputError("the classifiers must have the same names of classes")

    source = open_images(options.images, split=options.split, size=first.config.sample_size)
    count = min(options.count, len(source))
    chosen = np.sort(np.random.default_rng(options.seed).choice(len(source), count, replace=False))
    pictures = source.read(chosen)
    pixels = torch.from_numpy(pictures)
    if options.number is not None:
        classes = [options.number] * count
    elif source.labels is not None:
        classes = [_known_class(int(label), source, first) for label in source.labels[chosen]]
    else:
        with torch.no_grad():
            classes = first.model(first.prepare(pixels.to(device))).argmax(dim=1).tolist()
    maps = [heat_maps(name, classifier, pixels, classes) for name, classifier in loaded.items()]
    names = first.class_names or [str(number) for number in range(first.config.num_classes)]
    draw_heat_maps(pictures, [names[number] for number in classes], maps, options.out, names)
    for one in maps:
        right = sum(chosen == asked for chosen, asked in zip(one.predicted, classes, strict=True))
        score = f"mean score {one.scores.mean():.3f}"
        console.print(f"{one.name}: {right} of {count} are classified as the class asked about; {score}")
    console.print(f"{options.out}, images {', '.join(map(str, chosen))} of {source.name}")


def _known_class(label: int, images: "ImageSet", classifier: "SavedClassifier") -> int:
    """The classifier's number for a class of the images, matched by name if both have names."""
    if images.class_names is None or classifier.class_names is None:
        return label
    name = images.class_names[label]
    if name not in classifier.class_names:
        raise InputError(
            f"{images.name} has the class {name!r}, which the classifiers don't have; give a class with --class"
        )
    return classifier.class_names.index(name)
