"""Evaluation during training: a callback that measures the pipeline of each checkpoint by a protocol."""

from functools import partial

import torch

from dia_diffusion.data.sources import open_images_on_ranks
from dia_diffusion.distributed import (
    broadcast_from_rank_zero,
    first_on_each_machine,
    lost_a_process,
    on_all_ranks,
    on_rank_zero,
)
from dia_diffusion.errors import InputError, first_line
from dia_diffusion.evaluation.evaluate import Evaluator, few_images_warnings
from dia_diffusion.evaluation.features import FeatureExtractor, build_features
from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import distance_name, read_records
from dia_diffusion.evaluation.reference import Reference, measure_held_out, measure_reference
from dia_diffusion.evaluation.sources import pipeline_source
from dia_diffusion.io import step_name
from dia_diffusion.progress import Progress
from dia_diffusion.sampling.generate import ImagePipeline, adapt_pipeline
from dia_diffusion.sampling.load import load_guide, load_pipeline
from dia_diffusion.training.callbacks import Callback, checkpoint_due
from dia_diffusion.training.config import Experiment
from dia_diffusion.training.diffusion import check_samples
from dia_diffusion.training.run_folder import read_metrics
from dia_diffusion.training.trainer import StepResult, Trainer


class EvaluatePipelines(Callback):
    """Measures the pipeline of each checkpoint, as `fid RUN --protocol NAME` does, against the training images.

    The record goes to the run's evaluations.jsonl, the distance to metrics.jsonl and the trackers. Weights that already
    have a record are not measured again. If an evaluation was killed, it continues after its last finished chunk when
    the run resumes.

    Args:
        protocol: what to measure.
        every: steps between evaluations, a multiple of train.checkpoint_every; None: every checkpoint. The last step is
            evaluated in any case.
    """

    after_checkpoint = True

    def __init__(self, protocol: EvalProtocol, every: int | None = None):
        self.protocol, self.every = protocol, every

    def start(self, trainer: Trainer) -> None:
        """Loads features and reference, and measures the run's newest pipeline if that is due and missing.

        Raises:
            InputError: the run can't be measured by the protocol, or has records of another protocol of its name.
        """
        if not isinstance(trainer.experiment, Experiment):
            raise InputError(f"EvaluatePipelines must be used with a diffusion model, got {trainer.task.description}")
        self.config, self.records = trainer.config, trainer.folder.evaluations
        missing = broadcast_from_rank_zero(trainer.accelerator, lambda: self._is_missing(trainer))
        if trainer.step == self.config.max_steps and not missing:
            return
        check_samples(trainer.experiment, self.protocol.sampling, load_guide(self.protocol.guide))
        on_rank_zero(trainer.accelerator, self._check_records)
        device, progress = trainer.accelerator.device, trainer.progress.reading("bytes")
        build = partial(build_features, self.protocol.features, device, progress=progress)
        extractor = first_on_each_machine(trainer.accelerator, build)
        self.protocol.check_count(self.protocol.num_samples, num_features=extractor.num_features)
        self.protocol.check_layers(extractor)
        reference = self._reference(trainer, extractor)
        accelerator, model = trainer.accelerator, trainer.experiment.model
        shape = (model.in_channels, model.sample_size, model.sample_size)
        data = trainer.experiment.data.source
        held_out = measure_held_out(reference, data, shape, extractor, self.protocol, accelerator, Progress())
        self.evaluator = Evaluator(self.protocol, extractor, reference, accelerator, held_out)
        if missing:
            self._evaluate(trainer)

    def _is_missing(self, trainer: Trainer) -> bool:
        """Whether the pipeline of this step was due to be evaluated, but the evaluation was killed."""
        folder, name = trainer.folder.pipelines / step_name(trainer.step), distance_name(self.protocol.features)
        if trainer.step == 0 or not self.due(trainer.step) or not folder.is_dir():
            return False
        records = read_records(self.records) if self.records.is_file() else []
        lines = read_metrics(trainer.folder.metrics) if trainer.folder.metrics.is_file() else []
        recorded = any(record.step == trainer.step and self.protocol.made(record) for record in records)
        return not (recorded and any(line["step"] == trainer.step and name in line for line in lines))

    def _check_records(self) -> None:
        if self.records.is_file():
            self.protocol.refuse_changed(read_records(self.records), self.records)

    def _reference(self, trainer: Trainer, extractor: FeatureExtractor) -> Reference:
        """The images that `fid` would measure the run against."""
        data, model, split = trainer.experiment.data, trainer.experiment.model, self.protocol.reference_split or "train"
        images = trainer.images
        if data.split != split:
            options = {"size": model.sample_size, "channels": model.in_channels, "split": split}
            images = open_images_on_ranks(data.source, trainer.accelerator, trainer.progress, **options)
        return measure_reference(images, extractor, self.protocol, trainer.accelerator, Progress())

    def due(self, step: int) -> bool:
        every = self.every or self.config.checkpoint_every
        return checkpoint_due(self.config, step) and (step % every == 0 or step == self.config.max_steps)

    def __call__(self, trainer: Trainer, result: StepResult) -> None:
        self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        folder = trainer.folder.pipelines / step_name(trainer.step)
        device, dtype = trainer.accelerator.device, getattr(torch, self.protocol.precision)

        def load() -> ImagePipeline:
            guide = load_guide(self.protocol.guide, device, dtype)
            return adapt_pipeline(load_pipeline(folder, device, dtype), self.protocol.sampling, guide)

        pipeline = on_all_ranks(trainer.accelerator, load)
        source = pipeline_source(pipeline, folder, self.protocol.num_samples)
        try:
            record, added = self.evaluator.record(source, self.records)
        # Such as a sample that is not finite, too little memory or a full disk: training can continue without the
        # distance. A rank that fails raises its own error, the others a RunError; all have to continue together.
        except (InputError, RuntimeError, OSError, MemoryError) as error:
            if isinstance(error, RuntimeError) and lost_a_process(error) is not None:
                raise
            trainer.message(f"step {trainer.step:,}: no distance, {first_line(error)}")
            return
        if added:
            trainer.message(f"step {trainer.step:,}: {record.metric} {record.distance:.3f} by {self.protocol.name}")
            for text in few_images_warnings(record.protocol, self.evaluator.extractor.num_features):
                trainer.message(f"warning: {text}")
        trainer.log({record.metric: record.distance})
