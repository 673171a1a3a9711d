import json

import pytest

from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.record import Origin, append_record, make_record, read_records
from dia_diffusion.io import verify_checksum


def test_records_come_back_as_they_were(tmp_path, record):
    written = [record(3.25, step=100), record(2.5, step=200, num_samples=1000)]
    for each in written:
        append_record(tmp_path / "evaluations.jsonl", each)
    assert read_records(tmp_path / "evaluations.jsonl") == written


def test_a_line_tells_a_person_what_it_is(tmp_path, record):
    append_record(tmp_path / "e.jsonl", record(3.25))
    line = json.loads((tmp_path / "e.jsonl").read_text())
    assert line["metric"] == "FD(digits)"
    assert (line["unit"], line["batch_size"], line["seed"], line["step"]) == ("dia-lstm", 32, 0, 100)
    assert (line["images_seen"], line["distance"], line["run"]) == (3200, 3.25, "a")
    assert line["protocol"]["features_hash"] == "f" * 64
    assert "torch-fidelity" in line["versions"]
    assert line["time"].endswith("+00:00")


def test_only_inceptions_distance_is_called_fid(record):
    assert record(features="inception").metric == "FID"
    assert record(features="cifar10").metric == "FD(cifar10)"


@pytest.mark.parametrize("change", [{"num_samples": 10}, {"weights": "raw"}, {"scheduler": {}}, {"seeds": None}])
def test_another_protocol_has_another_hash(change, protocol):
    assert protocol(**change).hash() != protocol().hash()
    assert list(protocol().differences(protocol(**change))) == list(change)


def test_more_metrics_are_no_part_of_a_distances_protocol(tmp_path, protocol):
    settings = {"kid": {"kid_subset_size": 300}, "bootstrap": {"resamples": 20}}
    origin = Origin(source="a")
    plain = make_record(3.0, protocol(), origin, 1.0)
    more = make_record(
        3.0, protocol(), origin, 1.0, low=2.9, high=3.2, standard_error=0.1, metrics={"KD(digits)": 0.5},
        metric_settings=settings,
    )  # fmt: skip
    for each in (plain, more):
        append_record(tmp_path / "e.jsonl", each)
    assert read_records(tmp_path / "e.jsonl") == [plain, more]
    assert plain.protocol_hash() == more.protocol_hash()
    assert more.has(settings) and more.has({}) and plain.has({})
    assert not plain.has(settings)
    assert not more.has({"kid": {"kid_subset_size": 1000}})


def test_records_from_before_there_were_other_metrics_and_names(tmp_path, record):
    path = tmp_path / "e.jsonl"
    append_record(path, record())
    line = verify_checksum(json.loads(path.read_text()))
    new = ("low", "high", "standard_error", "metrics", "metric_settings", "model_hash")
    for name in (*new, "protocol_name", "protocol_file_hash"):
        del line[name]
    path.write_text(json.dumps(line) + "\n")
    (old,) = read_records(path)
    assert old.metrics == {} and old.low is old.model_hash is old.protocol_name is old.protocol_file_hash is None


def test_progress_is_not_protocol(record):
    assert record(1.0, step=100).protocol_hash() == record(2.0, step=200).protocol_hash()


@pytest.mark.parametrize("damage", [lambda line: line[:-20], lambda line: "{}", lambda line: "", lambda line: "[1]"])
def test_a_line_cut_short_is_named(tmp_path, damage, record):
    path = tmp_path / "evaluations.jsonl"
    append_record(path, record())
    append_record(path, record(step=200))
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + damage(second) + "\n")
    with pytest.raises(InputError, match="line 2: not a whole evaluation record") as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_protocol_changed_afterwards_is_named(tmp_path, record):
    path = tmp_path / "evaluations.jsonl"
    append_record(path, record())
    path.write_text(path.read_text().replace('"num_samples": 500', '"num_samples": 5000'))
    with pytest.raises(InputError, match=r"line 1: not a whole evaluation record, .*its checksum differs"):
        read_records(path)
    altered = json.loads(path.read_text())
    del altered["crc32"]  # as of before there was one
    path.write_text(json.dumps(altered))
    with pytest.raises(InputError, match="line 1: the protocol was changed"):
        read_records(path)


def test_no_file_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl"):
        read_records(tmp_path / "none.jsonl")
