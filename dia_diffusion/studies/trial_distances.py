"""The distances of trials' images, measured by the command that a person would type."""

from collections.abc import Callable, Sequence
from typing import Any

from dia_diffusion.evaluation.protocol import EvalProtocol
from dia_diffusion.evaluation.record import EvaluationRecord, read_records
from dia_diffusion.studies.children import Job, run_jobs
from dia_diffusion.studies.trials import TRAINED, Trial
from dia_diffusion.training.run_folder import RunFolder


def measure_trials(
    trials: Sequence[Trial],
    results: Sequence[dict[str, Any]],
    protocol: EvalProtocol,
    given: str,
    watch: Callable[[int, int], None],
) -> str:
    """Puts the distance of each trial that trained into its result; those on record are not measured again.

    protocol, given: the protocol and how it was named.
    watch: called with trials measured, of how many.

    Returns:
        What the distance is, as "FD(digits), 596 samples".

    Raises:
        InputError, RunError, Stopped: see `run_jobs`.
    """
    trained = [(t, result) for t, result in zip(trials, results, strict=True) if result["outcome"] == TRAINED]
    missing = [trial for trial, _ in trained if _record(trial, protocol) is None]
    jobs = [Job(trial.folder, [["fid", str(trial.folder), "--protocol", given]]) for trial in missing]
    done = len(trained) - len(missing)

    def check(job: Job) -> None:
        nonlocal done
        done += 1
        watch(done, len(trained))

    run_jobs(jobs, 1, lambda running: None, check)
    name = f"distance by {protocol.name}"
    for trial, result in trained:
        record = _record(trial, protocol)
        if record is not None:
            result["distance"] = record.distance
            name = f"{record.metric}, {record.protocol.num_samples:,} samples"
    return name


def _record(trial: Trial, protocol: EvalProtocol) -> EvaluationRecord | None:
    """The newest record of a trial's last step."""
    file = RunFolder(trial.folder).evaluations
    records = read_records(file) if file.is_file() else []
    protocol.refuse_changed(records, file)
    own = [r for r in records if protocol.named_in(r) and r.step == trial.experiment.train.max_steps]
    return own[-1] if own else None
