"""`init_from`: a new run starts from the weights of a pipeline with the same network, unit and noise process."""

from typing import Any

from diffusers import DiffusionPipeline

from dia_diffusion.errors import InputError
from dia_diffusion.models.attach import UNITS_NAME
from dia_diffusion.models.attached import AttachedModel
from dia_diffusion.models.registry import wrapped_networks
from dia_diffusion.models.uvit import UViT
from dia_diffusion.noise import PROCESSES, NoiseProcess
from dia_diffusion.pipelines.folder import find_pipeline, weights_hash
from dia_diffusion.pipelines.pipeline_uvit import network_prediction_type
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.ssia import without_heads

# The keys that determine a unit, and those that determine a network without affecting its tensors' names and shapes.
UNIT_KEYS = ("attention", "attention_kwargs", "attention_blocks", "pool_tokens", "attention_at")
HIDDEN_KEYS = ("num_attention_heads", "residual_skips", "skip_scaling", "skip_kappa")
UNITS = ("unit.", f"network.{UNITS_NAME}.")  # prefixes of the unit's tensors in the models

Model = UViT | AttachedModel


def start_from(source: str, model: Model, experiment: Experiment) -> dict[str, Any]:
    """Loads the weights of a pipeline, or of a run's newest pipeline, into the model, and returns their origin.

    A model with a unit may start from weights without one; the unit then keeps its own initial weights.

    Raises:
        InputError: no such pipeline, or it has another network, unit or noise process.
    """
    folder = find_pipeline(source)
    pipeline = load_pipeline(folder)
    theirs = getattr(pipeline, "unet", None)
    if isinstance(theirs, tuple(row.network for row in wrapped_networks().values())):  # as in diffusers' DDPMPipeline
        theirs = AttachedModel.from_backbone(theirs, "none")
    if not isinstance(theirs, Model):
        kinds = "UViT, AttachedModel or UNet2DModel"
        raise InputError(f"`init_from` must be a pipeline of a {kinds}, got {source}, a {type(pipeline).__name__}")
    _check_noise(source, pipeline, experiment.noise_process())
    _check_unit(source, theirs, experiment)
    _check_backbone(source, theirs, model)
    model.load_state_dict({**model.state_dict(), **theirs.state_dict()})
    gained_unit = model.unit is not None and theirs.unit is None
    return {"path": source, "weights_sha256": weights_hash(folder), "gained_unit": gained_unit}


def same_start(kept: dict[str, Any] | None, source: str | None) -> dict[str, Any] | None:
    """What `start_from` returned when the resumed run was new.

    The same path is assumed to have the same weights, which may no longer exist; those at another path are compared.

    Raises:
        InputError: `source` has other weights than those the run started from.
    """
    path = None if kept is None else kept["path"]
    if source == path:
        return kept
    if source is not None and kept is not None and weights_hash(find_pipeline(source)) == kept["weights_sha256"]:
        return {**kept, "path": source}
    raise InputError(
        f"`init_from` must be {path}, as when the run started, got {source}; choose another output for another start"
    )


def _check_noise(source: str, pipeline: DiffusionPipeline, process: NoiseProcess) -> None:
    if not process.process.is_run_by(pipeline.scheduler):
        names = (name for name, kind in PROCESSES.items() if kind.is_run_by(pipeline.scheduler))
        schedule = next(names, "of no known name")
        raise InputError(f"`noise.schedule` must be {schedule!r} to match init_from {source}, got {process.schedule!r}")
    prediction_type = network_prediction_type(pipeline) or process.prediction_type
    if prediction_type != process.prediction_type:
        raise InputError(
            f"`noise.prediction_type` must be {prediction_type!r} to match init_from {source}, got "
            f"{process.prediction_type!r}"
        )


def _check_unit(source: str, theirs: Model, experiment: Experiment) -> None:
    own = experiment.model.model_dump()
    if theirs.unit is None:
        return
    for key in UNIT_KEYS:
        there, here = theirs.config.get(key) or None, own.get(key) or None
        if key in theirs.config and there != here:
            raise InputError(
                f"`model.{key}` must be {there} to match the shared unit of init_from {source}, got {here}"
            )


def _check_backbone(source: str, theirs: Model, model: Model) -> None:
    there, here = theirs.state_dict(), without_heads(model.state_dict())
    for name in [*here, *there]:
        if name.startswith(UNITS) and theirs.unit is None:
            continue
        shapes = [tuple(state[name].shape) if name in state else "missing" for state in (there, here)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"init_from {source} is of another network: tensor {name} is {shapes[0]} there, {shapes[1]} here"
            )
    for key, here in _hidden(model).items():
        if (there := _hidden(theirs).get(key, here)) != here:
            raise InputError(f"`model.{key}` must be {there} to match init_from {source}, got {here}")


def _hidden(model: Model) -> dict[str, Any]:
    """The settings that determine the network but don't affect its tensors' names and shapes."""
    if isinstance(model, UViT):
        return {key: model.config[key] for key in HIDDEN_KEYS}
    config = {key: value for key, value in model.network.config.items() if not key.startswith("_")}
    for key in ("sample_size", "dropout"):  # these may differ
        config.pop(key, None)
    return {f"backbone_kwargs.{key}": list(v) if isinstance(v, tuple) else v for key, v in config.items()}
