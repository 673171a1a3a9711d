"""The images that `fid` opens: those to measure, and the reference's, with their statistics and features."""

import argparse
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from dia_diffusion.cli.console import ConsoleReporter, Counter, MeasuringProgress
from dia_diffusion.cli.fid_protocol import check_count, option_told
from dia_diffusion.data import ImageSet
from dia_diffusion.data.sources import open_images_on_ranks
from dia_diffusion.distributed import first_on_each_machine, on_all_ranks
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.extras import Extras
from dia_diffusion.evaluation.features import FeatureExtractor
from dia_diffusion.evaluation.reference import Reference, choose, reference_statistics
from dia_diffusion.evaluation.reference_features import reference_features
from dia_diffusion.evaluation.statistics_files import is_statistics_file, open_reference


def open_source(options: argparse.Namespace, accelerator: Accelerator) -> ImageSet:
    """The images to measure, square ones; fewer than all are a choice by seed 0, since files are sorted by class."""
    images = _open(options.source, options.split, accelerator, size=options.size, channels=options.channels)
    if options.num is not None:
        if options.num > len(images):
            raise InputError(f"{option_told(options, 'num')}: {options.source} has {len(images)} images")
        images = images.subset(choose(len(images), options.num, seed=0))
    _, height, width = images.shape
    if height != width:
        raise InputError(f"{options.source} has images of {height}x{width}; accepted: square ones")
    return images


def reference_of(
    options: argparse.Namespace,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
    size: int,
    channels: int,
    extras: Extras,
) -> tuple[Reference, torch.Tensor | None]:
    """The reference: from a file of statistics, or of its images reduced to the size that is measured.

    With it, on the main process and where the extras need them, the features (M, D) of its images.
    """
    if is_statistics_file(options.reference):
        if extras.reference_features:
            raise InputError(f"--reference {options.reference} holds statistics; accepted for kid and prc: images")
        shape = (channels, size, size)
        reference = on_all_ranks(accelerator, lambda: open_reference(options.reference, extractor, shape))
        # Images without parts are opened as "train"; a file of another program doesn't say what it was made of.
        known = reference.split or ("train" if reference.shape else None)
        if options.reference_split not in (None, known):
            part = known or "no part that it names"
            raise InputError(f"{option_told(options, 'reference_split')}: {options.reference} is of {part}")
        check_count(options, reference.statistics.count)
        return reference, None
    images = _open(options.reference, options.reference_split, accelerator, size=size, channels=channels)
    check_count(options, len(images))
    features = None
    if extras.reference_features:
        extras.check_reference(len(images))
        with Counter("measuring the reference", "images") as counter:
            progress = MeasuringProgress(counter, len(images), accelerator)
            features = reference_features(images, extractor, accelerator, progress, progress)
    statistics = partial(reference_statistics, images, extractor, features=features)
    return first_on_each_machine(accelerator, statistics), features


def _open(source: str, split: str | None, accelerator: Accelerator, **kwargs: Any) -> ImageSet:
    return open_images_on_ranks(source, accelerator, ConsoleReporter().reading, split=split or "train", **kwargs)
