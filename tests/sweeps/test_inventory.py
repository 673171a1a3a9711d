"""What is there of a study, beside runs that were trained by the trainer itself."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dia_diffusion.data import open_images
from dia_diffusion.errors import InputError
from dia_diffusion.evaluation.features import build_features
from dia_diffusion.evaluation.protocol import EvalProtocol, under_name
from dia_diffusion.evaluation.record import append_record
from dia_diffusion.evaluation.reference import reference_statistics, write_statistics
from dia_diffusion.io import FolderLock
from dia_diffusion.sweeps.collect import check_images, check_measuring, check_randomness, check_study, inventory
from dia_diffusion.sweeps.launcher import Job, commands, run_study
from dia_diffusion.sweeps.plan import make_plan
from dia_diffusion.sweeps.sweep import Study, read_study
from dia_diffusion.training.diffusion import build_model
from dia_diffusion.training.run_folder import RunFolder
from dia_diffusion.training.trainer import Trainer
from tests.sweeps.measured_studies import a_record
from tests.training.conftest import TINY, Recorder
from tests.training.run_files import make_version_1

STUDY = """
output: {folder}/out
recipe: {folder}/tiny.yaml
runs: [{{units: [none, dia-lstm], batch_sizes: [8], seeds: [0]}}]
steps: 4
points: 2
protocol: fd-digits
final_protocol: fd2k-dpm25
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study and its first run, whole."""
    folder = tmp_path_factory.mktemp("inventory")
    (folder / "tiny.yaml").write_text(TINY + "samples: {count: 2, steps: 2}\n")
    (folder / "mine.yaml").write_text(STUDY.format(folder=folder))
    Trainer(read_study(str(folder / "mine.yaml")).runs[0].experiment, Recorder()).run()
    return folder


@pytest.fixture
def study(trained: Path, tmp_path: Path) -> Callable[..., Study]:
    """study(("old", "new")) is the study with its text changed, beside a copy of the run."""
    shutil.copytree(trained / "out", tmp_path / "out")

    def read(*changes: tuple[str, str], **options: dict[str, object]) -> Study:
        text = (trained / "mine.yaml").read_text()
        for old, new in changes:
            text = text.replace(old, new)
        (tmp_path / "mine.yaml").write_text(text)
        return read_study(str(tmp_path / "mine.yaml"), str(tmp_path / "out"), **options)  # type: ignore[arg-type]

    return read


def test_what_is_missing(study: Callable[..., Study]) -> None:
    here = study()
    check_study(here)
    first, second = inventory(here)
    assert (first.trained, first.steps_left, first.unmeasured, first.final_unmeasured) == (True, 0, [2, 4], True)
    assert (second.trained, second.steps_left, second.unmeasured) == (False, 4, [2, 4])
    folder = str(first.run.folder)
    measure = [["fid", folder, "--every-step", "--protocol", "fd-digits"], ["fid", folder, "--protocol", "fd2k-dpm25"]]
    assert commands(here, first) == measure
    assert commands(here, second)[0] == ["train", "--config", f"{second.run.folder}/config.yaml"]
    with_reference = study(changes={"reference": "digits", "final_protocol": None})
    assert commands(with_reference, inventory(with_reference)[0]) == [[*measure[0], "--reference", "digits"]]


def test_a_run_without_checkpoints_is_whole_while_its_pipelines_are(study: Callable[..., Study]) -> None:
    here = study()
    shutil.rmtree(RunFolder(here.runs[0].folder).checkpoints)
    check_study(here)
    assert inventory(here)[0].trained
    shutil.rmtree(RunFolder(here.runs[0].folder).pipelines / "step-00000002")
    with pytest.raises(InputError, match="pipelines and no checkpoint"):
        check_study(here)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("steps: 4", "steps: 2")], "trained for 4 steps; the study's runs end after 2"),
        ([("points: 2", "points: 4")], "passed step 1 without leaving a pipeline"),
        ([("protocol: fd-digits", "protocol: fd-digits\noverrides: {ema.decay: 0.9}")], "ema.decay: 0.9999 -> 0.9"),
    ],
)
def test_a_study_that_disagrees_with_its_runs(
    changes: list[tuple[str, str]], said: str, study: Callable[..., Study]
) -> None:
    with pytest.raises(InputError) as refused:
        check_study(study(*changes))
    assert said in str(refused.value) and "none-b8-s0" in str(refused.value)


def test_nothing_is_trained_beside_a_run_of_randomness_1(study: Callable[..., Study]) -> None:
    here = study(changes={"final_protocol": None})
    check_randomness(here)
    first, protocol = here.runs[0], EvalProtocol.read("fd-digits")
    for step in first.steps:
        record = replace(a_record(first, step, 1.5), randomness=2)
        append_record(RunFolder(first.folder).evaluations, under_name(record, protocol))
    make_version_1(here.folder)
    check_study(here)  # it can be drawn
    check_randomness(replace(here, runs=here.runs[:1]))  # and measured
    with pytest.raises(InputError, match=r"none-b8-s0 was trained with randomness 1"):
        check_randomness(here)
    # Of a run whose weights are gone, the newest record says it.
    shutil.rmtree(RunFolder(first.folder).checkpoints)
    shutil.rmtree(RunFolder(first.folder).pipelines)
    check_randomness(here)
    append_record(RunFolder(first.folder).evaluations, under_name(a_record(first, 4, 1.5), protocol))
    with pytest.raises(InputError, match=r"none-b8-s0 was trained with randomness 1"):
        check_randomness(here)


def test_other_images_are_refused(study: Callable[..., Study], tmp_path: Path) -> None:
    np.save(tmp_path / "others.npy", np.zeros((40, 8, 8), np.uint8))
    others = study(overrides={"data.source": str(tmp_path / "others.npy")})
    check_study(others)
    with pytest.raises(InputError, match=r"none-b8-s0 was trained on other images than data.source .*others.npy has"):
        check_images(others)
    check_images(study())


def test_another_reference_is_refused_before_anything_is_trained(study: Callable[..., Study], tmp_path: Path) -> None:
    here, protocol = study(changes={"final_protocol": None}), EvalProtocol.read("fd-digits")
    run, file = here.runs[0], RunFolder(here.runs[0].folder).evaluations
    held_out, extractor = open_images("digits", size=8, channels=1, split="test"), build_features("digits")
    hashes = {
        "features_hash": extractor.weights_hash,
        "reference_hash": reference_statistics(held_out, extractor).hash,
        "reference_count": len(held_out),
    }
    for step in run.steps:
        append_record(file, under_name(a_record(run, step, 1.5, **hashes), protocol))
    check_images(here)

    for part in ("train", "test"):
        (tmp_path / "mine" / part).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), index).save(tmp_path / "mine" / part / f"{index}.png")
    for other, said in (
        ("mine", "differ from those that are there, reference mine against digits"),
        ("none.zip", "is no file"),
    ):
        again = study(changes={"final_protocol": None, "reference": str(tmp_path / other)})
        for runs in (again.runs, again.runs[:1]):  # of which the first is complete
            with pytest.raises(InputError, match=said):
                check_images(replace(again, runs=runs))

    file.unlink()
    append_record(file, under_name(a_record(run, 2, 1.5, **hashes | {"features_hash": "f"}), protocol))
    with pytest.raises(InputError, match=r"features digits: its records .* features_hash [0-9a-f]+ against f; go on"):
        check_images(here)


def test_one_reference_for_all_runs_in_the_protocols_features(study: Callable[..., Study], tmp_path: Path) -> None:
    """The first run says that it was trained on the digits; the second would be, from a file of them."""
    digits = open_images("digits", size=8, channels=1)
    np.save(tmp_path / "copy.npy", digits.images[:, 0])
    (tmp_path / "open.yaml").write_text("{features: digits, num_samples: 70, sampler: ddim, steps: 2}")
    moved, keys = {"data.source": str(tmp_path / "copy.npy")}, {"protocol": str(tmp_path / "open.yaml")}
    here = study(overrides=moved, changes={**keys, "final_protocol": None})
    with pytest.raises(InputError, match=r"none-b8-s0 against digits and dia-lstm-b8-s0 against .*copy.npy, which dif"):
        check_measuring(
            here, here.runs, lambda source, size, channels, split: open_images(source, size=size, channels=1)
        )

    write_statistics(
        tmp_path / "of.safetensors", reference_statistics(digits, extractor := build_features("digits")), extractor
    )
    keys["reference"] = str(tmp_path / "of.safetensors")
    check_images(study(changes={**keys, "final_protocol": None}))
    with pytest.raises(InputError, match="statistics in features digits; protocol fd2k-dpm25 measures in cifar10"):
        check_images(study(changes=keys))


def test_a_run_that_is_on_record_needs_no_pipelines(study: Callable[..., Study]) -> None:
    """As where they were removed to save disk."""
    here = study(changes={"final_protocol": None})
    run, folder = here.runs[0], RunFolder(here.runs[0].folder)
    for step in run.steps:
        append_record(folder.evaluations, under_name(a_record(run, step, 1.5), EvalProtocol.read("fd-digits")))
    shutil.rmtree(folder.pipelines / "step-00000002")
    check_study(here)
    shutil.rmtree(folder.checkpoints)
    shutil.rmtree(folder.pipelines)
    check_study(here)
    assert inventory(here)[0].complete and not inventory(here)[1].trained
    assert not inventory(study())[0].trained, "the last one is still to be measured by the final protocol"


def test_what_a_run_was_measured_by_is_compared_when_it_ends(
    study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = study(changes={"final_protocol": None})

    def run_jobs(jobs: list[Job], side_by_side: int, watch: object, check: Callable[[Job], None]) -> None:
        for reference_hash, job in zip("ab", jobs, strict=True):
            run = next(run for run in here.runs if run.folder == job.folder)
            record = a_record(run, 4, 1.5, reference_hash=reference_hash)
            append_record(RunFolder(run.folder).evaluations, under_name(record, EvalProtocol.read("fd-digits")))
            check(job)

    monkeypatch.setattr("dia_diffusion.sweeps.launcher.run_jobs", run_jobs)
    with pytest.raises(InputError, match="reference_hash a against b"):
        run_study(here, 1, lambda progress: None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("steps: 2, classes: [3]", "fd-digits has class 3; the model has 0 classes"),
        ("steps: 2, guidance_scale: 2", "fd-digits has guidance, which needs data.label_dropout"),
        ("steps: 2", "both called fd-digits and differ"),
    ],
)
def test_protocols_that_can_not_be_used(settings: str, said: str, study: Callable[..., Study], tmp_path: Path) -> None:
    file = tmp_path / "fd-digits.yaml"
    file.write_text(f"{{features: digits, num_samples: 70, sampler: ddim, {settings}}}")
    with pytest.raises(InputError, match=said):
        check_study(study(changes={"final_protocol": str(file)}))


def test_records_that_can_not_be_gone_on_with(study: Callable[..., Study]) -> None:
    here = study()
    file = RunFolder(here.runs[0].folder).evaluations
    file.write_text('{"distance": 1.0')
    with pytest.raises(InputError, match=r"evaluations.jsonl, line 1: not a whole evaluation record"):
        check_study(here)


def test_a_run_in_use_is_refused_before_anything_is_started(study: Callable[..., Study]) -> None:
    here = study()
    with FolderLock(here.runs[1].folder), pytest.raises(InputError, match=r"dia-lstm-b8-s0 is in use by process \d+"):
        run_study(here, 1, lambda progress: None)
    assert not list(here.folder.glob("*/*.log"))


def test_the_plan_adds_up(study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs of 4 steps with 2 points one is trained; all times are given."""
    for name, seconds in (("start", 5.0), ("step", 3.0), ("pass", 0.01), ("features", 0.1)):
        monkeypatch.setattr(f"dia_diffusion.sweeps.plan.seconds_of_{name}", lambda *_, seconds=seconds: seconds)
    here = study()
    plan = make_plan(here, 2)
    none, unit = plan.groups
    grids = 2 * 2 * 2 * 0.01  # points, images, sampler steps
    point, final = 596 * (25 * 0.01 + 0.1), 2000 * (25 * 0.01 + 0.1)
    assert (none.trained, none.steps_left, none.training_seconds_left, none.evaluations_left) == (1, 0, 0, 3)
    assert (unit.trained, unit.steps_left, unit.evaluations_left) == (0, 4, 3)
    assert unit.training_seconds == unit.training_seconds_left == pytest.approx(4 * 3 + grids)
    measuring = 2 * point + final
    assert none.evaluation_seconds_left == pytest.approx(measuring)
    assert plan.seconds_left == pytest.approx(12 + grids + 2 * measuring + (2 + 3) * 5)
    assert plan.wall_seconds_left == pytest.approx(12 + grids + measuring + 3 * 5), (
        "the run with the training is longer"
    )
    files = [
        path for kind in ("pipelines", "checkpoints") for path in (here.runs[0].folder / kind).rglob("*.safetensors")
    ]
    tensors = sum(tensor.nbytes for path in files for name, tensor in load_file(path).items() if "/step" not in name)
    with_unit = sum(p.numel() for p in build_model(here.runs[1].experiment.model).parameters()) * 4 * (4 + 2)
    assert plan.bytes == tensors + with_unit + 2 * 2000 * 256 * 4, "and the features of two measurements at once"
