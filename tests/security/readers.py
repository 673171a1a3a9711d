"""Every JSON reader of the library, each with a valid file of its kind."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import save_file

from dia_diffusion import UViT, UViTPipeline
from dia_diffusion.data.image_set import array_source, decoded_set
from dia_diffusion.evaluation.feature_store import open_store
from dia_diffusion.evaluation.features import PACKAGED
from dia_diffusion.evaluation.features.extractor import load_weights
from dia_diffusion.evaluation.record import append_record, read_records
from dia_diffusion.io import sha256_of_file, write_json
from dia_diffusion.models.classifier_config import BackboneConfig
from dia_diffusion.models.classifiers import build_classifier, load_classifier, save_classifier
from dia_diffusion.noise import NoiseProcess
from dia_diffusion.pipelines.folder import model_hash, read_training, weights_hash
from dia_diffusion.report.subjects import run_page
from dia_diffusion.sampling.load import load_pipeline
from dia_diffusion.sampling.writers import open_folder
from dia_diffusion.sharing.card import write_card
from dia_diffusion.sharing.export import check_pipeline, export_pipeline
from dia_diffusion.sweeps.accuracies import read_result
from dia_diffusion.sweeps.outcome import finished
from dia_diffusion.sweeps.results import _known_floors
from dia_diffusion.sweeps.sweep import read_study
from dia_diffusion.sweeps.trials import make_trial
from dia_diffusion.training.checkpoint import Checkpoint, load_checkpoint, read_state, save_checkpoint
from dia_diffusion.training.config import ClassifyExperiment
from dia_diffusion.training.recipe import read_experiment
from dia_diffusion.training.run_folder import logged_step, read_metrics
from tests.data.conftest import write_folder
from tests.evaluation.conftest import _record
from tests.pipelines.conftest import SMALL, add_training, contents
from tests.report.conftest import write_run_of
from tests.training.conftest import TINY


@dataclass
class Reader:
    """A file, and the call that reads it."""

    file: Path
    read: Callable[[], Any]


@cache
def _files_of_a_pipeline() -> dict[str, bytes]:
    torch.manual_seed(0)
    scheduler = DPMSolverMultistepScheduler(**NoiseProcess().scheduler_config())
    with TemporaryDirectory() as made:
        UViTPipeline(UViT(attention="dia-lstm", **SMALL).eval(), scheduler).save_pretrained(made)
        add_training(Path(made))
        return contents(Path(made))


def pipeline(folder: Path) -> Path:
    """A complete pipeline folder as a run writes it."""
    return write_folder(folder / "pipeline", _files_of_a_pipeline())


def experiment(folder: Path) -> Any:
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    return read_experiment(str(recipe), ["--output", str(folder / "run")])


def run(folder: Path) -> Path:
    return write_run_of(experiment(folder), [_record(2.5)])


def within(make: Callable[[Path], Path], file: str, read: Callable[[Path], Any]) -> Callable[[Path], Reader]:
    """Makes a folder in which tests replace `file`, and reads the folder."""

    def reader(folder: Path) -> Reader:
        place = make(folder)
        return Reader(place / file, lambda: read(place))

    return reader


def export(place: Path) -> Any:
    return export_pipeline(place, place.parent / "out", with_code=False)


def sharded_pipeline(folder: Path) -> Path:
    place = pipeline(folder)
    write_json(place / "unet" / SHARDS, {"weight_map": {"a": "diffusion_pytorch_model.safetensors"}})
    return place


def converted_pipeline(folder: Path) -> Path:
    place = pipeline(folder)
    write_json(place / "converted.json", {"source": "x.pth", "sha256": "0" * 64})
    return place


def measured_pipeline(folder: Path) -> Path:
    place = pipeline(folder)
    append_record(place / "evaluations.jsonl", _record(2.5))
    return place


def records(folder: Path) -> Reader:
    file = folder / "evaluations.jsonl"
    append_record(file, _record(2.5))
    return Reader(file, lambda: read_records(file))


def run_with_environment(folder: Path) -> Path:
    place = run(folder)
    write_json(place / "environment.json", {"python": "3.11"})
    return place


def checkpoint(folder: Path) -> Path:
    tensors = {"model": {"weight": torch.ones(2)}, "optimizer": {"weight/step": torch.ones(1)}}
    state = {"recipe": experiment(folder).to_dict(), "data": {"name": "digits"}}
    return save_checkpoint(folder / "checkpoints", 3, Checkpoint(tensors, state), 1)


@cache
def _files_of_a_classifier() -> dict[str, bytes]:
    config = BackboneConfig(backbone="cifar-resnet8-basic", sample_size=8, num_classes=2)
    weights, recipe = build_classifier(config).state_dict(), {"run": "a", "step": 1}
    with TemporaryDirectory() as made:
        save_classifier(Path(made) / "it", weights, config, [0.5] * 3, [0.5] * 3, ("a", "b"), recipe)
        return contents(Path(made) / "it")


def classifier(folder: Path) -> Path:
    return write_folder(folder / "classifier", _files_of_a_classifier())


def result(folder: Path) -> Reader:
    place = folder / "classified"
    recipe = {**ClassifyExperiment().to_dict(), "seed": 1}
    data = {"fingerprint": "f"}
    about = {"test_accuracy": 0.5, "diverged_at": None, "parameters": 10, "train_data": data, "test_data": data}
    write_json(place / "result.json", {"step": 6, "recipe": recipe, **about})
    return Reader(place / "result.json", lambda: read_result(place))


def trial(folder: Path) -> Reader:
    recipe = experiment(folder)
    one = make_trial("trial", {}, folder, recipe, 0)
    write_json(one.folder / "trial.json", {"recipe": one.experiment.to_dict(), "held_out": {}})
    return Reader(one.folder / "trial.json", lambda: finished(one))


def study(folder: Path) -> Any:
    (folder / "tiny.yaml").write_text(TINY)
    text = "runs: [{units: [none], batch_sizes: [8], seeds: [0]}]\nprotocol: fd-digits\nsteps: 6\npoints: 2\n"
    (folder / "s.yaml").write_text(f"output: {folder / 'study'}\nrecipe: {folder / 'tiny.yaml'}\n{text}")
    return read_study(str(folder / "s.yaml"))


def known_floors(folder: Path) -> Reader:
    read = study(folder)
    floor = {"settings_hash": "a", "floor": {"distance": 1.0, "images": "some"}}
    write_json(read.folder / "results.json", {"protocol": floor, "final_protocol": None})
    assert _known_floors(read)
    return Reader(read.folder / "results.json", lambda: _known_floors(read))


def samples(folder: Path) -> Reader:
    write_json(folder / "samples" / "samples.json", {"sampler": "ddim"})
    return Reader(folder / "samples" / "samples.json", lambda: open_folder(folder / "samples", {"sampler": "ddim"}))


def features_finished(folder: Path) -> Reader:
    place = folder / "features"

    def read() -> Any:
        with open_store(place, {"features": 4}, 10) as file:
            return file.missing, file.resumed_seconds

    read()
    with open_store(place, {"features": 4}, 10) as file:
        file.write(range(10), {"features": torch.ones(10, 4)}, 1.0)
    return Reader(place / "chunk-00000000.safetensors", read)


def weights_card(folder: Path) -> Reader:
    network = PACKAGED["digits"].network
    save_file(network().state_dict(), folder / "weights.safetensors")
    write_json(folder / "weights.json", {"sha256": sha256_of_file(folder / "weights.safetensors")})
    return Reader(folder / "weights.json", lambda: load_weights(network(), folder / "weights.safetensors"))


def kept_images(folder: Path) -> Reader:
    import numpy as np

    array = np.zeros((3, 8, 8, 3), dtype=np.uint8)

    def read() -> Any:
        source = array_source("x", array)
        return decoded_set(source, size=4, channels=3, cache=folder / "kept", memory_limit=0, progress=None)

    read()
    (file,) = (folder / "kept").glob("*.json")
    assert json.loads(file.read_text())["pixels_sha256"]
    return Reader(file, read)


UNET = "unet/config.json"
SHARDS = "diffusion_pytorch_model.safetensors.index.json"
# Files that are refused whatever is wrong with them.
STRICT: dict[str, Callable[[Path], Reader]] = {
    "pipeline's index": within(pipeline, "model_index.json", load_pipeline),
    "pipeline's index, to be exported": within(pipeline, "model_index.json", check_pipeline),
    "network's config": within(pipeline, UNET, load_pipeline),
    "network's config, to be exported": within(pipeline, UNET, check_pipeline),
    "index of shards": within(sharded_pipeline, f"unet/{SHARDS}", weights_hash),
    "training of a pipeline": within(pipeline, "training.json", read_training),
    "training on a card": within(pipeline, "training.json", write_card),
    "training that is exported": within(pipeline, "training.json", export),
    "conversion on a card": within(converted_pipeline, "converted.json", write_card),
    "records": records,
    "records on a page": within(run, "evaluations.jsonl", run_page),
    "checkpoint's state": within(checkpoint, "state.json", read_state),
    "checkpoint's state, to be loaded": within(checkpoint, "state.json", load_checkpoint),
    "classifier's config": within(classifier, "config.json", load_classifier),
    "result of a classifier": result,
    "result of a trial": trial,
    "samples' protocol": samples,
    "card of weights": weights_card,
}
# Files that are rebuilt or left out if they can't be read, or that have no required key.
LENIENT: dict[str, Callable[[Path], Reader]] = {
    "scheduler's config": within(pipeline, "scheduler/scheduler_config.json", load_pipeline),
    "config that is hashed": within(pipeline, UNET, model_hash),
    "records that are exported": within(measured_pipeline, "evaluations.jsonl", export),
    "metrics": within(run, "metrics.jsonl", lambda place: read_metrics(place / "metrics.jsonl")),
    "metrics on a page": within(run, "metrics.jsonl", run_page),
    "last line of metrics": within(run, "metrics.jsonl", lambda place: logged_step(place / "metrics.jsonl")),
    "environment on a page": within(run_with_environment, "environment.json", run_page),
    "training of a classifier": within(classifier, "training.json", load_classifier),
    "floors of a study": known_floors,
    "features that are finished": features_finished,
    "images that are kept": kept_images,
}
