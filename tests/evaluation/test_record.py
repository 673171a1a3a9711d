import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.curves import draw_curves
from dia_diffusion.evaluation.record import (
    Origin,
    ResolvedProtocol,
    added_field,
    append_record,
    make_record,
    read_records,
)
from dia_diffusion.io import verify_checksum, with_checksum

RESULTS = sorted(Path(__file__).parents[2].glob("docs/results/**/*.jsonl"))


def test_records_come_back_as_they_were(tmp_path, record):
    guidance = {"guidance_interval": [0.3, 5.0], "guide": {"weights_hash": "a", "model_hash": "b"}}
    written = [record(3.25, step=100), record(2.5, step=200, num_samples=1000), record(**guidance)]
    for each in written:
        append_record(tmp_path / "evaluations.jsonl", each)
    assert read_records(tmp_path / "evaluations.jsonl") == written
    line = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[0])
    assert [record(features=name).metric for name in ("inception", "cifar10")] == ["FID", "FD(cifar10)"]
    assert (line["metric"], line["distance"], line["run"], line["record_version"]) == ("FD(digits)", 3.25, "a", 2)
    assert (line["unit"], line["batch_size"], line["seed"], line["step"]) == ("dia-lstm", 32, 0, 100)
    assert line["protocol"]["features_hash"] == "f" * 64 and line["images_seen"] == 3200
    assert "torch-fidelity" in line["versions"] and line["time"].endswith("+00:00")
    assert not {"guidance_interval", "guide"} & line["protocol"].keys()


@pytest.mark.parametrize(
    "change", [{"num_samples": 10}, {"weights": "raw"}, {"scheduler": {}}, {"seeds": None}, {"guide": {}}]
)
def test_another_protocol_has_another_hash(change, protocol):
    assert protocol(**change).hash() != protocol().hash()
    assert list(protocol().differences(protocol(**change))) == list(change)


@dataclass(frozen=True, kw_only=True)
class Later(ResolvedProtocol):
    crop: str | None = added_field(None)


def test_an_added_field_is_hashed_unless_it_has_its_default(protocol):
    fields = vars(protocol())
    assert Later(**fields).hash() == protocol().hash() != Later(**fields, crop="center").hash()
    assert Later(**fields).differences(Later(**fields, crop="center")) == {"crop": (None, "center")}
    before = {name: value for name, value in asdict(protocol()).items() if name not in ("guidance_interval", "guide")}
    assert protocol().to_dict() == before
    assert protocol().hash() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()


def written(path, record, change):
    """Writes the record's line after `change(line)`, with a new checksum; returns the path."""
    append_record(path, record)
    line = verify_checksum(json.loads(path.read_text()))
    change(line)
    path.write_text(json.dumps(with_checksum(line)) + "\n")
    return path


def test_a_record_of_version_1_is_the_same_as_one_of_version_2(tmp_path, record):
    path = written(tmp_path / "e.jsonl", record(2.0, step=100), lambda line: line.pop("record_version"))
    append_record(path, record(1.0, step=200))
    first, second = read_records(path)
    assert first.protocol == second.protocol and first == replace(record(2.0, step=100), time=first.time)
    assert len(draw_curves([("a", [first, second])], tmp_path / "a.png")) == 2


def test_a_newer_version_is_named(tmp_path, record):
    path = written(tmp_path / "e.jsonl", record(), lambda line: line.update(record_version=3, extra="x"))
    with pytest.raises(InputError, match="line 1: `record_version` must be 2 or less, got 3"):
        read_records(path)


assert len(RESULTS) >= 5


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_published_records_are_read_and_drawn(file, tmp_path):
    records = read_records(file)
    for each, line in zip(records, file.read_text().splitlines(), strict=True):
        assert each.protocol_hash() == json.loads(line)["protocol_hash"]
        append_record(tmp_path / "again.jsonl", each)
    assert read_records(tmp_path / "again.jsonl") == records
    if all(each.images_seen for each in records):
        drawn = draw_curves([("a", records)], tmp_path / "a.png")
        assert {point["distance"] for point in drawn} <= {each.distance for each in records}


def test_extra_metrics_do_not_change_the_protocol_hash(tmp_path, protocol):
    settings = {"kid": {"kid_subset_size": 300}, "bootstrap": {"resamples": 20}}
    plain = make_record(3.0, protocol(), Origin(source="a"), 1.0)
    metrics = {"metrics": {"KD(digits)": 0.5}, "metric_settings": settings}
    more = make_record(3.0, protocol(), Origin(source="a"), 1.0, low=2.9, high=3.2, standard_error=0.1, **metrics)
    for each in (plain, more):
        append_record(tmp_path / "e.jsonl", each)
    assert read_records(tmp_path / "e.jsonl") == [plain, more]
    assert plain.protocol_hash() == more.protocol_hash()
    assert more.has(settings) and more.has({}) and plain.has({})
    assert not plain.has(settings)
    assert not more.has({"kid": {"kid_subset_size": 1000}})


def test_records_without_the_later_fields_are_read(tmp_path, record):
    new = ("low", "high", "standard_error", "metrics", "metric_settings", "model_hash", "record_version")
    without = (*new, "protocol_name", "protocol_file_hash")
    (old,) = read_records(written(tmp_path / "e.jsonl", record(), lambda line: [line.pop(name) for name in without]))
    assert old.metrics == {} and old.low is old.model_hash is old.protocol_name is old.protocol_file_hash is None


def test_a_protocol_changed_afterwards_is_named(tmp_path, record):
    path = tmp_path / "evaluations.jsonl"
    with pytest.raises(InputError, match=r"evaluations\.jsonl"):
        read_records(path)
    append_record(path, record())
    path.write_text(path.read_text().replace('"num_samples": 500', '"num_samples": 5000'))
    with pytest.raises(InputError, match=r"line 1: not a complete evaluation record; .*its checksum differs"):
        read_records(path)
    altered = json.loads(path.read_text())
    del altered["crc32"]  # as in records from before checksums
    path.write_text(json.dumps(altered))
    with pytest.raises(InputError, match="line 1: the protocol was changed"):
        read_records(path)
