"""From images to a record: the steps of `fid` and the training callback once features and reference are loaded."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dia_diffusion.distributed import broadcast_from_rank_zero, on_rank_zero
from dia_diffusion.environment import installed_versions
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.feature_store import FeatureStore, StoreSpec, filled_stores
from dia_diffusion.evaluation.features.extractor import FeatureExtractor
from dia_diffusion.evaluation.frechet import SUM_BLOCK, bootstrap_interval, sums
from dia_diffusion.evaluation.metrics import METRICS, MetricInputs, labeled
from dia_diffusion.evaluation.protocol import EvalProtocol, renamed
from dia_diffusion.evaluation.record import (
    EvaluationRecord,
    ResolvedProtocol,
    append_record,
    distance_name,
    make_record,
    read_records,
)
from dia_diffusion.evaluation.reference import HeldOut, Reference, choose
from dia_diffusion.evaluation.sources import MeasuredImages
from dia_diffusion.io import check_writable
from dia_diffusion.pipelines.folder import TRAINING_FILE, records_file, weights_hash
from dia_diffusion.progress import Progress
from dia_diffusion.sharing.card import evaluation_rows, write_card

Measuring = Callable[[Path], AbstractContextManager[Progress]]
"""Work folder -> a context around the measurement, which shows its progress."""


@dataclass(frozen=True)
class Evaluator:
    """A protocol with features and reference loaded, on all ranks."""

    protocol: EvalProtocol
    extractor: FeatureExtractor
    reference: Reference
    accelerator: Accelerator
    held_out: HeldOut | None = None
    """Only if a metric needs it."""

    def resolve(self, source: MeasuredImages) -> ResolvedProtocol:
        """The protocol of the source's distance, as stored in its record."""
        return ResolvedProtocol(
            features=self.extractor.name,
            features_hash=self.extractor.weights_hash,
            reference=self.reference.name,
            reference_split=self.reference.split,
            reference_shape=self.reference.shape,
            reference_count=self.reference.statistics.count,
            reference_hash=self.reference.hash,
            num_samples=source.count,
            **source.sampled_by,
        )

    def metric_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of metrics other than the distance that aren't in the resolved protocol, as stored in records."""
        settings = self.protocol.metric_settings()
        for name in self.protocol.needing("held-out features"):
            assert self.held_out is not None
            source = ", ".join(filter(None, (self.held_out.name, self.held_out.split)))
            settings[name] |= {"held_out": source, "held_out_hash": self.held_out.hash}
        if self.reference.num_feature_images is not None:
            for name in self.protocol.needing("reference features"):
                settings[name] |= {"reference_images": self.reference.num_feature_images}
        return settings

    def record(self, source: MeasuredImages, file: Path) -> tuple[EvaluationRecord, bool]:
        """`record_together` for this evaluator alone."""
        return record_together([self], source, file)[0]

    def known(self, source: MeasuredImages, file: Path) -> EvaluationRecord | None:
        """The newest record of these images and this protocol with all metrics, under the protocol's name if any is."""
        origin, resolved, settings = source.origin, self.resolve(source), self.metric_settings()
        known = [
            record
            for record in (read_records(file) if file.is_file() else [])
            if (record.weights_hash, record.model_hash) == (origin.weights_hash, origin.model_hash)
            and not record.protocol.differences(resolved)
            and record.has(settings)
        ]
        return next(reversed([record for record in known if self.protocol.made(record)] or known), None)

    def check(self, source: MeasuredImages) -> None:
        """Raises InputError if a metric has too few images, or lacks a layer."""
        self.protocol.check_count(source.count, num_features=self.extractor.num_features)
        if self.held_out is not None and self.held_out.count < source.count:
            most = f"{self.held_out.count} or less for metric fdr, the held-out images of {self.held_out.name}"
            raise InputError(f"the number of images must be {most}, got {source.count}")
        self.protocol.check_layers(self.extractor)

    def numbers(self, store: FeatureStore | None, progress: Progress) -> tuple[float, dict[str, Any]]:
        """Seconds that resumed chunks took, and the measured fields of a record."""
        assert store is not None
        protocol, reference = self.protocol, self.reference.statistics
        spatial = None
        if protocol.needs("spatial"):
            spatial = sums(store.blocks("spatial", SUM_BLOCK), self.extractor.widths["spatial"])
        held_out = None
        if self.held_out is not None and self.held_out.features is not None:
            held_out = self.held_out.features[choose(self.held_out.count, store.count, seed=0)]
        whole = protocol.bootstrap or protocol.needs("features")
        inputs = MetricInputs(
            sums(store.blocks("features", SUM_BLOCK), self.extractor.num_features),
            reference,
            self.extractor.device,
            store.read("features") if whole else None,
            store.read("logits") if protocol.needs("logits") else None,
            self.reference.features,
            spatial,
            self.reference.spatial,
            held_out,
        )
        metrics: dict[str, float] = {}
        for index, name in enumerate(protocol.metrics):
            if index:
                progress.update("computing", "metrics", index, len(protocol.metrics), name)
            numbers = METRICS[name].compute(inputs, protocol.settings_of(name))
            metrics |= labeled(METRICS[name], numbers, self.extractor.name)
        distance = metrics.pop(distance_name(self.extractor.name))
        fields: dict[str, Any] = {"distance": distance, "metrics": metrics}
        if protocol.bootstrap:
            assert inputs.features is not None
            show = partial(progress.update, "bootstrap", "resamples")
            interval = bootstrap_interval(inputs.features, reference, distance, protocol.bootstrap, show)
            fields |= vars(interval)
        return store.resumed_seconds, fields

    def work_folder(self, source: MeasuredImages, resolved: ResolvedProtocol, records: Path) -> Path:
        """The folder of chunks until the record is in the file `records`, next to that file.

        Its name is a hash of everything that the features depend on, so that no other evaluation resumes from it.
        """
        origin, layers = source.origin, self.protocol.layers
        depends = [resolved.hash(), origin.weights_hash, origin.model_hash, layers, installed_versions()]
        key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()
        return records.parent / f"{records.stem}.unfinished" / key[:16]


def record_together(
    evaluators: Sequence[Evaluator],
    source: MeasuredImages,
    file: Path,
    measuring: Measuring = lambda work: nullcontext(Progress()),
) -> list[tuple[EvaluationRecord, bool]]:
    """Each evaluator's record of a source in a file, and whether it was added now; images are generated once for all.

    Records that are already in the file are not measured again, at most added again under the protocol's name. A new
    record of a run's pipeline is also added to its model card.

    Raises:
        InputError: a file that can't be read or written, or too few images.
        RunError: another process measures the same.
    """
    accelerator = evaluators[0].accelerator

    def known() -> list[dict[str, Any] | None]:
        found = [evaluator.known(source, file) for evaluator in evaluators]
        if None in found:
            check_writable(file, "the records file")
        return [None if record is None else record.to_dict() for record in found]

    before = [
        None if fields is None else EvaluationRecord.from_dict(fields)
        for fields in broadcast_from_rank_zero(accelerator, known)
    ]
    works = [evaluator.work_folder(source, evaluator.resolve(source), file) for evaluator in evaluators]
    measured: Iterator[EvaluationRecord] = iter(())
    if None in before:
        pairs = zip(evaluators, works, strict=True)
        new, new_works = zip(*(pair for pair, record in zip(pairs, before, strict=True) if record is None), strict=True)
        with measuring(new_works[0]) as progress:
            measured = iter(measure_together(new, source, new_works, progress))
    records = [
        renamed(record or next(measured), evaluator.protocol)
        for evaluator, record in zip(evaluators, before, strict=True)
    ]

    def keep() -> None:
        for record, known_record in zip(records, before, strict=True):
            if record != known_record:
                append_record(file, record)
        for work in works:
            discard_work(work)
        if source.folder is not None:
            # The card of a known record may be older than it, or in a folder that can't be written to.
            with suppress(OSError) if records == before else nullcontext():
                update_card(source.folder, file)

    on_rank_zero(accelerator, keep)
    return [(record, record != known_record) for record, known_record in zip(records, before, strict=True)]


def measure_together(
    evaluators: Sequence[Evaluator],
    source: MeasuredImages,
    works: Sequence[Path | None],
    progress: Progress | None = None,
) -> list[EvaluationRecord]:
    """Measures the images by each evaluator, on all ranks; only features are kept, on disk.

    Args:
        works: for each evaluator, the folder of finished chunks, see `work_folder`; the same call resumes after them.
            None: a temporary folder.

    Raises:
        InputError: a metric has too few images, or lacks a layer.
        RunError: another process is writing to a folder.
    """
    start, progress, accelerator = time.monotonic(), progress or Progress(), evaluators[0].accelerator
    records = []
    with filled_by_all(evaluators, source, works, progress) as filled:
        for evaluator, store in zip(evaluators, filled, strict=True):
            earlier, numbers = broadcast_from_rank_zero(accelerator, partial(evaluator.numbers, store, progress))
            record = make_record(
                protocol=evaluator.resolve(source),
                origin=source.origin,
                seconds=time.monotonic() - start + earlier,
                metric_settings=evaluator.metric_settings(),
                **numbers,
            )
            records.append(record)
    return records


def filled_by_all(
    evaluators: Sequence[Evaluator], source: MeasuredImages, works: Sequence[Path | None], progress: Progress
) -> AbstractContextManager[list[FeatureStore | None]]:
    """The features of the images by each evaluator, see `filled_stores`; arguments and errors of `measure_together`."""
    for evaluator in evaluators:
        evaluator.check(source)
    specs = [
        StoreSpec(evaluator.extractor, work, evaluator.protocol.layers)
        for evaluator, work in zip(evaluators, works, strict=True)
    ]
    accelerator = evaluators[0].accelerator
    return filled_stores(source.images, source.count, specs, accelerator, source.name, progress=progress)


def discard_work(folder: Path) -> None:
    """Removes a work folder, and the folder around it if it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def update_card(folder: Path, file: Path) -> None:
    """Writes the records of a run's pipeline into its model card, if `file` has the run's records."""
    if file != records_file(folder) or not (folder / TRAINING_FILE).is_file():
        return
    own = weights_hash(folder)
    records = (record.to_dict() for record in read_records(file) if record.weights_hash == own)
    write_card(folder, evaluation_rows(records))


def few_images_warnings(protocol: ResolvedProtocol, num_features: int) -> list[str]:
    """Warnings if there are no more images than features."""
    counts = {"samples": protocol.num_samples, "reference images": protocol.reference_count}
    return [
        f"{count} {what} for {num_features} features: their covariance is singular and the distance is biased "
        "upward; compare it only with distances of the same number of images"
        for what, count in counts.items()
        if count is not None and count <= num_features
    ]
