"""The distance that real images have: recorded by `fid`, in a file of its own."""

from pathlib import Path

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import EvaluationRecord, read_records

COMPARED = ("features", "features_hash", "reference_hash", "num_samples")
"""What must agree between real images and samples."""


def recorded_floor(file: Path, record: EvaluationRecord) -> float:
    """The distance of a file's newest record of images that were measured as a record's samples were.

    Raises:
        InputError: there is none, naming what differs.
    """
    told = ""
    for candidate in reversed(read_records(file)):
        differences = candidate.protocol.differences(record.protocol)
        different = [name for name in COMPARED if name in differences]
        if candidate.protocol.seeds is None and not different:
            return candidate.distance
        told = told or ", ".join(
            f"{name} {differences[name][0]} there, {differences[name][1]} here" for name in different
        )
    raise InputError(f"{file} has no images that were measured as the runs were: {told or 'only samples'}")
