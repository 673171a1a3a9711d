"""The images that `dia-diffusion fid` measures, and the reference images."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from dia_diffusion.cli.fid_options import MeasureOptions, Options, spelled
from dia_diffusion.cli.shared_options import load_for_sampling
from dia_diffusion.errors import InputError
from dia_diffusion.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dia_diffusion.data import ImageSet
    from dia_diffusion.evaluation.features import FeatureExtractor
    from dia_diffusion.evaluation.protocol import EvalProtocol
    from dia_diffusion.evaluation.reference import Reference
    from dia_diffusion.evaluation.sources import MeasuredImages


def pipelines_of(options: Options) -> list[Path]:
    """The folders of the pipelines to measure, in order of step."""
    from dia_diffusion.io import step_folders
    from dia_diffusion.pipelines.folder import find_pipeline
    from dia_diffusion.training.run_folder import RunFolder

    if options.every_step and (folders := step_folders(RunFolder(options.source).pipelines)):
        return list(folders.values())
    return [find_pipeline(options.source, options.step)]


def training_images(options: MeasureOptions, pipelines: list[Path]) -> str:
    """The images that a pipeline's run was trained on, as its recipe names them."""
    from dia_diffusion.data.sources import find_format
    from dia_diffusion.pipelines.folder import read_training

    pipeline = pipelines[-1]
    training = read_training(pipeline)
    if training is None:
        raise InputError(f"{pipeline} doesn't say what it was trained on; give --reference DATA")
    source = str(training["recipe"]["data"].get("source"))
    if find_format(source) is None and not Path(source).exists():
        raise InputError(f"{pipeline} was trained on {source}, which isn't here; give --reference DATA")
    return source


def sources_of(
    options: MeasureOptions,
    protocols: "list[EvalProtocol]",
    pipelines: list[Path],
    accelerator: "Accelerator",
    progress: Progress,
) -> "Iterator[tuple[MeasuredImages, tuple[int, int, int], int]]":
    """Yields each source to measure, with the shape (C, H, W) of its square images and the index of its protocol."""
    from dia_diffusion.evaluation.sources import images_source, pipeline_source

    if not pipelines:
        assert isinstance(options, Options)
        images = _open_source(options, protocols[0], accelerator, progress)
        yield images_source(images), _square(options.source, images.shape), 0
        return
    protocols[0].check_count(protocols[0].num_samples)
    for folder, (index, protocol) in product(pipelines, enumerate(protocols)):
        pipeline, _ = load_for_sampling(folder, protocol, accelerator.device)
        shape = _square(folder, pipeline.image_shape)
        yield pipeline_source(pipeline, folder, protocol.num_samples, options.batch_size), shape, index


def _square(source: str | Path, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if shape[1] != shape[2]:
        raise InputError(f"{source} must have square images, got {shape[1]}x{shape[2]}")
    return shape


def _open_source(
    options: Options, protocol: "EvalProtocol", accelerator: "Accelerator", progress: Progress
) -> "ImageSet":
    """The images to measure; a subset is chosen at random with seed 0, since files are sorted by class."""
    from dia_diffusion.data.sources import open_images_on_ranks
    from dia_diffusion.evaluation.reference import choose

    opening = {"split": options.split or "train", "size": options.size, "channels": options.channels}
    images = open_images_on_ranks(options.source, accelerator, progress, **opening)
    if (count := protocol.num_samples) > len(images):
        what = spelled(protocol, "num_samples")
        raise InputError(f"{what} must be {len(images)} or less, the images of {options.source}, got {count}")
    images = images.subset(choose(len(images), count, seed=0)) if count not in (0, len(images)) else images
    if len(images) < 2:
        raise InputError(f"{options.source} must have 2 images or more, got {len(images)}")
    protocol.check_count(len(images))
    return images


def load_reference(
    options: MeasureOptions,
    protocol: "EvalProtocol",
    data: str,
    shape: tuple[int, int, int],
    extractor: "FeatureExtractor",
    accelerator: "Accelerator",
    progress: Progress,
) -> "Reference":
    """The reference: a file of statistics, or images reduced to the measured shape."""
    from dia_diffusion.distributed import on_all_ranks
    from dia_diffusion.evaluation import reference as references
    from dia_diffusion.evaluation.statistics_file import holds_images, is_statistics_file

    split = protocol.reference_split or options.reference_split
    if not is_statistics_file(data):
        images = reference_images(options, protocol, data, shape, accelerator, progress)
        return references.measure_reference(images, extractor, protocol, accelerator, progress)
    needing = protocol.needing("reference features")
    if (names := needing + ["--show"] * bool(options.show)) and not holds_images(data):
        raise InputError(f"`--reference` must be images for {' and '.join(names)}, got {data}, which holds statistics")
    reference = on_all_ranks(accelerator, lambda: references.open_reference(data, extractor, shape))
    if protocol.needs("spatial"):
        width, got = extractor.widths["spatial"], 0 if reference.spatial is None else reference.spatial.mean.size
        if got != width:
            needed = f"images or have mu_s and sigma_s of {width} features for sfid"
            raise InputError(f"`--reference` must be {needed}, got {data}, which has {got or 'none'}")
    # Images without splits count as "train"; a file of another program doesn't say what it was made from.
    known = reference.split or ("train" if reference.shape else None)
    if split not in (None, known):
        what = spelled(protocol, "reference_split") if protocol.reference_split else "`--reference-split`"
        raise InputError(f"{what} must be the split of {data}, {known or 'which is not recorded'}, got {split}")
    references.check_reference_count(protocol, data, reference.statistics.count)
    if not needing:
        return reference
    return references.with_images(reference, data, shape, extractor, protocol, accelerator, progress)


def reference_images(
    options: MeasureOptions,
    protocol: "EvalProtocol",
    data: str,
    shape: tuple[int, int, int],
    accelerator: "Accelerator",
    progress: Progress,
) -> "ImageSet":
    from dia_diffusion.data.sources import open_images_on_ranks

    split = protocol.reference_split or options.reference_split or "train"
    return open_images_on_ranks(data, accelerator, progress, split=split, size=shape[1], channels=shape[0])
