"""`dia-diffusion gradcam`: where trained classifiers look in the same images, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dia_diffusion.cli.arguments import CommandParser
from dia_diffusion.cli.console import console
from dia_diffusion.cli.imports import imports
from dia_diffusion.data import SPLITS, ImageSet, open_images
from dia_diffusion.errors import InputError
from dia_diffusion.io import refuse_existing

if TYPE_CHECKING:
    from dia_diffusion.models.classifiers import SavedClassifier


def run(arguments: Sequence[str]) -> None:
    """Draws what the arguments say."""
    parser = CommandParser("gradcam", "Draws Grad-CAM heat maps of trained classifiers over images.")
    parser.add_argument(
        "classifiers", nargs="+", metavar="CLASSIFIER", help="runs or folders that classify has written"
    )
    parser.add_argument("--images", required=True, metavar="SOURCE", help="any image source, as for training")
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="the part of the images, where they have parts"
    )
    parser.add_argument("--count", type=int, default=6, help="images, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="decides which")
    parser.add_argument(
        "--class",
        type=int,
        dest="number",
        help="asked about; if none, the image's own or, without labels, what the first classifier predicts",
    )
    parser.add_argument("--out", type=Path, default=Path("gradcam.png"), help="the figure")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.seed < 0:
        raise InputError(f"--count is {options.count}, --seed {options.seed}; accepted: 1 or more, 0 or more")
    refuse_existing(options.out)
    with imports():
        import torch

        from dia_diffusion.analysis.gradcam import draw_heat_maps, heat_maps
        from dia_diffusion.evaluation.curves import check_format
        from dia_diffusion.models.classifiers import load_classifier
    check_format(options.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {Path(place).resolve().name: load_classifier(place, device) for place in options.classifiers}
    if len(found) < len(options.classifiers):
        raise InputError(f"two classifiers are called the same; accepted: folders of different names, not {min(found)}")
    first, *others = found.values()
    for other in others:
        if (other.config.sample_size, other.config.num_classes) != (first.config.sample_size, first.config.num_classes):
            raise InputError("the classifiers differ in model.sample_size or num_classes; accepted: alike in both")

        if None not in (first.class_names, other.class_names) and other.class_names != first.class_names:
            raise InputError("the classifiers' classes have other names; accepted: alike in both")

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
    maps = [heat_maps(name, classifier, pixels, classes) for name, classifier in found.items()]
    names = first.class_names or [str(number) for number in range(first.config.num_classes)]
    draw_heat_maps(pictures, [names[number] for number in classes], maps, options.out, names)
    for one in maps:
        right = sum(chosen == asked for chosen, asked in zip(one.predicted, classes, strict=True))
        console.print(
            f"{one.name}: {right} of {count} are taken for the class asked about; mean score {one.scores.mean():.3f}"
        )
    console.print(f"{options.out}, images {', '.join(map(str, chosen))} of {source.name}")


def _known_class(label: int, images: ImageSet, classifier: "SavedClassifier") -> int:
    """The classifier's number of the images' class, by its name where both have names."""
    if images.class_names is None or classifier.class_names is None:
        return label
    name = images.class_names[label]
    if name not in classifier.class_names:
        raise InputError(f"{images.name} has the class {name!r}, which the classifiers don't know; --class names one")
    return classifier.class_names.index(name)
