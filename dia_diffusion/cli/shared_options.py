"""Options that several commands share, and what is loaded from them: a pipeline, a feature extractor."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dia_diffusion.cli.console import ConsoleProgress, console
from dia_diffusion.cli.options import Metavar, refuse_both
from dia_diffusion.errors import InputError
from dia_diffusion.validation import Strict

if TYPE_CHECKING:
    import torch

    from dia_diffusion.evaluation.features import FeatureExtractor
    from dia_diffusion.evaluation.protocol import EvalProtocol
    from dia_diffusion.sampling.generate import ImagePipeline

Split = Literal["train", "test"]
"""A split of a dataset that has splits."""


class SamplingOptions(Strict):
    sampler: str = "dpmsolver++"
    """ddpm, ddim, dpmsolver++, dpmsolver++3m, dpmsolver++sde, unipc, euler, euler-ancestral, heun or euler-maruyama;
    own is the pipeline's scheduler unchanged."""
    steps: int = 50
    """Sampler steps."""
    batch_size: int = Field(64, ge=1)
    """Images that a process samples at once."""
    classes: list[int] | None = None
    """Classes, such as 3 or 0,1,2, assigned to the seeds in turn; all classes of the model if not given."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, or of --guide; 1 is none."""
    guidance_interval: Annotated[list[float] | None, Metavar("LOW,HIGH")] = None
    """Guide only at noise levels sigma/alpha above LOW and up to HIGH, such as 0.3,5."""
    guide: Annotated[str | None, Metavar("RUN[:STEP]")] = None
    """Autoguidance by another run or pipeline folder, such as an earlier step or a smaller network, in place of the
    null label."""
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of the network; auto is bfloat16 if the device multiplies it natively, else float32."""


def chosen_precision(precision: str, device: "torch.device | None" = None) -> str:
    """The precision; `auto` is resolved for the device, and the result is printed."""
    from dia_diffusion.precision import best_precision, training_device

    if precision != "auto":
        return precision
    chosen = best_precision(device or training_device())
    if os.environ.get("RANK", "0") == "0":
        console.print(f"sampling in {chosen}")
    return chosen.dtype


def load_for_sampling(
    folder: Path, options: "SamplingOptions | EvalProtocol", device: "torch.device"
) -> tuple["ImagePipeline", str]:
    """The pipeline of a folder, adapted with the options' sampling settings, and its precision."""
    import torch

    from dia_diffusion.pipelines.folder import read_training
    from dia_diffusion.sampling.generate import adapt_pipeline
    from dia_diffusion.sampling.load import load_guide, load_pipeline
    from dia_diffusion.sampling.samplers import SamplingSettings

    precision = chosen_precision(options.precision, device)
    dtype = getattr(torch, precision)
    classes = None if options.classes is None else tuple(options.classes)
    settings = SamplingSettings(
        options.sampler, options.steps, classes, options.guidance_scale, options.guidance_interval
    )
    guide = load_guide(options.guide, device, dtype)
    pipeline = adapt_pipeline(load_pipeline(folder, device, dtype), settings, guide)
    training = read_training(folder)
    if (
        guide is None
        and settings.guidance_scale != 1
        and training
        and not training["recipe"]["data"].get("label_dropout")
    ):
        raise InputError(
            f"`--guidance-scale` must be 1 for {folder}, which was trained with data.label_dropout 0 and so without a "
            f"null label, got {settings.guidance_scale}"
        )
    return pipeline, precision


class FeatureOptions(Strict):
    features: str | None = None
    """digits, cifar10, inception, dinov2-vit-s-14 (b, l or g for s), clip-vit-b-32, clip-vit-l-14, vgg16, or
    MODULE:CLASS, a torch-fidelity extractor of your own; if not given, those of a file of statistics, digits for the
    digits, and cifar10 for other images."""
    weights: Annotated[Path | None, Metavar("FILE")] = None
    """Weights of the features, .pth or .safetensors; if not given, from the package, torch's hub folder, or a checked
    download."""
    inception_weights: Annotated[Path | None, Metavar("FILE")] = None
    """The same as --weights, for Inception."""

    @property
    def weights_file(self) -> Path | None:
        return self.weights or self.inception_weights


def load_features(options: FeatureOptions, data: str, device: "str | torch.device") -> "FeatureExtractor":
    """The extractor that the options name, or that suits the data; a download is shown on the terminal."""
    from dia_diffusion.evaluation.features import build_features

    name = options.features or features_for(data)
    if options.inception_weights is not None and name != "inception":
        raise InputError(f"`--inception-weights` must be given with --features inception, got --features {name}")
    if options.weights is not None and ":" in name:
        raise InputError(f"`--weights` must be left out with --features {name}, which loads its own")
    refuse_both(options, "weights", "inception_weights")
    progress = ConsoleProgress().reading("bytes")
    return build_features(name, device, options.weights_file, progress)


def warn_unreleased(options: FeatureOptions, extractor: "FeatureExtractor") -> None:
    """Prints a warning if the given weights aren't the released Inception."""
    from dia_diffusion.evaluation.features.inception import NAME, unreleased

    file = options.weights_file
    if file is not None and extractor.name.startswith(NAME) and (text := unreleased(extractor.name, file)):
        console.print(f"warning: {text}")


def features_for(data: str) -> str:
    """The features of a file of statistics, if it names them; else those that suit the images."""
    from dia_diffusion.evaluation.features import PACKAGED
    from dia_diffusion.evaluation.statistics_file import is_statistics_file, read_statistics

    if Path(data).is_file() and is_statistics_file(data) and (name := read_statistics(data).features) is not None:
        if name not in PACKAGED:  # may need a download or run a module, so must be requested
            raise InputError(f"{data} holds statistics in features {name}; name them with --features")
        return name
    return "digits" if data == "digits" else "cifar10"
